"""Trace, patch and chain on the built-in model, and the command as a user runs it."""

from __future__ import annotations

import fnmatch
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import llama3_raw
from llama3_raw import REFERENCE, Model, Trace, UserError, chain, forward, load_trace, patch, trace
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.ops import Tap
from llama3_raw.tracing.__main__ import Statistics, main
from llama3_raw.tracing.partial import names_of_pass
from llama3_raw.tracing.record import Origin, check_trace
from llama3_raw.tracing.taps import dry_run
from tests.paths import TINY
from tests.references import cast, seen_by_hand

LAYERS = range(4)


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode("Once upon a time, there was a little", bos=True)


@pytest.fixture(scope="module")
def whole(tiny: Model, ids: list[int]) -> Trace:
    """A trace with every tensor of a pass by the exact operations."""
    return trace(tiny, ids, ops=REFERENCE)


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are bit-identical, infinities included."""
    return first.dtype == second.dtype and torch.equal(first, second)


def test_a_trace_has_every_tensor_in_the_order_of_the_pass(tiny: Model, ids: list[int], whole: Trace) -> None:
    by_hand = seen_by_hand(tiny, ids)
    assert list(whole) == list(by_hand)
    assert len(whole) == 3 + 17 * len(LAYERS)
    for name, tensor in by_hand.items():
        assert same(whole[name], tensor), name


@pytest.mark.parametrize(
    ("pattern", "shell"),
    [
        ("layers.*.residual", "layers.[0-9].residual"),  # not layers.0.attention.residual: * does not cross a dot ...
        ("*.residual", "*.residual"),  # ... unless it is at an end
        ("layers.0.*", "layers.0.*"),
        ("*", "*"),
        ("*norm*", "*norm*"),
        ("layers.[12].attention.?", "layers.[12].attention.[qkv]"),
        ("layers.*.attention.q*", "layers.[0-9].attention.q*"),
        ("layers.[!0].residual", "layers.[!0].residual"),
        ("layers.**.out", "layers.[0-9].*.out"),
        ("logits", "logits"),
    ],
)
def test_patterns_match_as_in_a_shell(tiny: Model, ids: list[int], whole: Trace, pattern: str, shell: str) -> None:
    expected = fnmatch.filter(list(whole), shell)
    assert expected
    assert list(trace(tiny, ids, pattern)) == expected


@pytest.mark.parametrize("pattern", ["", "[", "[[]", "[a&&b]", "[\\\\]", "layers.[9-0].residual", "layers.[]x].norm"])
def test_patterns_that_match_nothing_are_refused(tiny: Model, ids: list[int], pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"nearest|the \[ has no \]"):
            trace(tiny, ids, pattern)


def test_a_trace_as_the_tap_of_forward_keeps_the_same(tiny: Model, ids: list[int], whole: Trace) -> None:
    kept = Trace("layers.*.residual", "norm")
    with torch.no_grad():
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=kept)
    assert list(kept) == [*(f"layers.{i}.residual" for i in LAYERS), "norm"]
    assert all(same(kept[name], whole[name]) for name in kept)


def test_kept_tensors_are_copies(tiny: Model, ids: list[int], whole: Trace) -> None:
    kept = Trace()
    with torch.no_grad():
        # each tensor is zeroed in place right after it was kept; keys and values are also views of a cache
        forward(
            tiny.weights,
            tiny.params,
            torch.tensor(ids),
            tap=chain(kept, lambda name, x: x.clone() if x.zero_() is None else x),
        )
    assert same(kept["tok_embeddings"], whole["tok_embeddings"])
    assert kept["tok_embeddings"].abs().sum() > 0


def test_the_device_and_dtype_of_the_copies(tiny: Model, ids: list[int], whole: Trace) -> None:
    kept = trace(tiny, ids, "layers.1.*", "logits", device="meta", dtype=torch.float16)
    assert {(tensor.device.type, tensor.dtype) for tensor in kept.values()} == {("meta", torch.float16)}
    assert kept.nbytes == sum(2 * whole[name].numel() for name in kept)


def test_the_last_position_of_a_tensor_that_a_custom_attend_taps(tiny: Model, ids: list[int]) -> None:
    """Its name is not in the table, so its shape is assumed to be [..., T, dim], like that of most tensors."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
        tap("own", q.flatten(-2))
        return REFERENCE.attend(q, keys, values, start, tap)

    last = trace(tiny, ids, last_position=True, ops=REFERENCE._replace(attend=attend))
    assert last["layers.0.attention.own"].shape == (tiny.params.dim,)


def test_the_last_position_only(tiny: Model, ids: list[int], whole: Trace) -> None:
    last = trace(tiny, ids, last_position=True, ops=REFERENCE)
    shapes = {name: list(tensor.shape) for name, tensor in last.items()}
    assert shapes["layers.0.attention.q"] == [6, 32]
    assert shapes["layers.0.attention.k_rope"] == [2, 32]
    assert shapes["layers.0.attention.scores"] == [6, len(ids)]
    assert shapes["layers.0.residual"] == [192]
    assert same(last["layers.2.attention.heads"], whole["layers.2.attention.heads"][-1])
    assert same(last["layers.2.attention.probs"], whole["layers.2.attention.probs"][:, -1])
    assert same(last["logits"], whole["logits"][-1])
    kept = Trace("logits", last_position=True)  # of a pass that computes the logits of one position only
    forward(tiny.weights, tiny.params, torch.tensor(ids), logits_at=-1, tap=kept)
    assert same(kept["logits"].detach(), whole["logits"][-1])


def test_a_second_pass_replaces_the_first(tiny: Model, ids: list[int]) -> None:
    kept = Trace()
    for length, ops in ((len(ids), REFERENCE), (3, fast_ops())):
        forward(tiny.weights, tiny.params, torch.tensor(ids[:length]), ops=ops, tap=kept)
    assert "layers.0.attention.scores" not in kept
    assert {tensor.shape[0] for tensor in kept.values()} == {3}


def test_invalid_prompts_are_refused(tiny: Model) -> None:
    for wrong in ("Once", [None], [1.5], [], torch.zeros(1, 2, 3, dtype=torch.long), 3, [[1], []], [[1], "Once"]):
        with pytest.raises(UserError, match=r"ids should be|empty"):
            trace(tiny, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the prompt needs 513 positions, but the context holds 512; shorten"):
        trace(tiny, [1] * 513)


def test_generate_leaves_the_trace_of_its_last_pass(tiny: Model, ids: list[int]) -> None:
    kept = Trace("layers.3.residual", "logits")
    tokens = list(llama3_raw.generate(tiny, ids, max_new_tokens=3, ops=REFERENCE, tap=kept))
    assert kept["layers.3.residual"].shape == (1, 192)
    assert int(kept["logits"].argmax()) == tokens[-1]


def test_patching_a_tensor_with_itself_changes_no_bit(tiny: Model, ids: list[int], whole: Trace) -> None:
    patched = trace(tiny, ids, tap=patch({"*": lambda x: x.clone()}), ops=REFERENCE)
    assert all(same(patched[name], whole[name]) for name in whole)


def test_a_patch_changes_what_follows_and_only_that(tiny: Model, ids: list[int], whole: Trace) -> None:
    def without_head_2(heads: Tensor) -> Tensor:  # [T, n_heads, head_dim]
        heads = heads.clone()
        heads[..., 2, :] = 0
        return heads

    patched = trace(tiny, ids, tap=patch({"layers.1.attention.heads": without_head_2}), ops=REFERENCE)
    names = list(whole)
    at = names.index("layers.1.attention.heads")
    assert all(same(patched[name], whole[name]) for name in names[:at])
    assert patched["layers.1.attention.heads"][:, 2].abs().max() == 0
    assert not same(patched["layers.1.attention.out"], whole["layers.1.attention.out"])
    # as if wo had no columns for that head
    wo = tiny.weights.layers[1].wo.clone()
    wo[:, 64:96] = 0
    layers = (tiny.weights.layers[0], tiny.weights.layers[1]._replace(wo=wo), *tiny.weights.layers[2:])
    ablated = trace(tiny._replace(weights=tiny.weights._replace(layers=layers)), ids, "logits", ops=REFERENCE)
    assert torch.allclose(patched["logits"], ablated["logits"], atol=0.02)


def test_activations_of_one_prompt_patched_into_another(tiny: Model, ids: list[int], whole: Trace) -> None:
    other = [*ids[:-1], ids[1]]
    residual = whole["layers.3.residual"]
    for replacement in (residual, lambda x: residual, lambda x, name: residual if name == "layers.3.residual" else x):
        patched = trace(tiny, other, "logits", tap=patch({"layers.3.residual": replacement}), ops=REFERENCE)
        assert same(patched["logits"], whole["logits"])


def test_what_a_replacement_is_called_with(tiny: Model, ids: list[int]) -> None:
    """The name is for a function with a second parameter without a default, or one that is called name."""
    names = []

    def see(tensor: Tensor, name: str = "none") -> Tensor:
        names.append(name)
        return tensor

    functions: dict[str, Any] = {
        "layers.*.ffn_norm": see,
        "layers.0.residual": lambda x, where: (names.append(where), x)[1],
        "layers.1.residual": lambda x, head=2: (names.append(head), x)[1],
        "layers.2.residual": torch.clone,
        "norm": lambda x, *, name: (names.append(name), x)[1],
        "layers.3.residual": torch.nn.functional.silu,  # with a parameter inplace
    }
    kept = trace(tiny, ids, "layers.3.residual", "norm", tap=patch(functions))
    assert names[:4] == ["layers.0.ffn_norm", "layers.0.residual", "layers.1.ffn_norm", 2]
    assert names[4:] == ["layers.2.ffn_norm", "layers.3.ffn_norm", "norm"]
    assert float(kept["layers.3.residual"].min()) > -0.3  # the least value of silu
    with pytest.raises(UserError, match="the patch of norm should be a tensor or a function, is a int"):
        patch({"norm": 0})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="replacements should be a dict of what replaces each tensor by name, is a lis"):
        patch(["norm"])  # type: ignore[arg-type]


def test_several_patches_of_one_name_run_in_order(tiny: Model, ids: list[int]) -> None:
    taps = patch({"layers.*.ffn_norm": lambda x: x + 1, "layers.0.ffn_norm": lambda x: x * 0})
    kept = trace(tiny, ids, "layers.[01].ffn_norm", tap=taps)
    assert kept["layers.0.ffn_norm"].abs().max() == 0
    assert kept["layers.1.ffn_norm"].abs().max() > 0


@pytest.mark.parametrize("result", [None, torch.zeros(3), torch.zeros(10, 192)])
def test_a_patch_that_returns_something_else_is_refused(tiny: Model, ids: list[int], result: Any) -> None:
    with pytest.raises(
        UserError, match=r"the patch of layers\.0\.ffn_norm should return a tensor \[10, 192\] in bfloat16"
    ):
        trace(tiny, ids, "norm", tap=patch({"layers.0.ffn_norm": lambda x: result}))


def test_a_wrong_name_gets_the_nearest(tiny: Model, ids: list[int], whole: Trace) -> None:
    with pytest.raises(
        UserError, match=r"'layers.1.atention.q'.*layers 0 to 3; the nearest are layers\.1\.attention\.q,"
    ):
        trace(tiny, ids, "norm", "layers.1.atention.q")
    with pytest.raises(UserError, match=r"the nearest are layers\.\*\.residual,"):
        trace(tiny, ids, "layers.*.residul")
    with pytest.raises(UserError, match="nearest"):  # forward does not check before, only at the end of the pass
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=Trace("layers.4.residual"))
    with pytest.raises(UserError, match="nearest"):
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=patch({"layers.4.residual": lambda x: x}))
    with pytest.raises(UserError, match=r"the \[ has no \] after it"):
        trace(tiny, ids, "layers.[0-2.residual")
    for wrong in (["norm"], "norm", torch.int8):
        with pytest.raises(UserError, match="should be"):
            trace(tiny, ids, wrong) if isinstance(wrong, list) else Trace("norm", dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"the nearest are layers\.1\.residual"):
        whole["layers.1.residua"]


@pytest.mark.usefixtures("_no_gpu")
def test_dtypes_and_devices_by_name(tiny: Model, ids: list[int]) -> None:
    assert trace(tiny, ids, "norm", dtype="float32") == trace(tiny, ids, "norm", dtype=torch.float32)
    kept = Trace("norm", dtype="float64", device="cpu")
    forward(tiny.weights, tiny.params, torch.tensor(ids), tap=kept)
    assert kept["norm"].dtype == torch.float64
    for device, message in (("cuda", "torch sees 0 CUDA GPUs here"), ("foo", "there is no such device")):
        for use in (trace, lambda _model, _ids, name, device: Trace(name, device=device)):
            with pytest.raises(UserError, match=f"^device {device}: {message}"):
                use(tiny, ids, "norm", device=device)
    with pytest.raises(UserError, match="dtype fp32: should be one of bfloat16, "):
        trace(tiny, ids, "norm", dtype="fp32")


def test_scores_of_the_fast_attention_are_refused(tiny: Model, ids: list[int]) -> None:
    with pytest.raises(UserError, match=r"leave ops out, or give ops=llama3_raw\.REFERENCE"):
        trace(tiny, ids, "layers.*.attention.scores", ops=fast_ops())
    with pytest.raises(UserError, match=r"llama3_raw\.REFERENCE"):
        forward(tiny.weights, tiny.params, torch.tensor(ids), ops=fast_ops(), tap=Trace("*.probs"))
    assert "layers.0.attention.heads" in trace(tiny, ids, "layers.0.*", ops=fast_ops())


def test_a_custom_attention_may_read_the_values_of_its_input(tiny: Model, ids: list[int], whole: Trace) -> None:
    """It is not called in the dry run, whose tensors have no values."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
        assert float(q.abs().max()) > 0
        return REFERENCE.attend(q, keys, values, start, tap)

    kept = trace(tiny, ids, "layers.*.attention.scores", "logits", ops=REFERENCE._replace(attend=attend))
    assert same(kept["logits"], whole["logits"])


def test_a_dry_run_has_the_names_shapes_and_dtypes_of_the_pass(tiny: Model, ids: list[int], whole: Trace) -> None:
    planned = Trace(device="meta")
    dry_run(tiny.params, torch.bfloat16, [len(ids)], names_of_pass(tiny.params, REFERENCE), planned)
    assert [(name, x.shape, x.dtype) for name, x in planned.items()] == [
        (name, x.shape, x.dtype) for name, x in whole.items()
    ]


def test_a_trace_that_does_not_fit_is_refused_before_the_pass(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = trace(tiny, [1] * 512, device="meta")
    scores = kept["layers.0.attention.scores"].nbytes  # the largest tensor, of which a pass makes several copies
    assert kept.nbytes > 4 * 2 * scores  # scores and probs of four layers, and more
    free = {"cpu": kept.nbytes, "meta": 0}
    monkeypatch.setattr("llama3_raw.tracing.record.free_memory", lambda device: free[device.type])
    check = functools.partial(check_trace, tiny.params, torch.bfloat16, 512)
    with pytest.raises(UserError, match=r"a trace of 0\.04 GB, and 0\.\d\d GB in all on cpu, do not fit: 0\.04 GB are"):
        check()
    free["cpu"] = 20 * scores  # enough for the pass
    check("norm")
    with pytest.raises(UserError, match="GB are free on meta"):
        check(device="meta")
    free["meta"] = kept.nbytes
    check(device="meta")
    free["cpu"] = 5 * scores
    with pytest.raises(UserError, match="are free on cpu"):
        check("layers.3.attention.scores", last_position=True)
    check("norm")  # computes no scores
    free["cpu"] = 5 * 2 * scores  # in fp32 they are twice as large, but there is no copy in another dtype
    check_trace(tiny.params, torch.float32, 512, "norm", ops=REFERENCE)
    free["cpu"] = 2 * 2 * scores
    with pytest.raises(UserError, match="are free on cpu"):
        check_trace(tiny.params, torch.float32, 512, "norm", ops=REFERENCE)


def test_a_saved_trace_is_loaded_unchanged(tiny: Model, ids: list[int], whole: Trace, tmp_path: Path) -> None:
    whole.save(tmp_path / "t.safetensors")
    loaded = load_trace(tmp_path / "t.safetensors")
    assert list(loaded) == list(whole)
    assert all(same(loaded[name], whole[name]) for name in whole)
    assert loaded.origin == whole.origin == Origin.of(tiny, ids)
    loaded.origin.check(tiny, ids, "t")
    loaded.origin.check(tiny._replace(weights=cast(tiny.weights, torch.float32)), ids, "t")  # the same in another dtype
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_an_existing_file_stays_until_the_trace_is_complete(
    whole: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "t.safetensors", tmp_path / "link"
    file.write_bytes(b"before")
    file.chmod(0o640)
    link.symlink_to(file)

    def disk_full(tensors: dict[str, Tensor], part: Path, metadata: dict[str, str]) -> None:
        Path(part).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("llama3_raw.tracing.record.save_file", disk_full)
        with pytest.raises(
            UserError, match=r"link: cannot be written \(No space left on device\); choose another place"
        ):
            whole.save(link)
    assert file.read_bytes() == b"before"
    whole.save(link)  # through the link, with the permissions of the file
    assert link.is_symlink()
    assert len(load_trace(file)) == len(whole)
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "t.safetensors"]
    with pytest.raises(UserError, match="is not a file"):
        whole.save("/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.slow
def test_a_trace_of_another_model_or_prompt_is_refused(tiny: Model, ids: list[int], stories15m: Model) -> None:
    origin = Origin.of(tiny, ids)
    other_norm = tiny.weights._replace(norm=tiny.weights.norm * 1.01)
    with pytest.raises(UserError, match="t: is of another model, with dim 192, not 288"):
        origin.check(stories15m, ids, "t")
    with pytest.raises(UserError, match="t: is of a model of the same shape with other weights"):
        origin.check(tiny._replace(weights=other_norm), ids, "t")
    with pytest.raises(UserError, match="t: is of another prompt, with another token 3"):
        origin.check(tiny, [*ids[:3], 0, *ids[4:]], "t")
    with pytest.raises(UserError, match="t: is of another prompt, with 10 tokens, not 9"):
        origin.check(tiny, ids[:-1], "t")


def test_files_that_are_not_traces_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    for content in (b"", b"not safetensors at all", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.safetensors"):
            load_trace(file)
    for about in ("[]", "{", '{"names": ["a", "b"]}', '{"origin": {"params": 3}}'):
        save_file({"a": torch.zeros(1)}, file, metadata={"llama3_raw": about})
        with pytest.raises(UserError, match=r"t\.safetensors"):
            load_trace(file)
    save_file({"norm": torch.zeros(1)}, file)  # saved by a port
    assert load_trace(file).origin is None
    assert list(load_trace(file)) == ["norm"]


def test_statistics_cover_the_finite_values() -> None:
    figures = Statistics.of(torch.tensor([[1.0, -torch.inf], [3.0, 5.0]]))
    assert figures[:2] == ((2, 2), torch.float32)
    assert figures[2:] == pytest.approx((3.0, (8 / 3) ** 0.5, 1.0, 5.0, 0.25))
    assert Statistics.of(torch.full((2,), torch.nan)).non_finite == 1


def test_the_command_prints_and_writes(
    tiny: Model, ids: list[int], whole: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.safetensors"
    prompt = "Once upon a time, there was a little"
    wanted = ["--names", "layers.0.*", "--names", "logits", "-o", str(file), "--stats", "--reference"]
    assert main(["--weights", str(TINY), prompt, *wanted]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 1 + 18
    scores = next(line for line in lines if line.startswith("layers.0.attention.scores")).split()
    assert scores[1:5] == ["[6,", "10,", "10]", "bfloat16"]
    finite = whole["layers.0.attention.scores"][whole["layers.0.attention.scores"].isfinite()].float()
    assert [float(word) for word in scores[5:9]] == pytest.approx(
        [float(finite.mean()), float(finite.std(correction=0)), float(finite.min()), float(finite.max())], rel=1e-3
    )
    assert scores[9] == "45.0%"  # 45 of 100 are masked
    assert f"{file}: 18 tensors" in err
    kept = load_trace(file)
    assert all(same(kept[name], whole[name]) for name in kept)
    as_ids = " ".join(map(str, ids))
    one = ["--weights", str(TINY), "--ids", as_ids, "--names", "logits", "--last-position", "-o", str(file)]
    assert main([*one, "--reference"]) == 0
    assert capsys.readouterr().out == ""
    assert same(load_trace(file)["logits"], whole["logits"][-1])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give a prompt"),
        (["Hi", "--names", "layers.7.residual"], "layers 0 to 3; the nearest are"),
        (["Hi", "-o", "/nowhere/t.safetensors"], "there is no folder /nowhere"),
        (["Hi", "-o", "/"], "-o /: is not a file"),
        (["Hi", "-o", "/dev/null"], "-o /dev/null: is not a file"),
        (["--ids", "1 99999"], "token id 99999"),
        (["Hi " * 2000], "the model's context is 512"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(TINY), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err.splitlines()[-1]
    assert len(err.splitlines()) == 1

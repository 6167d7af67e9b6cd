"""`compare` finds planted bugs at the right tensor, and nothing if there are none."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import llama3_raw
from llama3_raw import LayerWeights, Model, Trace, UserError
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.compare import compare, compare_gradients
from llama3_raw.compare.__main__ import main
from llama3_raw.compare.difference import Difference, Logits, difference
from llama3_raw.compare.references import trace_hf, trace_meta
from llama3_raw.model import REFERENCE, token_positions
from llama3_raw.ops import Ops, Tap
from llama3_raw.tracing.names import named_tensors
from tests.compare.conftest import PROMPT
from tests.paths import TINY
from tests.references import cast, random_weights

OWN_WEIGHTS = ["--weights", str(TINY)]
IN_FP32 = [*OWN_WEIGHTS, "--dtype", "float32"]
DTYPES = [torch.float32, torch.bfloat16]

trace = partial(llama3_raw.trace, ops=REFERENCE)  # as compare does


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    return model._replace(weights=cast(model.weights, dtype))


def with_layer(model: Model, number: int, change: Callable[[LayerWeights], LayerWeights]) -> Model:
    """Return the model with the weights of one layer changed."""
    layers = list(model.weights.layers)
    layers[number] = change(layers[number])
    return model._replace(weights=model.weights._replace(layers=tuple(layers)))


def half_split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as in Hugging Face's code, which needs the rows of wq and wk in another order."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def feed_forward_with_silu_of_up(x: Tensor, weights: LayerWeights, ops: Ops, tap: Tap) -> Tensor:
    gate, up = tap("gate", ops.linear(x, weights.w1)), tap("up", ops.linear(x, weights.w3))
    hidden = tap("hidden", gate * F.silu(up))
    return tap("out", ops.linear(hidden, weights.w2))


def attend_with_bugs(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    tap: Tap,
    sees_ahead: int = 0,
    softmax_in: torch.dtype = torch.float32,
    share: Callable[[Tensor, int], Tensor] = lambda x, times: x.repeat_interleave(times, dim=-2),
) -> Tensor:
    """model.attend, unless an argument adds a bug."""
    times = q.shape[-2] // keys.shape[-2]
    q, keys, values = q.transpose(-3, -2), share(keys, times).transpose(-3, -2), share(values, times).transpose(-3, -2)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])
    positions = token_positions(start, q.shape[-2], q.device).unsqueeze(-1)
    future = torch.arange(keys.shape[-2], device=q.device) > positions + sees_ahead
    scores = tap("scores", scores.masked_fill(future, -torch.inf))
    probs = tap("probs", F.softmax(scores.to(softmax_in), dim=-1).to(q.dtype))
    return (probs @ values).transpose(-3, -2)


Bug = Callable[[Model, list[int], pytest.MonkeyPatch], Trace]


def in_attend(**bugs: Any) -> Bug:
    return lambda model, ids, patch: trace(model, ids, ops=REFERENCE._replace(attend=partial(attend_with_bugs, **bugs)))


def in_model(function: str, replacement: Callable[..., Any]) -> Bug:
    def run(model: Model, ids: list[int], patch: pytest.MonkeyPatch) -> Trace:
        with patch.context() as context:
            context.setattr(f"llama3_raw.model.{function}", replacement)
            return trace(model, ids)

    return run


def in_weights(number: int, field: str) -> Bug:
    return lambda model, ids, patch: trace(
        with_layer(model, number, lambda layer: layer._replace(**{field: getattr(layer, field).T.contiguous()})), ids
    )


BUGS: dict[str, tuple[Bug, str, str]] = {  # a buggy run, the first wrong tensor, and what computes it
    "half-split rope": (in_model("rope", half_split_rope), "layers.0.attention.q_rope", "rope"),
    "mask off by one": (in_attend(sees_ahead=1), "layers.0.attention.scores", "attend"),
    "softmax in bf16": (in_attend(softmax_in=torch.bfloat16), "layers.0.attention.probs", "softmax"),
    "kv heads interleaved": (
        in_attend(share=lambda x, times: x.repeat(1, times, 1)),
        "layers.0.attention.scores",
        "attend",
    ),
    "silu of up": (
        in_model("feed_forward", feed_forward_with_silu_of_up),
        "layers.0.feed_forward.hidden",
        "feed_forward",
    ),
    "wq transposed": (in_weights(2, "wq"), "layers.2.attention.q", "wq"),
    "wo transposed": (in_weights(2, "wo"), "layers.2.attention.out", "wo"),
}
VISIBLE_IN_BF16 = [name for name in BUGS if name != "softmax in bf16"]


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Return the JSON that the command printed, and the verdict before it."""
    *lines, figures = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("They "))
    return json.loads(figures), "\n".join(lines[begin:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "dtype"),
    [*((bug, torch.float32) for bug in BUGS), *((bug, torch.bfloat16) for bug in VISIBLE_IN_BF16)],
)
def test_a_planted_bug_is_found_at_its_tensor(
    bug: str,
    dtype: torch.dtype,
    tiny: Model,
    ids: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, name, made_by = BUGS[bug]
    file = tmp_path / "port.safetensors"
    run(in_dtype(tiny, dtype), ids, monkeypatch).save(file)
    assert main([*OWN_WEIGHTS, "--dtype", str(dtype).removeprefix("torch."), "--with", str(file), PROMPT]) == 1
    figures, verdict = printed(capsys)
    assert figures["first"] == name
    assert verdict.startswith(f"They diverge first at {name} (in model.py, ")
    assert made_by in figures["made_by"]
    # later tensors are not blamed: a bug in one layer gives one step, a bug in the code one step per layer
    others = {".".join(place.split(".")[2:]) for place in figures["parted"]}
    if bug.endswith("transposed"):
        assert figures["parted"] == [name]
    elif bug == "half-split rope":
        assert others == {"attention.q_rope", "attention.k_rope"}
    elif bug == "kv heads interleaved":
        assert others == {"attention.scores", "attention.heads"}
    else:
        assert figures["parted"] == [name.replace(".0.", f".{i}.") for i in range(4)]


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        ({}, {"norm_eps": 1e-6}, "layers.0.attention_norm"),
        ({"use_scaled_rope": True}, {}, "layers.0.attention.q_rope"),
    ],
)
def test_a_wrong_number_in_the_params_is_found(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = []
    for which, changes in (("ours", ours), ("theirs", theirs)):
        folder = tmp_path / which
        folder.mkdir()
        for file in ("consolidated.00.pth", "tokenizer.model"):
            (folder / file).symlink_to(TINY / file)
        params = json.loads((TINY / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps({**params, **changes}))
        folders.append(str(folder))
    assert main(["--weights", folders[0], "--with", folders[1], "--dtype", "float32", PROMPT]) == 1
    figures, verdict = printed(capsys)
    assert figures["first"] == name
    assert f"{folders[1]}" not in verdict  # the verdict names the tensor, not the folder


def test_params_whose_effect_16_bits_may_hide_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("consolidated.00.pth", "tokenizer.model"):
        (tmp_path / file).symlink_to(TINY / file)
    params = json.loads((TINY / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-6}))
    assert main([*OWN_WEIGHTS, "--with", str(tmp_path), PROMPT]) == 0
    assert f"{tmp_path} has norm_eps 1e-06, not 1e-05 (16 bits may hide" in capsys.readouterr().err
    assert main([*IN_FP32, "--with", str(tmp_path), PROMPT]) == 1
    assert f"{tmp_path} has norm_eps 1e-06, not 1e-05\n" in capsys.readouterr().err


def test_bugs_of_two_kinds_are_both_named(tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = in_dtype(tiny, torch.float32)
    transposed = with_layer(fp32, 2, lambda layer: layer._replace(wq=layer.wq.T.contiguous()))
    other = in_attend(sees_ahead=1)(transposed, ids, monkeypatch)
    diverged = [step.name for step in compare(fp32, ids, other).diverged]
    assert diverged == [
        *(f"layers.{i}.attention.scores" for i in range(2)),
        "layers.2.attention.q",
        *(f"layers.{i}.attention.scores" for i in range(2, 4)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["softmax in bf16", "half-split rope"])
def test_a_bug_of_a_trained_model_is_found(bug: str, stories15m: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, 403, 407, 261, 378]
    run, name, _ = BUGS[bug]
    assert compare(stories15m, ids, run(stories15m, ids, monkeypatch)).diverged[0].name == name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("other", ["hf", "meta"])
def test_other_implementations_agree(other: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OWN_WEIGHTS, "--dtype", dtype, "--with", other, PROMPT]) == 0
    figures, verdict = printed(capsys)
    assert figures["tensors"] == 71
    assert figures["missing"] == figures["unknown"] == 0
    if other == "meta":
        assert verdict == "They are equal: all 71 tensors, value by value."
    else:
        assert 0 < figures["worst_relative"] < (1e-5 if dtype == "float32" else 0.1)
        assert verdict.startswith("They agree")


@pytest.mark.slow
def test_a_trained_model_agrees_with_others_in_every_tensor(smollm2: Model) -> None:
    ids = [504, 2870, 282, 4649, 314, 253]
    ours, metas = trace(smollm2, ids), trace_meta(smollm2, ids)
    assert list(metas) == list(ours)
    assert [name for name in ours if not torch.equal(ours[name], metas[name])] == []
    found = compare(smollm2, ids, trace_hf(smollm2, ids))
    assert len(found.steps) == 3 + 17 * 30
    assert found.agree
    assert found.logits is not None
    assert found.logits.same_likeliest == 1
    assert 0 <= found.logits.kl < 1e-8


@pytest.mark.parametrize("other", ["fast", "float32", "float16", "int8"])
def test_rounding_is_no_divergence(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the weights to another dtype too, for each step alone and end to end."""
    assert main([*OWN_WEIGHTS, "--with", other, PROMPT]) == 0
    figures, _ = printed(capsys)
    assert 0 < figures["worst_relative"] < 0.2
    assert figures["missing"] == (8 if other == "fast" else 0)  # scores and probs, which are fused


def test_weights_of_4_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """They differ by more than rounding explains, which a line says; a tolerance decides."""
    assert main([*OWN_WEIGHTS, "--with", "int4", PROMPT]) == 1
    out, err = capsys.readouterr()
    assert "int4 has weights of 4 bits, which differ by more than the rounding of a computation; judge it by the" in err
    assert 0 < json.loads(out.splitlines()[-1])["logits"]["kl"] < 0.01
    assert main([*OWN_WEIGHTS, "--with", "int4", "--tolerance", "0.5", PROMPT]) == 0


def test_a_trace_with_itself_is_the_same(tiny: Model, ids: list[int]) -> None:
    same = compare(tiny, ids, trace(tiny, ids))
    assert {difference for step in same.steps for difference in (step.whole, step.own)} == {Difference(0.0, 0.0)}
    assert same.logits == Logits(1.0, 1.0, 1.0, True, 0.0, 0.0)
    assert [step.name for step in same.steps] == list(named_tensors(tiny.params))  # so this table is complete


def test_the_usual_layouts_of_ports_are_understood(tiny: Model, ids: list[int]) -> None:
    fp32 = in_dtype(tiny, torch.float32)
    port: dict[str, Tensor] = {}
    for name, tensor in trace(fp32, ids).items():
        if name.endswith((".q", ".k", ".v", ".heads")):
            tensor = tensor.flatten(-2)
        port[name] = tensor.masked_fill(tensor == -torch.inf, -1e9).unsqueeze(0)
    found = compare(fp32, ids, port)
    assert found.agree
    assert found.worst.whole.relative == 0
    assert found.notes == ()
    port["layers.1.attention.q_rope"] = port["layers.1.attention.q_rope"][..., :-1]
    found = compare(fp32, ids, port)
    assert [step.name for step in found.diverged] == ["layers.1.attention.q_rope"]
    assert "its shape is [1, 14, 6, 31], not [14, 6, 32]" in found.verdict()


def test_arrays_are_understood(tiny: Model, ids: list[int]) -> None:
    fp32 = in_dtype(tiny, torch.float32)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in trace(fp32, ids).items()}
    assert compare(fp32, ids, arrays).verdict().startswith("They are equal: all 71")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ids": []}, "the prompt is empty"),
        ({"ids": [1.5]}, "ids should be the tokens of one prompt"),
        ({"tolerance": -1.0}, "the tolerance should be a number of 0 or more"),
        ({"tolerance": math.nan}, "the tolerance should be a number of 0 or more"),
        ({"tolerance": "0.1"}, "the tolerance should be a number of 0 or more"),
        ({"rounding": torch.int8}, "the rounding should be that of a dtype"),
        ({"rounding": "float33"}, "the rounding should be that of a dtype .* is 'float33'"),
        ({"dtype": "float33"}, "the dtype of its weights or in torch.float32, not in float33"),
        ({"ids": [0] * 513}, "needs 513 positions, but the context holds 512"),
        ({"other": {0: torch.zeros(14, 192)}}, "has a name of this pass"),
        ({"other": torch.zeros(14, 192)}, "the other run should be a mapping from names to tensors, is Tensor"),
        (
            {
                "other": {"layers.0.attention.probs": torch.zeros(6, 14, 14)},
                "ops": REFERENCE._replace(has_scores=False),
            },
            "ops has fused attention, so no layers.0.attention.probs; leave scores and probs out",
        ),
        ({"other": {"norm": torch.zeros(14, 192, dtype=torch.float8_e4m3fn)}}, "norm to compare with is torch.float8"),
        ({"other": {"norm": "zero"}}, "norm to compare with is str"),
    ],
)
def test_wrong_arguments_are_refused(tiny: Model, ids: list[int], change: dict[str, Any], complaint: str) -> None:
    arguments = {"ids": ids, "other": {"norm": torch.zeros(14, 192)}, **change}
    for function in (compare, compare_gradients)[: 1 if "dtype" in change else 2]:
        with pytest.raises(UserError, match=complaint):
            function(tiny, **arguments)


@pytest.mark.parametrize("function", [compare, compare_gradients])
def test_a_trace_of_one_position_is_refused(function: Callable[..., Any], tiny: Model, ids: list[int]) -> None:
    for options, complaint in (
        ({"last_position": True}, "of the last position only; make one without last_position"),
        ({"at": 2}, "of one position only; trace all positions, without at="),
    ):
        with pytest.raises(UserError, match=complaint):
            function(tiny, ids, trace(tiny, ids, "norm", **options))


def test_a_dtype_may_be_a_name(tiny: Model, ids: list[int]) -> None:
    other = trace(tiny, ids, "*norm")
    assert compare(tiny, ids, other, dtype="float32", rounding="bfloat16").dtype == torch.bfloat16
    assert compare_gradients(tiny, ids, other, rounding="float16").dtype == torch.float16


def test_other_tokens_and_layouts_are_named(tiny: Model, ids: list[int]) -> None:
    whole = trace(tiny, ids)
    assert "the tokens, of which one run has more (BOS? padding=, --" in compare(tiny, ids[1:], whole).verdict()
    with_batch = {name: tensor.unsqueeze(0) for name, tensor in whole.items()}
    assert "of which one run has more (BOS?" in compare(tiny, ids[1:], with_batch).verdict()
    for name, odd in (
        ("norm", torch.zeros(7)),
        ("layers.0.attention.q", torch.zeros(5)),
        ("logits", torch.tensor(0.0)),
    ):
        assert "its layout, which should be that of model.py" in compare(tiny, ids, {**whole, name: odd}).verdict()
    two_rows = {name: torch.stack((tensor, tensor)) for name, tensor in whole.items()}
    assert "Look at: its batch: compare one prompt, and not 2 rows." in compare(tiny, ids, two_rows).verdict()
    without = {**whole, "norm": torch.zeros_like(whole["norm"])}
    assert "it has rows that are all zeros in the other run" in compare(tiny, ids, without).verdict()


def test_a_few_tensors_narrow_it_down(tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = in_dtype(tiny, torch.float32)
    whole = in_weights(2, "wq")(fp32, ids, monkeypatch)
    few = {name: whole[name] for name in whole if name.endswith(".residual") and ".attention" not in name}
    found = compare(fp32, ids, {**few, "layers.0.atention.q": whole["layers.0.attention.q"]})
    assert [step.name for step in found.diverged] == ["layers.2.residual"]
    text = found.verdict("my port")
    assert "also be layers.2.attention_norm … layers.2.feed_forward.out, which my port does not have" in text
    assert found.unknown == ("layers.0.atention.q",)
    assert found.logits is None
    only_logits = compare(fp32, ids, {"logits": whole["logits"]}, rounding=torch.float32)
    assert "also be tok_embeddings … norm, which" in only_logits.verdict()
    healthy = trace(fp32, ids)
    assert compare(fp32, ids, {name: healthy[name] for name in few}).agree


def test_tensors_saved_in_another_dtype_than_computed_in(tiny: Model, ids: list[int]) -> None:
    in_bf16 = {name: tensor.float() for name, tensor in trace(tiny, ids).items()}
    fp32 = in_dtype(tiny, torch.float32)
    assert not compare(fp32, ids, in_bf16).agree
    assert compare(fp32, ids, in_bf16, rounding=torch.bfloat16).agree


def test_runs_that_drift_apart_without_a_bug(tiny: Model, ids: list[int]) -> None:
    """Small errors in the same direction, each below what rounding explains."""
    drifting = trace(tiny, ids, tap=lambda name, x: x * 1.008 if "norm" in name else x)
    found = compare(in_dtype(tiny, torch.float32), ids, drifting, tolerance=0.01)
    assert not found.agree
    assert found.first_beyond_tolerance == next(step for step in found.steps if step.whole.relative > 0.01)
    assert f"beyond the tolerance of 0.01 is {found.first_beyond_tolerance.name}, " in found.verdict()
    unexplained = tuple(step._replace(rounding_end_to_end=1e-9) for step in found.steps)
    assert found._replace(tolerance=None, steps=unexplained).verdict().startswith("They drift apart")


def test_the_tolerance_decides_the_exit_status(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*IN_FP32, "--with", "bfloat16", PROMPT]
    assert main([*arguments, "--tolerance", "0.2"]) == 0
    assert printed(capsys)[1].startswith("They agree")
    assert main([*arguments, "--tolerance", "0.001"]) == 1
    figures, verdict = printed(capsys)
    assert figures["tolerance"] == 0.001
    assert verdict.startswith("They differ by up to ")
    # what comes before it is equal
    assert figures["first_beyond_tolerance"] == "layers.0.attention_norm"
    assert figures["first"] is None


def test_a_difference_is_relative_to_the_norm_of_its_row() -> None:
    b = torch.tensor([[3.0, 4.0], [3.0, 4.0], [300.0, 400.0], [0.001, 0.0]])
    a = b + torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 1.0], [0.1, 0.0]])
    # the row of 500 does not hide the others, and the last is no larger in error than the others are in size
    found = difference(a, b)
    assert (found[0], found[2]) == (1.0, None)
    assert found[1] == pytest.approx(0.1)
    assert difference(b, torch.zeros_like(b)).relative == math.inf
    assert difference(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, 0.0, None)
    assert difference(torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.nan, 1.0]])).absolute == 0
    most_negative = torch.finfo(torch.float32).min  # a finite mask, here over one value too many
    assert difference(torch.tensor([[1.0, -math.inf]]), torch.full((1, 2), most_negative)).relative == 1
    for other in (math.nan, math.inf, 1.0):
        hidden, seen = torch.tensor([[-math.inf, 1.0]]), torch.tensor([[other, 1.0]])
        assert difference(hidden, seen).relative == math.inf
        unlike = difference(seen, hidden).unlike
        assert unlike is not None
        assert unlike.startswith("1 of its 2 values are infinite or NaN on one side only: first [")


def test_how_similar_the_next_tokens_are() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(100, 50), torch.randn(100, 50)
    theirs[-1] = ours[-1]
    found = Logits.of(ours, theirs)
    ours64, theirs64 = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    assert found.kl == pytest.approx(float(F.kl_div(ours64, theirs64, log_target=True, reduction="batchmean")))
    shared = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(ours.topk(10)[1], theirs.topk(10)[1], strict=True)]
    assert found.top_k == pytest.approx(sum(shared) / 1000)
    assert found.same_likeliest == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert (found.top_k_last, found.same_likeliest_last, found.kl_last) == (1.0, True, 0.0)


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*IN_FP32, "--with", "hf", PROMPT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9].strip() for line in lines[2:9]] == [
        "embedding",
        *(f"layer {i}" for i in range(4)),
        "norm",
        "logits",
    ]
    assert max(map(len, lines[:-2])) <= 100
    assert main([*IN_FP32, "--with", "hf", "--names", "layers.*.attention.q_rope", "--names", "norm", PROMPT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == [*(f"layers.{i}.attention.q_rope" for i in range(4)), "norm"]


def test_unknown_names_are_reported_with_the_nearest(
    tmp_path: Path, tiny: Model, ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trace(tiny, ids)
    file = tmp_path / "port.safetensors"
    save_file({"logits": whole["logits"], "layers.0.atention.q": whole["layers.0.attention.q"]}, file)
    assert main([*OWN_WEIGHTS, "--with", str(file), PROMPT]) == 0
    _, err = capsys.readouterr()
    assert "no tensor of a pass is named 'layers.0.atention.q'; the nearest are layers.0.attention.q," in err
    assert f"{file} does not have tok_embeddings, layers.*.attention_norm" in err
    save_file({"model.layers.0.self_attn.q": whole["norm"]}, file)
    assert main([*OWN_WEIGHTS, "--with", str(file), PROMPT]) == 2
    assert "none of the 1 tensors to compare with has a name of this pass (model.layers.0.self_attn.q)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([PROMPT], "the following arguments are required: --with"),
        (["--with", "hf"], "give a prompt"),
        (["--with", "nowhere", PROMPT], "--with nowhere: there is no such folder"),
        (["--with", "nowhere.safetensors", PROMPT], "nowhere.safetensors: cannot be read"),
        (["--with", "fast", "--names", "layers.9.residual", PROMPT], "the nearest are"),
        (["--with", "fast", "--tolerance", "-1", PROMPT], "--tolerance: should be a number of 0 or more"),
        (["--with", "int8", "--dtype", "float32", PROMPT], "int8 matrices are fast in bfloat16 only"),
        (["--with", "int4", "--dtype", "float32", PROMPT], "int4 matrices are fast in bfloat16 only"),
        (["--with", "hf", "--max-ram", "4GB", PROMPT], "leave --max-ram out"),
        (["--with", "fast", "--backward", PROMPT], "--with fast: the fast operations compute no gradients"),
        *(
            (["--with", other, "--padding", "left", PROMPT], "--padding: is of the tensors in a file; leave it out")
            for other in ("hf", "float32", "int8", "fast")
        ),
    ],
)
def test_an_impossible_comparison_is_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OWN_WEIGHTS, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_other_models_and_prompts_are_refused(
    tmp_path: Path, tiny: Model, ids: list[int], stories15m: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "t.safetensors")
    for origin_of, prompt, complaint in (
        (tiny, ids[:-1], "is of another prompt, with 13 tokens, not 14"),
        (stories15m, ids, "is of another model, with dim 288, not 192"),
    ):
        trace(origin_of, prompt, "norm").save(file)
        assert main([*OWN_WEIGHTS, "--with", file, PROMPT]) == 2
        assert complaint in capsys.readouterr().err
    trace(tiny, ids, last_position=True).save(file)
    assert main([*OWN_WEIGHTS, "--with", file, PROMPT]) == 2
    assert "is of the last position only; make one without --last-position" in capsys.readouterr().err
    assert main([*OWN_WEIGHTS, "--with", str(random_folder(tmp_path / "one-layer", tiny, 1)), PROMPT]) == 2
    assert f"--with {tmp_path}/one-layer: is another model, with n_layers 1, not 4" in capsys.readouterr().err


def test_other_weights_of_the_same_shape_are_compared(
    tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OWN_WEIGHTS, "--with", str(random_folder(tmp_path / "other", tiny, 4)), PROMPT]) == 1
    figures, _ = printed(capsys)
    assert figures["first"] == "tok_embeddings"
    assert set(figures["parted"]) >= {f"layers.{i}.attention.{name}" for i in range(4) for name in ("q", "k", "v")}
    assert not any("scores" in name or "hidden" in name for name in figures["parted"])  # they have no weights


def random_folder(folder: Path, like: Model, n_layers: int) -> Path:
    """Write a folder of random weights with the shapes of a model, except for the number of layers."""
    folder.mkdir()
    params = replace(like.params, n_layers=n_layers)
    torch.save(to_state_dict(params, random_weights(params, torch.bfloat16, seed=0)), folder / "consolidated.00.pth")
    numbers = {**json.loads((TINY / "params.json").read_text()), "n_layers": n_layers}
    (folder / "params.json").write_text(json.dumps(numbers))
    return folder


@pytest.mark.parametrize(
    ("other", "package"), [("hf", "transformers"), ("meta", "llama_models"), ("meta", "fairscale")]
)
def test_a_missing_package_is_named(
    other: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*OWN_WEIGHTS, "--with", other, PROMPT]) == 2
    err = capsys.readouterr().err
    assert f"--with {other} needs the package {package}" in err
    assert "pip install -e '.[compare]'" in err


def test_models_that_metas_code_does_not_support_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("consolidated.00.pth", "tokenizer.model"):
        (tmp_path / file).symlink_to(TINY / file)
    params = json.loads((TINY / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**params, "use_scaled_rope": True, "rope_scaling_factor": 32}))
    assert main(["--weights", str(tmp_path), "--with", "meta", PROMPT]) == 2
    assert "Meta's code supports only the RoPE scaling of Llama 3.1" in capsys.readouterr().err
    assert main(["--weights", str(tmp_path), "--with", "hf", PROMPT]) == 0

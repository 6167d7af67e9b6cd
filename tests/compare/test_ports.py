"""Two independent ports: without a bug they agree in every form and dtype, and each bug is named at its tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from llama3_raw import REFERENCE, Model, Params, UserError, trace
from llama3_raw.checkpoint.loading import to_state_dict
from llama3_raw.compare import assert_matches, compare, compare_gradients
from llama3_raw.compare.__main__ import main
from llama3_raw.compare.comparison import Comparison, Padding
from llama3_raw.compare.generation import compare_texts, first_difference, greedy
from llama3_raw.compare.gradients import next_token_loss
from llama3_raw.compare.references import _HF, _gradients, gradients_hf, gradients_meta, hf_model, trace_hf
from llama3_raw.compare.rounding import shown_dtype
from llama3_raw.ops import Tap
from llama3_raw.params import RopeScaling
from tests.compare.conftest import PROMPT
from tests.compare.ports import TorchPort, numpy_port
from tests.paths import CACHE, TINY
from tests.references import cast, dense, random_weights

OWN_WEIGHTS = ["--weights", str(TINY)]


@pytest.fixture(scope="module")
def fp32(tiny: Model) -> Model:
    return tiny._replace(weights=cast(tiny.weights, torch.float32))


@pytest.fixture(scope="module")
def exact(fp32: Model, ids: list[int]) -> dict[str, Tensor]:
    """The tensors of a pass in fp32."""
    return dict(trace(fp32, ids, ops=REFERENCE))


def state(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in to_state_dict(model.params, model.weights).items()}


def in_numpy(model: Model, ids: list[int], bugs: Collection[str] = (), dtype: Any = np.float32) -> dict[str, Any]:
    weights = {name: tensor.numpy() for name, tensor in state(model).items()}
    return numpy_port(weights, model.params, ids, bugs, dtype)


def in_torch(
    model: Model, ids: list[int], bugs: Collection[str] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    return TorchPort(state(model, dtype), model.params, bugs).outputs(ids)


def first_of(found: Comparison) -> str | None:
    return found.diverged[0].name if found.diverged else None


def understood(found: Comparison) -> str:
    return "\n".join(found.notes)


@pytest.mark.parametrize("length", [1, 2, 6, 14])  # 6: as many positions as heads
def test_ports_without_a_bug_agree(length: int, tiny: Model, ids: list[int]) -> None:
    """Although the model is in bf16: it runs in the dtype that the tensors show."""
    found = compare(tiny, ids[:length], in_numpy(tiny, ids[:length]))
    assert found.agree
    assert found.dtype == torch.float32
    assert "the tensors are in float32, so the model runs in float32 and not in bfloat16" in found.verdict()
    assert "heads before positions (layers.*.attention.q_rope, layers.*.attention.k_rope)" in understood(found)
    assert ("saved before the mask (layers.*.attention.scores)" in understood(found)) == (length > 1)
    found = compare(tiny, ids[:length], in_torch(tiny, ids[:length]))
    assert found.agree
    assert len(found.steps) == 3 + 10 * tiny.params.n_layers
    assert (
        "in Hugging Face's order, pairs half a head apart (layers.*.attention.q, layers.*.attention" in found.verdict()
    )


@pytest.mark.slow
def test_a_port_without_a_bug_agrees_on_a_long_prompt(fp32: Model) -> None:
    """It has the angles of RoPE in fp64: the error of those in fp32 grows with the position. A bug in them is found."""
    ids = [1, *range(20, 219)]
    found = compare(fp32, ids, in_numpy(fp32, ids))
    assert found.agree, found.verdict()
    other = fp32._replace(params=replace(fp32.params, rope_theta=fp32.params.rope_theta * 1.0001))
    assert first_of(compare(fp32, ids, in_numpy(other, ids))) == "layers.0.attention.q_rope"


@pytest.mark.slow
@pytest.mark.parametrize("ids", [[1], [504], [1, 504]], ids=str)
def test_a_port_of_a_trained_model_agrees_on_short_prompts(ids: list[int], smollm2: Model) -> None:
    """Its sums are in another order, and its first token has values that are a thousand times the others."""
    model = smollm2._replace(weights=cast(smollm2.weights, torch.float32))
    found = compare(model, ids, in_numpy(model, ids))
    assert found.agree, found.verdict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_beside_fused_attention(dtype: torch.dtype, fp32: Model, tiny: Model, ids: list[int]) -> None:
    """The heads are not computed from the probabilities that are saved, but from others, rounded otherwise."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
        REFERENCE.attend(q, keys, values, start, tap)
        times = q.shape[-2] // keys.shape[-2]
        heads, k, v = (x.transpose(-3, -2).float() for x in (q, keys, values))
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
        fused = F.scaled_dot_product_attention(heads, k, v, is_causal=True)
        return fused.transpose(-3, -2).to(q.dtype)

    model = fp32 if dtype == torch.float32 else tiny
    for first in range(4):
        prompt = ids[first:]
        found = compare(model, prompt, trace(model, prompt, ops=REFERENCE._replace(attend=attend)))
        assert found.agree, found.verdict()


def test_products_in_bf16_are_pointed_out(fp32: Model, ids: list[int]) -> None:
    """As autocast, TF32 and JAX compute them. The verdict says which option judges by that; a bug gets no such line."""

    def linear(x: Tensor, weight: Any) -> Tensor:
        return REFERENCE.linear(x.bfloat16(), weight.bfloat16()).float()

    seen = trace(fp32, ids, ops=REFERENCE._replace(linear=linear))
    some = {name: tensor + 1e-9 for name, tensor in seen.items()}
    found = compare(fp32, ids, some)
    assert not found.agree
    assert "(--rounding bfloat16)" in found.verdict()
    assert compare(fp32, ids, some, rounding="bfloat16").agree
    wrong = in_numpy(fp32, ids, ["eps 1e-6"])  # of logits alone, it looks like rounding
    for ends in ("", "residual", "logits"):
        some = {name: array for name, array in wrong.items() if name.endswith(ends)}
        assert "--rounding" not in compare(fp32, ids, some).verdict()


def test_a_port_in_fp64_or_bf16_agrees(tiny: Model, ids: list[int]) -> None:
    assert compare(tiny, ids, in_numpy(tiny, ids, dtype=np.float64)).agree
    port = in_torch(tiny, ids, dtype=torch.bfloat16)
    found = compare(tiny, ids, port)
    assert found.agree
    assert found.dtype == torch.bfloat16
    # saved in fp32, as NumPy has no bf16: their values show it
    found = compare(tiny, ids, {name: tensor.float() for name, tensor in port.items()})
    assert found.agree
    assert found.dtype == torch.bfloat16


BUGS = {
    "eps 1e-6": "attention_norm",
    "no eps": "attention_norm",
    "mean, then square": "attention_norm",
    "positions from 1": "attention.q_rope",
    "no square root": "attention.scores",
    "sees ahead": "attention.scores",  # saved before its wrong mask
    "no mask": "attention.scores",
    "softmax over heads": "attention.probs",
    "adds the norm": "attention.residual",
    "gelu": "feed_forward.hidden",
}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_numpy_is_named(bug: str, tiny: Model, ids: list[int]) -> None:
    found = compare(tiny, ids, in_numpy(tiny, ids, [bug]))
    assert not found.agree
    assert first_of(found) == f"layers.0.{BUGS[bug]}"


def test_a_wrong_rope_factor_is_named(tiny: Model, ids: list[int]) -> None:
    scaled = tiny._replace(params=replace(tiny.params, rope_scaling=RopeScaling(32.0, original_max_seq_len=64)))
    assert compare(scaled, ids, in_numpy(scaled, ids)).agree
    assert first_of(compare(scaled, ids, in_numpy(scaled, ids, ["RoPE factor 8"]))) == "layers.0.attention.q_rope"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bug", "name"),
    [
        ("k without RoPE", "layers.0.attention.out"),
        ("kv heads in turn", "layers.0.attention.out"),
        ("normalised queries", "layers.0.attention.out"),
        ("silu of up", "layers.0.feed_forward.out"),
        ("no final norm", "norm"),
    ],
)
def test_a_bug_in_modules_is_named(bug: str, name: str, dtype: torch.dtype, tiny: Model, ids: list[int]) -> None:
    """By the outputs of the modules alone, so at the first output after it."""
    found = compare(tiny, ids, in_torch(tiny, ids, [bug], dtype))
    assert not found.agree
    assert first_of(found) == name


def test_one_tensor_in_bf16_does_not_loosen_the_others(tiny: Model, ids: list[int]) -> None:
    def with_one_in_bf16(name: str, bugs: Collection[str] = ()) -> Comparison:
        tensors: dict[str, Tensor] = {key: torch.tensor(array) for key, array in in_numpy(tiny, ids, bugs).items()}
        return compare(tiny, ids, {**tensors, name: tensors[name].bfloat16()})

    for name in ("tok_embeddings", "layers.0.attention_norm", "layers.1.attention.v"):
        found = with_one_in_bf16(name)
        assert found.agree, name
        assert found.dtype == torch.float32
    assert first_of(with_one_in_bf16("tok_embeddings", ["eps 1e-6"])) == "layers.0.attention_norm"
    found = with_one_in_bf16("layers.0.attention_norm", ["eps 1e-6"])  # which hides the bug in itself, not after it
    assert first_of(found) == "layers.0.attention.q"
    assert "may also be layers.0.attention_norm, which the other run has in a coarser dtype only" in found.verdict()


def test_the_dtype_that_values_show() -> None:
    values = torch.randn(1000)
    assert shown_dtype(values) == shown_dtype(values.double()) == torch.float32
    assert shown_dtype(values.bfloat16().float()) == torch.bfloat16
    assert shown_dtype(values.half().double()) == torch.float16
    assert shown_dtype(torch.eye(100)) is None  # of any


WIDE = Params(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=128256,
    head_dim=16,
    hidden_dim=128,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    max_seq_len=512,
)


@pytest.mark.parametrize("deviations", [6, 10, -6])
def test_one_wrong_logit_among_128256_is_found(deviations: float) -> None:
    """In bf16, where it hides in the length of its row."""
    model = Model(random_weights(WIDE, torch.bfloat16, seed=0), WIDE, None)
    prompt = [5, 77, 90000]
    tensors = dict(trace(model, prompt, ops=REFERENCE))
    logits = tensors["logits"].clone()
    logits[1, 31000] += deviations * logits[1].std()
    found = compare(model, prompt, {**tensors, "logits": logits})
    assert not found.agree
    assert (first_of(found), found.diverged[0].kind, found.diverged[0].own_measured.at) == (
        "logits",
        "value",
        (1, 31000),
    )
    assert "differs most in one value, [1, 31000], by" in found.verdict()
    assert not compare(model, prompt, {"logits": logits}).agree
    assert bool(found.unexplained_swaps) == (deviations > 0)


def test_they_never_agree_on_other_likeliest_tokens(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    """Even if no tensor differed by more than rounding explains."""
    logits = exact["logits"].clone()
    logits[3] = logits[3].roll(1)
    found = compare(fp32, ids, {"logits": logits}, tolerance=1e9)
    assert found.agree  # as asked
    assert found.verdict().startswith("They stay within a tolerance")
    assert "The most likely token differs at position 3: " in found.verdict()
    unjudged = tuple(
        step._replace(
            own=exactly.own,
            whole=exactly.whole,
            own_measured=exactly.own_measured,
            whole_measured=exactly.whole_measured,
        )
        for step, exactly in zip(found.steps, compare(fp32, ids, {"logits": exact["logits"]}).steps, strict=True)
    )
    without = found._replace(tolerance=None, steps=unjudged)
    assert not without.agree
    assert not without.verdict().startswith("They agree")


def unmasked(exact: dict[str, Tensor], name: str) -> Tensor:
    """The scores before the mask."""
    prefix = name.removesuffix("scores")
    q, k = exact[prefix + "q_rope"], exact[prefix + "k_rope"]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores: Tensor = q.transpose(0, 1) @ k.permute(1, 2, 0) / q.shape[-1] ** 0.5
    return scores


Change = Callable[[str, Tensor, dict[str, Tensor]], "Tensor | None"]


def of(*ends: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda name, x, exact: change(x) if name.endswith(ends) else x


def of_scores(change: Callable[[Tensor, Tensor], Tensor], probs: Callable[[Tensor], Tensor] = lambda x: x) -> Change:
    """change: (scores, scores before the mask) -> theirs."""
    return lambda name, x, exact: (
        change(x, unmasked(exact, name)) if name.endswith("scores") else probs(x) if name.endswith("probs") else x
    )


FORMS: dict[str, tuple[Change, str]] = {
    "a mask of -1e4 is added": (
        of_scores(lambda x, raw: raw + torch.where(x == -torch.inf, -1e4, 0.0)),
        "masked by a large negative number (layers.*.attention.scores)",
    ),
    "before the mask": (of_scores(lambda x, raw: raw), "saved before the mask"),
    "a static cache": (
        of_scores(lambda x, raw: F.pad(x, (0, 50), value=-1e9), lambda x: F.pad(x, (0, 50))),
        "over 64 keys, of which 14 are the prompt's (layers.*.attention.scores, layers.*.attention.probs)",
    ),
    "a static cache, before the mask": (
        of_scores(lambda x, raw: F.pad(raw, (0, 50)), lambda x: F.pad(x, (0, 50))),
        "saved before the mask",
    ),
    "the whole cache": (
        of("k_rope", ".v", change=lambda x: F.pad(x, (0, 0, 0, 0, 0, 50))),
        "a cache of 64 positions, of which the prompt has the first 14",
    ),
    "heads before positions": (
        of(".q", ".k", ".v", "_rope", ".heads", change=lambda x: x.transpose(0, 1).unsqueeze(0)),
        "heads before positions",
    ),
    "after repeat_kv": (
        of(".k", ".v", "k_rope", change=lambda x: x.repeat_interleave(3, 1).transpose(0, 1)),
        "after repeat_kv, a kv head for each query head",
    ),
    "half-split q and k": (
        of("q", "k", "_rope", change=lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)),
        "in Hugging Face's order",
    ),
    "last logits [V]": (of("logits", change=lambda x: x[-1]), "the last position alone (logits)"),
    "last logits [1, V]": (of("logits", change=lambda x: x[-1:]), "the last position alone (logits)"),
    "last logits [1, 1, V]": (of("logits", change=lambda x: x[None, -1:]), "the last position alone (logits)"),
    "a padded vocabulary": (
        of("logits", change=lambda x: F.pad(x, (0, 128), value=-1e30)),
        "logits, a padded vocabulary (logits)",
    ),
    "positions before heads": (of("scores", "probs", change=lambda x: x.transpose(0, 1)), "positions before heads"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_harmless_form_is_understood(form: str, exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    change, note = FORMS[form]
    tensors = {name: theirs for name, x in exact.items() if (theirs := change(name, x, exact)) is not None}
    found = compare(fp32, ids, tensors)
    assert found.agree, found.verdict()
    assert note in understood(found)
    assert f"Understood: {found.notes[0]}." in found.verdict()
    # a form hides no bug
    wrong = {**tensors, "layers.2.feed_forward.up": tensors["layers.2.feed_forward.up"] * 1.001}
    assert first_of(compare(fp32, ids, wrong)) == "layers.2.feed_forward.up"


def test_nan_is_no_form(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    """It does not count as masked; the verdict says where the first is; JSON has no NaN."""
    nan = {name: torch.full_like(x, torch.nan) for name, x in exact.items() if name[-6:] in ("scores", ".probs")}
    found = compare(fp32, ids, {**exact, **nan})
    assert first_of(found) == "layers.0.attention.scores"
    assert "infinite or NaN on one side only: first [0, 0, 0], nan there and " in found.verdict()
    assert found.notes == ()
    logits = exact["logits"].clone()
    logits[3, 5] = torch.nan
    found = compare(fp32, ids, {**exact, "logits": logits})
    assert "The most likely token differs at position 3: " in found.verdict()
    assert "Their logits are infinite or NaN." in found.verdict()
    json.dumps(found.to_json(), allow_nan=False)


def test_bf16_saved_in_fp16(tiny: Model, ids: list[int]) -> None:
    """Its values have the bits of bf16 only, so that is the rounding to expect."""
    port = {name: torch.from_numpy(array).bfloat16() for name, array in in_numpy(tiny, ids).items()}
    assert compare(tiny, ids, port).agree
    found = compare(tiny, ids, {name: tensor.clamp(-6e4, 6e4).half() for name, tensor in port.items()})
    assert found.dtype == torch.bfloat16
    assert found.agree, found.verdict()


BAD_FORMS: dict[str, tuple[Change, str, str]] = {  # and what the verdict says
    "keys after the prompt take part": (
        of_scores(lambda x, raw: F.pad(x, (0, 50)), lambda x: F.pad(x, (0, 50), value=0.001)),
        "attention.scores",
        "of its 64 keys, some that are not among the prompt's 14 take part",
    ),
    "repeated in turn": (
        of("k_rope", change=lambda x: x.repeat(1, 3, 1)),
        "attention.k_rope",
        "repeated in turn (0 1 0 1)",
    ),
    "only k is half-split": (
        of(".k", change=lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)),
        "attention.k",
        "the order of its rows",
    ),
    "positions are not heads": (
        lambda name, x, exact: x[:, [1, 0, 2, 3, 4, 5]] if name.endswith("heads") else x,
        "attention.heads",
        "which query heads share a kv head",
    ),
}


@pytest.mark.parametrize("form", BAD_FORMS)
def test_what_only_looks_like_a_form_is_named(form: str, exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    change, name, why = BAD_FORMS[form]
    found = compare(fp32, ids, {name: x for name, t in exact.items() if (x := change(name, t, exact)) is not None})
    assert first_of(found) == f"layers.0.{name}"
    assert why in found.verdict()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counted_from", ["the prompt", "the padding"])
def test_a_padded_prompt(side: str, counted_from: str, fp32: Model, ids: list[int]) -> None:
    """Positions may be counted from the padding on, which changes q and k after RoPE but no score."""
    n = 3
    padding = [0] * n
    padded = [*padding, *ids] if side == "left" else [*ids, *padding]
    network = hf_model(fp32, "eager")
    mask = torch.tensor([[0] * n + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * n])
    positions = torch.arange(len(padded)) - (n if side == "left" and counted_from == "the prompt" else 0)
    with torch.no_grad():
        outputs = network(
            torch.tensor([padded]),
            attention_mask=mask,
            position_ids=positions.clamp(min=0)[None],
            output_hidden_states=True,
            output_attentions=True,
        )
    tensors = {
        "hidden_states": torch.stack(outputs.hidden_states),
        "attentions": torch.stack(outputs.attentions),
        "logits": outputs.logits,
    }
    found = compare(fp32, ids, tensors, padding=side)  # type: ignore[arg-type]
    assert found.agree, found.verdict()
    assert f"padded on the {side}, by 3 positions" in understood(found)
    assert len(found.steps) == 10  # embeddings, three residuals, four probs, norm and logits
    assert not compare(fp32, ids, tensors).agree


def test_positions_counted_from_the_padding(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    shifted = in_numpy(fp32, [0, *ids])  # one more token before the prompt: as padding that is not masked
    tensors = {name: shifted[name] for name in shifted if name.endswith("k_rope")}
    tensors = {name: tensors[name] for name in tensors if name.startswith("layers.0.")}
    found = compare(fp32, ids, {**tensors}, padding="left")
    assert found.agree, found.verdict()
    assert "positions counted from the padding on, which changes no score" in understood(found)


def test_hidden_states_of_transformers(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    n = fp32.params.n_layers
    states = [exact["tok_embeddings"], *(exact[f"layers.{i}.residual"] for i in range(n - 1)), exact["norm"]]
    note = "layers.3.residual is after the norm, as transformers' last hidden state, and compared as norm"
    for tensors in (
        {"hidden_states": torch.stack(states).unsqueeze(1)},
        {f"hidden_states.{i}": state for i, state in enumerate(states)},
        {f"layers.{i}.residual": state for i, state in enumerate(states[1:])},
    ):
        found = compare(fp32, ids, tensors)
        assert found.agree
        assert found.steps[-1].name == "norm"
        assert note in understood(found)
    bug = [state.clone() for state in states]
    bug[-1] *= 1.01
    assert first_of(compare(fp32, ids, {"hidden_states": torch.stack(bug)})) == "norm"


def test_layers_counted_from_1(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    def one_more(name: str) -> str:
        parts = name.split(".")
        return ".".join([parts[0], str(int(parts[1]) + 1), *parts[2:]]) if len(parts) > 1 else name

    found = compare(fp32, ids, {one_more(name): tensor for name, tensor in exact.items()})
    assert found.verdict().startswith("They are equal: all 71 tensors, value by value.")
    assert "layers counted from 1: layers.1 is layers.0 here, layers.4 the last" in found.verdict()


def test_files_of_numpy_and_torch(
    tmp_path: Path, tiny: Model, ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = in_numpy(tiny, ids)
    np.savez(tmp_path / "port.npz", **arrays)
    outputs = in_torch(tiny, ids, ["silu of up"])
    nested: dict[str, Any] = {"model": {"layers": [{} for _ in range(4)]}, "logits": outputs["lm_head"]}
    for i in range(4):
        nested["model"]["layers"][i]["mlp"] = outputs[f"model.layers.{i}.mlp"]
    torch.save(outputs, tmp_path / "port.pt")
    torch.save(nested, tmp_path / "nested.pt")
    for file, status in (("port.npz", 0), ("port.pt", 1), ("nested.pt", 1)):
        assert main([*OWN_WEIGHTS, "--with", str(tmp_path / file), PROMPT]) == status, file
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures["dtype"] == "float32"
        assert figures["first"] == ("layers.0.feed_forward.out" if status else None)
    # as --dtype says, if it was said
    assert main([*OWN_WEIGHTS, "--dtype", "bfloat16", "--with", str(tmp_path / "port.npz"), PROMPT]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dtype"] == "bfloat16"


def test_names_under_a_common_one(
    tmp_path: Path, exact: dict[str, Tensor], fp32: Model, ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"acts": exact, "prompt": PROMPT}, tmp_path / "port.pt")
    assert main([*OWN_WEIGHTS, "--with", str(tmp_path / "port.pt"), PROMPT]) == 0
    out = capsys.readouterr().out
    assert "They are equal: all 71 tensors, value by value.\n" in out
    assert "Understood: names without 'acts' before them." in out
    found = compare(fp32, ids, {"run/first/norm": exact["norm"], "run/first/nrom": exact["norm"]})
    assert (len(found.steps), found.unknown) == (1, ("run.first.nrom",))
    # the name within a layer is not that of another tensor
    with pytest.raises(UserError, match="has a name of this pass"):
        compare(fp32, ids, {"net.layers.0.norm": exact["norm"]})


@pytest.mark.parametrize(
    ("factors", "first"),
    [
        ((1.0, 1.0), None),
        ((1.0, 1.01), "layers.0.attention.out"),
        ((1.01, 1.0), "layers.0.attention.out"),
    ],
)
def test_two_names_of_the_same_tensor(
    factors: tuple[float, float], first: str | None, exact: dict[str, Tensor], fp32: Model, ids: list[int]
) -> None:
    """Neither hides the other."""
    out, norm = exact["layers.0.attention.out"], exact["norm"]
    both = {"model.layers.0.self_attn.o_proj": factors[0] * out, "model.layers.0.self_attn": factors[1] * out[None]}
    found = compare(fp32, ids, both)
    assert first_of(found) == first
    assert ("also given as model.layers.0.self_attn, which differs more" in understood(found)) == (factors[1] > 1)
    gradients = {**gradients_hf(fp32, ids)}
    out = gradients["layers.0.attention.out"]
    both = {"model.layers.0.self_attn.o_proj": factors[0] * out, "model.layers.0.self_attn": factors[1] * out[None]}
    assert first_of(compare_gradients(fp32, ids, both)) == first
    # nor does a copy that was saved in bf16 differ
    assert compare(fp32, ids, {"norm": factors[0] * norm, "model.norm": norm.bfloat16()}).agree == (factors[0] == 1)
    # the norm of the last position is no other tensor than the norm
    assert compare(fp32, ids, {"model.norm": factors[0] * norm, "lm_head.input": norm[-1:]}).agree == (factors[0] == 1)


def test_two_names_of_the_last_hidden_state(exact: dict[str, Tensor], fp32: Model, ids: list[int]) -> None:
    last = "layers.3.residual"
    for factor in (1.0, 1.01):
        states = {last: exact[last], "norm": exact["norm"], "hidden_states.4": factor * exact["norm"]}
        found = compare(fp32, ids, states)
        assert [step.name for step in found.steps] == [last, "norm"]
        assert first_of(found) == ("norm" if factor > 1 else None)


def test_two_gradients_of_a_weight_that_differ_are_refused(fp32: Model, ids: list[int]) -> None:
    both = {"norm.weight": torch.zeros(192), "model.norm.weight": torch.ones(192)}
    with pytest.raises(UserError, match=r"norm.weight and model.norm.weight are the same weight"):
        compare_gradients(fp32, ids, both)


def test_inputs_of_modules(fp32: Model, ids: list[int]) -> None:
    port, inputs = TorchPort(state(fp32), fp32.params), {}
    for name, module in port.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({f"{name}.input": args[0].detach()}))
    with torch.no_grad():
        port(torch.tensor([ids]))
    found = compare(fp32, ids, inputs)
    assert found.agree, found.verdict()
    assert found.unknown == (".input", "model.input", "model.embed_tokens.input")  # token ids
    per_layer = ("attention_norm", "attention.heads", "attention.residual", "ffn_norm", "feed_forward.hidden")
    within = {f"layers.{i}.{name}" for i in range(4) for name in (*per_layer, "residual")}
    assert {step.name for step in found.steps} == {"tok_embeddings", "norm", *within}
    for module, name in (
        ("layers.2.input_layernorm", "layers.1.residual"),
        ("layers.2.self_attn.k_proj", "layers.2.attention_norm"),
        ("layers.2.mlp.up_proj", "layers.2.ffn_norm"),
        ("layers.0", "tok_embeddings"),
    ):
        wrong = {**inputs, f"model.{module}.input": 1.01 * inputs[f"model.{module}.input"]}
        assert first_of(compare(fp32, ids, wrong)) == name


class Code:
    """What a pickle may run."""


def test_files_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"logits": Code()}, tmp_path / "code.pt")
    torch.save(torch.zeros(3), tmp_path / "nameless.pt")
    np.savez(tmp_path / "objects.npz", logits=np.array([Code()], dtype=object))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no")
    for file, complaint in (
        ("code.pt", "has more than tensors in dicts and lists, or is damaged"),
        ("nameless.pt", "has no tensors with names"),
        ("objects.npz", "cannot be read as arrays"),
        ("damaged.npz", "cannot be read as arrays"),
        ("missing.npz", "cannot be read"),
    ):
        assert main([*OWN_WEIGHTS, "--with", str(tmp_path / file), PROMPT]) == 2
        err = capsys.readouterr().err
        assert complaint in err
        assert len(err.splitlines()) == 1


def test_assert_matches(tiny: Model, ids: list[int]) -> None:
    assert assert_matches(tiny, ids, in_numpy(tiny, ids)).agree
    with pytest.raises(AssertionError, match=r"They diverge first at layers.0.feed_forward.hidden \(in model.py"):
        assert_matches(tiny, ids, in_numpy(tiny, ids, ["gelu"]))
    with pytest.raises(UserError, match='the padding should be "left" or "right"'):
        assert_matches(tiny, ids, in_numpy(tiny, ids), padding="both")


@pytest.mark.parametrize("other", ["hf", "meta", "fast"])
def test_greedy_texts_are_equal(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OWN_WEIGHTS, "--with", other, "--generate", "5", "Once upon a time"]) == 0
    out = capsys.readouterr().out
    assert "The texts are equal: 5 new tokens. Compared is the pass of the last one.\nThey " in out
    figures = json.loads(out.splitlines()[-1])
    assert figures["text_differs_at"] is None
    assert figures["ours"] == figures["theirs"]
    assert len(figures["ours"]) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")  # makes the file
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_texts_of_a_trained_model(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the last position is compared; before it, keys and values differ by what rounding adds up to."""
    options = ["--with", "hf", "--dtype", dtype, "--generate", "12", "The capital of France is"]
    assert main(["--weights", str(CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"), *options]) == 0
    assert "The texts are equal: 12 new tokens." in capsys.readouterr().out


def test_a_stale_cache_is_found_where_the_texts_part(tiny: Model, fp32: Model, ids: list[int]) -> None:
    """The port's own cache: the tensors of the pass are of one position."""
    port = TorchPort(state(fp32), fp32.params, ["stale cache"])

    def texts() -> Iterator[tuple[int, dict[str, Tensor]]]:
        new, start = list(ids), 0
        while True:
            tensors = port.outputs(new, start)
            start += len(new)
            new = [int(tensors["lm_head"][0, -1].argmax())]
            yield new[0], tensors

    ours = greedy(fp32, ids, 12)
    theirs, tensors = first_difference(ours, texts())
    found = compare_texts(fp32, ids, ours, theirs, tensors)
    assert found.differ
    assert not found.agree
    assert 0 < found.step < 12
    assert ours[: found.step] == theirs[: found.step]
    assert found.tensors.diverged[0].name == "layers.0.attention.out"
    assert found.verdict("my port").startswith(f"The texts differ first at new token {found.step}: ")


def test_a_file_has_no_text(tmp_path: Path, tiny: Model, ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    trace(tiny, ids, "logits").save(tmp_path / "port.safetensors")
    file = str(tmp_path / "port.safetensors")
    assert main([*OWN_WEIGHTS, "--with", file, "--generate", "5", PROMPT]) == 2
    assert (
        "compare the pass of the first token that differs: its tensors, with the whole text" in capsys.readouterr().err
    )
    assert main([*OWN_WEIGHTS, "--with", "hf", "--generate", "5", "--backward", PROMPT]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_other_implementations_agree(dtype: torch.dtype, tiny: Model, ids: list[int]) -> None:
    model = tiny._replace(weights=cast(tiny.weights, dtype))
    found = compare_gradients(model, ids, gradients_hf(model, ids))
    assert found.agree, found.verdict()
    assert len(found.steps) == 71
    assert [step.name for step in found.steps][:2] == ["logits", "norm"]
    assert compare_gradients(model, ids, gradients_meta(model, ids)).worst.whole.relative < 0.01


def gradients_of_weights(model: Model, ids: list[int], bug: str = "") -> dict[str, Tensor]:
    port = TorchPort(state(model), model.params, [bug])
    logits = port(torch.tensor([ids]))[0]
    targets = torch.tensor(ids)
    loss = F.cross_entropy(logits, targets) if bug == "not shifted" else F.cross_entropy(logits[:-1], targets[1:])
    loss.backward()
    return {f"{name}.grad": weight.grad for name, weight in port.named_parameters() if weight.grad is not None}


def test_gradients_of_weights(tmp_path: Path, tiny: Model, ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """By Hugging Face's names, with its order of the rows of q and k."""
    torch.save(gradients_of_weights(tiny, ids), tmp_path / "port.pt")
    assert main([*OWN_WEIGHTS, "--with", str(tmp_path / "port.pt"), "--backward", PROMPT]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tensors"] == 2 + 9 * 4
    found = compare_gradients(tiny, ids, gradients_of_weights(tiny, ids, "not shifted"))
    assert first_of(found) == "norm.weight"
    assert "whether the pass itself agrees" in found.verdict()
    assert "may also be logits … norm, which" in found.verdict()


def test_a_gradient_that_is_wrong_alone_is_named(fp32: Model, ids: list[int]) -> None:
    healthy = gradients_hf(fp32, ids)
    name = "layers.2.feed_forward.up"
    found = compare_gradients(fp32, ids, {**healthy, name: healthy[name] * 1.01})
    assert [step.name for step in found.diverged] == [name, "layers.2.ffn_norm"]
    weight = {"layers.2.feed_forward.w1.weight.grad": torch.full((512, 192), torch.nan)}
    assert first_of(compare_gradients(fp32, ids, weight)) == "layers.2.feed_forward.w1.weight"
    with pytest.raises(UserError, match="give a prompt of at least two tokens"):
        compare_gradients(fp32, ids[:1], healthy)


def test_gradients_of_a_short_prompt(fp32: Model) -> None:
    """Of two tokens the last has no loss, so that its gradients are 0."""
    for ids in ([1, 300], [1, 300, 400]):
        found = compare_gradients(fp32, ids, gradients_hf(fp32, ids))
        assert found.agree, found.verdict()


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_prompt(
    side: Padding, tmp_path: Path, fp32: Model, ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    n = 3
    padded = [*[0] * n, *ids] if side == "left" else [*ids, *[0] * n]
    begin = n if side == "left" else 0
    mask = torch.zeros(1, len(padded), dtype=torch.long)
    mask[:, begin : begin + len(ids)] = 1
    network = hf_model(fp32, "eager")
    tokens, positions = torch.tensor([padded]), (torch.arange(len(padded)) - begin).clamp(min=0)[None]
    with _gradients(network, _HF, fp32.params) as gradients:
        logits = network(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        next_token_loss(logits[0, begin : begin + len(ids)], torch.tensor(ids)).backward()
    assert compare_gradients(fp32, ids, gradients, padding=side).agree
    assert not compare_gradients(fp32, ids, gradients).agree
    save_file(gradients, tmp_path / "port.safetensors")
    arguments = [*OWN_WEIGHTS, "--dtype", "float32", "--with", str(tmp_path / "port.safetensors"), "--backward", PROMPT]
    assert main([*arguments, "--padding", side]) == 0
    assert f"padded on the {side}, by 3 positions" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["float32", "int8"])
def test_gradients_of_this_program_agree(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OWN_WEIGHTS, "--with", other, "--backward", PROMPT]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["tensors"], figures["missing"]) == (71, 0)
    assert 0 < figures["worst_relative"] < 0.5


def test_two_tokenizers(tmp_path: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.tokenizer is not None
    own = TINY / "tokenizer.model"
    assert main([*OWN_WEIGHTS, "--tokenizer", str(own), PROMPT]) == 0
    assert "They cut the text alike: 14 tokens with the same ids." in capsys.readouterr().out
    # with half of the merges, the longest words are cut differently
    lines = own.read_text().splitlines()
    (tmp_path / "tokenizer.model").write_text("\n".join(lines[:1024]) + "\n")
    text = "Once upon a time, a dragon lived in a castle"
    assert main([*OWN_WEIGHTS, "--tokenizer", str(tmp_path / "tokenizer.model"), text]) == 1
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    first = figures["first"]
    assert text.encode()[first["begin"] : first["end"]].decode() == first["text"] == "rag"
    assert f"They cut differently first at byte {first['begin']}, in {first['text']!r}:" in out
    assert "".join(map(tiny.tokenizer.name, first["ours"])) == first["text"]
    assert len(first["theirs"]) > len(first["ours"]) == 1
    assert figures["pieces"] == 3  # a difference does not shift what follows
    other, report = ["--tokenizer", str(tmp_path / "tokenizer.model")], tmp_path / "report.json"
    assert main([*OWN_WEIGHTS, *other, "--json", str(report), text]) == 1
    saved = json.loads(report.read_text())
    assert {**saved, "differences": len(saved["differences"])} == {**figures, "differences": 3}
    assert saved["differences"][0] == first
    capsys.readouterr()
    for option in (
        "--ids",
        "--html=a.html",
        "--generate=2",
        "--backward",
        "--padding=left",
        "--tolerance=0",
        "--names=*",
    ):
        assert main([*OWN_WEIGHTS, *other, option, text]) == 2
        assert f"{option.split('=')[0]}: two tokenizers are compared on a text" in capsys.readouterr().err
    assert main([*OWN_WEIGHTS, PROMPT]) == 2
    assert "the following arguments are required: --with" in capsys.readouterr().err


def test_reports(tmp_path: Path, tiny: Model, ids: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "port.npz", **in_numpy(tiny, ids, ["gelu"]))
    page, figures = tmp_path / "report.html", tmp_path / "report.json"
    arguments = ["--with", str(tmp_path / "port.npz"), "--html", str(page), "--json", str(figures)]
    assert main([*OWN_WEIGHTS, *arguments, PROMPT]) == 1
    text = page.read_text()
    assert "They diverge first at layers.0.feed_forward.hidden" in text
    assert text.count('<td class="bad"') == 4
    assert text.count("<tr><th>") + text.count("<tr class=bad><th>") > 71
    assert "http" not in text  # needs nothing else
    saved = json.loads(figures.read_text())
    assert saved["first"] == "layers.0.feed_forward.hidden"
    assert [step["name"] for step in saved["steps"] if step["diverges"]] == saved["parted"]
    assert len(saved["steps"]) == 71
    assert main([*OWN_WEIGHTS, *arguments[:2], "--html", str(tmp_path / "no" / "report.html"), PROMPT]) == 2
    assert "there is no folder" in capsys.readouterr().err
    same = ["--html", str(page), "--json", str(tmp_path / ".." / tmp_path.name / page.name)]
    assert main([*OWN_WEIGHTS, *arguments[:2], *same, PROMPT]) == 2
    assert "--html and --json name the same file; give two" in capsys.readouterr().err


def test_transformers_runs_a_layer_at_a_time(tiny: Model, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its reordered, converted weights are those of one layer: 8B in fp32 would be 32 GB besides the model."""
    import transformers

    alive: list[int] = []

    def count(block: Any, inputs: Any) -> None:
        of_blocks = [p for layer in networks[0].model.layers for p in layer.parameters() if p.device.type != "meta"]
        alive.append(sum(p.nbytes for p in of_blocks))

    networks: list[Any] = []
    build = transformers.LlamaForCausalLM.__init__

    def remember(self: Any, config: Any) -> None:
        build(self, config)
        networks.append(self)
        for layer in self.model.layers:
            layer.mlp.register_forward_pre_hook(count)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", remember)
    tensors = trace_hf(tiny, ids, dtype=torch.float32)
    one_layer = sum(4 * dense(matrix).numel() for matrix in tiny.weights.layers[0])
    assert alive == [one_layer] * tiny.params.n_layers
    assert {p.device.type for layer in networks[0].model.layers for p in layer.parameters()} == {"meta"}
    assert compare(tiny, ids, tensors, dtype=torch.float32).agree

"""A trace computes what it needs: up to the last wanted tensor, from a layer on, and with exact attention if needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama3_raw import REFERENCE, Model, Trace, UserError, chain, forward, patch, trace
from llama3_raw.backends.choose import ops_for
from llama3_raw.ops import Ops
from llama3_raw.tracing.record import same_bits
from tests.references import seen_by_hand


@pytest.fixture(scope="module")
def ids(tiny: Model) -> list[int]:
    assert tiny.tokenizer is not None
    return tiny.tokenizer.encode("Once upon a time, there was a little", bos=True)


class Counted:
    """The exact operations, which count the matrices that are multiplied, and where attention is computed."""

    def __init__(self) -> None:
        self.products = 0

    def ops(self) -> Ops:
        def linear(x: Tensor, weight: Any) -> Tensor:
            self.products += 1
            return REFERENCE.linear(x, weight)

        return REFERENCE._replace(linear=linear)


@pytest.mark.parametrize(
    ("patterns", "products"),
    [
        (["tok_embeddings"], 0),
        (["layers.0.attention.v"], 3),
        (["layers.1.residual"], 14),
        (["layers.0.*", "layers.1.attention.q"], 8),
        (["norm"], 28),
        (["logits"], 29),
        ([], 29),
    ],
)
def test_the_pass_ends_after_the_last_wanted_tensor(
    tiny: Model, ids: list[int], patterns: list[str], products: int
) -> None:
    counted, by_hand = Counted(), seen_by_hand(tiny, ids)
    kept = trace(tiny, ids, *patterns, ops=counted.ops())
    assert counted.products == products
    assert kept == {name: by_hand[name] for name in kept}


def test_what_a_tap_wants_is_computed_too(tiny: Model, ids: list[int]) -> None:
    seen: list[str] = []
    # a patch says what it wants
    counted = Counted()
    later = patch({"layers.2.ffn_norm": lambda x, name: (seen.append(name), x)[1]})
    kept = trace(tiny, ids, "layers.0.residual", tap=chain(later, Trace("layers.1.residual")), ops=counted.ops())
    assert list(kept) == ["layers.0.residual"]
    assert seen == ["layers.2.ffn_norm"]
    assert counted.products == 2 * 7 + 4
    # a plain function may want every tensor
    counted = Counted()
    trace(tiny, ids, "layers.0.residual", tap=lambda name, x: (seen.append(name), x)[1], ops=counted.ops())
    assert seen[-1] == "logits"
    assert counted.products == 29
    with pytest.raises(UserError, match=r"no tensor is named 'layers\.9\.ffn_norm'"):  # although the pass ends before
        trace(tiny, ids, "layers.0.residual", tap=patch({"layers.9.ffn_norm": lambda x: x}))


def test_attention_is_exact_only_where_scores_are_wanted(tiny: Model, ids: list[int]) -> None:
    fast = ops_for(tiny.weights)
    exact = fast._replace(attend=REFERENCE.attend, has_scores=True)
    names = ["layers.*.residual", "logits"]
    assert trace(tiny, ids, *names) == trace(tiny, ids, *names, ops=fast)
    with_probs = trace(tiny, ids, *names, "layers.2.attention.probs")
    assert with_probs == trace(tiny, ids, *names, "layers.2.attention.probs", ops=exact)
    # what a tap wants counts
    uniform = patch({"layers.0.attention.probs": lambda probs: torch.ones_like(probs).tril() / len(ids)})
    assert trace(tiny, ids, "logits", tap=uniform) == trace(tiny, ids, "logits", tap=uniform, ops=exact)
    assert trace(tiny, ids, "logits", tap=uniform) != trace(tiny, ids, "logits")
    plain = trace(tiny, ids, "logits", tap=lambda name, x: torch.zeros_like(x) if name.endswith("probs") else x)
    assert plain == trace(tiny, ids, "logits", tap=patch({"*.probs": torch.zeros_like}))


@pytest.mark.parametrize("case", ["fast", "exact"])
@pytest.mark.parametrize("first", range(4))
def test_a_pass_from_a_layer_on_has_the_same_bits(tiny: Model, ids: list[int], first: int, case: str) -> None:
    ops = REFERENCE if case == "exact" else None
    whole = trace(tiny, ids, ops=ops)
    residual = whole["tok_embeddings" if first == 0 else f"layers.{first - 1}.residual"]
    part = trace(tiny, ids, start_at=f"layers.{first}", residual=residual, ops=ops)
    names = list(whole)
    assert list(part) == names[names.index(f"layers.{first}.attention_norm") :]
    assert part == {name: whole[name] for name in part}
    end = trace(tiny, ids, "layers.*.ffn_norm", start_at=f"layers.{first}", residual=residual, ops=ops)
    assert list(end) == [f"layers.{i}.ffn_norm" for i in range(first, 4)]


def test_a_tap_sees_the_names_of_the_whole_model(tiny: Model, ids: list[int]) -> None:
    residual = trace(tiny, ids, "layers.1.residual", ops=REFERENCE)["layers.1.residual"]
    seen, kept, zero = [], Trace("layers.3.*"), patch({"layers.3.ffn_norm": torch.zeros_like})
    tap = chain(lambda name, x: (seen.append(name), x)[1], zero, kept)
    patched = trace(tiny, ids, "logits", start_at="layers.2", residual=residual, tap=tap, ops=REFERENCE)
    assert seen[0] == "layers.2.attention_norm"
    assert kept["layers.3.ffn_norm"].abs().max() == 0
    assert same_bits(patched["logits"], trace(tiny, ids, "logits", tap=zero, ops=REFERENCE)["logits"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"start_at": "layers.2"},
            r"residual should be the input of layers.2, \[10, 192\] in bfloat16 on cpu, is None",
        ),
        ({"start_at": "layers.2", "residual": torch.zeros(10, 192)}, r"is \[10, 192\] in float32 on cpu"),
        ({"start_at": "layers.2", "residual": torch.zeros(9, 192).bfloat16()}, r"is \[9, 192\] in bfloat16"),
        ({"start_at": "layers.4", "residual": torch.zeros(10, 192)}, r"start_at should be 'layers.N', N from 0 to 3"),
        ({"start_at": "layers.2.residual", "residual": torch.zeros(10, 192)}, r"start_at should be 'layers.N'"),
        ({"start_at": 2, "residual": torch.zeros(10, 192)}, r"start_at should be 'layers.N'"),
        ({"residual": torch.zeros(10, 192)}, r"residual belongs to start_at"),
    ],
)
def test_a_wrong_start_is_refused(tiny: Model, ids: list[int], settings: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        trace(tiny, ids, **settings)


def test_a_tensor_before_the_start_is_refused(tiny: Model, ids: list[int]) -> None:
    residual = trace(tiny, ids, "layers.1.residual")["layers.1.residual"]
    for wrong in ("layers.1.residual", "tok_embeddings"):
        with pytest.raises(UserError, match=f"no tensor is named '{wrong}' in a pass of layers 2 to 3"):
            trace(tiny, ids, wrong, start_at="layers.2", residual=residual)
        with pytest.raises(UserError, match=f"no tensor is named '{wrong}' in a pass of layers 2 to 3"):
            trace(tiny, ids, start_at="layers.2", residual=residual, tap=patch({wrong: torch.clone}))


@pytest.mark.parametrize("name", ["tok_embeddings", "layers.2.attention.probs", "layers.1.residual", "norm", "logits"])
def test_a_tap_that_returns_nothing_is_named(tiny: Model, ids: list[int], name: str) -> None:
    def forgets(seen: str, tensor: Tensor) -> Tensor | None:
        return None if seen == name else tensor

    message = f"the tap forgets should return a tensor, returns None for {name}; end it with return tensor"
    with pytest.raises(UserError, match=message):
        forward(tiny.weights, tiny.params, torch.tensor(ids), tap=forgets)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        trace(tiny, ids, "logits", tap=chain(Trace("norm"), forgets))  # type: ignore[arg-type]

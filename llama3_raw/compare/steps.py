"""How model.py makes each tensor of a pass, and what ports get wrong there."""

from __future__ import annotations

from typing import NamedTuple

from ..params import Params
from ..tracing.taps import FIRST, LAST


class Made(NamedTuple):
    """How model.py makes a tensor."""

    by: str  # its function
    of: tuple[str, ...]  # the tensors that go into it
    check: str  # what ports get wrong there, in words


_BEFORE = "what comes into the layer"

_OF_LAYER = {
    "attention_norm": Made("rms_norm", (_BEFORE,), "norm_eps, the mean square in fp32, attention_norm.weight"),
    "attention.q": Made("linear by wq", ("attention_norm",), "wq, its transpose, the order of its rows"),
    "attention.k": Made("linear by wk", ("attention_norm",), "wk, its transpose, the order of its rows"),
    "attention.v": Made("linear by wv", ("attention_norm",), "wv, its transpose"),
    "attention.q_rope": Made(
        "rope", ("attention.q",), "which values are a pair (neighbours here), rope_theta, rope_scaling, the positions"
    ),
    "attention.k_rope": Made(
        "rope", ("attention.k",), "which values are a pair (neighbours here), rope_theta, rope_scaling, the positions"
    ),
    "attention.scores": Made(
        "attend: q k / sqrt(head_dim), masked",
        ("attention.q_rope", "attention.k_rope"),
        "the mask, the scale, which query heads share a kv head (neighbours here)",
    ),
    "attention.probs": Made("attend: softmax", ("attention.scores",), "the softmax in fp32, over the keys"),
    "attention.heads": Made(
        "attend: probs v",
        ("attention.probs", "attention.v"),
        "which query heads share a kv head (neighbours here)",
    ),
    "attention.out": Made("linear by wo", ("attention.heads",), "wo, its transpose, the order of the heads"),
    "attention.residual": Made("layer: a sum", (_BEFORE, "attention.out"), "what is added: the input before the norm"),
    "ffn_norm": Made("rms_norm", ("attention.residual",), "norm_eps, the mean square in fp32, ffn_norm.weight"),
    "feed_forward.gate": Made("linear by w1", ("ffn_norm",), "w1 (not w3), its transpose"),
    "feed_forward.up": Made("linear by w3", ("ffn_norm",), "w3 (not w1), its transpose"),
    "feed_forward.hidden": Made(
        "swiglu: silu(gate) * up", ("feed_forward.gate", "feed_forward.up"), "silu is of the gate (w1) alone"
    ),
    "feed_forward.out": Made("linear by w2", ("feed_forward.hidden",), "w2, its transpose"),
    "residual": Made(
        "layer: a sum", ("attention.residual", "feed_forward.out"), "what is added: the sum before the norm"
    ),
}


def how_it_is_made(params: Params) -> dict[str, Made]:
    """Every name that a tap of `forward` sees in a pass of such a model, in order, with how it comes about."""
    made = {FIRST: Made("embed", (), "the token ids (and BOS), tok_embeddings")}
    before = FIRST
    for i in range(params.n_layers):
        for name, (by, of, check) in _OF_LAYER.items():
            inputs = tuple(before if it == _BEFORE else f"layers.{i}.{it}" for it in of)
            made[f"layers.{i}.{name}"] = Made(by, inputs, check)
        before = f"layers.{i}.residual"
    made["norm"] = Made("rms_norm", (before,), "norm_eps, the mean square in fp32, norm.weight")
    made[LAST] = Made("linear by output", ("norm",), "output (tok_embeddings where they are tied), its transpose")
    return made

"""Every tensor that a tap sees: its name, its shape, how model.py makes it, and what ports get wrong there."""

from __future__ import annotations

from typing import NamedTuple

from ..params import Params

FIRST, LAST = "tok_embeddings", "logits"  # the names with which every pass begins and ends
UNFUSED = ("attention.scores", "attention.probs")  # made within `attend`; a fused one has none


class NamedTensor(NamedTuple):
    """A tensor of a pass over a lone prompt of T tokens."""

    shape: str  # in T and the fields of Params
    made_by: str  # the function of model.py, and what of it
    inputs: tuple[str, ...]  # the names of the tensors that it is made of
    check: str  # where ports differ, in words


_BEFORE = "the residual stream before the layer"
_NORM = "norm_eps, the mean square in fp32, "
_ROPE = "which values are a pair (neighbours here), rope_theta, rope_scaling, the positions"
_GROUPS = "which query heads share a kv head (neighbours here)"

_LAYER = {  # under "layers.N.", in the order of the pass
    "attention_norm": NamedTensor("T dim", "rms_norm", (_BEFORE,), _NORM + "attention_norm.weight"),
    "attention.q": NamedTensor(
        "T n_heads head_dim", "linear by wq", ("attention_norm",), "wq, its transpose, the order of its rows"
    ),
    "attention.k": NamedTensor(
        "T n_kv_heads head_dim", "linear by wk", ("attention_norm",), "wk, its transpose, the order of its rows"
    ),
    "attention.v": NamedTensor("T n_kv_heads head_dim", "linear by wv", ("attention_norm",), "wv, its transpose"),
    "attention.q_rope": NamedTensor("T n_heads head_dim", "rope", ("attention.q",), _ROPE),
    "attention.k_rope": NamedTensor("T n_kv_heads head_dim", "rope", ("attention.k",), _ROPE),
    "attention.scores": NamedTensor(
        "n_heads T T",
        "attend: q k / sqrt(head_dim), masked",
        ("attention.q_rope", "attention.k_rope"),
        "the mask, the scale, " + _GROUPS,
    ),
    "attention.probs": NamedTensor(
        "n_heads T T", "attend: softmax", ("attention.scores",), "the softmax in fp32, over the keys"
    ),
    "attention.heads": NamedTensor(
        "T n_heads head_dim", "attend: probs v", ("attention.probs", "attention.v"), _GROUPS
    ),
    "attention.out": NamedTensor(
        "T dim", "linear by wo", ("attention.heads",), "wo, its transpose, the order of the heads"
    ),
    "attention.residual": NamedTensor(
        "T dim", "layer: a sum", (_BEFORE, "attention.out"), "what is added: the input before the norm"
    ),
    "ffn_norm": NamedTensor("T dim", "rms_norm", ("attention.residual",), _NORM + "ffn_norm.weight"),
    "feed_forward.gate": NamedTensor("T hidden_dim", "linear by w1", ("ffn_norm",), "w1 (not w3), its transpose"),
    "feed_forward.up": NamedTensor("T hidden_dim", "linear by w3", ("ffn_norm",), "w3 (not w1), its transpose"),
    "feed_forward.hidden": NamedTensor(
        "T hidden_dim",
        "feed_forward: silu(gate) * up",
        ("feed_forward.gate", "feed_forward.up"),
        "silu is of the gate (w1) alone",
    ),
    "feed_forward.out": NamedTensor("T dim", "linear by w2", ("feed_forward.hidden",), "w2, its transpose"),
    "residual": NamedTensor(
        "T dim", "layer: a sum", ("attention.residual", "feed_forward.out"), "what is added: the sum before the norm"
    ),
}


def named_tensors(params: Params) -> dict[str, NamedTensor]:
    """Every name that a tap of `forward` sees in a pass of such a model, in order."""
    tensors = {FIRST: NamedTensor("T dim", "embed", (), "the token ids (and BOS), tok_embeddings")}
    before = FIRST
    for i in range(params.n_layers):
        prefix = f"layers.{i}."
        for name, tensor in _LAYER.items():
            inputs = tuple(before if it == _BEFORE else prefix + it for it in tensor.inputs)
            tensors[prefix + name] = tensor._replace(inputs=inputs)
        before = f"{prefix}residual"
    tensors["norm"] = NamedTensor("T dim", "rms_norm", (before,), _NORM + "norm.weight")
    output = "output (tok_embeddings where they are tied), its transpose"
    tensors[LAST] = NamedTensor("T vocab_size", "linear by output", ("norm",), output)
    return tensors


def token_dimension(name: str) -> int:
    """Where the dimension T of the named tensor is, from the end: -2 of [T, dim]. (Of scores it is that of queries.)"""
    shape = _LAYER[within_layer(name)].shape.split() if name.startswith("layers.") else ["T", "dim"]
    return shape.index("T") - len(shape)


def within_layer(name: str) -> str:
    """layers.3.attention.q -> attention.q"""
    return name.split(".", 2)[-1]

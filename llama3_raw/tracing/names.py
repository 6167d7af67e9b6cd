"""Every tensor that a tap sees: its name, its shape, where model.py computes it, and what ports get wrong there."""

from __future__ import annotations

from typing import NamedTuple

from ..params import Params

FIRST, LAST = "tok_embeddings", "logits"  # the first and the last name of every pass


class NamedTensor(NamedTuple):
    """A tensor of a pass over a single prompt of T tokens."""

    shape: str  # in T and the fields of Params
    made_by: str  # the function of model.py and the operation in it
    inputs: tuple[str, ...]  # the names of the tensors that it is computed from
    check: str  # where ports differ, as text


_BEFORE = "the residual stream before the layer"
_NORM = "norm_eps, the mean square in fp32, "
_ROPE = "which values form a pair (neighbours here), rope_theta, rope_scaling, the positions"
_GROUPS = "which query heads share a kv head (neighbours here)"

_LAYER = {  # under "layers.N.", in the order of the pass
    "attention_norm": NamedTensor("T dim", "rms_norm", (_BEFORE,), _NORM + "attention_norm.weight"),
    "attention.q": NamedTensor(
        "T n_heads head_dim", "linear, wq", ("attention_norm",), "wq, its transpose, the order of its rows"
    ),
    "attention.k": NamedTensor(
        "T n_kv_heads head_dim", "linear, wk", ("attention_norm",), "wk, its transpose, the order of its rows"
    ),
    "attention.v": NamedTensor("T n_kv_heads head_dim", "linear, wv", ("attention_norm",), "wv, its transpose"),
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
        "T n_heads head_dim",
        "attend: probs v",
        ("attention.probs", "attention.v"),
        _GROUPS + ", v (without RoPE), its cache, dropout",
    ),
    "attention.out": NamedTensor(
        "T dim", "linear, wo", ("attention.heads",), "wo, its transpose, the order of the heads"
    ),
    "attention.residual": NamedTensor(
        "T dim", "layer: the sum", (_BEFORE, "attention.out"), "what is added: the input before the norm"
    ),
    "ffn_norm": NamedTensor("T dim", "rms_norm", ("attention.residual",), _NORM + "ffn_norm.weight"),
    "feed_forward.gate": NamedTensor("T hidden_dim", "linear, w1", ("ffn_norm",), "w1 (not w3), its transpose"),
    "feed_forward.up": NamedTensor("T hidden_dim", "linear, w3", ("ffn_norm",), "w3 (not w1), its transpose"),
    "feed_forward.hidden": NamedTensor(
        "T hidden_dim",
        "feed_forward: silu(gate) * up",
        ("feed_forward.gate", "feed_forward.up"),
        "silu applies to the gate (w1) only",
    ),
    "feed_forward.out": NamedTensor("T dim", "linear, w2", ("feed_forward.hidden",), "w2, its transpose"),
    "residual": NamedTensor(
        "T dim", "layer: the sum", ("attention.residual", "feed_forward.out"), "what is added: the sum before the norm"
    ),
}


def named_tensors(params: Params) -> dict[str, NamedTensor]:
    """Return the tensors that a tap of `forward` sees, by name, in the order of the pass."""
    tensors = {FIRST: NamedTensor("T dim", "embed", (), "the token ids (and BOS), tok_embeddings")}
    before = FIRST
    for i in range(params.n_layers):
        prefix = f"layers.{i}."
        for name, tensor in _LAYER.items():
            inputs = tuple(before if it == _BEFORE else prefix + it for it in tensor.inputs)
            tensors[prefix + name] = tensor._replace(inputs=inputs)
        before = f"{prefix}residual"
    tensors["norm"] = NamedTensor("T dim", "rms_norm", (before,), _NORM + "norm.weight")
    output = "output (tok_embeddings if they are tied), its transpose, the position; nothing comes after it"
    tensors[LAST] = NamedTensor("T vocab_size", "linear, output", ("norm",), output)
    return tensors


def token_dimension(name: str) -> int:
    """Return the index of the dimension T, counted from the end: -2 for [T, dim]. For scores it is that of queries."""
    tensor = _LAYER.get(within_layer(name)) if name.startswith("layers.") else None
    shape = tensor.shape.split() if tensor else ["T", "dim"]  # also for a name that a custom attend taps
    return shape.index("T") - len(shape)


def within_layer(name: str) -> str:
    """layers.3.attention.q -> attention.q"""
    return name.split(".", 2)[-1]

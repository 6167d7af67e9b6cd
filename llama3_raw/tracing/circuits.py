"""Circuits from weights: matrices by head, QK and OV circuits, composition scores, induction heads.

The framework is that of Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Vectors are columns: a
matrix M reads x and writes M x. A circuit is kept as its two factors, so nothing here is [dim, dim].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..model import rope, rope_rotation, token_positions
from ..ops import accumulate_dtype
from ..params import Params
from ..quantization.matrix import Matrix
from ..weights import LayerWeights, Model, Weights
from .record import trace


class HeadWeights(NamedTuple):
    """The attention matrices of a layer by head. n_kv is n_kv_heads, or n_heads where they are repeated."""

    wq: Tensor  # [n_heads, head_dim, dim]
    wk: Tensor  # [n_kv, head_dim, dim]
    wv: Tensor  # [n_kv, head_dim, dim]
    wo: Tensor  # [n_heads, dim, head_dim]


class Circuit(NamedTuple):
    """A matrix [..., dim, dim] of low rank, as its factors: left @ right."""

    left: Tensor  # [..., dim, head_dim]
    right: Tensor  # [..., head_dim, dim]

    def matrix(self) -> Tensor:
        """Return the matrix [..., dim, dim] itself."""
        return self.left @ self.right

    def norm(self) -> Tensor:
        """Return the Frobenius norm, [...]."""
        return _norm(_triangle(self.left) @ _triangle(self.right.mT).mT)

    def singular_values(self) -> Tensor:
        """Return the singular values that can differ from 0, [..., head_dim], the largest first."""
        values: Tensor = torch.linalg.svdvals(_triangle(self.left) @ _triangle(self.right.mT).mT)
        return values

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues that can differ from 0, complex [..., head_dim]."""
        values: Tensor = torch.linalg.eigvals(_wide(self.right) @ _wide(self.left))
        return values


def dense(matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix as a tensor, dequantized if it is quantized; in fp32 then, or in `dtype`."""
    if isinstance(matrix, Tensor):
        return matrix if dtype is None else matrix.to(dtype)
    return matrix.dequantize(dtype or torch.float32)


def by_head(weights: Weights, params: Params, *, repeat_kv: bool = False) -> tuple[HeadWeights, ...]:
    """Return the attention matrices of each layer by head: views of the weights, without a copy.

    Quantized matrices are dequantized, to the dtype of the norms.

    Args:
        weights: the weights of a model.
        params: its params.
        repeat_kv: repeat each kv head for the n_heads / n_kv_heads query heads that share it, as a copy, so that index
            h is head h of all four.
    """
    return tuple(_heads_of(layer, params, repeat_kv) for layer in weights.layers)


def _heads_of(layer: LayerWeights, params: Params, repeat_kv: bool) -> HeadWeights:
    dtype, size = layer.attention_norm.dtype, params.head_dim
    wq, wk, wv = (dense(matrix, dtype).unflatten(0, (-1, size)) for matrix in (layer.wq, layer.wk, layer.wv))
    wo = dense(layer.wo, dtype).unflatten(1, (-1, size)).transpose(0, 1)
    if repeat_kv:
        wk, wv = (kv.repeat_interleave(len(wq) // len(kv), dim=0) for kv in (wk, wv))
    return HeadWeights(wq, wk, wv, wo)


def fold_norms(weights: Weights) -> Weights:
    """Return weights of the same logits, up to rounding, whose norms are all one: each matrix has the norm before it.

    wq, wk and wv are multiplied by attention_norm, w1 and w3 by ffn_norm, and output by norm, so that matrices of
    different layers can be compared as they read the stream, which the norms then only scale as a whole. The matrices
    are copies in the dtype of the norms, quantized ones too; tied embeddings become untied. The params stay the same.
    """

    def fold(matrix: Matrix, norm: Tensor) -> Tensor:  # [out, in], [in]
        wide = _wide(norm)
        return (dense(matrix, wide.dtype) * wide).to(norm.dtype)

    layers = tuple(
        layer._replace(
            attention_norm=torch.ones_like(layer.attention_norm),
            ffn_norm=torch.ones_like(layer.ffn_norm),
            **{field: fold(getattr(layer, field), layer.attention_norm) for field in ("wq", "wk", "wv")},
            **{field: fold(getattr(layer, field), layer.ffn_norm) for field in ("w1", "w3")},
        )
        for layer in weights.layers
    )
    return weights._replace(
        layers=layers, norm=torch.ones_like(weights.norm), output=fold(weights.output, weights.norm)
    )


def qk_circuits(weights: Weights, params: Params, *, distance: int = 0) -> tuple[Circuit, ...]:
    """Return the QK circuit of each layer's heads, factors of [n_heads, dim, dim]: what a head attends to.

    Head h's score of a query and a key is x_query · M[h] x_key / sqrt(head_dim), where x is the layer's attention_norm
    (or, with `fold_norms`, the stream divided by its RMS).

    Args:
        weights: the weights of a model.
        params: its params.
        distance: how many tokens the key is before the query. RoPE turns q and k by their positions, so that there is
            another circuit for each distance; 0, a token's score of itself, is wq^T wk without any rotation.
    """
    circuits = []
    for heads in by_head(weights, params, repeat_kv=True):
        wq = heads.wq
        if distance:
            positions = token_positions(distance, 1, wq.device)
            cos, sin = rope_rotation(positions, params, accumulate_dtype(wq.dtype))  # [1, 1, head_dim/2]
            wq = rope(wq.mT, cos, sin).mT  # each column is a vector of the head
        circuits.append(Circuit(wq.mT, heads.wk))
    return tuple(circuits)


def ov_circuits(weights: Weights, params: Params) -> tuple[Circuit, ...]:
    """Return the OV circuit of each layer's heads, factors of [n_heads, dim, dim]: what a head moves.

    Head h adds M[h] x to the stream for each token that it attends to, times the probability, where x is that token's
    attention_norm. The circuit is wo wv.
    """
    return tuple(Circuit(heads.wo, heads.wv) for heads in by_head(weights, params, repeat_kv=True))


def composition(weights: Weights, params: Params, kind: Literal["Q", "K", "V"], *, progress: bool = False) -> Tensor:
    """Return how much each head reads of what each earlier head writes, [layer, head, later layer, its head].

    In fp32, or the weights' fp64.

    The score is |M W| / (|M| |W|), with Frobenius norms, where W is the earlier head's OV circuit and M is the later
    head's QK circuit, transposed for "Q", as it is for "K", and its OV circuit for "V". (Elhage et al. 2021,
    "Composition of attention heads") 0 where the other layer is not later. Scores of unrelated heads are not 0 but
    about 1 / sqrt(dim): compare them with each other.

    Args:
        weights: the weights of a model, read as they are. Through the norms, which scale what a head reads, it is
            `composition(fold_norms(weights), params, kind)`.
        params: its params.
        kind: "Q", "K" or "V": through the later head's queries, keys or values. QK circuits are without RoPE.
        progress: show a bar on stderr, if it takes longer than a second.

    Raises:
        UserError: another kind.
    """
    if kind not in ("Q", "K", "V"):
        raise UserError(f"should be 'Q', 'K' or 'V', is {kind!r}", argument="kind")
    ov = [Circuit(*map(_wide, circuit)) for circuit in ov_circuits(weights, params)]
    read = ov if kind == "V" else [Circuit(*map(_wide, circuit)) for circuit in qk_circuits(weights, params)]
    if kind == "Q":
        read = [Circuit(circuit.right.mT, circuit.left.mT) for circuit in read]
    n_layers, n_heads = len(ov), params.n_heads
    scores = ov[0].left.new_zeros(n_layers, n_heads, n_layers, n_heads)
    for later in tqdm(range(1, n_layers), desc="composition", unit="layer", leave=False, delay=1, disable=not progress):
        outer, norm = _triangle(read[later].left), read[later].norm()  # [n_heads, head_dim, head_dim], [n_heads]
        for layer in range(later):
            inner = _triangle(ov[layer].right.mT).mT
            between = torch.einsum("ard,bdw->abrw", read[later].right, ov[layer].left)
            product = _norm(outer.unsqueeze(1) @ between @ inner)  # [later heads, heads]
            scores[layer, :, later] = (product / (norm.unsqueeze(1) * ov[layer].norm())).T
    return scores


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in the fp64 that it has."""
    return tensor.to(accumulate_dtype(tensor.dtype))


def _triangle(factor: Tensor) -> Tensor:
    """[..., dim, head_dim] -> [..., head_dim, head_dim], which has the same norm times any matrix after it."""
    triangle: Tensor = torch.linalg.qr(_wide(factor), mode="r").R
    return triangle


def _norm(matrix: Tensor) -> Tensor:
    """[..., n, m] -> [...]: the Frobenius norm."""
    return matrix.square().sum((-2, -1)).sqrt()


def attention_at(kept: Mapping[str, Tensor], distance: int, *, start: int | None = None) -> Tensor:
    """Return the mean probability with which each head attends `distance` tokens back, [n_layers, n_heads].

    In fp32, or the weights' fp64. Of a batch, it is the mean of what its prompts have alone, without padding.

    Args:
        kept: a trace with layers.*.attention.probs, [..., n_heads, T, T].
        distance: how many tokens the key is before the query: 1 finds previous-token heads, 0 heads that attend to the
            token itself.
        start: the first query position of the mean. None: the first that has such a key, `distance`.

    Raises:
        UserError: the trace lacks probs or is not of whole prompts (as of one position, of a pass with a cache, or a
            collection), or a prompt is too short.
    """
    names = [name for name in kept if name.endswith(".attention.probs")]
    if not names:
        raise UserError("the trace has no attention.probs; trace '*.probs'")
    if getattr(kept, "at", None) is not None:
        raise UserError("the trace is of one position; trace '*.probs' of all")
    n_queries, n_keys = kept[names[0]].shape[-2:]
    if n_queries != n_keys:
        got = f"{n_queries} queries and {n_keys} keys"
        raise UserError(f"the trace has probs of {got}; trace '*.probs' of a whole prompt, in one pass")
    lengths = getattr(kept, "lengths", None)  # of the prompts of a padded batch
    ends = [kept[names[0]].shape[-1]] if lengths is None else lengths.tolist()
    start = distance if start is None else start
    if not 0 <= distance <= start < min(ends):
        raise UserError(f"{distance} is too far for a prompt of {min(ends)} tokens", argument="distance")
    rows = []
    for name in names:
        probs = _wide(kept[name]).diagonal(-distance, -2, -1)  # [..., n_heads, T - distance]
        prompts = [probs] if lengths is None else probs.unbind()
        means = [text[..., start - distance : end - distance].mean(-1) for text, end in zip(prompts, ends, strict=True)]
        rows.append(torch.stack(means))
    return torch.stack([row.reshape(-1, row.shape[-1]).mean(0) for row in rows])


def repeated_tokens(model: Model, length: int = 64, *, seed: int = 0) -> list[int]:
    """Return begin-of-text, if the tokenizer has one, and `length` random ordinary tokens, twice in a row."""
    tokenizer = model.tokenizer
    ordinary = torch.tensor(sorted(tokenizer.ranks.values()) if tokenizer else range(model.params.vocab_size))
    chosen = torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(seed))
    bos = [tokenizer.bos_id] if tokenizer and tokenizer.bos_id is not None else []
    return bos + 2 * ordinary[chosen].tolist()


def induction_scores(model: Model, *, length: int = 64, repeats: int = 4, seed: int = 0) -> Tensor:
    """Return how much each head is an induction head, [n_layers, n_heads] in fp32 or the weights' fp64, from 0 to 1.

    On random tokens that are repeated, the mean probability with which a token in the second half attends to the token
    after its own first occurrence. (Olsson et al. 2022) An induction head is well above the others, near 1 if it does
    nothing else.

    Args:
        model: the model to run.
        length: the number of random tokens, before they are repeated.
        repeats: the number of such prompts that are averaged.
        seed: of the first of them.

    Raises:
        UserError: length or repeats are below 1, or the repeated tokens are more than the context.
    """
    for name, number in (("length", length), ("repeats", repeats)):
        if number < 1:
            raise UserError(f"{number}: should be 1 or more", argument=name)
    scores = []
    for number in range(repeats):
        ids = repeated_tokens(model, length, seed=seed + number)
        kept = trace(model, ids, "layers.*.attention.probs")
        scores.append(attention_at(kept, length - 1, start=len(ids) - length))
    return torch.stack(scores).mean(0)

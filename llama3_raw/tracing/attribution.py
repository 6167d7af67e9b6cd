"""Direct logit attribution: how much of a logit each part of the model, and each head, adds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, in_short
from ..ops import accumulate_dtype
from ..quantization.int8 import ROWS_AT_ONCE
from ..quantization.matrix import Matrix
from ..weights import Model
from .circuits import dense
from .padding import index_in_texts, integers, select_token


class Attribution(NamedTuple):
    """What each part adds to a logit, or to a difference of logits. The sum over the parts is that logit.

    by_part: [..., 1 + 2 * n_layers], for the parts in `names`. by_head: [..., n_layers, n_heads]; the heads of a layer
    sum to its attention.out. Both in fp32, or the weights' fp64.
    """

    by_part: Tensor
    by_head: Tensor

    @property
    def names(self) -> list[str]:
        """The tap names of the parts, in the order of `by_part`."""
        n_layers = self.by_head.shape[-2]
        layers = (f"layers.{i}.{part}.out" for i in range(n_layers) for part in ("attention", "feed_forward"))
        return ["tok_embeddings", *layers]


def attribute(
    kept: Mapping[str, Tensor], model: Model, direction: int | Sequence[int] | Tensor, position: int = -1
) -> Attribution:
    """Split a logit into what each part of the model added to the residual stream for it; return (by part, by head).

    The final norm is frozen: its scale is that of the whole stream at this position, so that the norm and the output
    matrix are linear in the parts. (Elhage et al. 2021; Wang et al. 2022, section 3.1) Computed in fp32, or the
    weights' fp64. The sum is the model's own logit up to the rounding of its dtype; but not if a patch changed the
    residual stream itself (a residual or attention.residual), or norm or logits, because such a change is no part.

    Args:
        kept: a trace with tok_embeddings, layers.*.attention.heads, layers.*.attention.out and
            layers.*.feed_forward.out: `trace(model, ids, "tok_embeddings", "*.heads", "*.out")`.
        model: the model of the trace.
        direction: a token for its logit, an int or a tensor such as `logits.argmax()`; two tokens for the logit of the
            first minus that of the second; or a vector [dim] in the space of the final norm's output, such as
            `logit_direction` returns.
        position: the position in the prompt whose logits are split; a negative one counts from the end of each prompt
            of a padded batch. Unused if the trace has one position only.

    Raises:
        UserError: the trace lacks a tensor, the position is not in each of its prompts, or the direction is none of
            these.
    """
    direction = _direction_of(direction, model)
    weights, device, wide = model.weights, model.weights.norm.device, accumulate_dtype(model.weights.norm.dtype)
    layers = range(len(weights.layers))

    def at_position(name: str, dimensions: int) -> Tensor:
        if name not in kept:
            raise UserError(f"the trace lacks {name!r}; trace 'tok_embeddings', '*.heads' and '*.out'")
        tensor = kept[name].to(device, wide)
        if getattr(kept, "at", None) is not None:
            return tensor  # the trace has one position only
        lengths = getattr(kept, "lengths", None)  # of the prompts of a padded batch
        if lengths is not None:
            return select_token(tensor, -dimensions, index_in_texts(position, lengths, "position"))
        length = tensor.shape[-dimensions]
        if not -length <= position < length:
            raise UserError(f"{position} is not in a prompt of {length} tokens", argument="position")
        return select_token(tensor, -dimensions, position)

    names = Attribution(torch.empty(0), torch.empty(len(layers), 0)).names
    parts = torch.stack([at_position(name, 2) for name in names], dim=-2)  # [..., parts, dim]
    mean_square = parts.sum(-2).square().mean(-1, keepdim=True)
    scale = torch.rsqrt(mean_square + model.params.norm_eps)  # [..., 1]
    direction = direction.to(device, wide) * weights.norm.to(wide)
    by_head = []
    for i in layers:
        heads = at_position(f"layers.{i}.attention.heads", 3)  # [..., n_heads, head_dim]
        through_wo = (direction @ dense(weights.layers[i].wo, wide)).view(heads.shape[-2:])
        by_head.append((heads * through_wo).sum(-1))
    return Attribution(parts @ direction * scale, torch.stack(by_head, dim=-2) * scale.unsqueeze(-1))


def logit_direction(model: Model, token: int, other: int | None = None) -> Tensor:
    """Return the direction [dim] of a token's logit, or of the logit of `token` minus that of `other`.

    In fp32, or the weights' fp64. It is the token's row of the output matrix, so a direction of the final norm's
    output. Raises UserError for a token that is not in the vocabulary, or is none.
    """
    tokens = integers([token] if other is None else [token, other])
    if tokens is None or tokens.dim() != 1:
        raise UserError(
            f"should be the id of a token, such as tokenizer.encode returns, is {token!r}", argument="token"
        )
    model.params.check_ids(tokens.tolist())
    dtype = accumulate_dtype(model.weights.norm.dtype)
    rows = [_row(model.weights.output, it, dtype) for it in tokens.tolist()]
    return rows[0] if other is None else rows[0] - rows[1]


def _direction_of(direction: int | Sequence[int] | Tensor, model: Model) -> Tensor:
    """Return what `attribute` takes as a vector [dim]. Raises UserError if it is something else."""
    dim = model.params.dim
    if isinstance(direction, Tensor) and direction.is_floating_point():
        if direction.shape == (dim,):
            return direction
    else:
        tokens = integers(direction)
        if tokens is not None and tokens.dim() < 2 and tokens.numel() in (1, 2):
            return logit_direction(model, *tokens.view(-1).tolist())
    got = list(direction.shape) if isinstance(direction, Tensor) else in_short(repr(direction))
    raise UserError(f"should be a token, two tokens, or [{dim}]; is {got}", argument="direction")


def head_results(kept: Mapping[str, Tensor], model: Model, layer: int) -> Tensor:
    """Return what each head of a layer adds to the residual stream, [..., T, n_heads, dim]; their sum is attention.out.

    Args:
        kept: a trace with layers.N.attention.heads, [..., T, n_heads, head_dim].
        model: the model of the trace.
        layer: the layer N, from 0.

    Raises:
        UserError: the trace lacks the tensor.
    """
    name = f"layers.{layer}.attention.heads"
    if name not in kept:
        raise UserError(f"the trace lacks {name!r}; trace that name too, or trace without patterns")
    heads = kept[name].to(model.weights.norm.device)
    wo = dense(model.weights.layers[layer].wo, heads.dtype).unflatten(-1, heads.shape[-2:])  # [dim, n_heads, head_dim]
    results: Tensor = torch.einsum("...hd,ohd->...ho", heads, wo)
    return results


def _row(matrix: Matrix, index: int, dtype: torch.dtype) -> Tensor:
    """Return a row of a matrix; a quantized one is dequantized ROWS_AT_ONCE rows at a time, up to that row."""
    if isinstance(matrix, Tensor):
        return matrix[index].detach().to(dtype)
    pieces = (rows.dequantize(dtype) for rows in matrix.split(ROWS_AT_ONCE))
    return next(itertools.islice(pieces, index // ROWS_AT_ONCE, None))[index % ROWS_AT_ONCE]

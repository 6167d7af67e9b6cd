"""Direct logit attribution: how much of a logit each part of the model, and each head, adds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..quantization.int8 import ROWS_AT_ONCE
from ..quantization.matrix import Matrix
from ..weights import Model
from .circuits import dense
from .padding import index_in_texts, select_token


class Attribution(NamedTuple):
    """What each part adds to a logit, or to a difference of logits. The sum over the parts is that logit.

    by_part: fp32 [..., 1 + 2 * n_layers], for the parts in `names`. by_head: fp32 [..., n_layers, n_heads]; the heads
    of a layer sum to its attention.out.
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
    kept: Mapping[str, Tensor], model: Model, direction: int | tuple[int, int] | Tensor, position: int = -1
) -> Attribution:
    """Split a logit into what each part of the model added to the residual stream for it; return (by part, by head).

    The final norm is frozen: its scale is that of the whole stream at this position, so that the norm and the output
    matrix are linear in the parts. (Elhage et al. 2021; Wang et al. 2022, section 3.1) Computed in fp32. The sum is the
    model's own logit up to the rounding of its dtype.

    Args:
        kept: a trace with tok_embeddings, layers.*.attention.heads, layers.*.attention.out and
            layers.*.feed_forward.out: `trace(model, ids, "tok_embeddings", "*.heads", "*.out")`.
        model: the model of the trace.
        direction: a token for its logit; two tokens for the logit of the first minus that of the second; or a vector
            [dim] in the space of the final norm's output, such as `logit_direction` returns.
        position: the position in the prompt whose logits are split; a negative one counts from the end of each prompt
            of a padded batch. Unused if the trace has one position only.

    Raises:
        UserError: the trace lacks a tensor, the position is not in each of its prompts, or the direction is none of
            these.
    """
    if not isinstance(direction, Tensor):
        direction = logit_direction(model, *(direction if isinstance(direction, Sequence) else (direction,)))
    if direction.shape != (model.params.dim,):
        raise UserError(
            f"should be a token, two tokens, or [{model.params.dim}]; is {list(direction.shape)}", argument="direction"
        )
    weights, device = model.weights, model.weights.norm.device
    layers = range(len(weights.layers))

    def at_position(name: str, dimensions: int) -> Tensor:
        if name not in kept:
            raise UserError(f"the trace lacks {name!r}; trace 'tok_embeddings', '*.heads' and '*.out'")
        tensor = kept[name].to(device, torch.float32)
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
    direction = direction.to(device, torch.float32) * weights.norm.float()
    by_head = []
    for i in layers:
        heads = at_position(f"layers.{i}.attention.heads", 3)  # [..., n_heads, head_dim]
        through_wo = (direction @ dense(weights.layers[i].wo).float()).view(heads.shape[-2:])
        by_head.append((heads * through_wo).sum(-1))
    return Attribution(parts @ direction * scale, torch.stack(by_head, dim=-2) * scale.unsqueeze(-1))


def logit_direction(model: Model, token: int, other: int | None = None) -> Tensor:
    """Return the direction [dim], fp32, of a token's logit, or of the logit of `token` minus that of `other`.

    It is the token's row of the output matrix, so a direction of the final norm's output. Raises UserError for a token
    that is not in the vocabulary.
    """
    model.params.check_ids([token] if other is None else [token, other])
    rows = [_row(model.weights.output, it) for it in ([token] if other is None else [token, other])]
    return rows[0] if other is None else rows[0] - rows[1]


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


def _row(matrix: Matrix, index: int) -> Tensor:
    """Return a row of a matrix in fp32; a quantized one is dequantized ROWS_AT_ONCE rows at a time, up to that row."""
    if isinstance(matrix, Tensor):
        return matrix[index].detach().float()
    pieces = (rows.dequantize(torch.float32) for rows in matrix.split(ROWS_AT_ONCE))
    return next(itertools.islice(pieces, index // ROWS_AT_ONCE, None))[index % ROWS_AT_ONCE]

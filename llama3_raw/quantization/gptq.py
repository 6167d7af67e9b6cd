"""GPTQ: a matrix in int4, rounded so that its outputs change little for the inputs that it will get.

With the second moments H = sum of x xᵀ of the inputs, a change d of a row of the matrix has the squared error d H dᵀ at
that output. Rounding each value to the nearest makes d small, and d H dᵀ much larger than it could be. (Frantar et al.
2022)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .int4 import GROUP, Int4, find_grid, nearest, pack, pieces_of

_DAMPING = 0.01  # of the mean of H's diagonal, which is added to the diagonal, as in the paper
# times in / tokens: by how much of itself the diagonal grows, as few tokens overstate correlations. stories15M loses
# 34 millinats per token if calibrated with 512 tokens, and 65 without this; with 16,384 tokens it is 29 either way
_SHRINKAGE = 2.0
_BLOCK = 128  # inputs to which the errors before them are carried over by one matrix product
_SWEEPS = 2  # of `_descend`; more gain little


class _Rounding(NamedTuple):
    """A matrix while it is rounded. It is transposed: all outputs of an input lie together."""

    matrix: Tensor  # [in, out] fp32
    values: Tensor  # [in, out], from 0 to 15, in fp32 like the other integers
    scale: Tensor  # [in / 32, out], from 1 to 255
    minimum: Tensor  # [in / 32, out], from 0 to 255
    units: Tensor  # [2, out]: of the scales and of the minimums

    def grid(self, group: int) -> tuple[Tensor, Tensor]:
        """Return the scale and the minimum of a group in the matrix's units, each [out]."""
        return self.scale[group] * self.units[0], self.minimum[group] * self.units[1]


def gptq(matrix: Tensor, moments: Tensor, tokens: int) -> Int4:
    """Round a matrix [out, in] of any floating dtype to int4, given the second moments [in, in] fp32 of its inputs.

    tokens: the number of inputs that the moments are the sum over.

    Each group gets the grid with the least squared error, weighted by the mean squares of its inputs. On these grids
    the values are rounded input by input (`_round`), then all that makes up the matrix is improved (`_descend`).

    `in` is a multiple of 32. Raises UserError if a value or a moment is not finite.
    """
    if not moments.isfinite().all():
        raise UserError("the inputs of a matrix are not numbers: the weights are damaged (see download.py --verify)")
    mean = moments.diagonal().mean()
    damped = moments / torch.where(mean == 0, 1.0, mean)
    damped.diagonal().mul_(1 + _SHRINKAGE * len(moments) / tokens).add_(_DAMPING)
    grids = [find_grid(rows.float(), damped.diagonal()) for rows in pieces_of(matrix)]
    scale, minimum, units = (torch.cat(parts).T.contiguous() for parts in zip(*grids, strict=True))
    wide = matrix.float().T.contiguous()
    rounding = _Rounding(wide, torch.empty_like(wide), scale, minimum, units)
    _round(rounding, damped)
    for _ in range(_SWEEPS):
        _descend(rounding, damped)
    values = rounding.values.T.unflatten(-1, (-1, GROUP))
    return pack(values, rounding.scale.T, rounding.minimum.T, units.T.contiguous())


def _round(rounding: _Rounding, damped: Tensor) -> None:
    """Round the values one input after another, those with the largest mean squares first, on grids that stay.

    With H = R Rᵀ, R upper triangular, d H dᵀ is the sum over the inputs i of (d R)ᵢ², and (d R)ᵢ depends on the errors
    of the inputs up to i alone. So each is rounded to make its own term least, given the errors before it. That gives
    the values of the paper, which carries errors over by the inverse of H. (Chen et al. 2025, arXiv 2507.18553)
    """
    matrix, values = rounding.matrix, rounding.values
    order = damped.diagonal().argsort(descending=True, stable=True)
    upper = _upper_factor(damped, order)
    errors = torch.empty_like(matrix)  # in this order, like `upper`
    for begin in range(0, len(order), _BLOCK):
        block = range(begin, min(begin + _BLOCK, len(order)))
        carried = upper[:begin, begin : block.stop].T @ errors[:begin]  # [block, out]
        for i, row, at in zip(block, carried, order[begin : block.stop].tolist(), strict=True):
            row.addmv_(errors[begin:i].T, upper[begin:i, i])
            scale, minimum = rounding.grid(at // GROUP)
            values[at] = nearest(matrix[at] + row / upper[i, i], scale, minimum)
            errors[i] = matrix[at] + minimum - values[at] * scale


def _upper_factor(damped: Tensor, order: Tensor) -> Tensor:
    """Return R, upper triangular, with R Rᵀ = damped[order][:, order]; both [in, in]."""
    backwards = order.flip(0)  # of a matrix that is reversed, Cholesky's lower factor, reversed, is an upper one
    while True:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped[backwards.unsqueeze(-1), backwards])
        if not failed:
            return lower.flip(0, 1)
        damped.diagonal().mul_(1.1)  # rounding made an eigenvalue negative


def _descend(rounding: _Rounding, damped: Tensor) -> None:
    """Go once through the groups, and give the scale, the minimum and each of the 32 values what is best for the rest.

    Each is an integer, of which d H dᵀ is a parabola, so that no step makes it larger. (Coordinate descent on values:
    Behdin et al. 2023, arXiv 2309.01885)
    """
    matrix, values = rounding.matrix, rounding.values
    steps, offsets = (
        (integers * unit).repeat_interleave(GROUP, dim=0)
        for integers, unit in zip((rounding.scale, rounding.minimum), rounding.units, strict=True)
    )
    errors = matrix - values * steps + offsets  # [in, out]
    unit_scale, unit_minimum = rounding.units
    for group in range(len(rounding.scale)):
        inputs = slice(group * GROUP, (group + 1) * GROUP)
        local, x = damped[inputs, inputs], values[inputs]
        slope = damped[inputs] @ errors  # [32, out]: half the gradient
        scale, minimum = rounding.scale[group], rounding.minimum[group]

        bent = local @ x  # [32, out]
        change = (slope * x).sum(0) / ((bent * x).sum(0) * unit_scale).clamp_(min=1e-30)
        better = (scale + change).round_().clamp_(1, 255)
        slope -= bent * ((better - scale) * unit_scale)
        scale.copy_(better)

        better = (minimum - slope.sum(0) / (local.sum() * unit_minimum)).round_().clamp_(0, 255)
        slope += local.sum(1, keepdim=True) * ((better - minimum) * unit_minimum)
        minimum.copy_(better)

        step, offset = rounding.grid(group)
        for i in range(GROUP):
            better = nearest(x[i] * step - offset + slope[i] / local[i, i], step, offset)
            slope.addr_(local[i], (x[i] - better) * step)
            x[i] = better
        errors[inputs] = matrix[inputs] + offset - x * step

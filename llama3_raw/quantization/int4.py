"""Matrices in 4 bits: 4.5 bits per weight with their scales, and thus 3.5 times fewer bytes to read than in bf16.

The 32 inputs of a group share a scale and a minimum of 8 bits for each output, in units that the output has for all of
its groups: weight = value * scale - minimum. That is the grid of GGML's Q4_K, whose scales and minimums have 6 bits, in
units for 256 inputs. The values of 16 outputs lie together: one vector of a processor has the same inputs of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

GROUP = 32  # inputs that share a scale
OUTPUTS = 16  # whose values lie together, here and in interleaved blocks: TOGETHER in the CPU's kernels
_LEVELS = 15  # the largest value
_CANDIDATES = 20  # scales that are tried for a group
_ROWS_AT_ONCE = 128  # a multiple of 16: what is needed in fp32 at a time, and stays in a CPU's cache


class Int4(NamedTuple):
    """A matrix [out, in] in groups of 32 inputs; the last block of 16 outputs may be padded with zeros.

    Byte [j, o, i] of `values` has the values of inputs 4 * j + i (low four bits) and 16 + 4 * j + i (high) of output o.
    """

    values: Tensor  # [out / 16, in / 32, 4, 16, 4] uint8
    scales: Tensor  # [out / 16, in / 32, 2, 16] uint8: the scales, then the minimums
    row_scales: Tensor  # [out, 2] fp32: the units of the scales and of the minimums

    @property
    def format(self) -> str:
        """The name of the format."""
        return "int4"

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((self.row_scales.shape[0], self.values.shape[1] * GROUP))

    @property
    def nbytes(self) -> int:
        """The number of bytes of the three tensors."""
        return sum(tensor.nbytes for tensor in self)

    def split(self, n_rows: int) -> Iterator[Int4]:
        """Yield the matrix in pieces of `n_rows` rows, a multiple of 16, as views."""
        assert n_rows % OUTPUTS == 0
        n_blocks = n_rows // OUTPUTS
        pieces = (self.values.split(n_blocks), self.scales.split(n_blocks), self.row_scales.split(n_rows))
        yield from itertools.starmap(Int4, zip(*pieces, strict=True))

    def part(self, dimension: int, wanted: range) -> Int4:
        """Return some rows (dimension 0) or columns (1), as views; the range begins and ends between `units`."""
        unit = self.units()[dimension]
        piece = slice(wanted.start // unit, -(-wanted.stop // unit))
        if dimension == 0:
            return Int4(self.values[piece], self.scales[piece], self.row_scales[wanted.start : wanted.stop])
        return Int4(self.values[:, piece], self.scales[:, piece], self.row_scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that this stands for; computed in fp32, then rounded to `dtype`."""
        scale, minimum = scales_of(self).unbind(-2)  # [blocks, groups, 16]
        values = unpack(self.values)  # [blocks, groups, 16, 32]
        groups = (values * scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1))
        return groups.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]].to(dtype)

    @staticmethod
    def units() -> tuple[int, int]:
        """Return the numbers of outputs and of inputs that lie together and cannot be split."""
        return OUTPUTS, GROUP

    @classmethod
    def meta(cls, shape: Sequence[int]) -> Int4:
        """Return a matrix of this shape on the meta device, for the shapes, dtypes and bytes of its tensors."""
        n_blocks, groups = -(-shape[0] // OUTPUTS), shape[1] // GROUP
        return cls(
            torch.empty(n_blocks, groups, 4, OUTPUTS, 4, dtype=torch.uint8, device="meta"),
            torch.empty(n_blocks, groups, 2, OUTPUTS, dtype=torch.uint8, device="meta"),
            torch.empty(shape[0], 2, dtype=torch.float32, device="meta"),
        )

    @classmethod
    def quantize(cls, matrix: Tensor) -> Int4:
        """Quantize a matrix [out, in] of any floating dtype: round to the nearest values of a good grid for each group.

        Raises UserError if `in` is not a multiple of 32, or if a value is not finite.
        """
        if matrix.shape[1] % GROUP:
            raise UserError(f"a matrix {list(matrix.shape)} has no int4 format: its inputs are no multiple of {GROUP}")
        pieces = [cls._quantize_rows(rows.float()) for rows in pieces_of(matrix)]
        return cls(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))

    @classmethod
    def _quantize_rows(cls, rows: Tensor) -> Int4:
        scale, minimum, units = find_grid(rows)
        step, offset = (scale * units[:, :1]).unsqueeze(-1), (minimum * units[:, 1:]).unsqueeze(-1)
        return pack(nearest(rows.unflatten(-1, (-1, GROUP)), step, offset), scale, minimum, units)


def pieces_of(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows [out, in] in pieces for `find_grid`: on a GPU larger ones, which keep it busy."""
    yield from matrix.split(_ROWS_AT_ONCE if matrix.is_cpu else 16 * _ROWS_AT_ONCE)


def nearest(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return the values from 0 to 15, in x's dtype, with which value * scale - minimum is nearest to x."""
    return ((x + minimum) / scale).round_().clamp_(0, _LEVELS)


def find_grid(rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """rows [out, in] fp32 -> scale and minimum [out, groups], numbers of 8 bits in fp32, and their units [out, 2] fp32.

    importance: the mean squares [in] of the inputs, which weigh errors, together with the sizes of the values, much as
    in GGML's quantize_row_q4_K_impl; None weighs all errors alike. Raises UserError if a value is not finite.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise UserError("a matrix has values that are not finite: the weights are damaged (see download.py --verify)")
    largest = torch.where(largest == 0, 1.0, largest)  # of zeros, any unit is right
    groups = (rows / largest).unflatten(-1, (-1, GROUP))  # in which no square overflows or vanishes
    weights = rows.new_ones(1)
    if importance is not None:
        squares = groups.square()
        weights = squares.add_(squares.mean(-1, keepdim=True)).sqrt_().mul_(importance.view(-1, GROUP))
    scale, minimum, units = _rounded_grid(*_best_grid(groups, weights))
    return scale, minimum, units * largest


def _best_grid(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """groups, weights [..., 32] fp32 -> scale and minimum [...] fp32, not negative, with the least squared error found.

    Rounding with a scale gives values, for which the best scale and minimum are a linear regression. Tried are scales
    from that of the whole range to a seventh less or more, as in GGML's make_qkx2_quants (ggml-quants.c).
    """
    weights = weights.expand(groups.shape)
    lowest, highest = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    weighted = groups * weights
    sum_w, sum_x = weights.sum(-1), weighted.sum(-1)
    least = torch.full_like(lowest, torch.inf)
    scale, minimum = torch.zeros_like(lowest), torch.zeros_like(lowest)
    for levels in torch.linspace(0.9 * _LEVELS, 1.1 * _LEVELS, _CANDIDATES).tolist():
        step = ((highest - lowest) / levels).clamp_(min=1e-12)
        values = nearest(groups, step.unsqueeze(-1), -lowest.unsqueeze(-1))
        sum_v, sum_vx = (values * weights).sum(-1), (values * weighted).sum(-1)
        sum_vv = values.square().mul_(weights).sum(-1)
        slope = (sum_w * sum_vx - sum_v * sum_x) / (sum_w * sum_vv - sum_v.square()).clamp_(min=1e-20)
        offset = (slope * sum_v - sum_x) / sum_w
        without = sum_vx / sum_vv.clamp_(min=1e-20)  # the best scale if the minimum is to be 0
        slope, offset = torch.where(offset < 0, without, slope), offset.clamp_(min=0)
        errors = (values * slope.unsqueeze(-1)).sub_(offset.unsqueeze(-1)).sub_(groups).square_().mul_(weights).sum(-1)
        better = errors < least
        least = torch.where(better, errors, least)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, offset, minimum)
    return scale, minimum


def _rounded_grid(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale and minimum [rows, groups] -> both as numbers of 8 bits, in fp32, and their units [rows, 2] fp32.

    A scale is at least 1, so that no value of its group is lost.
    """
    units = torch.stack((scale.amax(-1), minimum.amax(-1)), dim=-1) / 255
    units = torch.where(units == 0, 1.0, units)  # of zeros, any unit is right
    return (
        (scale / units[:, :1]).round_().clamp_(1, 255),
        (minimum / units[:, 1:]).round_().clamp_(0, 255),
        units,
    )


def pack(values: Tensor, scale: Tensor, minimum: Tensor, units: Tensor) -> Int4:
    """values [out, groups, 32], scale and minimum [out, groups], integers, and units [out, 2] -> the matrix."""
    padding = -len(values) % OUTPUTS
    values, scale, minimum = (
        torch.cat((x, x.new_zeros(padding, *x.shape[1:]))).to(torch.uint8).unflatten(0, (-1, OUTPUTS)).transpose(1, 2)
        for x in (values, scale, minimum)
    )  # [blocks, groups, 16, 32] and [blocks, groups, 16]
    low, high = values.unflatten(-1, (2, 4, 4)).unbind(-3)  # [blocks, groups, 16, 4, 4]
    return Int4((low | high << 4).transpose(-3, -2).contiguous(), torch.stack((scale, minimum), dim=-2), units)


def unpack(values: Tensor) -> Tensor:
    """[blocks, groups, 4, 16, 4] uint8 -> [blocks, groups, 16, 32] uint8."""
    both = torch.stack((values & 15, values >> 4), dim=-4)  # [blocks, groups, 2, 4, 16, 4]
    return both.movedim(-2, -4).flatten(-3)


def scales_of(matrix: Int4) -> Tensor:
    """Return the scales and the minimums of all groups, [blocks, groups, 2, 16] fp32."""
    n_blocks = len(matrix.values)
    units = torch.nn.functional.pad(matrix.row_scales, (0, 0, 0, n_blocks * OUTPUTS - len(matrix.row_scales)))
    return matrix.scales * units.view(n_blocks, 1, OUTPUTS, 2).transpose(-1, -2)

"""Matrices in int8: half the bytes of bf16, and thus about half the time to read them for each token.

A matrix is stored as integers from -127 to 127, with a scale for each row (an output) and one for each column (an
input). The column scales even out inputs with large weights, as in AWQ (Lin et al. 2023), but are computed from the
weights alone. Norms and embeddings are not quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # a whole matrix in fp32 would need four times the memory of the result


class Int8(NamedTuple):
    """A matrix [out, in]: values * row_scales[:, None] * column_scales."""

    values: Tensor  # [out, in] int8
    row_scales: Tensor  # [out] fp32
    column_scales: Tensor  # [in] fp32

    @property
    def format(self) -> str:
        """The name of the format."""
        return "int8"

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """The number of bytes of the three tensors."""
        return sum(tensor.nbytes for tensor in self)

    def split(self, n_rows: int) -> Iterator[Int8]:
        """Yield the matrix in pieces of `n_rows` rows, as views."""
        for values, row_scales in zip(self.values.split(n_rows), self.row_scales.split(n_rows), strict=True):
            yield Int8(values, row_scales, self.column_scales)

    def part(self, dimension: int, wanted: range) -> Int8:
        """Return some rows (dimension 0) or columns (1), as views."""
        piece = slice(wanted.start, wanted.stop)
        if dimension == 0:
            return Int8(self.values[piece], self.row_scales[piece], self.column_scales)
        return Int8(self.values[:, piece], self.row_scales, self.column_scales[piece])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] that the int8 values and scales stand for."""
        return (self.values * self.row_scales.unsqueeze(-1) * self.column_scales).to(dtype)

    @staticmethod
    def units() -> tuple[int, int]:
        """Return the numbers of outputs and of inputs that lie together and cannot be split."""
        return 1, 1

    @classmethod
    def meta(cls, shape: Sequence[int]) -> Int8:
        """Return a matrix of this shape on the meta device, for the shapes, dtypes and bytes of its tensors."""
        outputs, inputs = shape
        return cls(
            torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            torch.empty(outputs, dtype=torch.float32, device="meta"),
            torch.empty(inputs, dtype=torch.float32, device="meta"),
        )

    @classmethod
    def quantize(cls, matrix: Tensor) -> Int8:
        """Quantize a matrix [out, in] of any floating dtype: round to the nearest integers, scaled by rows and columns.

        Each absolute value is divided by the largest of its row; the scale of a column is the largest of these ratios.
        The scale of a row is then its largest absolute value, after division by the column scales, over 127. (On
        SmolLM2's matrices the error is 0.94 of that with row scales alone. Computing the two again from each other
        gains nothing there, and scales from the columns' mean squares, with a still smaller error, cost ten times as
        much in perplexity.)
        """
        largest = torch.zeros(matrix.shape[1], device=matrix.device)
        for rows in matrix.split(ROWS_AT_ONCE):
            sizes = rows.abs().float()
            largest = torch.maximum(largest, sizes.div_(_not_zero(sizes.amax(dim=-1, keepdim=True))).amax(dim=0))
        column_scales = _not_zero(largest)
        values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
        row_scales = torch.empty(matrix.shape[0], device=matrix.device)
        for rows, rounded, scales in zip(
            matrix.split(ROWS_AT_ONCE), values.split(ROWS_AT_ONCE), row_scales.split(ROWS_AT_ONCE), strict=True
        ):
            even = rows.float() / column_scales
            scales.copy_(_not_zero(even.abs().amax(dim=-1) / 127))  # [rows]
            rounded.copy_(even.div_(scales.unsqueeze(-1)).round_())
        return cls(values, row_scales, column_scales)


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)  # for a row or column of zeros any scale is right

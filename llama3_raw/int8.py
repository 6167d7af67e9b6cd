"""Matrices in int8: half the bytes of bf16, and so about half the time to read them for each token.

Each row of a matrix (one output) is cut into blocks of 256 values, rounded to whole numbers from -127 to 127 times a
scale of the block. (As Q8_0 of llama.cpp, with blocks of 32 there.) Norms and embeddings stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


BLOCK = 256  # values of a row that share a scale
_ROWS = 1024  # at a time: a whole matrix in fp32 would take four times the memory of the result


class Int8(NamedTuple):
    """A matrix [out, in] as whole numbers times the scales of their blocks."""

    values: Tensor  # [out, in] int8
    scales: Tensor  # [out, ceil(in / 256)] bf16

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """The bytes of both tensors."""
        return self.values.nbytes + self.scales.nbytes


Matrix = Tensor | Int8


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """The tensors that a matrix lies in."""
    return tuple(matrix) if isinstance(matrix, Int8) else (matrix,)


def quantize(matrix: Tensor) -> Int8:
    """[out, in] in any floating dtype -> the nearest whole numbers; a block of zeros has a scale of zero."""
    outputs, length = matrix.shape
    values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(outputs, -(-length // BLOCK), dtype=torch.bfloat16, device=matrix.device)
    for first in range(0, outputs, _ROWS):
        rows = slice(first, first + _ROWS)
        for i, block in enumerate(matrix[rows].float().split(BLOCK, dim=-1)):  # [rows, up to 256]
            scale = (block.abs().amax(dim=-1, keepdim=True) / 127).bfloat16()  # [rows, 1]
            steps = block / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
            values[rows, i * BLOCK : (i + 1) * BLOCK] = steps.round().clamp(-127, 127).to(torch.int8)
            scales[rows, i] = scale.squeeze(-1)
    return Int8(values, scales)


def widen(matrix: Int8, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that an int8 one stands for."""
    scales = matrix.scales.float().repeat_interleave(BLOCK, dim=-1)[:, : matrix.shape[1]]  # [out, in]
    return (matrix.values * scales).to(dtype)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out] in x's dtype; an int8 matrix is widened first."""
    return F.linear(x, widen(weight, x.dtype) if isinstance(weight, Int8) else weight)

"""Matrices in int8: half the bytes of bf16, and so about half the time to read them for each token.

Each row of a matrix (one output) is rounded to whole numbers from -127 to 127 times a scale of its own, as in Dettmers
et al. 2022 (LLM.int8(), vector-wise quantisation). Norms and embeddings stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Int8(NamedTuple):
    """A matrix [out, in] as whole numbers and the scales of its rows: values * scales[:, None]."""

    values: Tensor  # [out, in] int8
    scales: Tensor  # [out] fp32

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
    """[out, in] in any floating dtype -> the nearest whole numbers; a row of zeros keeps a scale of zero."""
    rounded = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = matrix.abs().amax(dim=-1).float() / 127  # [out]
    for first in range(0, len(matrix), 1024):  # a whole matrix in fp32 would take four times the memory of the result
        rows = slice(first, first + 1024)
        steps = matrix[rows].float() / scales[rows].clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
        rounded[rows] = steps.round_().to(torch.int8)
    return Int8(rounded, scales)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out] in x's dtype; an int8 matrix is widened, and its product scaled."""
    if isinstance(weight, Int8):
        return (F.linear(x, weight.values.to(x.dtype)).float() * weight.scales).to(x.dtype)
    return F.linear(x, weight)

"""`Matrix`: what `linear` multiplies by and `embed` looks up in, a tensor or a quantized matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Blocks, dequantize_blocks
from .int8 import ROWS_AT_ONCE, Int8, dequantize

Matrix = Tensor | Int8 | Blocks


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """Return the tensors that a matrix consists of."""
    if isinstance(matrix, Blocks):
        return (matrix.data,)
    return tuple(matrix) if isinstance(matrix, Int8) else (matrix,)


def embed(tokens: Tensor, table: Tensor | Blocks) -> Tensor:
    """tokens [..., T], table [vocab, dim] -> [..., T, dim] in the table's dtype; only these rows are dequantized."""
    if isinstance(table, Blocks):
        return dequantize_blocks(table._replace(data=table.data[tokens]), table.dtype)
    return F.embedding(tokens, table)


def linear(x: Tensor, weight: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out] in x's dtype; computed in `dtype`, by default x's.

    A weight that is in another dtype, in int8 or in blocks is converted ROWS_AT_ONCE rows at a time.
    """
    dtype = dtype or x.dtype
    if isinstance(weight, Int8):
        rows = zip(weight.values.split(ROWS_AT_ONCE), weight.row_scales.split(ROWS_AT_ONCE), strict=True)
        pieces = (dequantize(Int8(values, scales, weight.column_scales), dtype) for values, scales in rows)
    elif isinstance(weight, Blocks):
        pieces = (dequantize_blocks(rows, dtype) for rows in weight.split(ROWS_AT_ONCE))
    elif weight.dtype == dtype:
        return F.linear(x, weight)
    else:
        pieces = (piece.to(dtype) for piece in weight.split(ROWS_AT_ONCE))
    return torch.cat([F.linear(x.to(dtype), piece).to(x.dtype) for piece in pieces], dim=-1)

"""`Matrix`: what `linear` multiplies by and `embed` looks up in, a tensor or a quantized matrix."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Blocks
from .int4 import Int4
from .int8 import ROWS_AT_ONCE, Int8

Quantized = Int8 | Int4 | Blocks
Matrix = Tensor | Quantized

FORMATS: dict[str, type[Int8] | type[Int4]] = {"int8": Int8, "int4": Int4}  # that `quantize` makes of a matrix

DEQUANTIZED_BYTES = 1 << 28  # of a matrix at a time on a GPU: all of it in a layer of 8B; its output matrix in 4 pieces


@functools.cache
def nbytes_of(name: str, shape: tuple[int, ...]) -> int:
    """Return the number of bytes of a matrix [out, in] in the format of this name."""
    return FORMATS[name].meta(shape).nbytes


def stored_names(name: str, format_name: str) -> list[str]:
    """Return the names in files of the tensors of a matrix, in their order: its own name is that of the values."""
    return [name, *(f"{name}.{field}" for field in FORMATS[format_name]._fields[1:])]


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """Return the tensors that a matrix consists of."""
    if isinstance(matrix, Blocks):
        return (matrix.data,)
    return tuple(matrix) if isinstance(matrix, Int8 | Int4) else (matrix,)


def embed(tokens: Tensor, table: Tensor | Blocks) -> Tensor:
    """tokens [..., T], table [vocab, dim] -> [..., T, dim] in the table's dtype; only these rows are dequantized."""
    if isinstance(table, Blocks):
        assert not table.is_interleaved  # rows cannot be taken out
        return table._replace(data=table.data[tokens]).dequantize(table.dtype)
    return F.embedding(tokens, table)


def linear(x: Tensor, weight: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out] in x's dtype; computed in `dtype`, by default x's.

    A weight that is quantized or in another dtype is converted ROWS_AT_ONCE rows at a time.
    """
    dtype = dtype or x.dtype
    if isinstance(weight, Quantized):
        pieces = (rows.dequantize(dtype) for rows in weight.split(ROWS_AT_ONCE))
    elif weight.dtype == dtype:
        return F.linear(x, weight)
    else:
        pieces = (piece.to(dtype) for piece in weight.split(ROWS_AT_ONCE))
    return torch.cat([F.linear(x.to(dtype), piece).to(x.dtype) for piece in pieces], dim=-1)

"""Matrices in GGML's block formats, against the package gguf."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama3_raw.quantization.blocks import BLOCK_TYPES, Blocks, BlockType
from llama3_raw.quantization.int8 import ROWS_AT_ONCE
from llama3_raw.quantization.matrix import embed, linear, tensors_of
from tests.blocks import random_blocks

every_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def by_gguf(matrix: Blocks) -> Tensor:
    """Return the matrix in fp32, dequantized by the package gguf."""
    return torch.from_numpy(gguf.dequantize(matrix.data.numpy(), gguf.GGMLQuantizationType[matrix.kind.name]))


@every_type
def test_the_values_are_those_of_gguf_bit_for_bit(kind: BlockType) -> None:
    matrix = Blocks(random_blocks(kind, 40, 4, seed=1), kind, torch.bfloat16)
    scales = matrix.data.unflatten(-1, (-1, kind.n_bytes))[..., -2:] if kind.name == "Q6_K" else matrix.data[:, :2]
    assert (scales.contiguous().view(torch.float16).abs() < 2**-14).any(), "there should be subnormal scales"
    ours = matrix.dequantize(torch.float32)
    assert ours.shape == matrix.shape == (40, 4 * kind.n_values)
    assert torch.equal(ours.view(torch.int32), by_gguf(matrix).view(torch.int32))
    assert torch.equal(matrix.dequantize(torch.bfloat16), by_gguf(matrix).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_matrix_that_gguf_quantized_comes_back_with_a_small_error(name: str) -> None:
    matrix = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    data = torch.from_numpy(gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType[name]))
    back = Blocks(data, BLOCK_TYPES[name], torch.float32).dequantize(torch.float32)
    bits = int(name[1])
    assert (back - matrix).abs().max() < 2 * matrix.abs().max() / 2**bits


@every_type
def test_sizes_are_those_of_gguf(kind: BlockType) -> None:
    assert (kind.n_values, kind.n_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    matrix = Blocks(random_blocks(kind, 3, 2, seed=0), kind, torch.bfloat16)
    assert (matrix.shape.numel(), matrix.nbytes) == (3 * 2 * kind.n_values, 3 * 2 * kind.n_bytes)
    assert tensors_of(matrix) == (matrix.data,)


def whole_numbers(n_rows: int, n_blocks: int) -> Blocks:
    """Return a matrix in Q8_0 of integers, whose products are exact in fp32 in any order."""
    kind = BLOCK_TYPES["Q8_0"]
    data = random_blocks(kind, n_rows, n_blocks, seed=2).unflatten(-1, (-1, kind.n_bytes))
    data[..., :2] = torch.tensor(np.array([1.0], np.float16).view(np.uint8))
    return Blocks(data.flatten(1), kind, torch.bfloat16)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_linear_multiplies_by_the_dequantized_matrix(shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    matrix = whole_numbers(2 * ROWS_AT_ONCE + 5, 2)
    x = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = F.linear(x.float(), by_gguf(matrix)).to(torch.bfloat16)
    assert torch.equal(linear(x, matrix, dtype), expected)


def test_linear_never_holds_the_whole_matrix() -> None:
    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.n_values = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if tensor.dtype != torch.uint8:  # views of the matrix itself
                    self.n_values = max(self.n_values, tensor.numel())
            return result

    with Largest() as largest:
        linear(torch.ones(64), whole_numbers(8 * ROWS_AT_ONCE, 2))
    assert 0 < largest.n_values <= ROWS_AT_ONCE * 64


@every_type
def test_embed_returns_the_rows_of_the_tokens_in_the_dtype_of_the_table(kind: BlockType) -> None:
    table = Blocks(random_blocks(kind, 50, 1, seed=3), kind, torch.bfloat16)
    tokens = torch.tensor([[0, 49, 7], [7, 3, 3]])
    assert torch.equal(embed(tokens, table), by_gguf(table)[tokens].to(torch.bfloat16))
    assert torch.equal(embed(tokens[0, 1:], table), by_gguf(table)[[49, 7]].to(torch.bfloat16))

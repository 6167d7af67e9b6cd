"""Matrices in int8: their error, products and cost in perplexity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama3_raw import REFERENCE, Model, forward, generate
from llama3_raw.backends.cpu import fast_ops
from llama3_raw.quantization.int8 import Int8
from llama3_raw.quantization.matrix import linear
from tests.references import cast, dequantized_weights, quantized_weights


def error(matrix: Int8, exact: Tensor) -> Tensor:
    return (matrix.dequantize(torch.float64) - exact.double()).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_value_is_within_half_a_step(dtype: torch.dtype) -> None:
    """More rows than are quantized at a time."""
    matrix = torch.randn(1030, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = matrix.clone()
    int8 = Int8.quantize(matrix)
    assert torch.equal(matrix, before)
    assert [tensor.dtype for tensor in int8] == [torch.int8, torch.float32, torch.float32]
    assert int8.shape == matrix.shape
    assert int8.nbytes == 1030 * 96 + 4 * (1030 + 96)
    step = int8.row_scales.double().unsqueeze(-1) * int8.column_scales
    assert (error(int8, matrix) <= 0.5001 * step).all()
    assert (int8.values.abs().amax(dim=-1) == 127).all()  # uses the full range


def test_rows_and_columns_of_zeros() -> None:
    matrix = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    matrix[3] = 0
    matrix[:, 7] = 0
    dequantized = Int8.quantize(matrix).dequantize(torch.float32)
    assert not dequantized[3].any()
    assert not dequantized[:, 7].any()
    assert (dequantized - matrix).abs().max() < 0.02
    assert not Int8.quantize(torch.zeros(4, 32)).dequantize(torch.float32).any()


def test_columns_of_large_weights_do_not_coarsen_the_others() -> None:
    """With row scales alone, columns of small weights would be lost."""
    sizes = torch.logspace(-3, 0, 32)
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * sizes
    step = matrix.abs().amax(dim=-1, keepdim=True) / 127
    by_rows = (matrix / step).round() * step
    assert ((by_rows - matrix) / sizes).square().mean() > 0.1
    assert (error(Int8.quantize(matrix), matrix) / sizes).square().mean() < 0.003


def test_linear_equals_that_of_the_dequantized_matrix() -> None:
    matrix, x = torch.randn(64, 32), torch.randn(2, 3, 32)
    int8 = Int8.quantize(matrix)
    assert torch.equal(linear(x, int8), F.linear(x, int8.dequantize(torch.float32)))
    assert torch.equal(linear(x, matrix), F.linear(x, matrix))
    assert linear(x.bfloat16(), int8).dtype == torch.bfloat16


# Perplexity


def losses(model: Model, ids: list[int], window: int) -> Tensor:
    """Return -log p of each token except the first of each window, in fp64."""
    with torch.no_grad():
        return torch.cat(
            [
                F.cross_entropy(
                    forward(model.weights, model.params, piece[:-1], ops=fast_ops()), piece[1:], reduction="none"
                )
                for piece in torch.tensor(ids).split(window)
            ]
        ).double()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_perplexity_of_a_trained_model(smollm2: Model, smollm2_text: list[int]) -> None:
    """At most 0.5 % more on 2,048 tokens; the statistical error of that many tokens must be small enough."""
    ids = smollm2_text[:2048]
    model = smollm2._replace(weights=cast(smollm2.weights, torch.bfloat16))
    difference = losses(model._replace(weights=quantized_weights(model.weights, "int8")), ids, 1024) - losses(
        model, ids, 1024
    )
    uncertain = float(difference.std()) / len(difference) ** 0.5
    assert uncertain < 0.0025
    assert abs(float(difference.mean())) < 0.005


def test_perplexity_of_the_built_in_model(tiny: Model) -> None:
    """On text sampled from the model itself, where the difference is the loss of its probabilities."""
    ids = list(generate(tiny, [1], max_new_tokens=500, temperature=1.0, seed=0, stop_ids=()))
    model = tiny._replace(weights=quantized_weights(tiny.weights, "int8"))
    difference = losses(model, ids, 500) - losses(tiny, ids, 500)
    assert abs(float(difference.mean())) < 0.01


def test_exact_operations_accept_int8(tiny: Model) -> None:
    """They dequantize to bf16, and so round otherwise than the fast ones, whose integer products lose less."""
    model = tiny._replace(weights=quantized_weights(tiny.weights, "int8"))
    tokens = torch.randint(2000, (20,), generator=torch.Generator().manual_seed(0))
    exact = forward(dequantized_weights(model.weights), model.params, tokens)
    reference = forward(model.weights, model.params, tokens, ops=REFERENCE)
    fast = forward(model.weights, model.params, tokens, ops=fast_ops())
    assert (fast - exact).square().mean() <= 1.5**2 * (reference - exact).square().mean()

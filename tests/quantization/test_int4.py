"""int4: the layout, by a plain loop over its bytes, and rounding to the nearest."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from llama3_raw import UserError
from llama3_raw.quantization.int4 import Int4, find_grid, pack, unpack


def random_matrix(outputs: int = 40, inputs: int = 96) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def relative_error(matrix: Tensor, other: Tensor) -> float:
    return float((matrix - other).norm() / matrix.norm())


def by_hand(matrix: Int4) -> Tensor:
    """Return the weights, one after another, as the docstring of Int4 describes them."""
    outputs, inputs = matrix.shape
    values, scales, row_scales = (tensor.numpy() for tensor in matrix)
    weights = np.zeros((outputs, inputs), dtype=np.float32)
    for output in range(outputs):
        block, o = divmod(output, 16)
        for at in range(inputs):
            group, k = divmod(at, 32)
            half, k = divmod(k, 16)
            byte = values[block, group, k // 4, o, k % 4]
            value = np.float32(byte >> 4 if half else byte & 15)
            scale, minimum = scales[block, group, :, o].astype(np.float32) * row_scales[output]
            weights[output, at] = value * scale - minimum
    return torch.from_numpy(weights)


@pytest.mark.parametrize("outputs", [16, 40])
def test_the_layout(outputs: int) -> None:
    """Dequantized weights have the bits of a plain loop; the last block of 16 outputs may be padded."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(16, (outputs, 3, 32), generator=generator)
    scale, minimum = torch.randint(1, 256, (2, outputs, 3), generator=generator)
    units = torch.rand(outputs, 2, generator=generator)
    matrix = pack(values, scale, minimum, units)
    assert torch.equal(matrix.dequantize(torch.float32), by_hand(matrix))
    assert torch.equal(unpack(matrix.values).transpose(1, 2).flatten(0, 1)[:outputs], values.to(torch.uint8))
    whole = matrix.dequantize(torch.bfloat16)
    assert torch.equal(whole, by_hand(matrix).bfloat16())
    assert torch.equal(torch.cat([rows.dequantize(torch.bfloat16) for rows in matrix.split(16)]), whole)
    assert torch.equal(matrix.part(1, range(32, 96)).dequantize(torch.bfloat16), whole[:, 32:])
    assert matrix.nbytes == -(-outputs // 16) * 16 * 3 * (16 + 2) + outputs * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_the_nearest(dtype: torch.dtype) -> None:
    """Every value is the nearest one of its group's grid, in any dtype, and more rows than fit into one piece."""
    weights = random_matrix(200).to(dtype)
    matrix = Int4.quantize(weights)
    scale, minimum, units = find_grid(weights.float())
    step, offset = (scale * units[:, :1]).unsqueeze(-1), (minimum * units[:, 1:]).unsqueeze(-1)
    groups = weights.float().unflatten(-1, (-1, 32))
    grid = torch.arange(16) * step.unsqueeze(-1) - offset.unsqueeze(-1)  # [out, groups, 1, 16]
    least = (grid - groups.unsqueeze(-1)).abs().amin(-1)
    error = (matrix.dequantize(torch.float32) - weights.float()).unflatten(-1, (-1, 32)).abs()
    assert torch.allclose(error, least, atol=1e-6)


def test_a_smaller_error_than_q4_1() -> None:
    """GGML's type with a scale and a minimum in fp16 for 32 weights has 5 bits for each, int4 has 4.5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gguf import GGMLQuantizationType, quants
    weights = random_matrix(64, 512)
    kind = GGMLQuantizationType.Q4_1
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(weights.numpy(), kind), kind))
    ours = Int4.quantize(weights).dequantize(torch.float32)
    assert relative_error(weights, ours) < 0.95 * relative_error(weights, theirs)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**100])
def test_weights_of_any_size(factor: float) -> None:
    weights = random_matrix()
    as_they_are, scaled = Int4.quantize(weights), Int4.quantize(weights * factor)
    assert torch.equal(scaled.values, as_they_are.values)
    assert torch.equal(scaled.scales, as_they_are.scales)
    assert torch.equal(scaled.row_scales, as_they_are.row_scales * factor)


def test_zeros_and_equal_weights() -> None:
    weights = torch.zeros(5, 64)
    weights[1], weights[2], weights[3, 40:] = 0.3, -0.7, 2.0
    weights[4, 0] = 1e-20  # next to zeros
    rounded = Int4.quantize(weights).dequantize(torch.float32)
    assert not rounded[0].any()
    assert ((rounded - weights).abs() <= 1e-6 * weights.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weights = random_matrix()
    weights[3, 5] = value
    with pytest.raises(UserError, match="not finite: the weights are damaged"):
        Int4.quantize(weights)


def test_no_groups_of_32() -> None:
    with pytest.raises(UserError, match=r"\[40, 40\] has no int4 format"):
        Int4.quantize(random_matrix(40, 40))

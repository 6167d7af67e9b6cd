"""GPTQ: held against rounding to the nearest, and against the paper's algorithm in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama3_raw import UserError
from llama3_raw.quantization import gptq as module
from llama3_raw.quantization.gptq import gptq
from llama3_raw.quantization.int4 import Int4, scales_of, unpack

OUTPUTS, INPUTS = 40, 160


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int = 1000) -> Tensor:
    """Return inputs [tokens, in] with few directions that matter, and of different sizes."""
    mixing = random(30, INPUTS, seed=1)
    return (random(tokens, 30, seed=2) @ mixing + 0.3 * random(tokens, INPUTS, seed=3)) * random(INPUTS, seed=4).exp()


def grids(matrix: Int4) -> tuple[Tensor, Tensor]:
    """Return the scale and the minimum of each weight, [out, in] fp64."""
    return tuple(  # type: ignore[return-value]
        part.transpose(1, 2).flatten(0, 1)[:OUTPUTS].repeat_interleave(32, dim=-1).double()
        for part in scales_of(matrix).unbind(-2)
    )


def values_of(matrix: Int4) -> Tensor:
    return unpack(matrix.values).transpose(1, 2).flatten(0, 1)[:OUTPUTS].flatten(1)


def output_error(weights: Tensor, matrix: Int4, inputs: Tensor) -> float:
    return float((inputs.double() @ (matrix.dequantize(torch.float32) - weights).double().T).square().sum())


def is_nearest(weights: Tensor, matrix: Int4) -> Tensor:
    """Whether each value [out, in] is the nearest of its group's grid."""
    scale, minimum = grids(matrix)
    error = (matrix.dequantize(torch.float32).double() - weights).abs()
    at_the_end = ((weights < -minimum) & (values_of(matrix) == 0)) | (
        (weights > 15 * scale - minimum) & (values_of(matrix) == 15)
    )
    return (error <= 0.50001 * scale) | at_the_end


def test_the_output_changes_less() -> None:
    """On correlated inputs much less than by rounding to the nearest, and on other inputs of that kind, too."""
    weights, inputs = random(OUTPUTS, INPUTS), correlated_inputs(2000)
    seen, unseen = inputs.split(1000)
    ours, nearest = gptq(weights, seen.T @ seen, len(seen)), Int4.quantize(weights)
    assert output_error(weights, ours, seen) < 0.3 * output_error(weights, nearest, seen)
    assert output_error(weights, ours, unseen) < 0.4 * output_error(weights, nearest, unseen)
    assert not is_nearest(weights, ours).all()


def test_values_of_the_papers_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper carries errors over by the Cholesky factor of the inverse; here on the same grids, in fp64."""
    monkeypatch.setattr(module, "_SWEEPS", 0)
    monkeypatch.setattr(module, "_BLOCK", 64)  # the last block is shorter
    weights, inputs = random(OUTPUTS, INPUTS), correlated_inputs()
    moments = inputs.T @ inputs
    matrix = gptq(weights, moments, len(inputs))

    damped = moments.double()
    damped.diagonal().mul_(1 + 2 * INPUTS / len(inputs))
    damped.diagonal().add_(0.01 * moments.diagonal().mean().double())
    order = damped.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    scale, minimum = (part[:, order] for part in grids(matrix))
    left, expected = weights.double()[:, order], torch.zeros(OUTPUTS, INPUTS)
    for i in range(INPUTS):
        value = ((left[:, i] + minimum[:, i]) / scale[:, i]).round().clamp(0, 15)
        error = (left[:, i] - (value * scale[:, i] - minimum[:, i])) / factor[i, i]
        left[:, i:] -= error.unsqueeze(-1) * factor[i, i:]
        expected[:, order[i]] = value.float()
    # in fp32 a value near the middle of two may be rounded to the other, and then others of its row may be, too
    assert (values_of(matrix) == expected).float().mean() > 0.97


@pytest.mark.parametrize("sizes", [torch.ones(INPUTS), random(INPUTS).exp()], ids=["equal", "unequal"])
def test_inputs_without_correlations(sizes: Tensor) -> None:
    """Then each value is the nearest, in whatever order they are rounded."""
    weights = random(OUTPUTS, INPUTS)
    assert is_nearest(weights, gptq(weights, torch.diag(sizes), 1000)).all()


def test_descent_never_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = random(OUTPUTS, INPUTS), correlated_inputs()
    moments = inputs.T @ inputs
    # squares of these are what the diagonal gets
    damping = torch.diag(((2 * INPUTS / 1000) * moments.diagonal() + 0.01 * moments.diagonal().mean()).sqrt())
    errors = []
    for sweeps in range(5):
        monkeypatch.setattr(module, "_SWEEPS", sweeps)
        errors.append(output_error(weights, gptq(weights, moments, 1000), torch.cat((inputs, damping))))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


def test_inputs_that_are_always_zero() -> None:
    """They are rounded to the nearest."""
    weights, inputs = random(OUTPUTS, INPUTS), correlated_inputs()
    inputs[:, 40:50] = 0
    assert is_nearest(weights, gptq(weights, inputs.T @ inputs, len(inputs)))[:, 40:50].all()
    assert is_nearest(weights, gptq(weights, torch.zeros(INPUTS, INPUTS), 1)).all()


@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_few_tokens(tokens: int) -> None:
    """They say little about other inputs, for which the matrix is at least as good as rounded to the nearest."""
    weights, inputs = random(OUTPUTS, INPUTS), correlated_inputs(2000)
    seen, unseen = inputs[:tokens], inputs[1000:]
    ours = gptq(weights, seen.T @ seen, tokens)
    assert output_error(weights, ours, unseen) < output_error(weights, Int4.quantize(weights), unseen)


def test_moments_with_a_negative_eigenvalue() -> None:
    """Rounding makes one out of a zero; the damping grows until there is a Cholesky factor."""
    direction = random(INPUTS)
    moments = torch.eye(INPUTS) - 1.5 * torch.outer(direction, direction) / direction.square().sum()
    assert gptq(random(OUTPUTS, INPUTS), moments, 1_000_000).dequantize(torch.float32).isfinite().all()


def test_zeros_and_any_dtype() -> None:
    moments = torch.eye(INPUTS)
    assert not gptq(torch.zeros(OUTPUTS, INPUTS), moments, 1000).dequantize(torch.float32).any()
    weights = random(OUTPUTS, INPUTS).bfloat16()
    for ours, theirs in zip(gptq(weights, moments, 1000), gptq(weights.float(), moments, 1000), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_finite_is_refused() -> None:
    weights, moments = random(OUTPUTS, INPUTS), torch.eye(INPUTS)
    moments[3, 3] = torch.nan
    with pytest.raises(UserError, match="inputs of a matrix are not numbers"):
        gptq(weights, moments, 1000)
    weights[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite: the weights are damaged"):
        gptq(weights, torch.eye(INPUTS), 1000)

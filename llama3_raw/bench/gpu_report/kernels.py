"""Single launches on the shapes of 8B: with and without fusing, and how a product is best divided into programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.cuda_operators import (
    Division,
    division_of,
    linear_few,
    linear_three,
    multiply,
    rms_norm_by_kernel,
    rope_by_kernel,
    swiglu_few,
)
from ...model import rms_norm, rope, rope_rotation, token_positions
from ...params import Params
from ..synthetic import synthetic_checkpoint
from .stage import Emit, Stage

_SMALL = 100  # launches of a small kernel in a row
_BYTES = 1 << 30  # of different matrices in a row: many times a GPU's cache, and longer than starting a graph takes
CANDIDATES = [
    Division(16, 256, splits, stages, warps) for splits in (1, 2, 4) for stages, warps in ((4, 4), (6, 2), (4, 8))
] + [Division(32, 128, 1, 4, 4), Division(32, 256, 1, 3, 8), Division(16, 128, 1, 6, 4), Division(16, 512, 1, 3, 4)]


def shapes(params: Params) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices that differ."""
    kv_rows = params.n_kv_heads * params.head_dim
    return {
        "wk and wv": (kv_rows, params.dim),
        "wq and wo": (params.n_heads * params.head_dim, params.dim),
        "w1 and w3": (params.hidden_dim, params.dim),
        "w2": (params.dim, params.hidden_dim),
        "output": (params.vocab_size, params.dim),
    }


def divisions(stage: Stage, emit: Emit) -> None:
    """Measure a product of one row with each matrix, by each candidate and by the table's division."""
    for name, shape in shapes(synthetic_checkpoint("8b").params).items():
        matrices = _different(stage, shape)
        x = torch.randn(1, shape[1], dtype=stage.dtype, device=stage.device)

        def microseconds(division: Division, x: Tensor = x, matrices: Tensor = matrices) -> float:
            def run() -> Tensor:
                return [multiply(x, matrix, None, None, division) for matrix in matrices][-1]

            return stage.microseconds(run, len(matrices))

        candidates = CANDIDATES[::6] if stage.is_rehearsal else CANDIDATES
        times: dict[Division, float] = {}
        for division in dict.fromkeys([division_of(matrices[0]), *candidates]):
            try:
                times[division] = microseconds(division)
            except Exception as error:  # a division may need more memory than a multiprocessor has
                emit(f"{name}, {_text(division)}", type(error).__name__, is_detail=True)
                continue
            emit(f"{name}, {_text(division)}", times[division], "µs", is_detail=True)
        best = min(times, key=lambda division: times[division])
        emit(f"{name}, the table's: {_text(division_of(matrices[0]))}", times[division_of(matrices[0])], "µs")
        emit(f"{name}, the best: {_text(best)}", times[best], "µs")
        emit(f"{name}, the best, read", matrices[0].nbytes / times[best] / 1e3, "GB/s")


def _text(division: Division) -> str:
    return " ".join(f"{number} {field}" for field, number in division._asdict().items())


def _different(stage: Stage, shape: tuple[int, int]) -> Tensor:
    """Return different matrices of this shape, [number, outputs, length], so that none is in a cache."""
    number = 2 if stage.is_rehearsal else max(1, _BYTES // (shape[0] * shape[1] * stage.dtype.itemsize))
    return torch.randn(number, *shape, dtype=stage.dtype, device=stage.device) * 0.02


def launches(stage: Stage, emit: Emit) -> None:
    """Measure what is one launch next to what it replaces: three products, SwiGLU, a norm, a rotation."""
    params = synthetic_checkpoint("8b").params
    shape = shapes(params)
    x = torch.randn(1, params.dim, dtype=stage.dtype, device=stage.device)
    wq, wk = _different(stage, shape["wq and wo"]), _different(stage, shape["wk and wv"])
    w1 = _different(stage, shape["w1 and w3"])
    norm = torch.ones(params.dim, dtype=stage.dtype, device=stage.device)
    heads = x.view(1, params.n_heads, -1)
    cos, sin = rope_rotation(token_positions(17, 1, stage.device), params)
    threes = [(wq[i], wk[2 * i % len(wk)], wk[(2 * i + 1) % len(wk)]) for i in range(len(wq))]
    pairs = list(zip(w1[::2], w1[1::2], strict=False))

    def single(matrix: Tensor) -> Tensor:
        y: Tensor = linear_few(x, matrix, None, None)
        return y

    count = 2 if stage.is_rehearsal else _SMALL
    tasks: dict[str, tuple[Sequence[Any], Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
        "wq, wk and wv": (
            threes,
            lambda three: linear_three(x, *([matrix] for matrix in three)),
            lambda three: [single(matrix) for matrix in three][-1],
        ),
        "w1, w3 and SwiGLU": (
            pairs,
            lambda pair: swiglu_few(x, *([matrix] for matrix in pair)),
            lambda pair: F.silu(single(pair[0])) * single(pair[1]),
        ),
        "RMSNorm": (
            [x] * count,
            lambda x: rms_norm_by_kernel(x, norm, params.norm_eps),
            lambda x: rms_norm(x, norm, params.norm_eps),
        ),
        "RoPE": (
            [heads] * count,
            lambda heads: rope_by_kernel(heads, cos, sin),
            lambda heads: rope(heads, cos, sin),
        ),
    }
    for name, (inputs, fused, plain) in tasks.items():
        for how, function in (("in one launch", fused), ("without", plain)):

            def run(function: Callable[[Any], Tensor] = function, inputs: Sequence[Any] = inputs) -> Tensor:
                return [function(each) for each in inputs][-1]

            emit(f"{name}, {how}", stage.microseconds(run, len(inputs)), "µs")

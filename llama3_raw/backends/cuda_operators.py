"""The operators of cuda.py: each calls Triton kernels, in a way that torch.compile and a CUDA graph can keep unchanged.

None of them reads a value on the CPU, so that all can be captured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu import MAX_DECODE_ROWS

try:
    from . import cuda_kernels
except ImportError:  # torch installs Triton only for GPUs on Linux
    cuda_kernels = None  # type: ignore[assignment]
HAS_TRITON = cuda_kernels is not None

_GROUPS = 32  # of an int4 matrix at a time, 9 KB with their scales
_OFFSETS = {torch.bfloat16: (128, 0x4300), torch.float16: (1024, 0x6400)}  # numbers and their bits, for linear_few_int4
_KEYS = 64  # at a time
_SPLITS = 16  # programs that split the keys of a kv head: with Llama 3's 8, one for nearly every multiprocessor
_ADDED = 1024  # sums that a program adds up


class Division(NamedTuple):
    """How a product is divided into programs. It decides the order of a sum, and with it the last bits of a result."""

    outputs: int  # matrix rows of a program; 16 are the fewest that the matrix units accept
    inputs: int  # values of each row at a time: 256 are 512 bytes in bf16
    splits: int  # programs that share these rows; their sums are added by a second kernel if there are several
    stages: int  # blocks of the matrix that are loaded at a time
    warps: int


DIVISIONS: dict[tuple[int, int], tuple[tuple[int, Division], ...]] = {
    (8, 0): ((1 << 30, Division(16, 256, 1, 4, 4)),),  # A100
    (9, 0): ((1 << 30, Division(16, 256, 1, 4, 4)),),  # H100, H200
}
"""By the GPU's compute capability: (the most outputs of a matrix, its division), ascending.

Fixed, as a choice by the clock at run time would change the bits from run to run, and cannot be made while a graph is
captured. Not measured yet: the phase "divisions" of llama3_raw.bench.gpu_report measures what to write here.
"""


def division_of(matrix: Tensor) -> Division:
    """Return the division for products with the matrix [outputs, length] on its device."""
    capability = torch.cuda.get_device_capability(matrix.device) if matrix.is_cuda else (9, 0)
    divisions = DIVISIONS.get(capability, DIVISIONS[9, 0])
    return next(division for most, division in divisions if matrix.shape[0] <= most)


def multiply(
    x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None, division: Division
) -> Tensor:
    """Compute `linear_few` with this division."""
    (rows, length), outputs = x.shape, values.shape[0]
    x = x.contiguous()
    y = x.new_empty(rows, outputs)
    sums = y if division.splits == 1 else x.new_empty(division.splits, rows, outputs, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton uses the current one
        cuda_kernels.linear_kernel[(-(-outputs // division.outputs), division.splits)](
            *(x, values, *_scales(x, row_scales, column_scales), sums),
            *(rows, outputs, length),
            IS_INT8=row_scales is not None,
            SPLITS=division.splits,
            **_settings(division),
        )
        if division.splits > 1:
            grid = (-(-y.numel() // _ADDED),)
            cuda_kernels.add_kernel[grid](sums, y, y.numel(), SPLITS=division.splits, BLOCK=_ADDED)
    return y


def _scales(x: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scales of a matrix; for one that has none, tensors that are not read."""
    return (x, x) if row_scales is None or column_scales is None else (row_scales, column_scales)


def _settings(division: Division) -> dict[str, Any]:
    return {
        "ROWS": MAX_DECODE_ROWS,
        "OUTPUTS": division.outputs,
        "INPUTS": division.inputs,
        "num_stages": division.stages,
        "num_warps": division.warps,
    }


@torch.library.custom_op(
    "llama3_raw::linear_few",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor? row_scales, Tensor? column_scales) -> Tensor",
)
def linear_few(x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> Tensor:
    """x [rows <= MAX_DECODE_ROWS, in], values [out, in] in x's dtype, or in int8 with its scales -> [rows, out]."""
    return multiply(x, values, row_scales, column_scales, division_of(values))


@linear_few.register_fake
def _(x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op(
    "llama3_raw::linear_few_int4",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor scales, Tensor row_scales) -> Tensor",
)
def linear_few_int4(x: Tensor, values: Tensor, scales: Tensor, row_scales: Tensor) -> Tensor:
    """x [rows <= MAX_DECODE_ROWS, in] in fp16 or bf16, and the tensors of an Int4 [out, in] -> [rows, out].

    The last bit of the mantissa of 128 in bf16, and of 1024 in fp16, counts ones. So with a value of four bits in its
    last bits, that is 128 or 1024 more than the value: no conversion from integers is needed.
    """
    (rows, _), (n_blocks, groups) = x.shape, values.shape[:2]
    offset, bits = _OFFSETS[x.dtype]
    x = x.contiguous()
    y = x.new_empty(rows, len(row_scales))
    with torch.cuda.device_of(x):  # Triton uses the current one
        cuda_kernels.linear_int4_kernel[(n_blocks,)](
            *(x, values, scales, row_scales, y),
            *(rows, len(row_scales), groups),
            OFFSET=offset,
            OFFSET_BITS=bits,
            ROWS=8 if rows <= 8 else MAX_DECODE_ROWS,  # 8 are the fewest that the matrix units multiply
            GROUPS=_GROUPS,
            STAGES=3,
        )
    return y


@linear_few_int4.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, row_scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], row_scales.shape[0])


@torch.library.custom_op(
    "llama3_raw::attend_few",
    mutates_args=(),
    schema="(Tensor q, Tensor keys, Tensor values, Tensor starts) -> Tensor",
)
def attend_few(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """q [B, T, n_heads, head_dim], keys and values [B, S, n_kv_heads, head_dim], starts [B] -> the shape of q.

    T is at most MAX_DECODE_ROWS. Only the keys before starts + T are read, however large S is.
    """
    batch, n_tokens, n_heads, head_dim = q.shape
    n_kv_heads = keys.shape[-2]
    n_rep = n_heads // n_kv_heads
    rows = max(16, 1 << (n_tokens * n_rep - 1).bit_length())
    q = q.contiguous()
    sums = torch.empty(batch, n_kv_heads, _SPLITS, rows, head_dim, dtype=torch.float32, device=q.device)
    weights, largest = torch.empty(2, batch, n_kv_heads, _SPLITS, rows, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):  # Triton uses the current one
        cuda_kernels.attend_kernel[(batch * n_kv_heads, _SPLITS)](
            *(q, keys, values, starts, sums, weights, largest, n_tokens, n_kv_heads),
            *(keys.stride(0), keys.stride(1), head_dim**-0.5),
            N_REP=n_rep,
            ROWS=rows,
            HEAD_DIM=head_dim,
            KEYS=_KEYS,
            SPLITS=_SPLITS,
        )
        cuda_kernels.join_kernel[(batch * n_kv_heads, n_tokens * n_rep)](
            *(sums, weights, largest, out, n_tokens, n_kv_heads),
            N_REP=n_rep,
            ROWS=rows,
            HEAD_DIM=head_dim,
            SPLITS=_SPLITS,
        )
    return out


@attend_few.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "llama3_raw::linear_three",
    mutates_args=(),
    schema="(Tensor x, Tensor[] first, Tensor[] second, Tensor[] third) -> Tensor",
)
def linear_three(x: Tensor, first: list[Tensor], second: list[Tensor], third: list[Tensor]) -> Tensor:
    """x [rows <= MAX_DECODE_ROWS, in], the tensors of three matrices of one format -> their outputs side by side.

    The format is x's dtype or int8. One launch, and no copy of a matrix.
    """
    sizes = [matrix[0].shape[0] for matrix in (first, second, third)]
    division = division_of(first[0])
    x = x.contiguous()
    y = x.new_empty(x.shape[0], sum(sizes))
    with torch.cuda.device_of(x):
        cuda_kernels.linear_three_kernel[(sum(-(-size // division.outputs) for size in sizes),)](
            *(x, *_with_scales(x, first), *_with_scales(x, second), *_with_scales(x, third), y),
            *(x.shape[0], *sizes, x.shape[1]),
            IS_INT8=len(first) > 1,
            **_settings(division),
        )
    return y


@linear_three.register_fake
def _(x: Tensor, first: list[Tensor], second: list[Tensor], third: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], sum(matrix[0].shape[0] for matrix in (first, second, third)))


@torch.library.custom_op(
    "llama3_raw::swiglu_few", mutates_args=(), schema="(Tensor x, Tensor[] w1, Tensor[] w3) -> Tensor"
)
def swiglu_few(x: Tensor, w1: list[Tensor], w3: list[Tensor]) -> Tensor:
    """x [rows <= MAX_DECODE_ROWS, in], the tensors of two matrices as for `linear_three` -> silu(w1 x) * w3 x."""
    division = division_of(w1[0])
    x = x.contiguous()
    y = x.new_empty(x.shape[0], w1[0].shape[0])
    with torch.cuda.device_of(x):
        cuda_kernels.swiglu_kernel[(-(-y.shape[1] // division.outputs),)](
            *(x, *_with_scales(x, w1), *_with_scales(x, w3), y),
            *(*y.shape, x.shape[1]),
            IS_INT8=len(w1) > 1,
            **_settings(division),
        )
    return y


@swiglu_few.register_fake
def _(x: Tensor, w1: list[Tensor], w3: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], w1[0].shape[0])


def _with_scales(x: Tensor, matrix: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the values and the scales of a matrix; without scales, tensors that are not read."""
    return (matrix[0], *_scales(x, *(matrix[1:] or (None, None))))


@torch.library.custom_op(
    "llama3_raw::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps) -> Tensor"
)
def rms_norm_by_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like model.rms_norm, in one launch; x [..., dim] has no gaps."""
    y = torch.empty_like(x)
    dim = x.shape[-1]
    with torch.cuda.device_of(x):
        cuda_kernels.rms_norm_kernel[(x.numel() // dim,)](x, weight, y, dim, eps, DIM=1 << (dim - 1).bit_length())
    return y


@rms_norm_by_kernel.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("llama3_raw::rope", mutates_args=(), schema="(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def rope_by_kernel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like model.rope, in one launch; the tokens of x [..., T, heads, head_dim] may be apart, its heads not.

    cos and sin are those of `model.rope_rotation`: every second number in memory, as of complex ones, or every one.
    """
    heads, head_dim = x.shape[-2:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens = x.numel() // (heads * head_dim)
    with torch.cuda.device_of(x):
        cuda_kernels.rope_kernel[(tokens, heads)](
            *(x, cos, sin, y, heads, x.stride(-3), cos.numel() // (head_dim // 2), cos.stride(-1)),
            PAIRS=head_dim // 2,
            enable_fp_fusion=False,  # products rounded, as torch does
        )
    return y


@rope_by_kernel.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "llama3_raw::rope_into_cache",
    mutates_args=("keys", "values"),
    schema="(Tensor qkv, Tensor cos, Tensor sin, Tensor start, Tensor(a!) keys, Tensor(b!) values) -> Tensor",
)
def rope_into_cache(qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return q [T, n_heads, head_dim], rotated; write k, rotated, and v into the cache [S, n_kv_heads, head_dim].

    qkv [T, …]: what `linear_three` returned for wq, wk and wv. start []: the position of the first token.
    """
    n_kv_heads, head_dim = keys.shape[-2:]
    n_heads = qkv.shape[1] // head_dim - 2 * n_kv_heads
    q = qkv.new_empty(len(qkv), n_heads, head_dim)
    with torch.cuda.device_of(qkv):
        cuda_kernels.rope_into_cache_kernel[(len(qkv), n_heads + 2 * n_kv_heads)](
            *(qkv, cos, sin, start, q, keys, values, n_heads, n_kv_heads, cos.stride(-1)),
            PAIRS=head_dim // 2,
            enable_fp_fusion=False,
        )
    return q


@rope_into_cache.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    n_kv_heads, head_dim = keys.shape[-2:]
    return qkv.new_empty(len(qkv), qkv.shape[1] // head_dim - 2 * n_kv_heads, head_dim)

"""Fast operations for NVIDIA GPUs: Triton kernels for few tokens, at the speed of the memory; torch for many.

Each kernel is a custom operator of torch, so that torch.compile keeps it unchanged and fuses the operations around it.
None of them reads a value on the CPU, so that all can be captured in a CUDA graph. With TRITON_INTERPRET=1 they run on
the CPU, in float16 (the interpreter cannot multiply bfloat16); so they are tested without a GPU.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from ..errors import in_short
from ..ops import Ops, Tap
from ..quantization.int4 import OUTPUTS, Int4, scales_of
from ..quantization.int8 import Int8
from ..quantization.matrix import Matrix, embed, linear, tensors_of
from .cpu import MAX_DECODE_ROWS, attend_by_torch

try:
    from . import cuda_kernels
except ImportError:  # torch installs Triton only for GPUs on Linux
    cuda_kernels = None  # type: ignore[assignment]

_OUTPUTS = 16  # matrix rows per program: the fewest that the matrix units accept, for as many programs as possible
_INPUTS = 256  # values of each row at a time, 512 bytes
_GROUPS = 32  # of an int4 matrix at a time, 9 KB with their scales
_OFFSETS = {torch.bfloat16: (128, 0x4300), torch.float16: (1024, 0x6400)}  # numbers and their bits, for linear_few_int4
_KEYS = 64  # at a time
DEQUANTIZED_BYTES = 1 << 28  # of a matrix at a time: all of it in a layer of 8B; its output matrix in four pieces
_SPLITS = 16  # programs that split the keys of a kv head: with Llama 3's 8, one for nearly every multiprocessor


@torch.library.custom_op(
    "llama3_raw::linear_few",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor? row_scales, Tensor? column_scales) -> Tensor",
)
def linear_few(x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> Tensor:
    """x [rows <= MAX_DECODE_ROWS, in], values [out, in] in x's dtype, or in int8 with its scales -> [rows, out]."""
    (rows, length), outputs = x.shape, values.shape[0]
    x = x.contiguous()
    y = x.new_empty(rows, outputs)
    is_int8 = row_scales is not None
    with torch.cuda.device_of(x):  # Triton uses the current one
        cuda_kernels.linear_kernel[(-(-outputs // _OUTPUTS),)](
            *(x, values, row_scales if is_int8 else x, column_scales if is_int8 else x, y),
            *(rows, outputs, length),
            IS_INT8=is_int8,
            ROWS=MAX_DECODE_ROWS,
            OUTPUTS=_OUTPUTS,
            INPUTS=_INPUTS,
            num_stages=4,  # blocks of the matrix that are loaded at a time
        )
    return y


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


def fast_linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; few rows at the speed of the memory."""
    rows = x.numel() // x.shape[-1]
    is_few = 0 < rows <= MAX_DECODE_ROWS and x.dtype.itemsize == 2 and not x.requires_grad
    if not (is_few and all(tensor.is_contiguous() for tensor in tensors_of(weight))):
        return linear_many(x, weight)
    y: Tensor
    if isinstance(weight, Int4):
        y = linear_few_int4(x.reshape(rows, -1), *weight)
    elif isinstance(weight, Int8):
        y = linear_few(x.reshape(rows, -1), *weight)
    elif isinstance(weight, Tensor) and weight.dtype == x.dtype:
        y = linear_few(x.reshape(rows, -1), weight, None, None)
    else:
        return linear(x, weight)
    return y.view(*x.shape[:-1], -1)


def linear_many(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; many rows, with torch's product.

    A matrix in int8 or int4 is dequantized and multiplied DEQUANTIZED_BYTES at a time. As in the kernel, x and not the
    matrix is multiplied by the column scales of int8.
    """
    if isinstance(weight, Int8):
        x, panels = (x * weight.column_scales).to(x.dtype), _panels_of_int8(weight, x.dtype)
    elif isinstance(weight, Int4):
        panels = _panels_of_int4(weight, x.dtype)
    else:
        return linear(x, weight)
    products = [F.linear(x, panel) for panel in panels]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _panels_of_int8(weight: Int8, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield rows of the matrix without its column scales: one pass reads a byte per weight and writes `dtype`."""
    for rows in weight.split(max(1, DEQUANTIZED_BYTES // (weight.shape[1] * dtype.itemsize))):
        panel = torch.empty(rows.shape, dtype=dtype, device=rows.values.device)
        yield torch.mul(rows.values, rows.row_scales.unsqueeze(-1), out=panel)


def _panels_of_int4(weight: Int4, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield rows of the matrix: after the four bits are taken apart, one pass computes in fp32 and writes `dtype`."""
    n_blocks = max(1, DEQUANTIZED_BYTES // (weight.shape[1] * dtype.itemsize * OUTPUTS))
    for rows in weight.split(n_blocks * OUTPUTS):
        scale, minimum = scales_of(rows)[:, :, :, None, :, None].unbind(2)  # each [blocks, groups, 1, 16, 1]
        panel = torch.empty(len(rows.values), OUTPUTS, scale.shape[1], 2, 4, 4, dtype=dtype, device=scale.device)
        low, high = panel.permute(3, 0, 2, 4, 1, 5)  # each [blocks, groups, 4, 16, 4], like the values
        torch.addcmul(-minimum, rows.values & 15, scale, out=low)
        torch.addcmul(-minimum, rows.values >> 4, scale, out=high)
        yield panel.view(-1, weight.shape[1])[: rows.shape[0]]


def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
    """Like model.attend, without taps of the scores."""
    n_tokens, head_dim = q.shape[-3], q.shape[-1]
    by_kernel = q.dtype.itemsize == 2 and head_dim in (32, 64, 128, 256)
    has_strides = all(x.dim() <= 4 and x.stride()[-2:] == (head_dim, 1) for x in (keys, values))
    if (
        n_tokens <= MAX_DECODE_ROWS
        and by_kernel
        and has_strides
        and keys.stride() == values.stride()
        and not q.requires_grad
    ):
        if isinstance(start, int):
            starts = torch.full(q.shape[:-3] or (1,), start, device=q.device)
        else:
            starts = start.reshape(-1)
        four = (x if x.dim() == 4 else x.unsqueeze(0) for x in (q, keys, values))
        attended: Tensor = attend_few(*four, starts)
        return attended.view(q.shape)
    return attend_without_kernels(q, keys, values, start, tap)


def attend_without_kernels(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
    """Like model.attend, without taps of the scores; for any number of tokens."""
    if isinstance(start, int):
        return attend_to_prompt(q, keys, values)
    return attend_by_torch(q, keys, values, start)


def attend_to_prompt(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Like model.attend, for tokens that are the last ones of `keys`: with flash attention if torch has it.

    (Dao 2023, FlashAttention-2) No key is repeated for the query heads that share it. Otherwise (fp32, GPUs older than
    the A100) attention is computed in blocks: torch's only other implementation in which heads share keys needs memory
    for all scores.
    """
    from torch.nn.attention.bias import causal_lower_right  # imports torch.compile, which takes two seconds

    n_tokens, n_keys = q.shape[-3], keys.shape[-3]
    four = (1,) * (4 - q.dim())  # torch uses flash attention only with four dimensions
    q4, keys4, values4 = (x.transpose(-3, -2) for x in (q, keys, values))
    q4, keys4, values4 = (x.reshape(*four, *x.shape) for x in (q4, keys4, values4))
    if not can_use_flash_attention(SDPAParams(q4, keys4, values4, None, 0.0, False, True)):  # same as in the bias below
        return attend_by_torch(q, keys, values, n_keys - n_tokens)
    whole = n_tokens == n_keys
    attended = F.scaled_dot_product_attention(
        *(q4, keys4, values4),
        attn_mask=None if whole else causal_lower_right(n_tokens, n_keys),
        is_causal=whole,
        enable_gqa=True,
    )
    return attended.view(q.transpose(-3, -2).shape).transpose(-3, -2)


@functools.cache
def cuda_ops() -> Ops:
    """Return the fast operations for NVIDIA GPUs. Without Triton torch computes, and a line on stderr says so.

    Triton needs a C compiler and Python's headers, and reports a missing one only when a kernel is first called, so one
    is called here.
    """
    try:
        ones = torch.ones(16, 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
        linear_few(ones, ones, None, None)
    except Exception as error:  # compilers raise every kind of exception
        reason = "there is no Triton" if cuda_kernels is None else f"Triton fails ({in_short(error)})"
        print(f"llama3_raw: {reason}; tokens come slower, computed by torch", file=sys.stderr)
        return Ops(embed=embed, linear=linear_many, attend=attend_without_kernels, max_packed=1024)
    return Ops(embed=embed, linear=fast_linear, attend=attend, max_packed=1024, can_capture=True)

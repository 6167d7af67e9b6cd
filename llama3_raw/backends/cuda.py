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
from ..model import rms_norm, rope
from ..ops import Ops, Tap
from ..quantization.int4 import OUTPUTS, Int4, scales_of
from ..quantization.int8 import Int8
from ..quantization.matrix import DEQUANTIZED_BYTES, Matrix, embed, linear, tensors_of
from .cpu import MAX_DECODE_ROWS, attend_by_torch
from .cuda_operators import HAS_TRITON, attend_few, linear_few, linear_few_int4, rms_norm_by_kernel, rope_by_kernel


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
    n_tokens, n_keys = q.shape[-3], keys.shape[-3]
    four = (1,) * (4 - q.dim())  # torch uses flash attention only with four dimensions
    q4, keys4, values4 = (x.transpose(-3, -2) for x in (q, keys, values))
    q4, keys4, values4 = (x.reshape(*four, *x.shape) for x in (q4, keys4, values4))
    params = SDPAParams(q4, keys4, values4, None, 0.0, False, True)
    if q.shape[-1] % 8 or not can_use_flash_attention(params):
        return attend_by_torch(q, keys, values, n_keys - n_tokens)
    return _flash_attention(q4, keys4, values4).view(q.transpose(-3, -2).shape).transpose(-3, -2)


def _flash_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [B, n_heads, T, head_dim] of the last T of S tokens, keys and values [B, n_kv_heads, S, head_dim] -> like q.

    As torch.nn.attention.bias.CausalBias calls it. Left to choose, torch takes cuDNN's attention on an H100, which
    makes a plan for each length of a prompt.
    """
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, True)[0]
    return attended


def fast_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like model.rms_norm: one kernel instead of eight."""
    if x.dtype.itemsize == 2 and x.is_contiguous() and weight.dtype == x.dtype and not x.requires_grad and x.numel():
        normed: Tensor = rms_norm_by_kernel(x, weight, eps)
        return normed
    return rms_norm(x, weight, eps)


def fast_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Like model.rope: one kernel instead of nine."""
    head_dim = x.shape[-1]
    is_power = head_dim & (head_dim - 1) == 0  # Triton's blocks have such sizes
    has_strides = x.stride()[-2:] == (head_dim, 1) and (x.dim() == 3 or x.is_contiguous())
    if x.dtype.itemsize == 2 and is_power and has_strides and not x.requires_grad and x.numel():
        rotated: Tensor = rope_by_kernel(x, cos, sin)
        return rotated
    return rope(x, cos, sin)


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
        reason = f"Triton fails ({in_short(error)})" if HAS_TRITON else "there is no Triton"
        print(f"llama3_raw: {reason}; tokens come slower, computed by torch", file=sys.stderr)
        return Ops(embed=embed, linear=linear_many, attend=attend_without_kernels, max_packed=1024)
    return Ops(
        embed=embed,
        linear=fast_linear,
        attend=attend,
        rms_norm=fast_rms_norm,
        rope=fast_rope,
        max_packed=1024,
        can_capture=True,
    )

"""Fast operations for NVIDIA GPUs: few tokens by Triton, at the speed of the memory; many by torch.

Each kernel is a custom operator of torch, so that torch.compile takes it as it is and fuses what stands between. None
of them looks at a value on the CPU, so that all can be captured in a graph. With TRITON_INTERPRET=1 they run on the
CPU, in float16 (the interpreter multiplies no bfloat16), which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from ..errors import in_short
from ..ops import Ops, Tap
from ..quantization.int8 import Int8
from ..quantization.matrix import Matrix, linear
from .cpu import FEW, attend_by_torch

try:
    from . import cuda_kernels
except ImportError:  # Triton, which torch brings along for GPUs on Linux only
    cuda_kernels = None  # type: ignore[assignment]

_OUTPUTS = 16  # rows of a matrix in a program: the fewest that the matrix units take, for as many programs as can be
_INPUTS = 256  # of each row at a time, 512 bytes
_KEYS = 64  # at a time
WIDENED_BYTES = 1 << 28  # of an int8 matrix at a time: all of it, in a layer of 8B; the output matrix in five pieces
_SHARES = 16  # programs that share the keys of a kv head: with the 8 heads of Llama 3, one for nearly every processor


@torch.library.custom_op(
    "llama3_raw::linear_few",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor? row_scales, Tensor? column_scales) -> Tensor",
)
def linear_few(x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> Tensor:
    """x [rows, in], up to FEW of them, values [out, in] in x's dtype, or int8 with its scales -> [rows, out]."""
    (rows, length), outputs = x.shape, values.shape[0]
    x = x.contiguous()
    y = x.new_empty(rows, outputs)
    is_int8 = row_scales is not None
    with torch.cuda.device_of(x):  # Triton asks for the current one
        cuda_kernels.linear_kernel[(-(-outputs // _OUTPUTS),)](
            *(x, values, row_scales if is_int8 else x, column_scales if is_int8 else x, y),
            *(rows, outputs, length),
            IS_INT8=is_int8,
            ROWS=FEW,
            OUTPUTS=_OUTPUTS,
            INPUTS=_INPUTS,
            num_stages=4,  # parts of the matrix on their way at a time
        )
    return y


@linear_few.register_fake
def _(x: Tensor, values: Tensor, row_scales: Tensor | None, column_scales: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op(
    "llama3_raw::attend_few",
    mutates_args=(),
    schema="(Tensor q, Tensor keys, Tensor values, Tensor starts) -> Tensor",
)
def attend_few(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """q [B, T, n_heads, head_dim], keys and values [B, S, n_kv_heads, head_dim], starts [B] -> as q.

    T is at most FEW. Of the keys only those before starts + T are read, wherever S ends.
    """
    batch, n_tokens, n_heads, head_dim = q.shape
    n_kv_heads = keys.shape[-2]
    n_rep = n_heads // n_kv_heads
    rows = max(16, 1 << (n_tokens * n_rep - 1).bit_length())
    q = q.contiguous()
    sums = torch.empty(batch, n_kv_heads, _SHARES, rows, head_dim, dtype=torch.float32, device=q.device)
    weights, largest = torch.empty(2, batch, n_kv_heads, _SHARES, rows, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):  # Triton asks for the current one
        cuda_kernels.attend_kernel[(batch * n_kv_heads, _SHARES)](
            *(q, keys, values, starts, sums, weights, largest, n_tokens, n_kv_heads),
            *(keys.stride(0), keys.stride(1), head_dim**-0.5),
            N_REP=n_rep,
            ROWS=rows,
            HEAD_DIM=head_dim,
            KEYS=_KEYS,
            SHARES=_SHARES,
        )
        cuda_kernels.join_kernel[(batch * n_kv_heads, n_tokens * n_rep)](
            *(sums, weights, largest, out, n_tokens, n_kv_heads),
            N_REP=n_rep,
            ROWS=rows,
            HEAD_DIM=head_dim,
            SHARES=_SHARES,
        )
    return out


@attend_few.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def fast_linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; few rows at the speed of the memory."""
    rows = x.numel() // x.shape[-1]
    values, *scales = weight if isinstance(weight, Int8) else (weight,)
    is_plain = values.is_contiguous() and (scales or values.dtype == x.dtype) and not x.requires_grad
    if not (0 < rows <= FEW and x.dtype.itemsize == 2 and is_plain):
        return linear_many(x, weight)
    y: Tensor = linear_few(x.reshape(rows, -1), values, *(scales or (None, None)))
    return y.view(*x.shape[:-1], -1)


def linear_many(x: Tensor, weight: Matrix) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]; many rows, by torch's product.

    As in the kernel x takes the scales of the columns. Then an int8 matrix is widened in one pass over it, which reads
    a byte of each value and writes x's dtype, and WIDENED_BYTES of it at a time are multiplied.
    """
    if not isinstance(weight, Int8):
        return linear(x, weight)
    scaled = (x * weight.column_scales).to(x.dtype)  # [..., in]
    at_once = max(1, WIDENED_BYTES // (x.shape[-1] * x.dtype.itemsize))  # rows
    products = []
    for values, scales in zip(weight.values.split(at_once), weight.row_scales.split(at_once), strict=True):
        wide = torch.empty(values.shape, dtype=x.dtype, device=x.device)
        products.append(F.linear(scaled, torch.mul(values, scales.unsqueeze(-1), out=wide)))
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
    """As model.attend, but there are no scores to tap."""
    n_tokens, head_dim = q.shape[-3], q.shape[-1]
    by_kernel = q.dtype.itemsize == 2 and head_dim in (32, 64, 128, 256)
    has_strides = all(x.dim() <= 4 and x.stride()[-2:] == (head_dim, 1) for x in (keys, values))
    if n_tokens <= FEW and by_kernel and has_strides and keys.stride() == values.stride() and not q.requires_grad:
        if isinstance(start, int):
            starts = torch.full(q.shape[:-3] or (1,), start, device=q.device)
        else:
            starts = start.reshape(-1)
        four = (x if x.dim() == 4 else x.unsqueeze(0) for x in (q, keys, values))
        attended: Tensor = attend_few(*four, starts)
        return attended.view(q.shape)
    return attend_without_kernels(q, keys, values, start, tap)


def attend_without_kernels(q: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, tap: Tap) -> Tensor:
    """As model.attend, but there are no scores to tap; for any number of tokens."""
    if isinstance(start, int):
        return attend_to_prompt(q, keys, values)
    return attend_by_torch(q, keys, values, start)


def attend_to_prompt(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As model.attend, for tokens that are the last of those in `keys`: by flash attention where torch has it.

    (Dao 2023, FlashAttention-2) Query heads that share a kv head do so here too: no key is repeated. Elsewhere (fp32,
    GPUs older than the A100) it is by blocks: of torch's other ways none lets heads share, but the one with all scores.
    """
    from torch.nn.attention.bias import causal_lower_right  # which brings torch.compile, two seconds, only where needed

    n_tokens, n_keys = q.shape[-3], keys.shape[-3]
    four = (1,) * (4 - q.dim())  # torch takes the fast way for four dimensions only
    q4, keys4, values4 = (x.transpose(-3, -2) for x in (q, keys, values))
    q4, keys4, values4 = (x.reshape(*four, *x.shape) for x in (q4, keys4, values4))
    if not can_use_flash_attention(SDPAParams(q4, keys4, values4, None, 0.0, False, True)):  # as the bias below asks
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
    """The fast operations for NVIDIA GPUs; one line on stderr says what is lost where Triton cannot be used.

    That is tried: it needs a C compiler and Python's headers, and says so only when a kernel is first called.
    """
    try:
        some = torch.ones(16, 16, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
        linear_few(some, some, None, None)
    except Exception as error:  # of compilers, in a world of their own
        reason = "there is no Triton" if cuda_kernels is None else f"Triton fails ({in_short(error)})"
        print(f"llama3_raw: {reason}; tokens come slower, by torch itself", file=sys.stderr)
        return Ops(embed=F.embedding, linear=linear_many, attend=attend_without_kernels)
    return Ops(embed=F.embedding, linear=fast_linear, attend=attend, max_packed=1024, can_capture=True)

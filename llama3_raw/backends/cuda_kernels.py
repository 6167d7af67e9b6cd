"""The GPU's kernels, in Triton's language, which is Python's syntax: what cuda.py calls.

A kernel runs as many programs side by side, each for its part; the names in capitals are fixed when it is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def linear_kernel(
    x,  # [rows, length]
    matrix,  # [outputs, length]
    row_scales,  # [outputs] fp32, for int8
    column_scales,  # [length] fp32, for int8
    y,  # [rows, outputs]
    rows,
    outputs,
    length,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Some outputs of a product for all rows, so that the matrix is read once; any number of rows has the same bits."""
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in range(0, length, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        part = tl.load(
            matrix + output.to(tl.int64)[:, None] * length + column[None, :],
            mask=(output[:, None] < outputs) & (column[None, :] < length),
            other=0,
            eviction_policy="evict_first",  # it is read once, x by every program
        )
        some = tl.load(
            x + row[None, :] * length + column[:, None],
            mask=(row[None, :] < rows) & (column[:, None] < length),
            other=0,
        )
        if IS_INT8:
            scale = tl.load(column_scales + column, mask=column < length, other=0)
            some = (some.to(tl.float32) * scale[:, None]).to(some.dtype)
            total = tl.dot(part.to(some.dtype), some, total)
        else:
            total = tl.dot(part, some, total)
    if IS_INT8:
        total *= tl.load(row_scales + output, mask=output < outputs, other=0)[:, None]
    tl.store(
        y + row[None, :] * outputs + output[:, None],
        total.to(y.dtype.element_ty),
        mask=(row[None, :] < rows) & (output[:, None] < outputs),
    )


@triton.jit
def attend_kernel(
    q,  # [B, T, n_heads, head_dim]
    keys,  # [B, S, n_kv_heads, head_dim], by its strides
    values,  # likewise
    starts,  # [B]
    sums,  # [B, n_kv_heads, SHARES, ROWS, head_dim] fp32: of the values, each times its weight
    weights,  # [B, n_kv_heads, SHARES, ROWS] fp32: the sum of the weights, which are exp(score - largest)
    largest,  # [B, n_kv_heads, SHARES, ROWS] fp32
    n_tokens,
    n_kv_heads,
    batch_stride,
    token_stride,
    scale,
    N_REP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """A share of a kv head's keys, for its query heads and all tokens, which are the rows. (Dao et al. 2023)"""
    head = tl.program_id(0) % n_kv_heads
    batch = tl.program_id(0) // n_kv_heads
    share = tl.program_id(1)
    start = tl.load(starts + batch)
    end = start + n_tokens  # what is behind it in the cache is not read
    each = tl.cdiv(tl.cdiv(end, SHARES), KEYS) * KEYS
    first = share * each
    last = tl.minimum(first + each, end)

    row = tl.arange(0, ROWS)
    token = row // N_REP
    column = tl.arange(0, HEAD_DIM)
    query_head = head * N_REP + row % N_REP
    at = ((batch * n_tokens + token) * n_kv_heads * N_REP + query_head)[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(q + at, mask=(token < n_tokens)[:, None], other=0)
    head_of_cache = batch.to(tl.int64) * batch_stride + head * HEAD_DIM

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for begin in range(first, last, KEYS):
        place = begin + tl.arange(0, KEYS)
        offset = head_of_cache + place.to(tl.int64)[:, None] * token_stride + column[None, :]
        key = tl.load(keys + offset, mask=(place < last)[:, None], other=0)
        scores = tl.dot(queries, tl.trans(key)) * scale
        seen = (place[None, :] <= start + token[:, None]) & (place < last)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that sees none of these keys
        shrink = tl.exp(top - finite)
        share_of = tl.exp(scores - finite[:, None])
        weight = weight * shrink + tl.sum(share_of, axis=1)
        value = tl.load(values + offset, mask=(place < last)[:, None], other=0)
        total = total * shrink[:, None] + tl.dot(share_of.to(value.dtype), value)
        top = higher
    to = (tl.program_id(0) * SHARES + share) * ROWS + row
    tl.store(sums + to[:, None] * HEAD_DIM + column[None, :], total)
    tl.store(weights + to, weight)
    tl.store(largest + to, top)


@triton.jit
def join_kernel(
    sums,  # these three as attend_kernel leaves them
    weights,
    largest,
    out,  # [B, T, n_heads, head_dim]
    n_tokens,
    n_kv_heads,
    N_REP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHARES: tl.constexpr,
):
    """What all shares of a row come to together."""
    head = tl.program_id(0) % n_kv_heads
    batch = tl.program_id(0) // n_kv_heads
    row = tl.program_id(1)
    share = tl.arange(0, SHARES)
    column = tl.arange(0, HEAD_DIM)
    of = (tl.program_id(0) * SHARES + share) * ROWS + row
    top = tl.load(largest + of)
    shrink = tl.exp(top - tl.max(top, axis=0))  # each row sees a key at least: itself
    weight = tl.sum(tl.load(weights + of) * shrink, axis=0)
    total = tl.sum(tl.load(sums + of[:, None] * HEAD_DIM + column[None, :]) * shrink[:, None], axis=0)
    place = (batch * n_tokens + row // N_REP) * n_kv_heads * N_REP + head * N_REP + row % N_REP
    tl.store(out + place * HEAD_DIM + column, (total / weight).to(out.dtype.element_ty))

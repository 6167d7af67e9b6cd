"""The Triton kernels of cuda.py.

A kernel runs as many parallel programs, each for a block of the result; names in capitals are compile-time constants.
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
    """Compute OUTPUTS outputs for all rows, so that the matrix is read once; the bits do not depend on the rows."""
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in range(0, length, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        weights = tl.load(
            matrix + output.to(tl.int64)[:, None] * length + column[None, :],
            mask=(output[:, None] < outputs) & (column[None, :] < length),
            other=0,
            eviction_policy="evict_first",  # the matrix is read once, x by every program
        )
        inputs = tl.load(
            x + row[None, :] * length + column[:, None],
            mask=(row[None, :] < rows) & (column[:, None] < length),
            other=0,
        )
        if IS_INT8:
            scale = tl.load(column_scales + column, mask=column < length, other=0)
            inputs = (inputs.to(tl.float32) * scale[:, None]).to(inputs.dtype)
            total = tl.dot(weights.to(inputs.dtype), inputs, total)
        else:
            total = tl.dot(weights, inputs, total)
    if IS_INT8:
        total *= tl.load(row_scales + output, mask=output < outputs, other=0)[:, None]
    tl.store(
        y + row[None, :] * outputs + output[:, None],
        total.to(y.dtype.element_ty),
        mask=(row[None, :] < rows) & (output[:, None] < outputs),
    )


@triton.jit
def linear_int4_kernel(
    x,  # [rows, groups * 32]
    values,  # [blocks, groups, 4, 16, 4] uint8: these three are the tensors of an Int4
    scales,  # [blocks, groups, 2, 16] uint8
    row_scales,  # [outputs, 2] fp32
    y,  # [rows, outputs]
    rows,
    outputs,
    groups,
    OFFSET: tl.constexpr,  # a number whose last bit counts ones in x's dtype
    OFFSET_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute a block of 16 outputs for all rows: scale * (values @ x) - minimum * (ones @ x), summed over the groups.

    The block's values are read in their order, without gaps. All factors of the products are integers that x's dtype
    holds exactly; sums are in fp32. The bits do not depend on the rows.
    """
    block = tl.program_id(0)
    row = tl.arange(0, ROWS)
    sixteen = tl.arange(0, 16)  # outputs, or half the inputs of a group
    dtype = x.dtype.element_ty
    values += block.to(tl.int64) * groups * 256
    scales += block.to(tl.int64) * groups * 32
    x += row[None, None, :] * groups * 32 + sixteen[None, :, None]
    scaled = tl.zeros((GROUPS, 16, ROWS), tl.float32)
    lowered = tl.zeros((GROUPS, 16, ROWS), tl.float32)
    for begin in tl.range(0, groups, GROUPS, num_stages=STAGES):  # STAGES of them are loaded at a time
        group = begin + tl.arange(0, GROUPS)
        byte = begin * 256 + tl.arange(0, GROUPS * 256)
        both = tl.load(values + byte, mask=byte < groups * 256, other=0, eviction_policy="evict_first")
        both = both.reshape(GROUPS, 4, 16, 4).permute(0, 2, 1, 3).reshape(GROUPS, 16, 16).to(tl.int16)
        low = (both & 15 | OFFSET_BITS).to(dtype, bitcast=True) - OFFSET  # 0 to 15, exactly
        high = (both >> 4 | OFFSET_BITS).to(dtype, bitcast=True) - OFFSET
        is_input = (group < groups)[:, None, None] & (row < rows)[None, None, :]
        low_x = tl.load(x + group[:, None, None] * 32, mask=is_input, other=0)  # [GROUPS, 16, ROWS]
        high_x = tl.load(x + group[:, None, None] * 32 + 16, mask=is_input, other=0)
        scale_at = scales + group[:, None] * 32 + sixteen[None, :]
        scale = tl.load(scale_at, mask=(group < groups)[:, None], other=0)
        minimum = tl.load(scale_at + 16, mask=(group < groups)[:, None], other=0)
        scaled += scale.to(tl.float32)[:, :, None] * tl.dot(high, high_x, tl.dot(low, low_x))
        minimums = minimum.to(dtype)[:, :, None].broadcast_to(GROUPS, 16, 16)
        lowered = tl.dot(minimums, high_x, tl.dot(minimums, low_x, lowered))
    output = block * 16 + sixteen
    unit = tl.load(row_scales + output * 2, mask=output < outputs, other=0)[:, None]
    unit_of_minimums = tl.load(row_scales + output * 2 + 1, mask=output < outputs, other=0)[:, None]
    total = tl.sum(scaled, axis=0) * unit - tl.sum(lowered, axis=0) * unit_of_minimums
    tl.store(
        y + row[None, :] * outputs + output[:, None],
        total.to(dtype),
        mask=(row < rows)[None, :] & (output < outputs)[:, None],
    )


@triton.jit
def attend_kernel(
    q,  # [B, T, n_heads, head_dim]
    keys,  # [B, S, n_kv_heads, head_dim], with strides
    values,  # likewise
    starts,  # [B]
    sums,  # [B, n_kv_heads, SPLITS, ROWS, head_dim] fp32: sums of the values times their weights
    weights,  # [B, n_kv_heads, SPLITS, ROWS] fp32: the sum of the weights, which are exp(score - largest)
    largest,  # [B, n_kv_heads, SPLITS, ROWS] fp32
    n_tokens,
    n_kv_heads,
    batch_stride,
    token_stride,
    scale,
    N_REP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Attend to one split of a kv head's keys. Rows are the tokens times the head's query heads. (Dao et al. 2023)"""
    head = tl.program_id(0) % n_kv_heads
    batch = tl.program_id(0) // n_kv_heads
    split = tl.program_id(1)
    start = tl.load(starts + batch)
    end = start + n_tokens  # the cache after it is not read
    split_size = tl.cdiv(tl.cdiv(end, SPLITS), KEYS) * KEYS
    first = split * split_size
    last = tl.minimum(first + split_size, end)

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
        position = begin + tl.arange(0, KEYS)
        offset = head_of_cache + position.to(tl.int64)[:, None] * token_stride + column[None, :]
        key = tl.load(keys + offset, mask=(position < last)[:, None], other=0)
        scores = tl.dot(queries, tl.trans(key)) * scale
        seen = (position[None, :] <= start + token[:, None]) & (position < last)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # for a row that sees none of these keys
        shrink = tl.exp(top - finite)
        probs = tl.exp(scores - finite[:, None])  # not normalized
        weight = weight * shrink + tl.sum(probs, axis=1)
        value = tl.load(values + offset, mask=(position < last)[:, None], other=0)
        total = total * shrink[:, None] + tl.dot(probs.to(value.dtype), value)
        top = higher
    to = (tl.program_id(0) * SPLITS + split) * ROWS + row
    tl.store(sums + to[:, None] * HEAD_DIM + column[None, :], total)
    tl.store(weights + to, weight)
    tl.store(largest + to, top)


@triton.jit
def join_kernel(
    sums,  # these three are the results of attend_kernel
    weights,
    largest,
    out,  # [B, T, n_heads, head_dim]
    n_tokens,
    n_kv_heads,
    N_REP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Combine the splits of one row."""
    head = tl.program_id(0) % n_kv_heads
    batch = tl.program_id(0) // n_kv_heads
    row = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, HEAD_DIM)
    index = (tl.program_id(0) * SPLITS + split) * ROWS + row
    top = tl.load(largest + index)
    shrink = tl.exp(top - tl.max(top, axis=0))  # each row sees at least one key: its own
    weight = tl.sum(tl.load(weights + index) * shrink, axis=0)
    total = tl.sum(tl.load(sums + index[:, None] * HEAD_DIM + column[None, :]) * shrink[:, None], axis=0)
    target = (batch * n_tokens + row // N_REP) * n_kv_heads * N_REP + head * N_REP + row % N_REP
    tl.store(out + target * HEAD_DIM + column, (total / weight).to(out.dtype.element_ty))

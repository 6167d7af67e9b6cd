"""The Triton kernels of cuda.py.

A kernel runs as many parallel programs, each for a block of the result; names in capitals are compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def product(
    x,  # [rows, length]
    matrix,  # [outputs, length]
    row_scales,  # [outputs] fp32, for int8
    column_scales,  # [length] fp32, for int8
    block,  # of OUTPUTS rows of the matrix
    rows,
    outputs,
    length,
    begin,  # the columns to add up; they end with the matrix, or before a multiple of INPUTS
    end,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Return a block of outputs for all rows, [OUTPUTS, ROWS] fp32. The bits do not depend on the rows."""
    row = tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(begin, end, INPUTS):
        column = start + tl.arange(0, INPUTS)
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
    return total


@triton.jit
def store_product(y, total, block, first, width, rows, outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Write what `product` returned to the columns of y [rows, width] from `first` on."""
    row = tl.arange(0, ROWS)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(
        y + row[None, :] * width + first + output[:, None],
        total.to(y.dtype.element_ty),
        mask=(row[None, :] < rows) & (output[:, None] < outputs),
    )


@triton.jit
def linear_kernel(
    x,  # [rows, length]
    matrix,  # [outputs, length]
    row_scales,  # as in product
    column_scales,
    y,  # [SPLITS, rows, outputs]: sums in fp32, to be added; or the result if SPLITS is 1
    rows,
    outputs,
    length,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Multiply all rows by a block of the matrix's rows, and by one of SPLITS parts of their columns."""
    split = tl.program_id(1)
    part = tl.cdiv(tl.cdiv(length, SPLITS), INPUTS) * INPUTS
    begin = split * part
    end = tl.minimum(begin + part, length)
    block = tl.program_id(0)
    total = product(
        x, matrix, row_scales, column_scales, block, rows, outputs, length, begin, end, IS_INT8, ROWS, OUTPUTS, INPUTS
    )
    store_product(y + split * rows * outputs, total, block, 0, outputs, rows, outputs, ROWS, OUTPUTS)


@triton.jit
def add_kernel(sums, y, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the sums [SPLITS, size] fp32 in order; the result is y [size]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * size + at, mask=at < size, other=0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def linear_three_kernel(
    x,  # [rows, length]
    first,  # three matrices, [n_first, length] and so on, each with its scales as in product
    first_row_scales,
    first_column_scales,
    second,
    second_row_scales,
    second_column_scales,
    third,
    third_row_scales,
    third_column_scales,
    y,  # [rows, n_first + n_second + n_third]
    rows,
    n_first,
    n_second,
    n_third,
    length,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Multiply all rows by a block of one of three matrices, whose blocks are counted one after the other."""
    block = tl.program_id(0)
    second_begins = tl.cdiv(n_first, OUTPUTS)
    third_begins = second_begins + tl.cdiv(n_second, OUTPUTS)
    # chosen before the one product: three products would each have their own shared memory
    if block < second_begins:
        matrix, row_scales, column_scales = first, first_row_scales, first_column_scales
        outputs, column = n_first, 0
    elif block < third_begins:
        matrix, row_scales, column_scales = second, second_row_scales, second_column_scales
        outputs, column = n_second, n_first
        block -= second_begins
    else:
        matrix, row_scales, column_scales = third, third_row_scales, third_column_scales
        outputs, column = n_third, n_first + n_second
        block -= third_begins
    total = product(
        x, matrix, row_scales, column_scales, block, rows, outputs, length, 0, length, IS_INT8, ROWS, OUTPUTS, INPUTS
    )
    store_product(y, total, block, column, n_first + n_second + n_third, rows, outputs, ROWS, OUTPUTS)


@triton.jit
def swiglu_kernel(
    x,  # [rows, length]
    w1,  # [outputs, length], with its scales as in product
    w1_row_scales,
    w1_column_scales,
    w3,  # likewise
    w3_row_scales,
    w3_column_scales,
    y,  # [rows, outputs]
    rows,
    outputs,
    length,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute silu(w1 x) * w3 x, rounded where the model rounds. (Shazeer 2020, eq. 6)"""
    block = tl.program_id(0)
    dtype = y.dtype.element_ty
    gate = product(
        x, w1, w1_row_scales, w1_column_scales, block, rows, outputs, length, 0, length, IS_INT8, ROWS, OUTPUTS, INPUTS
    )
    up = product(
        x, w3, w3_row_scales, w3_column_scales, block, rows, outputs, length, 0, length, IS_INT8, ROWS, OUTPUTS, INPUTS
    )
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    store_product(y, silu * up.to(dtype).to(tl.float32), block, 0, outputs, rows, outputs, ROWS, OUTPUTS)


@triton.jit
def rms_norm_kernel(x, weight, y, dim, eps, DIM: tl.constexpr):
    """Divide a row of x [rows, dim] by its RMS in fp32, round it, and multiply by weight [dim], like model.rms_norm."""
    column = tl.arange(0, DIM)
    at = tl.program_id(0).to(tl.int64) * dim + column
    dtype = y.dtype.element_ty
    values = tl.load(x + at, mask=column < dim, other=0).to(tl.float32)
    normed = (values * tl.rsqrt(tl.sum(values * values, axis=0) / dim + eps)).to(dtype).to(tl.float32)
    scale = tl.load(weight + column, mask=column < dim, other=0).to(tl.float32)
    tl.store(y + at, (normed * scale).to(dtype), mask=column < dim)


@triton.jit
def rotate(source, target, cos, sin, angle, angle_stride, PAIRS: tl.constexpr):
    """Rotate the pairs of neighbours of one head in fp32, like model.rope, by row `angle` of cos and sin."""
    pair = tl.arange(0, PAIRS)
    first = tl.load(source + 2 * pair).to(tl.float32)
    second = tl.load(source + 2 * pair + 1).to(tl.float32)
    c = tl.load(cos + (angle * PAIRS + pair) * angle_stride)
    s = tl.load(sin + (angle * PAIRS + pair) * angle_stride)
    dtype = target.dtype.element_ty
    tl.store(target + 2 * pair, (first * c - second * s).to(dtype))
    tl.store(target + 2 * pair + 1, (first * s + second * c).to(dtype))


@triton.jit
def rope_kernel(
    x,  # [tokens, heads, 2 * PAIRS], with a stride for the tokens
    cos,  # [n_angles, PAIRS] fp32, each angle_stride from the last; sin likewise
    sin,
    y,  # [tokens, heads, 2 * PAIRS]
    heads,
    token_stride,
    n_angles,
    angle_stride,
    PAIRS: tl.constexpr,
):
    """Rotate one head of a token; the rows of a batch share the angles."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * 2 * PAIRS
    target = y + token * heads * 2 * PAIRS + head
    rotate(x + token * token_stride + head, target, cos, sin, token % n_angles, angle_stride, PAIRS)


@triton.jit
def rope_into_cache_kernel(
    qkv,  # [tokens, (n_heads + 2 * n_kv_heads) * 2 * PAIRS]: what the three matrices gave
    cos,  # as in rope_kernel, a row for each token
    sin,
    start,  # [] int64: the position of the first token
    q,  # [tokens, n_heads, 2 * PAIRS]
    keys,  # [S, n_kv_heads, 2 * PAIRS], values likewise
    values,
    n_heads,
    n_kv_heads,
    angle_stride,
    PAIRS: tl.constexpr,
):
    """Rotate one head of q or k, or copy one of v; k and v go to their place in the cache."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    size = 2 * PAIRS
    source = qkv + (token * (n_heads + 2 * n_kv_heads) + head) * size
    row = (tl.load(start) + token).to(tl.int64) * n_kv_heads
    if head < n_heads:
        rotate(source, q + (token * n_heads + head) * size, cos, sin, token, angle_stride, PAIRS)
    elif head < n_heads + n_kv_heads:
        rotate(source, keys + (row + head - n_heads) * size, cos, sin, token, angle_stride, PAIRS)
    else:
        column = tl.arange(0, 2 * PAIRS)
        tl.store(values + (row + head - n_heads - n_kv_heads) * size + column, tl.load(source + column))


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

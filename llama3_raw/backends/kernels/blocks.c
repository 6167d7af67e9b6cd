#include "bf16.h"

/* Matrices in the blocks of GGML; their layouts are in quantization/blocks.py. OUTPUTS rows are unpacked to bf16 at a
   time, in the core's cache, and multiplied like rows that are stored so: the results have the same bits. In fp32 an
   unpacked value is rounded once, so that it has torch's bits. */

enum { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };
static const int VALUES[] = {32, 32, 32, 32, 32, 256, 256, 256}, BYTES[] = {34, 18, 20, 22, 24, 144, 176, 210};

static inline float half_at(const uint8_t *from) { /* fp16 to fp32 */
    uint16_t half;
    memcpy(&half, from, sizeof half);
    uint32_t rest = half & 0x7fff;
    union { uint32_t bits; float value; } both = {rest << 13};
    both.value *= 0x1p112f; /* the difference of the exponents; exact for subnormal numbers too */
    if (rest >= 0x7c00) both.bits = 0x7f800000 | rest << 13; /* infinite, or NaN */
    both.bits |= (uint32_t)(half & 0x8000) << 16;
    return both.value;
}

/* 16 bytes with 32 values of four bits, and the fifth bits if there are any; values, scaled */
static inline __attribute__((always_inline)) void unpack_32(
    const uint8_t *nibbles, uint32_t fifth, int zero, float scale, float minimum, float *values) {
    for (int i = 0; i < 16; i++) {
        int low = (nibbles[i] & 15) | (fifth >> i & 1) << 4, high = nibbles[i] >> 4 | (fifth >> (i + 16) & 1) << 4;
        values[i] = (float)(low - zero) * scale + minimum;
        values[i + 16] = (float)(high - zero) * scale + minimum;
    }
}

/* a group of 32 values of Q4_K, or of Q5_K with 32 bytes of fifth bits; constant shift */
static inline __attribute__((always_inline)) void unpack_group(
    const uint8_t *nibbles, int shift, const uint8_t *fifth, int bit, float scale, float minimum, float *values) {
    for (int i = 0; i < 32; i++) {
        int value = nibbles[i] >> shift & 15;
        if (fifth) value |= (fifth[i] >> bit & 1) << 4;
        values[i] = (float)value * scale - minimum;
    }
}

/* Q4_K, or Q5_K with its 32 bytes of fifth bits */
static inline __attribute__((always_inline)) void unpack_k(
    const uint8_t *block, const uint8_t *nibbles, const uint8_t *fifth, float *values) {
    float scale = half_at(block), minimum = half_at(block + 2), scales[8], minimums[8];
    const uint8_t *packed = block + 4;
    for (int g = 0; g < 4; g++) { /* six bits each */
        scales[g] = (float)(packed[g] & 63) * scale;
        minimums[g] = (float)(packed[g + 4] & 63) * minimum;
        scales[g + 4] = (float)((packed[g + 8] & 15) | (packed[g] >> 6) << 4) * scale;
        minimums[g + 4] = (float)(packed[g + 8] >> 4 | (packed[g + 4] >> 6) << 4) * minimum;
    }
    for (int g = 0; g < 8; g += 2, nibbles += 32, values += 64) {
        unpack_group(nibbles, 0, fifth, g, scales[g], minimums[g], values);
        unpack_group(nibbles, 4, fifth, g + 1, scales[g + 1], minimums[g + 1], values + 32);
    }
}

static inline void unpack_q6_k(const uint8_t *block, float *values) {
    const int8_t *scales = (const int8_t *)block + 192;
    float scale = half_at(block + 208);
    for (int g = 0; g < 16; g++) { /* 16 values */
        int half = g / 8, quarter = g % 8 / 2, begin = g % 2 * 16;
        const uint8_t *low = block + half * 64 + quarter % 2 * 32 + begin, *high = block + 128 + half * 32 + begin;
        float by = (float)scales[g] * scale;
        for (int i = 0; i < 16; i++) {
            int value = (low[i] >> quarter / 2 * 4 & 15) | (high[i] >> quarter * 2 & 3) << 4;
            values[g * 16 + i] = (float)(value - 32) * by;
        }
    }
}

static void unpack_row(int kind, const uint8_t *block, bf16 *row, int64_t length) {
    for (int64_t done = 0; done < length; done += VALUES[kind], block += BYTES[kind]) {
        float values[256], scale = half_at(block);
        uint32_t fifth;
        switch (kind) {
        case Q8_0:
            for (int i = 0; i < 32; i++) values[i] = (float)((const int8_t *)block)[2 + i] * scale;
            break;
        case Q4_0:
            unpack_32(block + 2, 0, 8, scale, 0, values);
            break;
        case Q4_1:
            unpack_32(block + 4, 0, 0, scale, half_at(block + 2), values);
            break;
        case Q5_0:
            memcpy(&fifth, block + 2, sizeof fifth);
            unpack_32(block + 6, fifth, 16, scale, 0, values);
            break;
        case Q5_1:
            memcpy(&fifth, block + 4, sizeof fifth);
            unpack_32(block + 8, fifth, 0, scale, half_at(block + 2), values);
            break;
        case Q4_K:
            unpack_k(block, block + 16, 0, values);
            break;
        case Q5_K:
            unpack_k(block, block + 48, block + 16, values);
            break;
        default:
            unpack_q6_k(block, values);
        }
        for (int i = 0; i < VALUES[kind]; i++) row[done + i] = to_bf16(values[i]);
    }
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length] in blocks. Returns 0, or 1 if out of memory. */
int linear_blocks(const bf16 *x, const uint8_t *w, int kind, bf16 *y, int64_t n_rows, int64_t n_outputs,
                  int64_t length) {
    int64_t row_bytes = length / VALUES[kind] * BYTES[kind], size = OUTPUTS * length;
    bf16 *rows = malloc(omp_get_max_threads() * size * sizeof *rows);
    if (!rows) return 1;
#pragma omp parallel for schedule(static) if (n_outputs * length > SERIAL)
    for (int64_t o = 0; o < n_outputs; o += OUTPUTS) {
        bf16 *unpacked = rows + omp_get_thread_num() * size;
        int64_t count = n_outputs - o < OUTPUTS ? n_outputs - o : OUTPUTS;
        for (int64_t i = 0; i < count; i++) unpack_row(kind, w + (o + i) * row_bytes, unpacked + i * length, length);
        if (count == OUTPUTS) {
            multiply_rows(x, n_rows, unpacked, length, y + o, n_outputs, 1, length);
            continue;
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < n_rows; r++)
                product(1, 1, x + r * length, unpacked + i * length, 0, y + r * n_outputs + o + i, 0, 0, length);
    }
    free(rows);
    return 0;
}

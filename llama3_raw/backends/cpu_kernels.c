/* The operations that cost time: products with a matrix in bf16, int8 or blocks, and attention over a bf16 cache. cpu.py
   compiles this file on first use, for the processor that it runs on.

   A token's result has the same bits alone and among other tokens: every sum adds its terms in one fixed order, in
   pieces that do not depend on the number of tokens or threads. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16; /* the upper half of a float */

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define SERIAL (1 << 18) /* products, or bytes: up to this many are done before another thread has woken up */
#define ROWS 4     /* tokens at a time */
#define OUTPUTS 8  /* rows of the matrix at a time: that many streams from memory, and independent sums */

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

static inline float to_float(bf16 x) {
    union { uint32_t bits; float value; } both = {(uint32_t)x << 16};
    return both.value;
}

static inline bf16 to_bf16(float x) { /* rounds to nearest, ties to even, as torch does; not for NaN */
    union { float value; uint32_t bits; } both = {x};
    return (both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16;
}

typedef float four_floats __attribute__((vector_size(16)));
typedef float eight_floats __attribute__((vector_size(32)));

static inline float total(floats sums) {
    four_floats four;
#if WIDTH == 4
    four = sums;
#else
    eight_floats eight;
#if WIDTH == 16
    eight_floats halves[2];
    memcpy(halves, &sums, sizeof halves);
    eight = halves[0] + halves[1];
#else
    eight = sums;
#endif
    four_floats quarters[2];
    memcpy(quarters, &eight, sizeof quarters);
    four = quarters[0] + quarters[1];
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* sums += x . w for 2 * WIDTH values x and w, two bf16 per lane. */
#if defined(__AVX512BF16__)
#include <immintrin.h>
typedef __m512bh pairs;
static inline pairs load_pairs(const bf16 *from) { return (pairs)_mm512_loadu_si512(from); }
static inline floats add_products(floats sums, pairs x, pairs w) { return (floats)_mm512_dpbf16_ps((__m512)sums, x, w); }
#else
typedef words pairs;
static inline pairs load_pairs(const bf16 *from) {
    pairs loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}
static inline floats add_products(floats sums, pairs x, pairs w) {
    sums += (floats)(x << 16) * (floats)(w << 16); /* compiled to a fused multiply-add */
    return sums + (floats)(x & 0xffff0000u) * (floats)(w & 0xffff0000u);
}
#endif

/* y[r][o * y_step] = x[r] . w[o], for constant numbers of rows r and outputs o; w_stride values from w[o] to w[o + 1] */
static inline __attribute__((always_inline)) void product(
    int rows, int outputs, const bf16 *x, const bf16 *w, int64_t w_stride, bf16 *y, int64_t y_stride, int64_t y_step,
    int64_t length) {
    floats sums[ROWS][OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sums[r][o] = (floats){0};
    for (int64_t i = 0; i < length; i += 2 * WIDTH) {
        pairs row[ROWS];
        for (int r = 0; r < rows; r++) row[r] = load_pairs(x + r * length + i);
        for (int o = 0; o < outputs; o++) {
            pairs column = load_pairs(w + o * w_stride + i);
            for (int r = 0; r < rows; r++) sums[r][o] = add_products(sums[r][o], row[r], column);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) y[r * y_stride + o * y_step] = to_bf16(total(sums[r][o]));
}

/* A matrix in int8 is integers times a scale for each row and one for each column. The tokens are multiplied by the
   column scales and rounded to 16 bits, with hardly any error. The product of integers is exact in any order. */
#define LARGEST (127 * 254 + 126) /* of a rounded value, which is 254 times one int8 plus another */

/* Rounds a token's values, times the column scales, to integers times one scale, which it returns. If a value is
   infinite or NaN, that scale is NaN, and so is the whole product. */
static float round_token(const bf16 *x, const float *column_scales, int16_t *rounded, int64_t length) {
    union { float value; uint32_t bits; } largest = {0};
    for (int64_t i = 0; i < length; i++) { /* the bits of absolute values are ordered like the values, NaN above all */
        union { float value; uint32_t bits; } size = {fabsf(to_float(x[i]) * column_scales[i])};
        largest.bits = size.bits > largest.bits ? size.bits : largest.bits;
    }
    if (!isfinite(largest.value) || largest.value < 1e-30f) { /* values whose inverse may be infinite count as zero */
        memset(rounded, 0, length * sizeof *rounded);
        return isfinite(largest.value) ? 0 : NAN;
    }
    float inverse = LARGEST / largest.value;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    for (int64_t i = 0; i < length; i++)
        rounded[i] = (int16_t)(int)(to_float(x[i]) * column_scales[i] * inverse + magic - magic);
    return largest.value / LARGEST;
}

typedef struct {
    const int8_t *values;       /* [n_outputs, length] */
    const float *row_scales;    /* [n_outputs] */
    const float *column_scales; /* [length] */
} Int8;

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* Matrix units (Intel AMX). A tile is 16 rows of up to 64 bytes, and one instruction multiplies two of them: 16 rows of
   the matrix, as stored in memory, by up to 16 columns. For bf16 a column is a token. For int8 a token has two columns,
   because its values have 16 bits: the first has the values divided by 254, the second the remainders. */
#define WITH_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* GCC does not know that tiles are loaded from memory (bug 114098), and would omit writes that nothing else reads. */
#define SEEN(memory) __asm__ volatile("" : : "r"(memory) : "memory")

#define COLUMNS 256 /* at a time: together with a block of the matrix they stay in the core's cache */
#define BLOCK 256   /* rows of the matrix at a time; with few columns: */
#define BLOCK_FOR_FEW 32

/* Requests the tiles from the system. Returns whether this process may use them. */
int has_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    int64_t row_bytes; /* of the matrix and of a column */
    int width;         /* columns in a tile */
    int64_t n_groups;  /* of `width` columns, the last ones possibly padding; int8 has two for the same tokens */
    char *packed;      /* [n_groups][row_bytes / 4][width][4 bytes] */
} Columns;

/* Tiles 0 to 3: sums of 16 outputs for `width` columns; 4 and 5: 64 bytes of 16 rows of the matrix; 6 and 7: of columns. */
static void shape_tiles(int width) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = 16;
        shapes.bytes[tile] = tile == 4 || tile == 5 ? 64 : 4 * width;
    }
    SEEN(&shapes);
    _tile_loadconfig(&shapes);
}

static void pack(const Columns *columns, int64_t group, int member, const void *column) {
    int32_t *to = (int32_t *)(columns->packed + group * columns->row_bytes * columns->width) + member;
    for (int64_t i = 0; i < columns->row_bytes / 4; i++) memcpy(to + i * columns->width, (const char *)column + 4 * i, 4);
}

/* scores [16][ROWS] = 16 keys times ROWS queries, [length / 2][ROWS][2]; needs tiles of width ROWS */
static inline void score(const int32_t *queries, const bf16 *keys, int64_t key_stride, int64_t length, float *scores) {
    SEEN(queries);
    _tile_zero(0);
    for (int64_t i = 0; i < length; i += 32) {
        _tile_loadd(4, keys + i, 2 * key_stride);
        _tile_loadd(6, queries + i / 2 * ROWS, 4 * ROWS);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, scores, 4 * ROWS);
}

/* Packs the tokens in the order that the matrix units need; for int8 also computes their scales. */
static void pack_tokens(const Columns *columns, const bf16 *x, int64_t n_rows, const Int8 *int8, float *scales) {
    int64_t length = columns->row_bytes / (int8 ? 1 : 2);
    int16_t rounded[int8 ? length : 1];
    int8_t high[int8 ? length : 1], low[int8 ? length : 1];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_rows; t++) {
        int64_t group = t / columns->width;
        int member = t % columns->width;
        if (!int8) {
            pack(columns, group, member, x + t * length);
            continue;
        }
        scales[t] = round_token(x + t * length, int8->column_scales, rounded, length);
        for (int64_t i = 0; i < length; i++) {
            high[i] = (int8_t)((rounded[i] + (rounded[i] < 0 ? -127 : 127)) / 254);
            low[i] = (int8_t)(rounded[i] - 254 * high[i]);
        }
        pack(columns, 2 * group, member, high);
        pack(columns, 2 * group + 1, member, low);
    }
}

/* sums [2][groups][16][width], `apart` bytes from one half to the other: 32 rows of w times one or two groups of
   columns, over `bytes` of each row; added to the present sums if `accumulate` */
static inline __attribute__((always_inline)) void multiply(
    int is_int8, int groups, int accumulate, const char *w, const char *x, const Columns *columns, int64_t bytes,
    char *sums, int64_t apart) {
#define ADD(sums, outputs, group) \
    if (is_int8) _tile_dpbssd(sums, outputs, group); \
    else _tile_dpbf16ps(sums, outputs, group)
    int64_t stride = columns->row_bytes, width = columns->width, size = 64 * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (accumulate) {
        _tile_loadd(0, sums, 4 * width);
        _tile_loadd(1, sums + apart, 4 * width);
        if (groups == 2) {
            _tile_loadd(2, sums + size, 4 * width);
            _tile_loadd(3, sums + apart + size, 4 * width);
        }
    }
    for (int64_t i = 0; i < bytes; i += 64) {
        _tile_loadd(4, w + i, stride);
        _tile_loadd(5, w + 16 * stride + i, stride);
        _tile_loadd(6, x + i * width, 4 * width);
        ADD(0, 4, 6);
        ADD(1, 5, 6);
        if (groups == 2) {
            _tile_loadd(7, x + (stride + i) * width, 4 * width);
            ADD(2, 4, 7);
            ADD(3, 5, 7);
        }
    }
#undef ADD
    _tile_stored(0, sums, 4 * width);
    _tile_stored(1, sums + apart, 4 * width);
    if (groups == 2) {
        _tile_stored(2, sums + size, 4 * width);
        _tile_stored(3, sums + apart + size, 4 * width);
    }
}

/* sums [outputs / 16][n_groups][16][width], each in four bytes, for the groups from `group` on and a matrix block */
static inline __attribute__((always_inline)) void multiply_block(
    int is_int8, const char *w, int64_t outputs, const Columns *columns, int64_t group, int64_t n_groups, char *sums) {
    int64_t row_bytes = columns->row_bytes, size = 64 * columns->width, apart = n_groups * size;
    /* with many columns, a piece of each row, so that the pieces and the columns stay in the cache */
    int64_t step = columns->n_groups <= 2 ? row_bytes : 2048;
    for (int64_t begin = 0; begin < row_bytes; begin += step) {
        int64_t bytes = row_bytes - begin < step ? row_bytes - begin : step;
        for (int64_t o = 0; o < outputs; o += 32)
            for (int64_t g = 0; g < n_groups; g += 2) {
                const char *rows = w + o * row_bytes + begin;
                const char *x = columns->packed + ((group + g) * row_bytes + begin) * columns->width;
                char *to = sums + o / 16 * apart + g * size;
                if (n_groups - g > 1) multiply(is_int8, 2, begin > 0, rows, x, columns, bytes, to, apart);
                else multiply(is_int8, 1, begin > 0, rows, x, columns, bytes, to, apart);
            }
    }
}

/* Like linear_bf16 if int8 is NULL, like linear_int8 if w is; for any number of tokens. n_outputs must be a multiple of
   32, and a row a multiple of 64 bytes. Returns 0, or 1 if out of memory. */
int linear_tiles(const bf16 *x, const bf16 *w, const Int8 *int8, bf16 *y, int64_t n_rows, int64_t n_outputs,
                 int64_t length) {
    int width = n_rows < 16 ? (int)n_rows : 16;
    int64_t row_bytes = int8 ? length : 2 * length, n_groups = (n_rows + width - 1) / width * (int8 ? 2 : 1);
    int64_t block = n_groups <= 2 ? BLOCK_FOR_FEW : BLOCK, together = COLUMNS / width / 2 * 2;
    while (block > BLOCK_FOR_FEW && n_outputs < block * omp_get_max_threads()) block /= 2; /* work for every thread */
    char *packed = calloc(n_groups * width, row_bytes + sizeof(float));
    if (!packed) return 1;
    float *scales = (float *)(packed + n_groups * width * row_bytes);
    Columns columns = {row_bytes, width, n_groups, packed};
#pragma omp parallel if (n_groups * n_outputs * row_bytes > SERIAL)
    {
        union {
            float as_float[BLOCK * COLUMNS];
            int32_t as_int[BLOCK * COLUMNS];
        } sums __attribute__((aligned(64)));
        pack_tokens(&columns, x, n_rows, int8, scales);
        shape_tiles(width);
        for (int64_t group = 0; group < n_groups; group += together) {
            int64_t count = n_groups - group < together ? n_groups - group : together;
            int64_t begin = group / (int8 ? 2 : 1) * width, end = begin + count / (int8 ? 2 : 1) * width;
            if (end > n_rows) end = n_rows;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n_outputs; first += block) {
                int64_t outputs = n_outputs - first < block ? n_outputs - first : block;
                const char *rows = (int8 ? (const char *)int8->values : (const char *)w) + first * row_bytes;
                if (int8) multiply_block(1, rows, outputs, &columns, group, count, (char *)&sums);
                else multiply_block(0, rows, outputs, &columns, group, count, (char *)&sums);
                for (int i = 0; i < 32; i++) /* of the next block, so that the memory is never idle */
                    for (int line = 0; line < 2; line++)
                        __builtin_prefetch(rows + (outputs + i) * row_bytes + 64 * line);
                for (int64_t t = begin; t < end; t++)
                    for (int64_t o = 0; o < outputs; o++) {
                        int64_t tile = o / 16 * count + (t - begin) / width * (int8 ? 2 : 1);
                        int64_t index = (tile * 16 + o % 16) * width + t % width;
                        bf16 *to = y + t * n_outputs + first + o;
                        if (int8) {
                            int64_t high = sums.as_int[index], low = sums.as_int[index + 16 * width];
                            *to = to_bf16((float)(254 * high + low) * (int8->row_scales[first + o] * scales[t]));
                        } else *to = to_bf16(sums.as_float[index]);
                    }
            }
        }
        _tile_release();
    }
    free(packed);
    return 0;
}
#else
int has_tiles(void) { return 0; }
#endif

int width(void) { return WIDTH; }

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length] in int8. Returns 0, or 1 if out of memory. */
int linear_int8(const bf16 *x, const bf16 *unused, const Int8 *w, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    (void)unused;
    float *scales = malloc(n_rows * (sizeof *scales + length * sizeof(int16_t)));
    if (!scales) return 1;
    int16_t *rounded = (int16_t *)(scales + n_rows);
    for (int64_t r = 0; r < n_rows; r++)
        scales[r] = round_token(x + r * length, w->column_scales, rounded + r * length, length);
#pragma omp parallel for schedule(static) if (n_rows * n_outputs * length > SERIAL)
    for (int64_t o = 0; o < n_outputs; o++)
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t sum = 0;
            for (int64_t begin = 0; begin < length; begin += 256) { /* 256 products do not overflow 32 bits */
                const int16_t *values = rounded + r * length + begin;
                const int8_t *weights = w->values + o * length + begin;
                int count = length - begin < 256 ? (int)(length - begin) : 256;
                int32_t partial = 0;
                for (int i = 0; i < count; i++) partial += (int32_t)values[i] * weights[i];
                sum += partial;
            }
            y[r * n_outputs + o] = to_bf16((float)sum * (w->row_scales[o] * scales[r]));
        }
    free(scales);
    return 0;
}

/* Products of all rows of x with OUTPUTS rows of w: y[r][o * y_step] = x[r] . w[o], w_stride values from w[o] to w[o + 1] */
static void multiply_rows(const bf16 *x, int64_t n_rows, const bf16 *w, int64_t w_stride, bf16 *y, int64_t y_stride,
                          int64_t y_step, int64_t length) {
    const bf16 *second = w + OUTPUTS / 2 * w_stride;
    for (int64_t r = 0; r < n_rows; r += ROWS) {
        const bf16 *from = x + r * length;
        bf16 *to = y + r * y_stride, *second_to = to + OUTPUTS / 2 * y_step;
        switch (n_rows - r) {
        case 1:
            product(1, OUTPUTS, from, w, w_stride, to, y_stride, y_step, length);
            break;
        case 2:
            product(2, OUTPUTS, from, w, w_stride, to, y_stride, y_step, length);
            break;
        case 3: /* in halves, whose sums fit into the registers */
            product(3, OUTPUTS / 2, from, w, w_stride, to, y_stride, y_step, length);
            product(3, OUTPUTS / 2, from, second, w_stride, second_to, y_stride, y_step, length);
            break;
        default:
            product(4, OUTPUTS / 2, from, w, w_stride, to, y_stride, y_step, length);
            product(4, OUTPUTS / 2, from, second, w_stride, second_to, y_stride, y_step, length);
        }
    }
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; length must be a multiple of 32. Returns 0, as
   it allocates no memory. (All products have the same arguments, and use one of the two matrices.) */
int linear_bf16(const bf16 *x, const bf16 *w, const Int8 *unused, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    (void)unused;
    /* The rows of w that are read together are an eighth of it apart, so that each stream continues through memory when
       its row ends. */
    int64_t step = n_outputs / OUTPUTS, stride = step * length;
#pragma omp parallel for schedule(static) if (n_rows * n_outputs * length > SERIAL)
    for (int64_t o = 0; o < step; o++) multiply_rows(x, n_rows, w + o * length, stride, y + o, n_outputs, step, length);
    for (int64_t o = step * OUTPUTS; o < n_outputs; o++)
        for (int64_t r = 0; r < n_rows; r++)
            product(1, 1, x + r * length, w + o * length, 0, y + r * n_outputs + o, 0, 0, length);
    return 0;
}

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

#define CHUNK 128 /* keys per partial result; the partial results are added in order */

typedef struct {
    int64_t n_tokens, n_heads, n_kv_heads, head_dim, start; /* token t sees the positions up to start + t */
    int64_t use_tiles; /* if ROWS divides the number of query heads per kv head */
    int64_t q_stride, key_stride, value_stride;             /* values from one token to the next */
} Shape;

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln(2)/2, and a polynomial for e^r */
static inline floats exponential(floats x) {
    floats lowest = (floats){0} - 87.0f;
    words too_low = (words)(x < lowest);
    x = (floats)(((words)x & ~too_low) | ((words)lowest & too_low));
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    floats shifted = x * 1.44269504f + magic, n = shifted - magic;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f, power = (floats){0} + 1.9875691e-4f;
    power = power * r + 1.3981999e-3f;
    power = power * r + 8.3334519e-3f;
    power = power * r + 4.1665796e-2f;
    power = power * r + 1.6666665e-1f;
    power = power * r + 5.0000001e-1f;
    power = power * r * r + r + 1.0f;
    return (floats)((words)power + ((words)shifted << 23)); /* the low bits of shifted are n */
}

static inline floats load_floats(const float *from) {
    floats loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

static inline words load_words(const void *from) {
    words loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

/* The partial result of token t's query head h over a chunk of keys: the largest score, the sum of the weights, and
   head_dim weighted sums of values. */
static inline float *partial_of(float *partials, const Shape *shape, int64_t chunks, int64_t t, int64_t h,
                                int64_t chunk) {
    return partials + ((t * shape->n_heads + h) * chunks + chunk) * (shape->head_dim + 2);
}

/* Loads rows into the cache in the order of memory. Plain loads, because the processor reads ahead of them with more
   requests at a time than it has for prefetch instructions. */
static void fetch(const bf16 *rows, int64_t count, int64_t stride, int64_t length) {
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = 0; i < length; i += 32) (void)*(volatile const bf16 *)(rows + s * stride + i);
}

/* Attention of one token to one chunk, for a constant number of query heads that share a kv head. */
static inline __attribute__((always_inline)) void attend_heads(
    int heads, const bf16 *queries, const bf16 *keys, const bf16 *values, float *partial, int64_t partial_stride,
    int count, const Shape *shape) {
    int64_t size = shape->head_dim;
    float scale = 1 / sqrtf((float)size);
    float weights[ROWS][CHUNK] __attribute__((aligned(64)));
    int s = 0;
#ifdef WITH_TILES
    if (shape->use_tiles) {
        float scores[16 * ROWS];
        int32_t packed[ROWS * size / 2];
        for (int h = 0; h < heads; h++)
            for (int64_t i = 0; i < size / 2; i++) memcpy(packed + i * heads + h, queries + h * size + 2 * i, 4);
        for (; s + 16 <= count; s += 16) {
            score(packed, keys + s * shape->key_stride, shape->key_stride, size, scores);
            for (int i = 0; i < 16; i++)
                for (int h = 0; h < heads; h++) weights[h][s + i] = scores[i * heads + h] * scale;
        }
    }
#endif
    for (; s < count; s++) {
        floats sums[ROWS];
        for (int h = 0; h < heads; h++) sums[h] = (floats){0};
        for (int64_t i = 0; i < size; i += 2 * WIDTH) {
            pairs key = load_pairs(keys + s * shape->key_stride + i);
            for (int h = 0; h < heads; h++) sums[h] = add_products(sums[h], load_pairs(queries + h * size + i), key);
        }
        for (int h = 0; h < heads; h++) weights[h][s] = total(sums[h]) * scale;
    }
    for (int h = 0; h < heads; h++) {
        float largest = -INFINITY;
        for (int s = 0; s < count; s++)
            if (weights[h][s] > largest) largest = weights[h][s];
        for (int s = count; s % WIDTH; s++) weights[h][s] = -INFINITY;
        floats sum = {0};
        for (int s = 0; s < count; s += WIDTH) {
            floats exponentials = exponential(load_floats(weights[h] + s) - largest);
            for (int i = 0; i < WIDTH; i++)
                if (s + i >= count) exponentials[i] = 0;
            memcpy(weights[h] + s, &exponentials, sizeof exponentials);
            sum += exponentials;
        }
        partial[h * partial_stride] = largest;
        partial[h * partial_stride + 1] = total(sum);
    }
    for (int64_t i = 0; i < size; i += 2 * WIDTH) {
        floats even[ROWS], odd[ROWS];
        for (int h = 0; h < heads; h++) even[h] = odd[h] = (floats){0};
        for (int s = 0; s < count; s++) {
            words value = load_words(values + s * shape->value_stride + i);
            for (int h = 0; h < heads; h++) {
                even[h] += weights[h][s] * (floats)(value << 16);
                odd[h] += weights[h][s] * (floats)(value & 0xffff0000u);
            }
        }
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < WIDTH; j++) {
                partial[h * partial_stride + 2 + i + 2 * j] = even[h][j];
                partial[h * partial_stride + 2 + i + 2 * j + 1] = odd[h][j];
            }
    }
}

static void attend_chunk(const Shape *shape, const bf16 *q, const bf16 *keys, const bf16 *values, float *partials,
                         int64_t chunks, int64_t kv_head, int64_t chunk) {
    int64_t n_rep = shape->n_heads / shape->n_kv_heads, size = shape->head_dim, first = chunk * CHUNK;
    int64_t keys_left = shape->start + shape->n_tokens - first, rows = keys_left < CHUNK ? keys_left : CHUNK;
    if (kv_head == 0) { /* one head has only a few bytes of each token, and would wait for most of them */
        fetch(keys + first * shape->key_stride, rows, shape->key_stride, shape->n_kv_heads * size);
        fetch(values + first * shape->value_stride, rows, shape->value_stride, shape->n_kv_heads * size);
    }
    keys += first * shape->key_stride + kv_head * size;
    values += first * shape->value_stride + kv_head * size;
    for (int64_t t = 0; t < shape->n_tokens; t++) {
        int64_t left = shape->start + t + 1 - first;
        if (left <= 0) continue;
        int count = left < CHUNK ? (int)left : CHUNK;
        for (int64_t h = kv_head * n_rep, end = h + n_rep; h < end; h += ROWS) {
            int heads = end - h < ROWS ? (int)(end - h) : ROWS;
            const bf16 *queries = q + t * shape->q_stride + h * size;
            float *partial = partial_of(partials, shape, chunks, t, h, chunk);
            int64_t stride = chunks * (size + 2);
            if (heads == 4) attend_heads(4, queries, keys, values, partial, stride, count, shape);
            else if (heads == 3) attend_heads(3, queries, keys, values, partial, stride, count, shape);
            else if (heads == 2) attend_heads(2, queries, keys, values, partial, stride, count, shape);
            else attend_heads(1, queries, keys, values, partial, stride, count, shape);
        }
    }
}

/* out [n_tokens, n_heads, head_dim] = softmax(q . keys / sqrt(head_dim)) . values, under a causal mask.
   Neighbouring query heads share a kv head; head_dim must be a multiple of 32. Returns 0, or 1 if out of memory. */
int attend(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, const Shape *shape) {
    int64_t size = shape->head_dim, chunks = (shape->start + shape->n_tokens + CHUNK - 1) / CHUNK;
    float *partials = malloc(shape->n_tokens * shape->n_heads * chunks * (size + 2) * sizeof *partials);
    if (!partials) return 1;
#pragma omp parallel if (shape->n_tokens * shape->n_heads * shape->start * size > SERIAL)
    {
#ifdef WITH_TILES
        if (shape->use_tiles) shape_tiles(ROWS);
#endif
#pragma omp for schedule(static) collapse(2)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t kv_head = 0; kv_head < shape->n_kv_heads; kv_head++)
                attend_chunk(shape, q, keys, values, partials, chunks, kv_head, chunk);
#ifdef WITH_TILES
        if (shape->use_tiles) _tile_release();
#endif
    }
#pragma omp parallel for schedule(static) collapse(2) if (shape->n_tokens * shape->n_heads * chunks * size > SERIAL)
    for (int64_t t = 0; t < shape->n_tokens; t++)
        for (int64_t h = 0; h < shape->n_heads; h++) {
            int64_t seen = (shape->start + t) / CHUNK + 1; /* chunks that token t sees a part of */
            float largest = -INFINITY, sum = 0, *first = partial_of(partials, shape, chunks, t, h, 0);
            for (int64_t c = 0; c < seen; c++)
                if (first[c * (size + 2)] > largest) largest = first[c * (size + 2)];
            for (int64_t c = 0; c < seen; c++) {
                float *partial = first + c * (size + 2), factor = expf(partial[0] - largest);
                sum += partial[1] * factor;
                for (int64_t i = 0; i < size; i++) {
                    partial[2 + i] *= factor;
                    if (c) first[2 + i] += partial[2 + i];
                }
            }
            for (int64_t i = 0; i < size; i++)
                out[(t * shape->n_heads + h) * size + i] = to_bf16(first[2 + i] / sum);
        }
    free(partials);
    return 0;
}

/* The sum of about n floats, read in streams as linear_bf16 reads them, to measure how fast the memory can be read. */
float read_loop(const float *from, int64_t n) {
    float sum = 0;
    int64_t step = n / OUTPUTS / 1024 * 1024; /* from one stream to the next */
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (int64_t begin = 0; begin < step; begin += 1024) {
        floats sums = {0};
        for (int64_t i = begin; i < begin + 1024; i += WIDTH)
            for (int o = 0; o < OUTPUTS; o++) sums += load_floats(from + o * step + i);
        sum += total(sums);
    }
    return sum;
}

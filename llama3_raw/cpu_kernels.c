/* The operations that cost time: products with a matrix in bf16 or int8, and attention over a bf16 cache. Built on first
   use by ops_cpu.py for the processor at hand.

   Whatever stands beside it, a token's result comes from the same operations in the same order: every sum runs over its
   terms in one fixed order, whose pieces do not depend on how many tokens or threads there are. */

#include <math.h>
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
#define ROWS 4     /* tokens at a time */
#define OUTPUTS 8  /* rows of the matrix at a time: as many streams from memory, and sums that do not wait for each other */

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

static inline float widen(bf16 x) {
    union { uint32_t bits; float value; } both = {(uint32_t)x << 16};
    return both.value;
}

static inline bf16 narrow(float x) { /* to the nearest, ties to even, as torch does; not for NaN */
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

/* Two bf16 a lane: sums += x . w, where x and w are 2 * WIDTH values. */
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
    sums += (floats)(x << 16) * (floats)(w << 16); /* the compiler makes one multiply-add of it */
    return sums + (floats)(x & 0xffff0000u) * (floats)(w & 0xffff0000u);
}
#endif

/* y[r][o * y_step] = x[r] . w[o], for constant numbers of rows r and outputs o; w_stride values from one w to the next */
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
        for (int o = 0; o < outputs; o++) y[r * y_stride + o * y_step] = narrow(total(sums[r][o]));
}

/* A matrix in int8: each row in blocks, of which each has a scale, [n_outputs, blocks] in bf16. The tokens it is multiplied
   with are rounded in the same blocks, to 16 bits, which leaves hardly an error. A block's sum is a whole number and exact,
   so that all processors agree but for the rounding of the sums over blocks. */
#define BLOCK 256
#define LARGEST (127 * 254 + 126) /* of a rounded value: 254 times one int8 and another */

static inline int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

/* Rounds values to whole numbers from -LARGEST to LARGEST times the scale, which it returns. */
static float round_block(const bf16 *x, int16_t *rounded, int count) {
    float largest = 0;
    for (int i = 0; i < count; i++) largest = fmaxf(largest, fabsf(widen(x[i])));
    float inverse = largest > 0 ? LARGEST / largest : 0;
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    for (int i = 0; i < count; i++) rounded[i] = (int16_t)(widen(x[i]) * inverse + magic - magic);
    return largest / LARGEST;
}

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* Matrix units (Intel AMX). A tile is 16 rows of up to 64 bytes, and one instruction multiplies two of them: 16 rows of
   the matrix, as they lie in memory, by up to 16 columns. For bf16 a column is a token. For int8 a token has two columns,
   since its values have 16 bits: the first takes 254ths of them, the second what is left. */
#include <sys/syscall.h>
#include <unistd.h>

#define TOKENS 256 /* so many at a time, with a part of the matrix, stay in the cache next to the processor */
#define PART 256   /* rows of the matrix that go with them; with few tokens: */
#define PART_FOR_FEW 32

/* Asks the system for the tiles; -> whether this process may use them. */
int has_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    int64_t row_bytes; /* of the matrix and of a column */
    int width;         /* columns in a tile */
    int64_t n_groups;  /* of so many columns, the last ones perhaps made up */
    char *packed;      /* [n_groups][row_bytes / 4][width][4 bytes] */
    float *scales;     /* [n_groups / 2][blocks][width] for int8 */
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
    _tile_loadconfig(&shapes);
}

/* A part of a column: `count` times four bytes. */
static void put(const Columns *columns, int64_t group, int member, int64_t begin, const void *bytes, int count) {
    int32_t words[BLOCK / 2], *to = (int32_t *)(columns->packed + (group * columns->row_bytes + begin) * columns->width);
    memcpy(words, bytes, 4 * count);
    for (int i = 0; i < count; i++) to[i * columns->width + member] = words[i];
}

/* Puts the tokens into the order that the matrix unit wants. */
static void pack(const Columns *columns, int is_int8, const bf16 *x, int64_t n_rows) {
    int64_t length = columns->row_bytes / (is_int8 ? 1 : 2), blocks = blocks_of(length);
    int64_t room = columns->n_groups / (is_int8 ? 2 : 1) * columns->width;
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < room; t++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t group = t / columns->width, first = block * BLOCK;
            int member = t % columns->width, count = length - first < BLOCK ? (int)(length - first) : BLOCK;
            bf16 values[BLOCK] = {0};
            if (t < n_rows) memcpy(values, x + t * length + first, count * sizeof *values);
            if (!is_int8) {
                put(columns, group, member, 2 * first, values, count / 2);
                continue;
            }
            int16_t rounded[BLOCK];
            int8_t high[BLOCK], low[BLOCK];
            columns->scales[(group * blocks + block) * columns->width + member] = round_block(values, rounded, count);
            for (int i = 0; i < count; i++) {
                high[i] = (int8_t)((rounded[i] + (rounded[i] < 0 ? -127 : 127)) / 254);
                low[i] = (int8_t)(rounded[i] - 254 * high[i]);
            }
            put(columns, 2 * group, member, first, high, count / 4);
            put(columns, 2 * group + 1, member, first, low, count / 4);
        }
}

/* out [2][groups][16][width], `apart` bytes from one half to the other: 32 rows of w times one or two groups of columns,
   over so many bytes; added to what is there if `go_on` */
static inline __attribute__((always_inline)) void multiply(
    int is_int8, int groups, int go_on, const char *w, const char *x, const Columns *columns, int64_t bytes, char *out,
    int64_t apart) {
#define ADD(sums, outputs, group) \
    if (is_int8) _tile_dpbssd(sums, outputs, group); \
    else _tile_dpbf16ps(sums, outputs, group)
    int64_t stride = columns->row_bytes, width = columns->width, size = 64 * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (go_on) {
        _tile_loadd(0, out, 4 * width);
        _tile_loadd(1, out + apart, 4 * width);
        if (groups == 2) {
            _tile_loadd(2, out + size, 4 * width);
            _tile_loadd(3, out + apart + size, 4 * width);
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
    _tile_stored(0, out, 4 * width);
    _tile_stored(1, out + apart, 4 * width);
    if (groups == 2) {
        _tile_stored(2, out + size, 4 * width);
        _tile_stored(3, out + apart + size, 4 * width);
    }
}

/* sums [outputs / 16][n_groups][16][width] for the groups from `group` on; w: the first of so many rows of the matrix */
static void multiply_bf16(const char *w, int64_t outputs, const Columns *columns, int64_t group, int64_t n_groups,
                          float *sums) {
    int64_t row_bytes = columns->row_bytes, size = 16 * columns->width, apart = n_groups * size;
    /* with many tokens, so much of a row that the rows and the tokens stay in the cache */
    int64_t step = outputs == PART_FOR_FEW ? row_bytes : 2048;
    for (int64_t begin = 0; begin < row_bytes; begin += step) {
        int64_t bytes = row_bytes - begin < step ? row_bytes - begin : step;
        for (int64_t o = 0; o < outputs; o += 32)
            for (int64_t g = 0; g < n_groups; g += 2) {
                const char *rows = w + o * row_bytes + begin;
                const char *x = columns->packed + ((group + g) * row_bytes + begin) * columns->width;
                char *out = (char *)(sums + o / 16 * apart + g * size);
                if (n_groups - g > 1) multiply(0, 2, begin > 0, rows, x, columns, bytes, out, 4 * apart);
                else multiply(0, 1, begin > 0, rows, x, columns, bytes, out, 4 * apart);
            }
    }
}

/* sums [16][width] += (254 high + low) times the scales of rows and tokens */
static inline __attribute__((always_inline)) void add_block(
    int width, const int32_t *high, const int32_t *low, const float *row_scales, const float *scales, float *sums) {
    for (int i = 0; i < 16; i++)
        for (int t = 0; t < width; t++)
            sums[i * width + t] += (float)(254 * high[i * width + t] + low[i * width + t]) * (row_scales[i] * scales[t]);
}

/* sums [outputs / 16][n_groups / 2][16][width], as multiply_bf16 */
static void multiply_int8(const char *w, const bf16 *w_scales, int64_t outputs, const Columns *columns, int64_t group,
                          int64_t n_groups, float *sums) {
    int64_t row_bytes = columns->row_bytes, blocks = blocks_of(row_bytes);
    int width = columns->width, size = 16 * width;
    int32_t products[4 * 16 * 16] __attribute__((aligned(64)));
    memset(sums, 0, outputs * n_groups / 2 * width * sizeof *sums);
    for (int64_t block = 0; block < blocks; block++) {
        int64_t begin = block * BLOCK, bytes = row_bytes - begin < BLOCK ? row_bytes - begin : BLOCK;
        for (int64_t o = 0; o < outputs; o += 32) {
            float row_scales[32];
            for (int i = 0; i < 32; i++) row_scales[i] = widen(w_scales[(o + i) * blocks + block]);
            for (int64_t g = 0; g < n_groups; g += 2) {
                const char *x = columns->packed + ((group + g) * row_bytes + begin) * width;
                const float *scales = columns->scales + ((group + g) / 2 * blocks + block) * width;
                multiply(1, 2, 0, w + o * row_bytes + begin, x, columns, bytes, (char *)products, 8 * size);
                for (int half = 0; half < 2; half++) {
                    const int32_t *high = products + half * 2 * size, *low = high + size;
                    float *to = sums + ((o / 16 + half) * n_groups / 2 + g / 2) * size, *rows = row_scales + 16 * half;
                    if (width == 16) add_block(16, high, low, rows, scales, to);
                    else if (width == 1) add_block(1, high, low, rows, scales, to);
                    else add_block(width, high, low, rows, scales, to);
                }
            }
        }
    }
}

/* As linear_bf16 where w_scales is NULL, as linear_int8 otherwise, at any number of tokens; n_outputs a multiple of 32,
   rows of w multiples of 64 bytes. -> 0, or 1 where there is no memory. */
int linear_tiles(const bf16 *x, const void *w, const bf16 *w_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
                 int64_t length) {
    int is_int8 = w_scales != NULL, columns_of_one = is_int8 ? 2 : 1, width = n_rows < 16 ? (int)n_rows : 16;
    int64_t row_bytes = 2 / columns_of_one * length, n_groups = (n_rows + width - 1) / width * columns_of_one;
    int64_t n_scales = is_int8 ? n_groups / 2 * blocks_of(length) * width : 0;
    int64_t part = n_rows <= 16 ? PART_FOR_FEW : PART, together = TOKENS / width * columns_of_one;
    char *packed = malloc(n_groups * width * row_bytes + n_scales * sizeof(float));
    if (!packed) return 1;
    Columns columns = {row_bytes, width, n_groups, packed, (float *)(packed + n_groups * width * row_bytes)};
#pragma omp parallel
    {
        float sums[PART * TOKENS] __attribute__((aligned(64)));
        pack(&columns, is_int8, x, n_rows);
        shape_tiles(width);
        for (int64_t group = 0; group < n_groups; group += together) {
            int64_t count = n_groups - group < together ? n_groups - group : together;
            int64_t n_tiles = count / columns_of_one, first_token = group / columns_of_one * width;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n_outputs; first += part) {
                int64_t outputs = n_outputs - first < part ? n_outputs - first : part;
                const char *rows = (const char *)w + first * row_bytes, *next = rows + outputs * row_bytes;
                if (is_int8)
                    multiply_int8(rows, w_scales + first * blocks_of(length), outputs, &columns, group, count, sums);
                else multiply_bf16(rows, outputs, &columns, group, count, sums);
                for (int i = 0; i < 32; i++) /* else the memory would be idle for a moment */
                    for (int line = 0; line < 2; line++) __builtin_prefetch(next + i * row_bytes + 64 * line);
                for (int64_t t = 0; t < n_tiles * width && first_token + t < n_rows; t++)
                    for (int64_t o = 0; o < outputs; o++)
                        y[(first_token + t) * n_outputs + first + o] =
                            narrow(sums[((o / 16 * n_tiles + t / width) * 16 + o % 16) * width + t % width]);
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

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length] in int8. -> 0, or 1 where there is no memory. */
int linear_int8(const bf16 *x, const int8_t *w, const bf16 *w_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    int64_t blocks = blocks_of(length);
    int16_t *rounded = malloc(n_rows * length * sizeof *rounded);
    float *scales = malloc(n_rows * blocks * sizeof *scales);
    int failed = !rounded || !scales;
    for (int64_t i = 0; i < n_rows * blocks && !failed; i++) {
        int64_t begin = i % blocks * BLOCK, first = i / blocks * length + begin;
        scales[i] = round_block(x + first, rounded + first, length - begin < BLOCK ? (int)(length - begin) : BLOCK);
    }
#pragma omp parallel for schedule(static) if (!failed)
    for (int64_t o = 0; o < n_outputs; o++)
        for (int64_t r = 0; r < n_rows && !failed; r++) {
            float sum = 0;
            for (int64_t block = 0; block < blocks; block++) {
                int64_t begin = block * BLOCK;
                const int16_t *values = rounded + r * length + begin;
                const int8_t *weights = w + o * length + begin;
                int count = length - begin < BLOCK ? (int)(length - begin) : BLOCK;
                int32_t whole = 0;
                for (int i = 0; i < count; i++) whole += (int32_t)values[i] * weights[i];
                sum += (float)whole * (widen(w_scales[o * blocks + block]) * scales[r * blocks + block]);
            }
            y[r * n_outputs + o] = narrow(sum);
        }
    free(rounded);
    free(scales);
    return failed;
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; length a multiple of 32. -> 0, as it needs no
   memory; without scales: the argument is there because the other products have it. */
int linear_bf16(const bf16 *x, const bf16 *w, const bf16 *no_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    (void)no_scales;
    /* The rows of w that are read together lie an eighth of it apart, so that each stream goes on through memory when
       its row ends. */
    int64_t step = n_outputs / OUTPUTS, stride = step * length;
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < step; o++)
        for (int64_t r = 0; r < n_rows; r += ROWS) {
            const bf16 *from = x + r * length, *matrix = w + o * length, *second = matrix + OUTPUTS / 2 * stride;
            bf16 *to = y + r * n_outputs + o, *behind = to + OUTPUTS / 2 * step;
            switch (n_rows - r) {
            case 1:
                product(1, OUTPUTS, from, matrix, stride, to, n_outputs, step, length);
                break;
            case 2:
                product(2, OUTPUTS, from, matrix, stride, to, n_outputs, step, length);
                break;
            case 3: /* in halves, whose sums are as many as a processor has registers for */
                product(3, OUTPUTS / 2, from, matrix, stride, to, n_outputs, step, length);
                product(3, OUTPUTS / 2, from, second, stride, behind, n_outputs, step, length);
                break;
            default:
                product(4, OUTPUTS / 2, from, matrix, stride, to, n_outputs, step, length);
                product(4, OUTPUTS / 2, from, second, stride, behind, n_outputs, step, length);
            }
        }
    for (int64_t o = step * OUTPUTS; o < n_outputs; o++)
        for (int64_t r = 0; r < n_rows; r++)
            product(1, 1, x + r * length, w + o * length, 0, y + r * n_outputs + o, 0, 0, length);
    return 0;
}

#define CHUNK 256 /* keys whose part of the sum is made at once; they are added up in order */

typedef struct {
    int64_t n_tokens, n_heads, n_kv_heads, head_dim, start; /* token t sees the positions up to start + t */
    int64_t q_stride, key_stride, value_stride;             /* values from one token to the next */
} Shape;

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln(2)/2, and a polynomial for e^r */
static inline floats exponential(floats x) {
    floats lowest = (floats){0} - 87.0f;
    words too_low = (words)(x < lowest);
    x = (floats)(((words)x & ~too_low) | ((words)lowest & too_low));
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
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

/* Where token t's query head h keeps, of one chunk of keys: its largest score, the sum of the weights, head_dim sums. */
static inline float *part_of(float *parts, const Shape *shape, int64_t chunks, int64_t t, int64_t h, int64_t chunk) {
    return parts + ((t * shape->n_heads + h) * chunks + chunk) * (shape->head_dim + 2);
}

/* The part of one chunk in the attention of one token, for a constant number of query heads that share a kv head.
   queries [heads][size]: even values before odd ones in every 2 * WIDTH, as load_words and shifting give those of a key */
static inline __attribute__((always_inline)) void attend_heads(
    int heads, const float *queries, const bf16 *keys, const bf16 *values, float *part, int64_t part_stride, int count,
    const Shape *shape) {
    int64_t size = shape->head_dim;
    float weights[ROWS][CHUNK] __attribute__((aligned(64)));
    for (int s = 0; s < count; s++) {
        floats sums[ROWS];
        for (int h = 0; h < heads; h++) sums[h] = (floats){0};
        for (int64_t i = 0; i < size; i += 2 * WIDTH) {
            words key = load_words(keys + s * shape->key_stride + i);
            floats even = (floats)(key << 16), odd = (floats)(key & 0xffff0000u);
            for (int h = 0; h < heads; h++) {
                sums[h] += load_floats(queries + h * size + i) * even;
                sums[h] += load_floats(queries + h * size + i + WIDTH) * odd;
            }
        }
        for (int h = 0; h < heads; h++) weights[h][s] = total(sums[h]);
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
        part[h * part_stride] = largest;
        part[h * part_stride + 1] = total(sum);
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
                part[h * part_stride + 2 + i + 2 * j] = even[h][j];
                part[h * part_stride + 2 + i + 2 * j + 1] = odd[h][j];
            }
    }
}

static void attend_chunk(const Shape *shape, const bf16 *q, const bf16 *keys, const bf16 *values, float *parts,
                         int64_t chunks, int64_t kv_head, int64_t chunk) {
    int64_t sharing = shape->n_heads / shape->n_kv_heads, size = shape->head_dim, first = chunk * CHUNK;
    float scale = 1 / sqrtf((float)size), queries[ROWS * size];
    keys += first * shape->key_stride + kv_head * size;
    values += first * shape->value_stride + kv_head * size;
    for (int64_t t = 0; t < shape->n_tokens; t++) {
        int64_t left = shape->start + t + 1 - first;
        if (left <= 0) continue;
        int count = left < CHUNK ? (int)left : CHUNK;
        for (int64_t h = kv_head * sharing, end = h + sharing; h < end; h += ROWS) {
            int heads = end - h < ROWS ? (int)(end - h) : ROWS;
            const bf16 *from = q + t * shape->q_stride + h * size;
            for (int64_t i = 0; i < heads * size; i += 2 * WIDTH)
                for (int j = 0; j < WIDTH; j++) {
                    queries[i + j] = widen(from[i + 2 * j]) * scale;
                    queries[i + WIDTH + j] = widen(from[i + 2 * j + 1]) * scale;
                }
            float *part = part_of(parts, shape, chunks, t, h, chunk);
            int64_t stride = chunks * (size + 2);
            if (heads == 4) attend_heads(4, queries, keys, values, part, stride, count, shape);
            else if (heads == 3) attend_heads(3, queries, keys, values, part, stride, count, shape);
            else if (heads == 2) attend_heads(2, queries, keys, values, part, stride, count, shape);
            else attend_heads(1, queries, keys, values, part, stride, count, shape);
        }
    }
}

/* out [n_tokens, n_heads, head_dim] = softmax(q . keys / sqrt(head_dim)) . values over each token's own past.
   Neighbouring query heads share a kv head; head_dim a multiple of 32. -> 0, or 1 where there is no memory. */
int attend(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, const Shape *shape) {
    int64_t size = shape->head_dim, chunks = (shape->start + shape->n_tokens + CHUNK - 1) / CHUNK;
    float *parts = malloc(shape->n_tokens * shape->n_heads * chunks * (size + 2) * sizeof *parts);
    if (!parts) return 1;
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t kv_head = 0; kv_head < shape->n_kv_heads; kv_head++)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            attend_chunk(shape, q, keys, values, parts, chunks, kv_head, chunk);
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t t = 0; t < shape->n_tokens; t++)
        for (int64_t h = 0; h < shape->n_heads; h++) {
            int64_t seen = (shape->start + t) / CHUNK + 1; /* chunks that token t sees a part of */
            float largest = -INFINITY, sum = 0, *first = part_of(parts, shape, chunks, t, h, 0);
            for (int64_t c = 0; c < seen; c++)
                if (first[c * (size + 2)] > largest) largest = first[c * (size + 2)];
            for (int64_t c = 0; c < seen; c++) {
                float *part = first + c * (size + 2), factor = expf(part[0] - largest);
                sum += part[1] * factor;
                for (int64_t i = 0; i < size; i++) {
                    part[2 + i] *= factor;
                    if (c) first[2 + i] += part[2 + i];
                }
            }
            for (int64_t i = 0; i < size; i++)
                out[(t * shape->n_heads + h) * size + i] = narrow(first[2 + i] / sum);
        }
    free(parts);
    return 0;
}

/* The sum of about n floats, read in streams as linear does it: how fast the memory can be read. */
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

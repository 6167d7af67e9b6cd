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

#define BLOCK 256 /* values of a token that share a scale when they are rounded to int8 */

/* Rounds values to whole numbers from -127 to 127 times the scale, which it returns. */
static float quantize(const bf16 *x, int8_t *rounded, int count) {
    float largest = 0;
    for (int i = 0; i < count; i++) largest = fmaxf(largest, fabsf(widen(x[i])));
    float inverse = largest > 0 ? 127 / largest : 0;
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    for (int i = 0; i < count; i++) rounded[i] = (int8_t)(widen(x[i]) * inverse + magic - magic);
    return largest / 127;
}

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* Matrix units (Intel AMX). A tile is 16 rows of up to 64 bytes, and one instruction multiplies two of them: 16 rows of
   the matrix, as they lie in memory, by up to 16 tokens. */
#include <sys/syscall.h>
#include <unistd.h>

#define TOKENS 256  /* so many at a time, with a part of the matrix, stay in the cache next to the processor */
#define OUTPUTS_OF_MANY 256
#define OUTPUTS_OF_FEW 32

/* Asks the system for the tiles; -> whether this process may use them. */
int has_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    int64_t row_bytes; /* of the matrix and of a token */
    int block_bytes;   /* whose products the matrix unit adds up */
    int width;         /* tokens in a tile */
    int64_t n_groups;  /* of so many tokens, the last ones perhaps made up */
    char *packed;      /* [n_groups][row_bytes / 4][width][4 bytes] */
    float *scales;     /* [n_groups][blocks][width] for int8 */
} Tokens;

/* Tiles 0 to 3: sums of 16 outputs for `width` tokens; 4 and 5: 64 bytes of 16 rows of the matrix; 6 and 7: of tokens. */
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

/* Puts the tokens into the order that the matrix unit wants, and rounds them for an int8 matrix. */
static void pack(const Tokens *tokens, int is_int8, const bf16 *x, int64_t n_rows) {
    int value_bytes = is_int8 ? 1 : 2, width = tokens->width;
    int64_t length = tokens->row_bytes / value_bytes, blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < tokens->n_groups * width; t++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t group = t / width, member = t % width, first = block * BLOCK;
            int count = length - first < BLOCK ? (int)(length - first) : BLOCK;
            int32_t values[BLOCK / 2] = {0};
            float scale = 0;
            if (t < n_rows && is_int8) scale = quantize(x + t * length + first, (int8_t *)values, count);
            else if (t < n_rows) memcpy(values, x + t * length + first, count * sizeof *x);
            int32_t *to = (int32_t *)(tokens->packed + (group * tokens->row_bytes + first * value_bytes) * width) + member;
            for (int i = 0; i < count * value_bytes / 4; i++) to[i * width] = values[i];
            if (is_int8) tokens->scales[(group * blocks + block) * width + member] = scale;
        }
}

/* out [2][groups][16][width] = 32 rows of w times one or two groups of tokens, over so many bytes */
static inline __attribute__((always_inline)) void multiply(
    int is_int8, int groups, const char *w, const char *x, const Tokens *tokens, int64_t bytes, char *out) {
#define ADD(sums, outputs, group) \
    if (is_int8) _tile_dpbssd(sums, outputs, group); \
    else _tile_dpbf16ps(sums, outputs, group)
    int64_t stride = tokens->row_bytes, width = tokens->width, size = 64 * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
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
    _tile_stored(1, out + groups * size, 4 * width);
    if (groups == 2) {
        _tile_stored(2, out + size, 4 * width);
        _tile_stored(3, out + 3 * size, 4 * width);
    }
}

/* sums [16][width] += products [16][width], int8 times the scales of the tokens */
static inline __attribute__((always_inline)) void add_block(
    int is_int8, int width, const char *products, const float *scales, float *sums) {
    for (int i = 0; i < 16; i++)
        for (int t = 0; t < width; t++)
            if (is_int8) sums[i * width + t] += (float)((const int32_t *)products)[i * width + t] * scales[t];
            else sums[i * width + t] += ((const float *)products)[i * width + t];
}

/* sums [outputs / 16][n_groups][16][width] for the groups from `group` on, w: the first of so many rows of the matrix */
static inline __attribute__((always_inline)) void multiply_part(
    int is_int8, const char *w, int64_t outputs, const Tokens *tokens, int64_t group, int64_t n_groups, float *sums) {
    int64_t row_bytes = tokens->row_bytes, blocks = (row_bytes + BLOCK - 1) / BLOCK;
    int width = tokens->width, size = 16 * width;
    char products[4 * 16 * 64] __attribute__((aligned(64)));
    memset(sums, 0, outputs * n_groups * width * sizeof *sums);
    for (int64_t begin = 0; begin < row_bytes; begin += tokens->block_bytes) {
        int64_t left = row_bytes - begin, bytes = left < tokens->block_bytes ? left : tokens->block_bytes;
        for (int64_t o = 0; o < outputs; o += 32)
            for (int64_t g = 0; g < n_groups; g += 2) {
                const char *rows = w + o * row_bytes + begin;
                const char *x = tokens->packed + ((group + g) * row_bytes + begin) * width;
                int groups = n_groups - g == 1 ? 1 : 2;
                if (groups == 2) multiply(is_int8, 2, rows, x, tokens, bytes, products);
                else multiply(is_int8, 1, rows, x, tokens, bytes, products);
                for (int i = 0; i < 2 * groups; i++) {
                    float *to = sums + ((o / 16 + i / groups) * n_groups + g + i % groups) * size;
                    const float *scales = tokens->scales + ((group + g + i % groups) * blocks + begin / BLOCK) * width;
                    if (width == 16) add_block(is_int8, 16, products + i * 4 * size, scales, to);
                    else add_block(is_int8, width, products + i * 4 * size, scales, to);
                }
            }
    }
}

/* As linear_bf16 where w_scales is NULL, as linear_int8 otherwise, at any number of tokens; n_outputs a multiple of 32,
   rows of w multiples of 64 bytes. -> 0, or 1 where there is no memory. */
int linear_tiles(const bf16 *x, const void *w, const float *w_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
                 int64_t length) {
    int is_int8 = w_scales != NULL, width = n_rows < 16 ? (int)n_rows : 16;
    int64_t row_bytes = is_int8 ? length : 2 * length, n_groups = (n_rows + width - 1) / width;
    int64_t scale_bytes = (length + BLOCK - 1) / BLOCK * sizeof(float), room = n_groups * width;
    int64_t step = n_rows <= 16 ? OUTPUTS_OF_FEW : OUTPUTS_OF_MANY, together = TOKENS / width;
    char *packed = malloc(room * (row_bytes + scale_bytes));
    if (!packed) return 1;
    Tokens tokens = {row_bytes, is_int8 ? BLOCK : 2048, width, n_groups, packed, (float *)(packed + room * row_bytes)};
#pragma omp parallel
    {
        float sums[OUTPUTS_OF_MANY * TOKENS] __attribute__((aligned(64)));
        pack(&tokens, is_int8, x, n_rows);
        shape_tiles(width);
        for (int64_t group = 0; group < n_groups; group += together) {
            int64_t count = n_groups - group < together ? n_groups - group : together, first_token = group * width;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n_outputs; first += step) {
                int64_t outputs = n_outputs - first < step ? n_outputs - first : step;
                const char *rows = (const char *)w + first * row_bytes, *next = rows + outputs * row_bytes;
                if (is_int8) multiply_part(1, rows, outputs, &tokens, group, count, sums);
                else multiply_part(0, rows, outputs, &tokens, group, count, sums);
                for (int i = 0; i < 32; i++) /* else the memory would be idle for a moment */
                    for (int line = 0; line < 2; line++) __builtin_prefetch(next + i * row_bytes + 64 * line);
                for (int64_t t = 0; t < count * width && first_token + t < n_rows; t++)
                    for (int64_t o = 0; o < outputs; o++) {
                        float sum = sums[((o / 16 * count + t / width) * 16 + o % 16) * width + t % width];
                        y[(first_token + t) * n_outputs + first + o] = narrow(is_int8 ? sum * w_scales[first + o] : sum);
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

/* y [n_rows, n_outputs] = (x [n_rows, length] w^T) w_scales, w [n_outputs, length] in int8, x rounded to int8 in blocks.
   -> 0, or 1 where there is no memory. */
int linear_int8(const bf16 *x, const int8_t *w, const float *w_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    int64_t blocks = (length + BLOCK - 1) / BLOCK;
    int8_t *rounded = malloc(n_rows * length);
    float *scales = malloc(n_rows * blocks * sizeof *scales);
    int failed = !rounded || !scales;
    for (int64_t r = 0; r < n_rows && !failed; r++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = r * length + b * BLOCK, left = length - b * BLOCK;
            scales[r * blocks + b] = quantize(x + first, rounded + first, left < BLOCK ? (int)left : BLOCK);
        }
#pragma omp parallel for schedule(static) if (!failed)
    for (int64_t o = 0; o < n_outputs; o++)
        for (int64_t r = 0; r < n_rows && !failed; r++) {
            float sum = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t *from = rounded + r * length + b * BLOCK, *weights = w + o * length + b * BLOCK;
                int count = length - b * BLOCK < BLOCK ? (int)(length - b * BLOCK) : BLOCK;
                int32_t whole = 0;
                for (int i = 0; i < count; i++) whole += (int32_t)from[i] * weights[i];
                sum += (float)whole * scales[r * blocks + b];
            }
            y[r * n_outputs + o] = narrow(sum * w_scales[o]);
        }
    free(rounded);
    free(scales);
    return failed;
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; length a multiple of 32. -> 0, as it needs no
   memory; without scales: the argument is there because the other products have it. */
int linear_bf16(const bf16 *x, const bf16 *w, const float *no_scales, bf16 *y, int64_t n_rows, int64_t n_outputs,
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

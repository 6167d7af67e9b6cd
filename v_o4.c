/* The two operations that read memory while tokens are generated, for 1 to 16 tokens at a time: a product with a bf16
   matrix, and attention over a bf16 cache. Built on first use by ops_cpu.py for the processor at hand.

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
#define OUTPUTS 4  /* rows of the matrix at a time: as many streams from memory, and sums that do not wait for each other */

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

/* y[rows][outputs] = x[rows][length] . w[outputs][length], for constants rows and outputs */
static inline __attribute__((always_inline)) void product(
    int rows, int outputs, const bf16 *x, const bf16 *w, bf16 *y, int64_t length, int64_t y_stride) {
    floats sums[ROWS][OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sums[r][o] = (floats){0};
    for (int64_t i = 0; i < length; i += 2 * WIDTH) {
        pairs row[ROWS];
        for (int r = 0; r < rows; r++) row[r] = load_pairs(x + r * length + i);
        for (int o = 0; o < outputs; o++) {
            pairs column = load_pairs(w + o * length + i);
            for (int r = 0; r < rows; r++) sums[r][o] = add_products(sums[r][o], row[r], column);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) y[r * y_stride + o] = narrow(total(sums[r][o]));
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; length a multiple of 32 */
void linear(const bf16 *x, const bf16 *w, bf16 *y, int64_t n_rows, int64_t n_outputs, int64_t length) {
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (n_outputs + OUTPUTS - 1) / OUTPUTS; block++) {
        int64_t o = block * OUTPUTS;
        int outputs = n_outputs - o < OUTPUTS ? (int)(n_outputs - o) : OUTPUTS;
        for (int64_t r = 0; r < n_rows; r += ROWS) {
            int rows = n_rows - r < ROWS ? (int)(n_rows - r) : ROWS;
            const bf16 *from = x + r * length, *matrix = w + o * length;
            bf16 *to = y + r * n_outputs + o;
            if (outputs == OUTPUTS && rows == 1) product(1, OUTPUTS, from, matrix, to, length, n_outputs);
            else if (outputs == OUTPUTS && rows == 2) product(2, OUTPUTS, from, matrix, to, length, n_outputs);
            else if (outputs == OUTPUTS) /* in halves, whose sums are as many as a processor has registers for */
                for (int half = 0; half < OUTPUTS; half += OUTPUTS / 2) {
                    const bf16 *part = matrix + half * length;
                    if (rows == 3) product(3, OUTPUTS / 2, from, part, to + half, length, n_outputs);
                    else product(4, OUTPUTS / 2, from, part, to + half, length, n_outputs);
                }
            else
                for (int each = 0; each < rows; each++)
                    for (int other = 0; other < outputs; other++)
                        product(1, 1, from + each * length, matrix + other * length, to + each * n_outputs + other,
                                length, n_outputs);
        }
    }
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

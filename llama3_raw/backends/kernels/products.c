/* Products with matrices in bf16 and int8, which lie in memory row by row.

   A lane of a vector is an input: a sum adds the products of two neighbouring inputs in each lane, and its lanes are
   added at the end. The tokens of bf16 are bf16, and those of int8 are rounded to 16 bits, so that both are pairs of 16
   bits. Neighbouring rows of the matrix are read together, and the rows after them are requested in the order of memory,
   which a processor reads fastest. */

#include "int8.h"

#define AT_ONCE 4 /* outputs, for several tokens: the sums fit into the registers */
#define SAFE (512 * WIDTH) /* inputs of int8 whose sums do not overflow 32 bits: 256 times 2 * 127 * LARGEST in a lane */

/* 2 * WIDTH values of 8 bits, as 16 bits */
static inline words load_integers(const int8_t *from) {
#if WIDTH == 16
    return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)from));
#elif WIDTH == 8
    return (words)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)from));
#elif defined(__SSE2__)
    __m128i eight = _mm_loadl_epi64((const void *)from);
    return (words)_mm_srai_epi16(_mm_unpacklo_epi8(eight, eight), 8);
#else
    int16_t values[2 * WIDTH];
    for (int i = 0; i < 2 * WIDTH; i++) values[i] = from[i];
    return load_words(values);
#endif
}

/* sums + x . w of integers in 16 bits, two in each lane */
static inline ints add_integers(ints sums, words x, words w) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)w);
#elif WIDTH == 16
    return sums + (ints)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif WIDTH == 8
    return sums + (ints)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
    return sums + (ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#elif defined(__ARM_NEON)
    int16x8_t a = vreinterpretq_s16_u32((uint32x4_t)x), b = vreinterpretq_s16_u32((uint32x4_t)w);
    return (ints)vmlal_high_s16(vmlal_s16((int32x4_t)sums, vget_low_s16(a), vget_low_s16(b)), a, b);
#else
    return sums + ((ints)(x << 16) >> 16) * ((ints)(w << 16) >> 16) + ((ints)x >> 16) * ((ints)w >> 16);
#endif
}

static inline int64_t total_of_integers(ints sums) {
#if WIDTH == 16
    __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256((__m512i)sums));
    return _mm512_reduce_add_epi64(low + _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64((__m512i)sums, 1)));
#elif WIDTH == 8
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128((__m256i)sums));
    __m256i four = low + _mm256_cvtepi32_epi64(_mm256_extracti128_si256((__m256i)sums, 1));
    return four[0] + four[1] + four[2] + four[3];
#else
    ints four = (ints)sums;
    return ((int64_t)four[0] + four[1]) + ((int64_t)four[2] + four[3]);
#endif
}

typedef struct {
    const uint16_t *x;                /* [n_rows, length] */
    const void *w;                    /* [n_outputs, length] */
    const float *row_scales, *scales; /* of int8: of the outputs and of the tokens */
    bf16 *y;                          /* [n_rows, n_outputs] */
    int64_t n_rows, n_outputs, length;
} Product;

/* y of `rows` tokens and `outputs` neighbouring outputs, which are constant numbers; `row` and `output` are the first.
   (One function for bf16 and int8 was a fifth slower in bf16: GCC 12 spills its sums.) */
static inline __attribute__((always_inline)) void stream_bf16(
    int rows, int outputs, const Product *p, int64_t row, int64_t output) {
    int64_t length = p->length;
    const bf16 *x = p->x + row * length, *w = (const bf16 *)p->w + output * length, *next = w + OUTPUTS * length;
    floats sums[ROWS][OUTPUTS];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) sums[r][o] = (floats){0};
    for (int64_t i = 0; i < length; i += 2 * WIDTH) {
        if (row == 0 && i % 32 == 0)
            for (int o = 0; o < outputs; o++) __builtin_prefetch(next + i * outputs + 32 * o, 0, 2);
        pairs token[ROWS];
        for (int r = 0; r < rows; r++) token[r] = load_pairs(x + r * length + i);
        for (int o = 0; o < outputs; o++) {
            pairs weights = load_pairs(w + o * length + i);
            for (int r = 0; r < rows; r++) sums[r][o] = add_products(sums[r][o], token[r], weights);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) p->y[(row + r) * p->n_outputs + output + o] = to_bf16(total(sums[r][o]));
}

/* The same for int8. The product of integers is exact in any order. */
static inline __attribute__((always_inline)) void stream_int8(
    int rows, int outputs, const Product *p, int64_t row, int64_t output) {
    int64_t length = p->length, totals[ROWS][OUTPUTS] = {{0}};
    const int16_t *x = (const int16_t *)p->x + row * length;
    const int8_t *w = (const int8_t *)p->w + output * length, *next = w + OUTPUTS * length;
    for (int64_t begin = 0; begin < length; begin += SAFE) {
        int64_t end = begin + SAFE < length ? begin + SAFE : length;
        ints sums[ROWS][OUTPUTS];
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < outputs; o++) sums[r][o] = (ints){0};
        for (int64_t i = begin; i < end; i += 2 * WIDTH) {
            if (row == 0 && i % 64 == 0)
                for (int o = 0; o < outputs; o++) __builtin_prefetch(next + i * outputs + 64 * o, 0, 2);
            words token[ROWS];
            for (int r = 0; r < rows; r++) token[r] = load_words(x + r * length + i);
            for (int o = 0; o < outputs; o++) {
                words weights = load_integers(w + o * length + i);
                for (int r = 0; r < rows; r++) sums[r][o] = add_integers(sums[r][o], token[r], weights);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < outputs; o++) totals[r][o] += total_of_integers(sums[r][o]);
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) {
            float scale = p->row_scales[output + o] * p->scales[row + r];
            p->y[(row + r) * p->n_outputs + output + o] = to_bf16((float)totals[r][o] * scale);
        }
}

/* y of all tokens and of OUTPUTS outputs, or fewer at the end of the matrix; `stream` is one of the two above. (A macro,
   because GCC passes no constant into a parallel region.) */
#define STREAM_ALL(stream, p, output) \
    for (int64_t row = 0, rows; row < (p)->n_rows; row += ROWS) { \
        rows = (p)->n_rows - row; \
        if ((p)->n_outputs - output < OUTPUTS) { \
            for (int64_t o = output; o < (p)->n_outputs; o++) \
                for (int64_t r = row; r < row + ROWS && r < (p)->n_rows; r++) stream(1, 1, p, r, o); \
        } else if (rows == 1) stream(1, OUTPUTS, p, row, output); \
        else \
            for (int64_t o = output; o < output + OUTPUTS; o += AT_ONCE) { \
                if (rows == 2) stream(2, AT_ONCE, p, row, o); \
                else if (rows == 3) stream(3, AT_ONCE, p, row, o); \
                else stream(ROWS, AT_ONCE, p, row, o); \
            } \
    }

static void all_bf16(const Product *p, int64_t output) { STREAM_ALL(stream_bf16, p, output) }
static void all_int8(const Product *p, int64_t output) { STREAM_ALL(stream_int8, p, output) }

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; length must be a multiple of 32. Returns 0, as it
   allocates no memory. (All products have the same arguments, and use one of the two matrices.) */
int linear_bf16(const bf16 *x, const bf16 *w, const Int8 *unused, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    (void)unused;
    Product product = {x, w, 0, 0, y, n_rows, n_outputs, length};
#pragma omp parallel for schedule(static) if (n_rows * n_outputs * length > SERIAL)
    for (int64_t output = 0; output < n_outputs; output += OUTPUTS) all_bf16(&product, output);
    return 0;
}

/* The same for w in int8. Returns 0, or 1 if out of memory. */
int linear_int8(const bf16 *x, const bf16 *unused, const Int8 *w, bf16 *y, int64_t n_rows, int64_t n_outputs,
                int64_t length) {
    (void)unused;
    float *scales = malloc(n_rows * (sizeof *scales + length * sizeof(int16_t)));
    if (!scales) return 1;
    int16_t *rounded = (int16_t *)(scales + n_rows);
#pragma omp parallel for schedule(static) if (n_rows * length > SERIAL)
    for (int64_t r = 0; r < n_rows; r++)
        scales[r] = round_token(x + r * length, w->column_scales, rounded + r * length, length);
    Product product = {(uint16_t *)rounded, w->values, w->row_scales, scales, y, n_rows, n_outputs, length};
#pragma omp parallel for schedule(static) if (n_rows * n_outputs * length > SERIAL)
    for (int64_t output = 0; output < n_outputs; output += OUTPUTS) all_int8(&product, output);
    free(scales);
    return 0;
}

int width(void) { return WIDTH; }

/* The sum of about n floats, read in streams as few tokens read a matrix, to measure how fast the memory can be read. */
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

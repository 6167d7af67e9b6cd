/* What the kernels share: numbers, vectors of the processor's width, and products of bf16. cpu.py compiles the files of
   this folder on first use, for the processor that it runs on.

   A token's result has the same bits alone and among other tokens: every sum adds its terms in one fixed order, in
   pieces that do not depend on the number of tokens or threads. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

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
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

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

static inline float to_float(bf16 x) {
    union { uint32_t bits; float value; } both = {(uint32_t)x << 16};
    return both.value;
}

static inline floats load_bf16(const bf16 *from) {
    halves loaded;
    memcpy(&loaded, from, sizeof loaded);
    return (floats)(__builtin_convertvector(loaded, words) << 16);
}

static inline void store_halves(void *to, words from) { /* their low halves */
    halves low = __builtin_convertvector(from & 0xffff, halves);
    memcpy(to, &low, sizeof low);
}

static inline bf16 to_bf16(float x) { /* rounds to nearest, ties to even, as torch does */
    union { float value; uint32_t bits; } both = {x};
    bf16 rounded = (bf16)((both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16);
    return x != x ? 0x7fc0 : rounded; /* the sum could carry a NaN over to zero */
}

static inline floats rounded(floats x) { /* as to_bf16 does */
    words bits = (words)x, is_nan = (words)(x != x);
    return (floats)(((bits + 0x7fff + (bits >> 16 & 1)) & ~is_nan & 0xffff0000) | (0x7fc00000 & is_nan));
}

static inline void store_bf16(bf16 *to, floats x) { store_halves(to, (words)rounded(x) >> 16); }

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
typedef __m512bh pairs;
static inline pairs load_pairs(const bf16 *from) { return (pairs)_mm512_loadu_si512(from); }
static inline floats add_products(floats sums, pairs x, pairs w) { return (floats)_mm512_dpbf16_ps((__m512)sums, x, w); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef bfloat16x8_t pairs;
static inline pairs load_pairs(const bf16 *from) { return (pairs)load_words(from); }
static inline floats add_products(floats sums, pairs x, pairs w) { return (floats)vbfdotq_f32((float32x4_t)sums, x, w); }
#else
typedef words pairs;
static inline pairs load_pairs(const bf16 *from) { return load_words(from); }
static inline floats add_products(floats sums, pairs x, pairs w) {
    sums += (floats)(x << 16) * (floats)(w << 16); /* compiled to a fused multiply-add */
    return sums + (floats)(x & 0xffff0000u) * (floats)(w & 0xffff0000u);
}
#endif

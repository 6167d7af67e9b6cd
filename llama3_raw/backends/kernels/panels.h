/* Products with matrices of few bits: the micro-kernel of int4 and of GGML's blocks.

   A lane of a vector is an output. A panel holds WIDTH outputs of 32 inputs as bytes, four inputs in each lane, and their
   scales; unpacking it is all that differs between formats. The tokens are rounded to 8 bits, with a scale for each 32
   inputs. The integer sum of a panel times a token is exact; it is added to the token's sum by a multiply-add (and one
   more for a minimum), in the order of the inputs. So a result depends neither on the other tokens nor on the threads:
   tests compare the bits for each instruction set. */

#pragma once
#include "shared.h"

#define GROUP 32
#define QUADS (GROUP / 4)

typedef uint8_t bytes __attribute__((vector_size(4 * WIDTH)));

/* The sums of a panel times a token. `add_quad` adds, to each lane, four unsigned bytes of `w` times four of the token,
   and `finish` returns the sums of the lanes. With 16-bit sums, `finish` must come before they overflow: after 8 quads
   of 4-bit values, 4 of 5-bit ones and 2 of 6-bit ones. Bytes of 8 bits are signed, except where SIGN is 128, which is
   added to them then. */
#if defined(__AVX512VNNI__) || (WIDTH == 8 && defined(__AVXVNNI__))
#define SIGN 128
typedef ints Sums;
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    (void)bits;
#if WIDTH == 16
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#else
    return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, _mm256_set1_epi32(x));
#endif
}
static inline ints finish(Sums sums) { return sums; }
static inline int quads_in_16_bits(int bits) { (void)bits; return QUADS; }

#elif WIDTH >= 8
#define SIGN 0
typedef int16_t Sums __attribute__((vector_size(4 * WIDTH)));
#if WIDTH == 16
#define OF(name) _mm512_##name
typedef __m512i vector;
static inline vector with_sign_of(vector x, vector w) {
    return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
}
#else
#define OF(name) _mm256_##name
typedef __m256i vector;
static inline vector with_sign_of(vector x, vector w) { return _mm256_sign_epi8(x, w); }
#endif
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    vector four = OF(set1_epi32)(x);
    if (bits == 8) return (Sums)OF(maddubs_epi16)(OF(abs_epi8)((vector)w), with_sign_of(four, (vector)w));
    return sums + (Sums)OF(maddubs_epi16)((vector)w, four);
}
static inline ints finish(Sums sums) { return (ints)OF(madd_epi16)((vector)sums, OF(set1_epi16)(1)); }
static inline int quads_in_16_bits(int bits) { return bits == 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

#else
#define SIGN 0
typedef struct { ints low, high; } Sums; /* pairs of sums: of lanes 0 and 1, and of lanes 2 and 3 */
#if defined(__SSE2__)
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    __m128i zero = _mm_setzero_si128(), four = _mm_set1_epi32(x), values = (__m128i)w;
    __m128i signs = bits == 8 ? _mm_cmpgt_epi8(zero, values) : zero;
    four = _mm_srai_epi16(_mm_unpacklo_epi8(four, four), 8);
    sums.low += (ints)_mm_madd_epi16(_mm_unpacklo_epi8(values, signs), four);
    sums.high += (ints)_mm_madd_epi16(_mm_unpackhi_epi8(values, signs), four);
    return sums;
}
static inline ints finish(Sums sums) {
    __m128 low = (__m128)sums.low, high = (__m128)sums.high;
    return (ints)_mm_shuffle_ps(low, high, 0x88) + (ints)_mm_shuffle_ps(low, high, 0xdd);
}
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    (void)bits;
    sums.low = (ints)vdotq_s32((int32x4_t)sums.low, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
    return sums;
}
static inline ints finish(Sums sums) { return sums.low; }
#elif defined(__ARM_NEON)
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    (void)bits;
    int8x16_t values = (int8x16_t)w, four = vreinterpretq_s8_s32(vdupq_n_s32(x));
    sums.low = (ints)vpadalq_s16((int32x4_t)sums.low, vmull_s8(vget_low_s8(values), vget_low_s8(four)));
    sums.high = (ints)vpadalq_s16((int32x4_t)sums.high, vmull_high_s8(values, four));
    return sums;
}
static inline ints finish(Sums sums) { return (ints)vpaddq_s32((int32x4_t)sums.low, (int32x4_t)sums.high); }
#else
static inline Sums add_quad(Sums sums, bytes w, int32_t x, int bits) {
    for (int i = 0; i < 4 * WIDTH; i++)
        sums.low[i / 4] += (bits == 8 ? (int8_t)w[i] : w[i]) * (int8_t)((uint32_t)x >> i % 4 * 8);
    return sums;
}
static inline ints finish(Sums sums) { return sums.low; }
#endif
static inline int quads_in_16_bits(int bits) { (void)bits; return QUADS; }
#endif

/* quads[i] = bytes 4 * i to 4 * i + 3 of WIDTH rows, from 16 bytes of each */
static inline void load_columns(const uint8_t *rows, int64_t stride, bytes quads[4]) {
    __asm__("" : "+r"(stride)); /* otherwise GCC keeps the address of each row, for which it has no registers */
#if WIDTH == 16
    __m512i r[4];
    for (int i = 0; i < 4; i++) {
        const uint8_t *row = rows + i * stride;
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)row));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 4 * stride)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 8 * stride)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const void *)(row + 12 * stride)), 3);
    }
#define ZIP(part, size, a, b) _mm512_unpack##part##_epi##size(a, b)
#elif WIDTH == 8
    __m256i r[4];
    for (int i = 0; i < 4; i++) {
        const uint8_t *row = rows + i * stride;
        r[i] = _mm256_castsi128_si256(_mm_loadu_si128((const void *)row));
        r[i] = _mm256_inserti128_si256(r[i], _mm_loadu_si128((const void *)(row + 4 * stride)), 1);
    }
#define ZIP(part, size, a, b) _mm256_unpack##part##_epi##size(a, b)
#elif defined(__SSE2__)
    __m128i r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_loadu_si128((const void *)(rows + i * stride));
#define ZIP(part, size, a, b) _mm_unpack##part##_epi##size(a, b)
#endif
#if defined(ZIP)
    quads[0] = (bytes)ZIP(lo, 64, ZIP(lo, 32, r[0], r[1]), ZIP(lo, 32, r[2], r[3]));
    quads[1] = (bytes)ZIP(hi, 64, ZIP(lo, 32, r[0], r[1]), ZIP(lo, 32, r[2], r[3]));
    quads[2] = (bytes)ZIP(lo, 64, ZIP(hi, 32, r[0], r[1]), ZIP(hi, 32, r[2], r[3]));
    quads[3] = (bytes)ZIP(hi, 64, ZIP(hi, 32, r[0], r[1]), ZIP(hi, 32, r[2], r[3]));
#undef ZIP
#else
    for (int i = 0; i < 4; i++) {
        uint32_t fours[WIDTH];
        for (int lane = 0; lane < WIDTH; lane++) memcpy(fours + lane, rows + lane * stride + 4 * i, 4);
        quads[i] = (bytes)load_words(fours);
    }
#endif
}

static inline floats from_bytes(const uint8_t *from) { /* WIDTH unsigned bytes, as floats */
#if WIDTH == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
#elif WIDTH == 8
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    return (floats){from[0], from[1], from[2], from[3]};
#endif
}

static inline floats from_halves(const uint8_t *from) { /* WIDTH numbers in fp16, as floats */
#if WIDTH == 16
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif WIDTH == 8 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
#else
    halves loaded;
    memcpy(&loaded, from, sizeof loaded);
    words wide = __builtin_convertvector(loaded, words);
    words rest = wide & 0x7fff, special = (words)(rest >= 0x7c00); /* infinite, or NaN */
    floats values = (floats)(rest << 13) * 0x1p112f; /* the difference of the exponents; right for subnormals too */
    return (floats)((words)values | (special & 0x7f800000) | (wide & 0x8000) << 16);
#endif
}

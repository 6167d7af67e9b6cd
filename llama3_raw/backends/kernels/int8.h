/* Matrices in int8, and tokens rounded to 16 bits to multiply them exactly. */

#pragma once
#include "shared.h"

/* A matrix in int8 is integers times a scale for each row and one for each column. The tokens are multiplied by the
   column scales and rounded to 16 bits, with hardly any error. The product of integers is exact in any order. */
#define LARGEST (127 * 254 + 126) /* of a rounded value, which is 254 times one int8 plus another */

/* Rounds a token's values, times the column scales, to integers times one scale, which it returns. If a value is
   infinite or NaN, that scale is NaN, and so is the whole product. */
static inline float round_token(const bf16 *x, const float *column_scales, int16_t *rounded, int64_t length) {
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

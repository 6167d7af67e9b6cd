/* Normalization, rotary positions and SwiGLU of bf16, each in one pass over the tokens. */

#include "shared.h"

/* y [n_rows, dim] = x divided by the RMS of each row, rounded, times weight */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, int64_t n_rows, int64_t dim, float eps) {
#pragma omp parallel for schedule(static) if (n_rows * dim > SERIAL / 4)
    for (int64_t r = 0; r < n_rows; r++) {
        const bf16 *row = x + r * dim;
        float sums[32] = {0}, sum = 0; /* 32, so that they are vectors */
        for (int64_t i = 0; i < dim; i += 32)
            for (int j = 0; j < 32; j++) sums[j] += to_float(row[i + j]) * to_float(row[i + j]);
        for (int j = 0; j < 32; j++) sum += sums[j];
        float scale = 1 / sqrtf(sum / (float)dim + eps);
        for (int64_t i = 0; i < dim; i++)
            y[r * dim + i] = to_bf16(to_float(to_bf16(to_float(row[i]) * scale)) * to_float(weight[i]));
    }
}

typedef struct {
    int64_t n_rows, n_heads, head_dim;
    int64_t n_angles, angle_stride, pair_stride; /* of cos and sin [n_angles, head_dim / 2], n_angles divides n_rows */
} Rotation;

/* y = x [n_rows, n_heads, head_dim], each pair of neighbours rotated; row r by the angles r modulo n_angles */
void rope(const bf16 *x, const float *cos, const float *sin, bf16 *y, const Rotation *shape) {
    int64_t row_size = shape->n_heads * shape->head_dim;
#pragma omp parallel for schedule(static) if (shape->n_rows * row_size > SERIAL / 4)
    for (int64_t r = 0; r < shape->n_rows; r++) {
        const float *c = cos + r % shape->n_angles * shape->angle_stride, *s = sin + r % shape->n_angles * shape->angle_stride;
        for (int64_t h = 0; h < shape->n_heads; h++) {
            const bf16 *from = x + r * row_size + h * shape->head_dim;
            bf16 *to = y + r * row_size + h * shape->head_dim;
            for (int64_t i = 0; i < shape->head_dim / 2; i++) {
                float first = to_float(from[2 * i]), second = to_float(from[2 * i + 1]);
                float cosine = c[i * shape->pair_stride], sine = s[i * shape->pair_stride];
                to[2 * i] = to_bf16(first * cosine - second * sine);
                to[2 * i + 1] = to_bf16(first * sine + second * cosine);
            }
        }
    }
}

/* y [n] = silu(gate) * up, n a multiple of 32; silu(x) = x / (1 + e^-x), rounded, and 0 below -87 */
void swiglu(const bf16 *gate, const bf16 *up, bf16 *y, int64_t n) {
#pragma omp parallel for schedule(static) if (n > SERIAL / 32)
    for (int64_t i = 0; i < n; i += WIDTH) {
        floats x = load_bf16(gate + i), size = (floats)((words)x & 0x7fffffff), one = (floats){0} + 1.0f;
        floats power = (floats)((words)exponential(-size) & ~(words)(size > 87.0f)); /* never overflows */
        words is_negative = (words)((ints)x >> 31);
        floats numerator = (floats)(((words)power & is_negative) | ((words)one & ~is_negative));
        store_bf16(y + i, rounded(x * (numerator / (1.0f + power))) * load_bf16(up + i));
    }
}

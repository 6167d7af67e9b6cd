/* Products of bf16 by sums that each add pairs of inputs: the micro-kernel of matrices in bf16, and of unpacked blocks. */

#pragma once
#include "shared.h"

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

/* Products of all rows of x with OUTPUTS rows of w: y[r][o * y_step] = x[r] . w[o], w_stride values from w[o] to w[o + 1] */
static inline void multiply_rows(const bf16 *x, int64_t n_rows, const bf16 *w, int64_t w_stride, bf16 *y, int64_t y_stride,
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

/* Products with matrices in bf16 and int8, row by row as they lie in memory. */

#include "bf16.h"
#include "int8.h"

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

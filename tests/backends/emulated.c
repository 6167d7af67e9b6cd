/* Runs one product of the kernels: reads its sizes and tensors from stdin, and writes the result to stdout. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    int64_t kind, n_outputs, length;
    const void *tensors[3];
    int64_t is_interleaved;
} Matrix;

int linear_quantized(const uint16_t *x, const Matrix *w, uint16_t *y, int64_t n_rows);
int linear_int8(const uint16_t *x, const void *unused, const void *const *w, uint16_t *y, int64_t n_rows,
                int64_t n_outputs, int64_t length);
int linear_bf16(const uint16_t *x, const void *w, const void *unused, uint16_t *y, int64_t n_rows, int64_t n_outputs,
                int64_t length);

int main(void) {
    int64_t sizes[8]; /* kind, outputs, length, rows, and the bytes of x and of up to three tensors */
    if (fread(sizes, sizeof sizes, 1, stdin) != 1) return 2;
    void *read[4];
    for (int i = 0; i < 4; i++) {
        read[i] = malloc(sizes[4 + i] + 1);
        if (sizes[4 + i] && fread(read[i], sizes[4 + i], 1, stdin) != 1) return 3;
    }
    uint16_t *y = malloc(2 * sizes[1] * sizes[3]);
    Matrix w = {sizes[0], sizes[1], sizes[2], {read[1], read[2], read[3]}, sizes[6] > 0}; /* int4 has scales */
    int failed;
    if (sizes[0] == -1) failed = linear_bf16(read[0], read[1], 0, y, sizes[3], sizes[1], sizes[2]);
    else if (sizes[0] == -2) failed = linear_int8(read[0], 0, w.tensors, y, sizes[3], sizes[1], sizes[2]);
    else failed = linear_quantized(read[0], &w, y, sizes[3]);
    fwrite(y, 2, sizes[1] * sizes[3], stdout);
    return failed;
}

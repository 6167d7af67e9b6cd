/* Products by matrix units, of matrices in bf16 and int8. */

#include "int8.h"
#include "tiles.h"

#ifdef WITH_TILES
#include <sys/syscall.h>
#include <unistd.h>

int omp_get_max_threads(void); /* of OpenMP, whose header not every system has */

#define COLUMNS 256 /* at a time: together with a block of the matrix they stay in the core's cache */
#define BLOCK 256   /* rows of the matrix at a time; with few columns: */
#define BLOCK_FOR_FEW 32

/* Requests the tiles from the system. Returns whether this process may use them. */
int has_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    int64_t row_bytes; /* of the matrix and of a column */
    int width;         /* columns in a tile */
    int64_t n_groups;  /* of `width` columns, the last ones possibly padding; int8 has two for the same tokens */
    char *packed;      /* [n_groups][row_bytes / 4][width][4 bytes] */
} Columns;

static void pack(const Columns *columns, int64_t group, int member, const void *column) {
    int32_t *to = (int32_t *)(columns->packed + group * columns->row_bytes * columns->width) + member;
    for (int64_t i = 0; i < columns->row_bytes / 4; i++) memcpy(to + i * columns->width, (const char *)column + 4 * i, 4);
}

/* Packs the tokens in the order that the matrix units need; for int8 also computes their scales. */
static void pack_tokens(const Columns *columns, const bf16 *x, int64_t n_rows, const Int8 *int8, float *scales) {
    int64_t length = columns->row_bytes / (int8 ? 1 : 2);
    int16_t rounded[int8 ? length : 1];
    int8_t high[int8 ? length : 1], low[int8 ? length : 1];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_rows; t++) {
        int64_t group = t / columns->width;
        int member = t % columns->width;
        if (!int8) {
            pack(columns, group, member, x + t * length);
            continue;
        }
        scales[t] = round_token(x + t * length, int8->column_scales, rounded, length);
        for (int64_t i = 0; i < length; i++) {
            high[i] = (int8_t)((rounded[i] + (rounded[i] < 0 ? -127 : 127)) / 254);
            low[i] = (int8_t)(rounded[i] - 254 * high[i]);
        }
        pack(columns, 2 * group, member, high);
        pack(columns, 2 * group + 1, member, low);
    }
}

/* sums [2][groups][16][width], `apart` bytes from one half to the other: 32 rows of w times one or two groups of
   columns, over `bytes` of each row; added to the present sums if `accumulate` */
static inline __attribute__((always_inline)) void multiply(
    int is_int8, int groups, int accumulate, const char *w, const char *x, const Columns *columns, int64_t bytes,
    char *sums, int64_t apart) {
#define ADD(sums, outputs, group) \
    if (is_int8) _tile_dpbssd(sums, outputs, group); \
    else _tile_dpbf16ps(sums, outputs, group)
    int64_t stride = columns->row_bytes, width = columns->width, size = 64 * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (accumulate) {
        _tile_loadd(0, sums, 4 * width);
        _tile_loadd(1, sums + apart, 4 * width);
        if (groups == 2) {
            _tile_loadd(2, sums + size, 4 * width);
            _tile_loadd(3, sums + apart + size, 4 * width);
        }
    }
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
    _tile_stored(0, sums, 4 * width);
    _tile_stored(1, sums + apart, 4 * width);
    if (groups == 2) {
        _tile_stored(2, sums + size, 4 * width);
        _tile_stored(3, sums + apart + size, 4 * width);
    }
}

/* sums [outputs / 16][n_groups][16][width], each in four bytes, for the groups from `group` on and a matrix block */
static inline __attribute__((always_inline)) void multiply_block(
    int is_int8, const char *w, int64_t outputs, const Columns *columns, int64_t group, int64_t n_groups, char *sums) {
    int64_t row_bytes = columns->row_bytes, size = 64 * columns->width, apart = n_groups * size;
    /* with many columns, a piece of each row, so that the pieces and the columns stay in the cache */
    int64_t step = columns->n_groups <= 2 ? row_bytes : 2048;
    for (int64_t begin = 0; begin < row_bytes; begin += step) {
        int64_t bytes = row_bytes - begin < step ? row_bytes - begin : step;
        for (int64_t o = 0; o < outputs; o += 32)
            for (int64_t g = 0; g < n_groups; g += 2) {
                const char *rows = w + o * row_bytes + begin;
                const char *x = columns->packed + ((group + g) * row_bytes + begin) * columns->width;
                char *to = sums + o / 16 * apart + g * size;
                if (n_groups - g > 1) multiply(is_int8, 2, begin > 0, rows, x, columns, bytes, to, apart);
                else multiply(is_int8, 1, begin > 0, rows, x, columns, bytes, to, apart);
            }
    }
}

/* Like linear_bf16 if int8 is NULL, like linear_int8 if w is; for any number of tokens. n_outputs must be a multiple of
   32, and a row a multiple of 64 bytes. Returns 0, or 1 if out of memory. */
int linear_tiles(const bf16 *x, const bf16 *w, const Int8 *int8, bf16 *y, int64_t n_rows, int64_t n_outputs,
                 int64_t length) {
    int width = n_rows < 16 ? (int)n_rows : 16;
    int64_t row_bytes = int8 ? length : 2 * length, n_groups = (n_rows + width - 1) / width * (int8 ? 2 : 1);
    int64_t block = n_groups <= 2 ? BLOCK_FOR_FEW : BLOCK, together = COLUMNS / width / 2 * 2;
    while (block > BLOCK_FOR_FEW && n_outputs < block * omp_get_max_threads()) block /= 2; /* work for every thread */
    char *packed = calloc(n_groups * width, row_bytes + sizeof(float));
    if (!packed) return 1;
    float *scales = (float *)(packed + n_groups * width * row_bytes);
    Columns columns = {row_bytes, width, n_groups, packed};
#pragma omp parallel if (n_groups * n_outputs * row_bytes > SERIAL)
    {
        union {
            float as_float[BLOCK * COLUMNS];
            int32_t as_int[BLOCK * COLUMNS];
        } sums __attribute__((aligned(64)));
        pack_tokens(&columns, x, n_rows, int8, scales);
        shape_tiles(width);
        for (int64_t group = 0; group < n_groups; group += together) {
            int64_t count = n_groups - group < together ? n_groups - group : together;
            int64_t begin = group / (int8 ? 2 : 1) * width, end = begin + count / (int8 ? 2 : 1) * width;
            if (end > n_rows) end = n_rows;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n_outputs; first += block) {
                int64_t outputs = n_outputs - first < block ? n_outputs - first : block;
                const char *rows = (int8 ? (const char *)int8->values : (const char *)w) + first * row_bytes;
                if (int8) multiply_block(1, rows, outputs, &columns, group, count, (char *)&sums);
                else multiply_block(0, rows, outputs, &columns, group, count, (char *)&sums);
                for (int i = 0; i < 32; i++) /* of the next block, so that the memory is never idle */
                    for (int line = 0; line < 2; line++)
                        __builtin_prefetch(rows + (outputs + i) * row_bytes + 64 * line);
                for (int64_t t = begin; t < end; t++)
                    for (int64_t o = 0; o < outputs; o++) {
                        int64_t tile = o / 16 * count + (t - begin) / width * (int8 ? 2 : 1);
                        int64_t index = (tile * 16 + o % 16) * width + t % width;
                        bf16 *to = y + t * n_outputs + first + o;
                        if (int8) {
                            int64_t high = sums.as_int[index], low = sums.as_int[index + 16 * width];
                            *to = to_bf16((float)(254 * high + low) * (int8->row_scales[first + o] * scales[t]));
                        } else *to = to_bf16(sums.as_float[index]);
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

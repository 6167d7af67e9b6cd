#pragma once
#include "shared.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
/* Matrix units (Intel AMX). A tile is 16 rows of up to 64 bytes, and one instruction multiplies two of them: 16 rows of
   the matrix, as stored in memory, by up to 16 columns. For bf16 a column is a token. For int8 a token has two columns,
   because its values have 16 bits: the first has the values divided by 254, the second the remainders. */
#define WITH_TILES

/* GCC does not know that tiles are loaded from memory (bug 114098), and would omit writes that nothing else reads. */
#define SEEN(memory) __asm__ volatile("" : : "r"(memory) : "memory")

/* Tiles 0 to 3: sums of 16 outputs for `width` columns; 4 and 5: 64 bytes of 16 rows of the matrix; 6 and 7: of columns. */
static inline void shape_tiles(int width) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = 16;
        shapes.bytes[tile] = tile == 4 || tile == 5 ? 64 : 4 * width;
    }
    SEEN(&shapes);
    _tile_loadconfig(&shapes);
}

/* scores [16][ROWS] = 16 keys times ROWS queries, [length / 2][ROWS][2]; needs tiles of width ROWS */
static inline void score(const int32_t *queries, const bf16 *keys, int64_t key_stride, int64_t length, float *scores) {
    SEEN(queries);
    _tile_zero(0);
    for (int64_t i = 0; i < length; i += 32) {
        _tile_loadd(4, keys + i, 2 * key_stride);
        _tile_loadd(6, queries + i / 2 * ROWS, 4 * ROWS);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, scores, 4 * ROWS);
}
#endif

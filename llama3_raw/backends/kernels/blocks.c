/* Products with matrices of few bits: int4, and GGML's blocks as they lie in a GGUF file. The formats' layouts are in
   quantization/int4.py and blocks.py, the micro-kernel in panels.h. */

#include "panels.h"

#define PANELS 8   /* unpacked at a time: 256 inputs, the length of GGML's longer blocks */
#define TOKENS 256 /* whose sums a thread keeps at a time */
#define TOGETHER 16 /* outputs of int4 that lie together */
#define AHEAD 4096 /* bytes of int4 that are requested ahead */

typedef struct {
    bytes quads[QUADS];
    floats scales[2]; /* of the first and of the last 16 inputs */
    floats minimum;   /* weight = (value - zero) * scale - minimum */
} Panel;

enum { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, INT4 };

typedef struct {
    int values, bytes; /* of a block */
    int bits, zero;
} Format;
static const Format FORMATS[] = {
    {32, 34, 8, SIGN}, {32, 18, 4, 8},   {32, 20, 4, 0},   {32, 22, 5, 16}, {32, 24, 5, 0},
    {256, 144, 4, 0},  {256, 176, 5, 0}, {256, 210, 6, 32}, {32, 16, 4, 0},
};

typedef struct {
    int64_t kind, n_outputs, length;
    const uint8_t *values;
    const uint8_t *scales;   /* of int4 */
    const float *row_scales; /* of int4 */
} Matrix;

/* A source of panels: what has been loaded of WIDTH rows, from which several panels come. */
typedef struct {
    const uint8_t *rows; /* the first row of the matrix */
    int64_t stride;      /* bytes from one row to the next */
    floats units[2];     /* of int4's scales and minimums */
    floats scale, minimum;               /* of a long block */
    words scales[4], minimums[2];        /* of its groups: a byte for each, four in a word */
    bytes low[2 * QUADS], high[QUADS];   /* the low four bits of each value, and the bits above them */
} Source;

static inline words bits_of(bytes x, int shift, uint32_t mask) { return (words)x >> shift & mask; }

/* the words at `at` of WIDTH rows; 16 bytes of each are loaded */
static inline words load_row_words(const uint8_t *at, int64_t stride) {
    bytes quads[4];
    load_columns(at, stride, quads);
    return (words)quads[0];
}

/* A word for each lane, with 32 values' fifth bits: those of values 4 * i to 4 * i + 3, as bit 4 of four bytes. */
static inline words fifth_bits(words fifth, int i) {
    return ((fifth >> 4 * i & 15) * 0x00204081u & 0x01010101u) << 4;
}

static inline void panel_of_32(int kind, const Source *source, const uint8_t *block, Panel *panel) {
    int64_t stride = source->stride;
    words head = load_row_words(block, stride);
    panel->scales[0] = panel->scales[1] = from_halves(head);
    panel->minimum = (floats){0};
    if (kind == Q8_0) {
        load_columns(block + 2, stride, panel->quads);
        load_columns(block + 18, stride, panel->quads + 4);
        for (int i = 0; i < QUADS; i++) panel->quads[i] ^= SIGN;
        return;
    }
    bytes both[4];
    load_columns(block + FORMATS[kind].bytes - 16, stride, both);
    words fifth = {0};
    if (kind == Q4_1 || kind == Q5_1) panel->minimum = -from_halves(head >> 16);
    if (kind == Q5_0 || kind == Q5_1) fifth = load_row_words(block + FORMATS[kind].bytes - 20, stride);
    for (int i = 0; i < 4; i++) {
        panel->quads[i] = (bytes)(bits_of(both[i], 0, 0x0f0f0f0f) | fifth_bits(fifth, i));
        panel->quads[i + 4] = (bytes)(bits_of(both[i], 4, 0x0f0f0f0f) | fifth_bits(fifth, i + 4));
    }
}

static inline floats byte_of(words four, int i) { return __builtin_convertvector((ints)(four >> 8 * i & 255), floats); }

/* Panel `group` of a block in Q4_K or Q5_K. Two groups share 32 bytes: the low and the high four bits. */
static inline void panel_of_k(int kind, Source *source, const uint8_t *block, int group, Panel *panel) {
    int64_t stride = source->stride;
    if (group == 0) {
        bytes head[4];
        load_columns(block, stride, head);
        source->scale = from_halves((words)head[0]);
        source->minimum = from_halves((words)head[0] >> 16);
        source->scales[0] = bits_of(head[1], 0, 0x3f3f3f3f); /* of groups 0 to 3 */
        source->minimums[0] = bits_of(head[2], 0, 0x3f3f3f3f);
        source->scales[1] = bits_of(head[3], 0, 0x0f0f0f0f) | bits_of(head[1], 2, 0x30303030);
        source->minimums[1] = bits_of(head[3], 4, 0x0f0f0f0f) | bits_of(head[2], 2, 0x30303030);
        if (kind == Q5_K)
            for (int i = 0; i < 2; i++) load_columns(block + 16 + 16 * i, stride, source->high + 4 * i);
    }
    if (group % 2 == 0)
        for (int i = 0; i < 2; i++)
            load_columns(block + (kind == Q5_K ? 48 : 16) + 16 * (group + i), stride, source->low + 4 * i);
    for (int i = 0; i < QUADS; i++) {
        words quad = bits_of(source->low[i], group % 2 * 4, 0x0f0f0f0f);
        if (kind == Q5_K) quad |= bits_of(source->high[i], group, 0x01010101) << 4;
        panel->quads[i] = (bytes)quad;
    }
    panel->scales[0] = panel->scales[1] = source->scale * byte_of(source->scales[group / 4], group % 4);
    panel->minimum = source->minimum * byte_of(source->minimums[group / 4], group % 4);
}

/* Panel `group` of a block in Q6_K. Four groups share 64 bytes of low bits and 32 bytes with two bits for each. */
static inline void panel_of_q6_k(Source *source, const uint8_t *block, int group, Panel *panel) {
    int64_t stride = source->stride;
    if (group == 0) {
        bytes scales[4], last[4]; /* the last 16 bytes of the block end with its own scale */
        load_columns(block + 192, stride, scales);
        for (int i = 0; i < 4; i++) source->scales[i] = (words)scales[i];
        load_columns(block + 194, stride, last);
        source->scale = from_halves((words)last[3] >> 16);
    }
    if (group % 4 == 0) {
        for (int i = 0; i < 4; i++) load_columns(block + 16 * (group + i), stride, source->low + 4 * i);
        for (int i = 0; i < 2; i++) load_columns(block + 128 + 8 * group + 16 * i, stride, source->high + 4 * i);
    }
    for (int i = 0; i < QUADS; i++) {
        words low = bits_of(source->low[i + group % 2 * QUADS], group % 4 / 2 * 4, 0x0f0f0f0f);
        panel->quads[i] = (bytes)(low | bits_of(source->high[i], group % 4 * 2, 0x03030303) << 4);
    }
    for (int half = 0; half < 2; half++) { /* signed bytes */
        ints scale = (ints)(source->scales[group / 2] << (24 - (group % 2 * 2 + half) * 8)) >> 24;
        panel->scales[half] = source->scale * __builtin_convertvector(scale, floats);
    }
    panel->minimum = (floats){0};
}

static inline void panel_of_int4(const Source *source, const Matrix *w, int64_t output, int64_t group, Panel *panel) {
    int64_t at = output / TOGETHER * (w->length / GROUP) + group, lane = output % TOGETHER;
    const uint8_t *values = w->values + at * 256 + 4 * lane, *scales = w->scales + at * 32 + lane;
    if (lane == 0) __builtin_prefetch(scales + AHEAD / 8, 0, 2);
    for (int i = 0; i < 4; i++) {
        bytes both;
        memcpy(&both, values + 64 * i, sizeof both);
        if (lane == 0) __builtin_prefetch(values + 64 * i + AHEAD, 0, 2);
        panel->quads[i] = (bytes)bits_of(both, 0, 0x0f0f0f0f);
        panel->quads[i + 4] = (bytes)bits_of(both, 4, 0x0f0f0f0f);
    }
    panel->scales[0] = panel->scales[1] = from_bytes(scales) * source->units[0];
    panel->minimum = from_bytes(scales + 16) * source->units[1];
}

static inline Source source_of(int kind, const Matrix *w, int64_t output) {
    Source source = {0};
    int64_t row_bytes = w->length / FORMATS[kind].values * FORMATS[kind].bytes;
    source.rows = w->values + output * row_bytes;
    source.stride = row_bytes;
    if (kind == INT4)
        for (int lane = 0; lane < WIDTH && output + lane < w->n_outputs; lane++)
            for (int i = 0; i < 2; i++) source.units[i][lane] = w->row_scales[2 * (output + lane) + i];
    return source;
}

/* The panel of inputs 32 * group to 32 * group + 31; in_block is group modulo the number of groups in a block. */
static inline __attribute__((always_inline)) void next_panel(
    int kind, Source *source, const Matrix *w, int64_t output, int64_t group, int in_block, Panel *panel) {
    int64_t size = FORMATS[kind].bytes, number = group * GROUP / FORMATS[kind].values;
    const uint8_t *block = source->rows + number * size;
    if (kind != INT4 && in_block == 0) /* the rows after these, in the order of memory, which a processor reads fastest */
        for (const uint8_t *line = source->rows + WIDTH * (source->stride + number * size), *end = line + WIDTH * size;
             line < end; line += 64)
            __builtin_prefetch(line, 0, 2);
    if (kind == INT4) panel_of_int4(source, w, output, group, panel);
    else if (kind == Q6_K) panel_of_q6_k(source, block, in_block, panel);
    else if (kind == Q4_K || kind == Q5_K) panel_of_k(kind, source, block, in_block, panel);
    else panel_of_32(kind, source, block, panel);
}

/* Tokens in 8 bits: scale * value */
typedef struct {
    int8_t *values;  /* [n_rows, length] */
    float *scales;   /* [n_rows, length / 32] */
    float *offsets;  /* [n_rows, length / 32]: scale times the sum of the values */
    int16_t *sums;   /* [n_rows, length / 16]: of the values */
    int64_t length;
} Tokens;

/* Rounds 32 inputs. If one is infinite or NaN, the scale is NaN, and so is the token's whole product. */
static void round_group(const bf16 *x, const Tokens *to, int64_t group) {
    union { uint32_t bits; float value; } largest = {0};
    float values[GROUP];
    for (int i = 0; i < GROUP; i++) { /* the bits of absolute values are ordered like the values, NaN above all */
        uint32_t size = (uint32_t)(x[i] & 0x7fff) << 16;
        values[i] = to_float(x[i]);
        largest.bits = size > largest.bits ? size : largest.bits;
    }
    int is_usable = largest.bits < 0x7f800000 && largest.value > 1e-30f; /* else its inverse may be infinite */
    float inverse = is_usable ? 127 / largest.value : 0;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    int8_t *rounded = to->values + group * GROUP;
    int32_t integers[GROUP], sums[2] = {0, 0};
    for (int i = 0; i < GROUP; i++) integers[i] = (int32_t)((is_usable ? values[i] : 0) * inverse + magic - magic);
    for (int i = 0; i < GROUP; i++) rounded[i] = (int8_t)integers[i];
    for (int i = 0; i < GROUP / 2; i++) {
        sums[0] += integers[i];
        sums[1] += integers[i + GROUP / 2];
    }
    float scale = is_usable ? largest.value / 127 : 0;
    to->scales[group] = largest.bits < 0x7f800000 ? scale : NAN;
    to->offsets[group] = to->scales[group] * (float)(sums[0] + sums[1]);
    to->sums[2 * group] = (int16_t)sums[0];
    to->sums[2 * group + 1] = (int16_t)sums[1];
}

/* sums[r] += x[r] . panels, for constant numbers of tokens, bits and zero; `count` panels from `group` on */
static inline __attribute__((always_inline)) void multiply(
    int rows, int bits, int zero, const Panel *panels, int64_t count, const Tokens *x, int64_t row, int64_t group,
    floats *sums) {
    int64_t groups = x->length / GROUP, first = row * groups + group;
    floats totals[ROWS];
    for (int r = 0; r < rows; r++) totals[r] = sums[r];
    for (int64_t g = 0; g < count; g++)
        for (int half = 0; half < (bits == 6 ? 2 : 1); half++) {
            const Panel *panel = panels + g;
            int quads = bits == 6 ? QUADS / 2 : QUADS, begin = half * quads, at_once = quads_in_16_bits(bits);
            ints whole[ROWS];
            for (int r = 0; r < rows; r++) whole[r] = (ints){0};
#pragma GCC unroll 8
            for (int part = begin; part < begin + quads; part += at_once) {
                Sums partial[ROWS];
                for (int r = 0; r < rows; r++) partial[r] = (Sums){0};
#pragma GCC unroll 8
                for (int i = part; i < part + at_once && i < begin + quads; i++)
                    for (int r = 0; r < rows; r++) {
                        int32_t four;
                        memcpy(&four, x->values + (first + r * groups + g) * GROUP + 4 * i, sizeof four);
                        partial[r] = add_quad(partial[r], panel->quads[i], four, bits);
                    }
                for (int r = 0; r < rows; r++) whole[r] += finish(partial[r]);
            }
            for (int r = 0; r < rows; r++) {
                int64_t at = first + r * groups + g;
                if (zero) whole[r] -= zero * (bits == 6 ? x->sums[2 * at + half] : x->sums[2 * at] + x->sums[2 * at + 1]);
                totals[r] += __builtin_convertvector(whole[r], floats) * panel->scales[half] * x->scales[at];
                if (!zero) totals[r] -= panel->minimum * x->offsets[at];
            }
        }
    for (int r = 0; r < rows; r++) sums[r] = totals[r];
}

/* Repeats a statement for g = 0 to 7, which GCC then knows. */
#define EACH_PANEL(...) \
    { enum { g = 0 }; __VA_ARGS__ } { enum { g = 1 }; __VA_ARGS__ } { enum { g = 2 }; __VA_ARGS__ } \
    { enum { g = 3 }; __VA_ARGS__ } { enum { g = 4 }; __VA_ARGS__ } { enum { g = 5 }; __VA_ARGS__ } \
    { enum { g = 6 }; __VA_ARGS__ } { enum { g = 7 }; __VA_ARGS__ }

/* sums[v][r] = x[row + r] . w, of up to TOKENS tokens; `vectors` of WIDTH outputs, and a constant kind */
static inline __attribute__((always_inline)) void multiply_many(
    int kind, int vectors, Source *sources, const Matrix *w, int64_t output, const Tokens *x, int64_t row, int64_t rows,
    floats sums[][TOKENS]) {
    int64_t groups = w->length / GROUP, r;
    int bits = FORMATS[kind].bits, zero = FORMATS[kind].zero, is_long = FORMATS[kind].values > GROUP;
    for (int64_t group = 0; group < groups; group += PANELS)
        for (int v = 0; v < vectors; v++) {
            Panel panels[PANELS];
            int count = groups - group < PANELS ? (int)(groups - group) : PANELS;
            EACH_PANEL(if (g < count) {
                next_panel(kind, sources + v, w, output + v * WIDTH, group + g, is_long ? g : 0, panels + g);
            })
            for (r = 0; r + ROWS <= rows; r += ROWS)
                multiply(ROWS, bits, zero, panels, count, x, row + r, group, sums[v] + r);
            for (; r < rows; r++) multiply(1, bits, zero, panels, count, x, row + r, group, sums[v] + r);
        }
}

/* The same for a constant number of tokens, up to ROWS: the panels stay in registers. */
static inline __attribute__((always_inline)) void multiply_few(
    int rows, int kind, int vectors, Source *sources, const Matrix *w, int64_t output, const Tokens *x,
    floats sums[][TOKENS]) {
    int64_t groups = w->length / GROUP;
    int in_block = FORMATS[kind].values / GROUP;
    for (int64_t group = 0; group < groups; group += in_block)
        for (int v = 0; v < vectors; v++) {
            EACH_PANEL(if (g < in_block) {
                Panel panel;
                next_panel(kind, sources + v, w, output + v * WIDTH, group + g, g, &panel);
                multiply(rows, FORMATS[kind].bits, FORMATS[kind].zero, &panel, 1, x, 0, group + g, sums[v]);
            })
        }
}

/* y[r][output + lane] of all tokens r, for lanes from `first` on */
static inline __attribute__((always_inline)) void multiply_outputs(
    int kind, const Matrix *w, int64_t output, int64_t first, const Tokens *x, int64_t n_rows, bf16 *y) {
    int vectors = kind == INT4 ? TOGETHER / WIDTH : 1;
    floats sums[TOGETHER / WIDTH][TOKENS];
    Source sources[TOGETHER / WIDTH];
    for (int v = 0; v < vectors; v++) sources[v] = source_of(kind, w, output + v * WIDTH);
    for (int64_t row = 0; row < n_rows; row += TOKENS) {
        int64_t rows = n_rows - row < TOKENS ? n_rows - row : TOKENS;
        for (int v = 0; v < vectors; v++) memset(sums[v], 0, rows * sizeof *sums[v]);
        if (n_rows == 1) multiply_few(1, kind, vectors, sources, w, output, x, sums);
        else if (n_rows == 2 && kind == INT4) multiply_few(2, kind, vectors, sources, w, output, x, sums);
        else multiply_many(kind, vectors, sources, w, output, x, row, rows, sums);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = first; i < vectors * WIDTH && output + i < w->n_outputs; i++)
                y[(row + r) * w->n_outputs + output + i] = to_bf16(sums[i / WIDTH][r][i % WIDTH]);
    }
}

static void multiply_kind(const Matrix *w, int64_t output, int64_t first, const Tokens *x, int64_t n_rows, bf16 *y) {
#define CASE(kind) \
    case kind: multiply_outputs(kind, w, output, first, x, n_rows, y); break
    switch (w->kind) {
        CASE(Q8_0);
        CASE(Q4_0);
        CASE(Q4_1);
        CASE(Q5_0);
        CASE(Q5_1);
        CASE(Q4_K);
        CASE(Q5_K);
        CASE(Q6_K);
        CASE(INT4);
    }
#undef CASE
}

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; at least WIDTH outputs unless it is int4, and
   length a multiple of a block. Returns 0, or 1 if out of memory or for an unknown kind. */
int linear_quantized(const bf16 *x, const Matrix *w, bf16 *y, int64_t n_rows) {
    if (w->kind < Q8_0 || w->kind > INT4) return 1;
    int64_t groups = n_rows * (w->length / GROUP), step = w->kind == INT4 ? TOGETHER : WIDTH;
    float *memory = malloc(groups * (2 * sizeof(float) + 2 * sizeof(int16_t) + GROUP));
    if (!memory) return 1;
    Tokens tokens = {.scales = memory, .offsets = memory + groups, .sums = (int16_t *)(memory + 2 * groups),
                     .values = (int8_t *)(memory + 3 * groups), .length = w->length};
#pragma omp parallel for schedule(static) if (groups * GROUP > SERIAL / 4)
    for (int64_t g = 0; g < groups; g++) round_group(x + g * GROUP, &tokens, g);
#pragma omp parallel for schedule(static) if (n_rows * w->n_outputs * w->length > SERIAL)
    for (int64_t output = 0; output < w->n_outputs; output += step) {
        /* the last rows of blocks are computed with some before them, so that there are WIDTH; int4 is padded */
        int64_t missing = w->kind != INT4 && output + step > w->n_outputs ? output + step - w->n_outputs : 0;
        multiply_kind(w, output - missing, missing, &tokens, n_rows, y);
    }
    free(memory);
    return 0;
}

/* Products with matrices of few bits: int4, and GGML's blocks as they lie in a GGUF file. The formats' layouts are in
   quantization/int4.py and blocks.py, the micro-kernel in panels.h. */

#include "panels.h"

#define PANELS 8   /* unpacked at a time: 256 inputs, the length of GGML's longer blocks */
#define TOKENS 256 /* whose sums a thread keeps at a time */
#define TOGETHER 16 /* outputs whose blocks are interleaved */
#define LONGEST (TOGETHER * PANELS * 34) /* bytes of interleaved blocks of 256 inputs */
#define AHEAD 12288 /* bytes that are requested ahead */

typedef struct {
    bytes quads[QUADS];
    floats scales[2]; /* of the first and of the last 16 inputs */
    floats minimum;   /* weight = (value - zero) * scale - minimum */
} Panel;

enum { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, INT4 };

typedef struct {
    int values, bytes; /* of a block */
    int bits, zero;
    int halves, at; /* how many numbers of 16 bits a block has, and at which byte; the rest are words of 32 bits */
} Format;
static const Format FORMATS[] = {
    {32, 34, 8, SIGN, 1, 0}, {32, 18, 4, 8, 1, 0},  {32, 20, 4, 0, 2, 0},  {32, 22, 5, 16, 1, 0},    {32, 24, 5, 0, 2, 0},
    {256, 144, 4, 0, 2, 0},  {256, 176, 5, 0, 2, 0}, {256, 210, 6, 32, 1, 208}, {32, 16, 4, 0, 0, 0},
};

typedef struct {
    int64_t kind, n_outputs, length;
    const uint8_t *values;
    const uint8_t *scales;   /* of int4 */
    const float *row_scales; /* of int4 */
    int64_t is_interleaved;  /* int4 always is */
} Matrix;

/* In an interleaved block, the words at byte `at` of TOGETHER blocks lie side by side at byte TOGETHER * at, and so do
   the halves. `lane` is the first of WIDTH. */
static inline words word_at(const uint8_t *block, int at, int lane) { return load_words(block + TOGETHER * at + 4 * lane); }

static inline floats half_at(const uint8_t *block, int at, int lane) {
    return from_halves(block + TOGETHER * at + 2 * lane);
}

/* Interleaves the blocks that begin at `from`, of TOGETHER outputs, `stride` bytes apart. */
static inline __attribute__((always_inline)) void interleave_block(
    int kind, const uint8_t *from, int64_t stride, uint8_t *to) {
    Format format = FORMATS[kind];
    int begin = format.at ? 0 : 2 * format.halves, end = format.at ? format.at : format.bytes;
    int head = format.at ? format.bytes - 16 : 0; /* 16 bytes with the halves in them */
    for (int lane = 0; lane < TOGETHER; lane += WIDTH) {
        const uint8_t *rows = from + lane * stride;
        bytes quads[4];
        load_columns(rows + head, stride, quads);
        for (int i = 0; i < format.halves; i++) {
            words pair = (words)quads[(format.at - head + 2 * i) / 4] >> (format.at - head + 2 * i) % 4 * 8;
            store_halves(to + TOGETHER * (format.at + 2 * i) + 2 * lane, pair);
        }
#pragma GCC unroll 16
        for (int at = begin; at < end; at += 16) {
            int last = at < end - 16 ? at : end - 16;
            load_columns(rows + last, stride, quads);
            for (int i = 0; i < 4; i++) memcpy(to + TOGETHER * (last + 4 * i) + 4 * lane, quads + i, sizeof *quads);
        }
    }
}

/* The interleaved blocks of TOGETHER outputs from block `number` on: where they lie, or made in `buffer`. */
static inline __attribute__((always_inline)) const uint8_t *blocks_at(
    int kind, const Matrix *w, int64_t output, int64_t number, int count, uint8_t *buffer) {
    int64_t size = FORMATS[kind].bytes, stride = w->length / FORMATS[kind].values * size;
    const uint8_t *rows = w->values + output * stride;
    if (w->is_interleaved) return rows + TOGETHER * number * size;
    for (int i = 0; i < count; i++)
        interleave_block(kind, rows + (number + i) * size, stride, buffer + i * TOGETHER * size);
    return buffer;
}

static inline const uint8_t *int4_scales(const Matrix *w, int64_t output, int64_t group) {
    return w->scales + (output / TOGETHER * (w->length / GROUP) + group) * 2 * TOGETHER;
}

/* Requests what comes later for TOGETHER outputs, a panel's share at a time, in the order of memory, which a processor
   reads fastest. */
static inline __attribute__((always_inline)) void request_panel(int kind, const Matrix *w, int64_t output, int64_t group) {
    int64_t share = TOGETHER * GROUP * FORMATS[kind].bytes / FORMATS[kind].values;
    int64_t row = w->length / FORMATS[kind].values * FORMATS[kind].bytes;
    const uint8_t *later = w->values + output * row + group * share + (w->is_interleaved ? AHEAD : TOGETHER * row);
    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(later + i, 0, 2);
    if (kind == INT4) __builtin_prefetch(int4_scales(w, output, group) + AHEAD / 8, 0, 2);
}

/* A word for each lane, with 32 values' fifth bits: those of values 4 * i to 4 * i + 3, as bit 4 of four bytes. */
static inline words fifth_bits(words fifth, int i) {
    return ((fifth >> 4 * i & 15) * 0x00204081u & 0x01010101u) << 4;
}

static inline void panel_of_32(int kind, const uint8_t *block, int lane, Panel *panel) {
    panel->scales[0] = panel->scales[1] = half_at(block, 0, lane);
    panel->minimum = (floats){0};
    if (kind == Q8_0) {
        for (int i = 0; i < QUADS; i++) panel->quads[i] = (bytes)word_at(block, 2 + 4 * i, lane) ^ SIGN;
        return;
    }
    words fifth = {0};
    if (kind == Q4_1 || kind == Q5_1) panel->minimum = -half_at(block, 2, lane);
    if (kind == Q5_0 || kind == Q5_1) fifth = word_at(block, FORMATS[kind].bytes - 20, lane);
    for (int i = 0; i < 4; i++) {
        words both = word_at(block, FORMATS[kind].bytes - 16 + 4 * i, lane);
        panel->quads[i] = (bytes)((both & 0x0f0f0f0f) | fifth_bits(fifth, i));
        panel->quads[i + 4] = (bytes)((both >> 4 & 0x0f0f0f0f) | fifth_bits(fifth, i + 4));
    }
}

/* Panel `group` of a block in Q4_K or Q5_K. Two groups share 32 bytes: the low and the high four bits. */
static inline void panel_of_k(int kind, const uint8_t *block, int lane, int group, Panel *panel) {
    /* 12 bytes with a scale and a minimum of each group, in six bits: of groups 4 to 7, the upper two lie apart */
    int shift = group % 4 * 8;
    words scale = word_at(block, 4, lane) >> shift, minimum = word_at(block, 8, lane) >> shift;
    if (group >= 4) {
        words both = word_at(block, 12, lane) >> shift;
        scale = (both & 15) | (scale >> 2 & 48);
        minimum = (both >> 4 & 15) | (minimum >> 2 & 48);
    }
    panel->scales[0] = panel->scales[1] = half_at(block, 0, lane) * __builtin_convertvector((ints)(scale & 63), floats);
    panel->minimum = half_at(block, 2, lane) * __builtin_convertvector((ints)(minimum & 63), floats);
    for (int i = 0; i < QUADS; i++) {
        int at = (kind == Q5_K ? 48 : 16) + group / 2 * 32 + 4 * i;
        words quad = word_at(block, at, lane) >> group % 2 * 4 & 0x0f0f0f0f;
        if (kind == Q5_K) quad |= (word_at(block, 16 + 4 * i, lane) >> group & 0x01010101) << 4;
        panel->quads[i] = (bytes)quad;
    }
}

/* Panel `group` of a block in Q6_K. Four groups share 64 bytes of low bits and 32 bytes with two bits for each. */
static inline void panel_of_q6_k(const uint8_t *block, int lane, int group, Panel *panel) {
    for (int i = 0; i < QUADS; i++) {
        words low = word_at(block, group / 4 * 64 + group % 2 * 32 + 4 * i, lane) >> group % 4 / 2 * 4 & 0x0f0f0f0f;
        words high = word_at(block, 128 + group / 4 * 32 + 4 * i, lane) >> group % 4 * 2 & 0x03030303;
        panel->quads[i] = (bytes)(low | high << 4);
    }
    for (int half = 0; half < 2; half++) { /* signed bytes */
        ints scale = (ints)(word_at(block, 192 + group / 2 * 4, lane) << (24 - (group % 2 * 2 + half) * 8)) >> 24;
        panel->scales[half] = half_at(block, 208, lane) * __builtin_convertvector(scale, floats);
    }
    panel->minimum = (floats){0};
}

static inline void panel_of_int4(
    const uint8_t *block, const uint8_t *scales, const float *units, int lane, Panel *panel) {
    for (int i = 0; i < 4; i++) {
        words both = word_at(block, 4 * i, lane);
        panel->quads[i] = (bytes)(both & 0x0f0f0f0f);
        panel->quads[i + 4] = (bytes)(both >> 4 & 0x0f0f0f0f);
    }
    panel->scales[0] = panel->scales[1] = from_bytes(scales + lane) * load_floats(units + lane);
    panel->minimum = from_bytes(scales + TOGETHER + lane) * load_floats(units + TOGETHER + lane);
}

/* The panel of inputs 32 * group to 32 * group + 31; in_block is group modulo the number of groups in a block. */
static inline __attribute__((always_inline)) void next_panel(
    int kind, const Matrix *w, int64_t output, int lane, const uint8_t *block, const float *units, int64_t group,
    int in_block, Panel *panel) {
    if (kind == INT4) panel_of_int4(block, int4_scales(w, output, group), units, lane, panel);
    else if (kind == Q6_K) panel_of_q6_k(block, lane, in_block, panel);
    else if (kind == Q4_K || kind == Q5_K) panel_of_k(kind, block, lane, in_block, panel);
    else panel_of_32(kind, block, lane, panel);
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
            int quads = bits == 6 ? QUADS / 2 : QUADS, begin = half * quads;
            int at_once = quads_in_16_bits(bits) < quads ? quads_in_16_bits(bits) : quads;
            ints whole[ROWS];
            for (int r = 0; r < rows; r++) whole[r] = (ints){0};
#pragma GCC unroll 8
            for (int part = begin; part < begin + quads; part += at_once) {
                Sums partial[ROWS];
                for (int r = 0; r < rows; r++) partial[r] = (Sums){0};
#pragma GCC unroll 8
                for (int i = part; i < part + at_once; i++)
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

#define VECTORS (TOGETHER / WIDTH)

/* sums[v][r] = x[row + r] . w, of up to TOKENS tokens and TOGETHER outputs; a constant kind */
static inline __attribute__((always_inline)) void multiply_many(
    int kind, const Matrix *w, const float *units, int64_t output, const Tokens *x, int64_t row, int64_t rows,
    floats sums[][TOKENS]) {
    int64_t groups = w->length / GROUP, r;
    int bits = FORMATS[kind].bits, zero = FORMATS[kind].zero, in_block = FORMATS[kind].values / GROUP;
    uint8_t buffer[LONGEST];
    for (int64_t group = 0; group < groups; group += PANELS) {
        int count = groups - group < PANELS ? (int)(groups - group) : PANELS;
        const uint8_t *blocks = blocks_at(kind, w, output, group / in_block, count / in_block, buffer);
        for (int v = 0; v < VECTORS; v++) {
            Panel panels[PANELS];
            EACH_PANEL(if (g < count) {
                if (v == 0) request_panel(kind, w, output, group + g);
                const uint8_t *block = blocks + g / in_block * TOGETHER * FORMATS[kind].bytes;
                next_panel(kind, w, output, v * WIDTH, block, units, group + g, g % in_block, panels + g);
            })
            for (r = 0; r + ROWS <= rows; r += ROWS)
                multiply(ROWS, bits, zero, panels, count, x, row + r, group, sums[v] + r);
            for (; r < rows; r++) multiply(1, bits, zero, panels, count, x, row + r, group, sums[v] + r);
        }
    }
}

/* The same for a constant number of tokens, up to ROWS: panels and sums stay in registers. */
static inline __attribute__((always_inline)) void multiply_few(
    int rows, int kind, const Matrix *w, const float *units, int64_t output, const Tokens *x, floats sums[][TOKENS]) {
    int64_t groups = w->length / GROUP;
    int in_block = FORMATS[kind].values / GROUP;
    uint8_t buffer[LONGEST];
    floats totals[VECTORS][ROWS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < rows; r++) totals[v][r] = (floats){0};
    for (int64_t group = 0; group < groups; group += in_block) {
        const uint8_t *block = blocks_at(kind, w, output, group / in_block, 1, buffer);
        EACH_PANEL(if (g < in_block) {
            request_panel(kind, w, output, group + g);
            _Pragma("GCC unroll 4")
            for (int v = 0; v < VECTORS; v++) {
                Panel panel;
                next_panel(kind, w, output, v * WIDTH, block, units, group + g, g, &panel);
                multiply(rows, FORMATS[kind].bits, FORMATS[kind].zero, &panel, 1, x, 0, group + g, totals[v]);
            }
        })
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
        for (int r = 0; r < rows; r++) sums[v][r] = totals[v][r];
}

/* y[r][output + lane] of all tokens r, for lanes from `first` on */
static inline __attribute__((always_inline)) void multiply_outputs(
    int kind, const Matrix *w, int64_t output, int64_t first, const Tokens *x, int64_t n_rows, bf16 *y) {
    floats sums[VECTORS][TOKENS];
    float units[2 * TOGETHER] = {0}; /* of int4's scales, and of its minimums */
    if (kind == INT4)
        for (int64_t i = 0; i < TOGETHER && output + i < w->n_outputs; i++)
            for (int unit = 0; unit < 2; unit++) units[unit * TOGETHER + i] = w->row_scales[2 * (output + i) + unit];
    for (int64_t row = 0; row < n_rows; row += TOKENS) {
        int64_t rows = n_rows - row < TOKENS ? n_rows - row : TOKENS;
        for (int v = 0; v < VECTORS; v++) memset(sums[v], 0, rows * sizeof *sums[v]);
        if (n_rows == 1) multiply_few(1, kind, w, units, output, x, sums);
        else if (n_rows == 2 && kind == INT4) multiply_few(2, kind, w, units, output, x, sums);
        else multiply_many(kind, w, units, output, x, row, rows, sums);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = first; i < TOGETHER && output + i < w->n_outputs; i++)
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

/* y [n_rows, n_outputs] = x [n_rows, length] w^T, w [n_outputs, length]; at least TOGETHER outputs unless it is int4, and
   length a multiple of a block. Returns 0, or 1 if out of memory or for an unknown kind. */
int linear_quantized(const bf16 *x, const Matrix *w, bf16 *y, int64_t n_rows) {
    if (w->kind < Q8_0 || w->kind > INT4) return 1;
    int64_t groups = n_rows * (w->length / GROUP);
    float *memory = malloc(groups * (2 * sizeof(float) + 2 * sizeof(int16_t) + GROUP));
    if (!memory) return 1;
    Tokens tokens = {.scales = memory, .offsets = memory + groups, .sums = (int16_t *)(memory + 2 * groups),
                     .values = (int8_t *)(memory + 3 * groups), .length = w->length};
#pragma omp parallel for schedule(static) if (groups * GROUP > SERIAL / 4)
    for (int64_t g = 0; g < groups; g++) round_group(x + g * GROUP, &tokens, g);
#pragma omp parallel for schedule(static) if (n_rows * w->n_outputs * w->length > SERIAL)
    for (int64_t output = 0; output < w->n_outputs; output += TOGETHER) {
        /* the last rows of blocks are computed with some before them, so that there are enough; int4 is padded */
        int64_t missing = !w->is_interleaved && output + TOGETHER > w->n_outputs ? output + TOGETHER - w->n_outputs : 0;
        multiply_kind(w, output - missing, missing, &tokens, n_rows, y);
    }
    free(memory);
    return 0;
}

/* Writes the blocks of `w` interleaved; the number of outputs must be a multiple of TOGETHER. */
void interleave(const Matrix *w, uint8_t *to) {
    Format format = FORMATS[w->kind];
    int64_t n_blocks = w->length / format.values, stride = n_blocks * format.bytes;
#pragma omp parallel for schedule(static)
    for (int64_t output = 0; output < w->n_outputs; output += TOGETHER)
        for (int64_t i = 0; i < n_blocks; i++) {
            int64_t at = output * stride + i * format.bytes; /* of the first output's block */
            interleave_block((int)w->kind, w->values + at, stride, to + output * stride + TOGETHER * i * format.bytes);
        }
}

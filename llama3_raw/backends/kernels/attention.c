/* Attention over a bf16 cache. */

#include "tiles.h"

#define CHUNK 128 /* keys per partial result; the partial results are added in order */

typedef struct {
    int64_t n_tokens, n_heads, n_kv_heads, head_dim, start; /* token t sees the positions up to start + t */
    int64_t use_tiles; /* if ROWS divides the number of query heads per kv head */
    int64_t q_stride, key_stride, value_stride;             /* values from one token to the next */
} Shape;

/* The partial result of token t's query head h over a chunk of keys: the largest score, the sum of the weights, and
   head_dim weighted sums of values. */
static inline float *partial_of(float *partials, const Shape *shape, int64_t chunks, int64_t t, int64_t h,
                                int64_t chunk) {
    return partials + ((t * shape->n_heads + h) * chunks + chunk) * (shape->head_dim + 2);
}

/* Loads rows into the cache in the order of memory. Plain loads, because the processor reads ahead of them with more
   requests at a time than it has for prefetch instructions. */
static void fetch(const bf16 *rows, int64_t count, int64_t stride, int64_t length) {
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = 0; i < length; i += 32) (void)*(volatile const bf16 *)(rows + s * stride + i);
}

/* Attention of one token to one chunk, for a constant number of query heads that share a kv head. */
static inline __attribute__((always_inline)) void attend_heads(
    int heads, const bf16 *queries, const bf16 *keys, const bf16 *values, float *partial, int64_t partial_stride,
    int count, const Shape *shape) {
    int64_t size = shape->head_dim;
    float scale = 1 / sqrtf((float)size);
    float weights[ROWS][CHUNK] __attribute__((aligned(64)));
    int s = 0;
#ifdef WITH_TILES
    if (shape->use_tiles) {
        float scores[16 * ROWS];
        int32_t packed[ROWS * size / 2];
        for (int h = 0; h < heads; h++)
            for (int64_t i = 0; i < size / 2; i++) memcpy(packed + i * heads + h, queries + h * size + 2 * i, 4);
        for (; s + 16 <= count; s += 16) {
            score(packed, keys + s * shape->key_stride, shape->key_stride, size, scores);
            for (int i = 0; i < 16; i++)
                for (int h = 0; h < heads; h++) weights[h][s + i] = scores[i * heads + h] * scale;
        }
    }
#endif
    for (; s < count; s++) {
        floats sums[ROWS];
        for (int h = 0; h < heads; h++) sums[h] = (floats){0};
        for (int64_t i = 0; i < size; i += 2 * WIDTH) {
            pairs key = load_pairs(keys + s * shape->key_stride + i);
            for (int h = 0; h < heads; h++) sums[h] = add_products(sums[h], load_pairs(queries + h * size + i), key);
        }
        for (int h = 0; h < heads; h++) weights[h][s] = total(sums[h]) * scale;
    }
    for (int h = 0; h < heads; h++) {
        float largest = -INFINITY;
        for (int s = 0; s < count; s++)
            if (weights[h][s] > largest) largest = weights[h][s];
        for (int s = count; s % WIDTH; s++) weights[h][s] = -INFINITY;
        floats sum = {0};
        for (int s = 0; s < count; s += WIDTH) {
            floats exponentials = exponential(load_floats(weights[h] + s) - largest);
            for (int i = 0; i < WIDTH; i++)
                if (s + i >= count) exponentials[i] = 0;
            memcpy(weights[h] + s, &exponentials, sizeof exponentials);
            sum += exponentials;
        }
        partial[h * partial_stride] = largest;
        partial[h * partial_stride + 1] = total(sum);
    }
    for (int64_t i = 0; i < size; i += 2 * WIDTH) {
        floats even[ROWS], odd[ROWS];
        for (int h = 0; h < heads; h++) even[h] = odd[h] = (floats){0};
        for (int s = 0; s < count; s++) {
            words value = load_words(values + s * shape->value_stride + i);
            for (int h = 0; h < heads; h++) {
                even[h] += weights[h][s] * (floats)(value << 16);
                odd[h] += weights[h][s] * (floats)(value & 0xffff0000u);
            }
        }
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < WIDTH; j++) {
                partial[h * partial_stride + 2 + i + 2 * j] = even[h][j];
                partial[h * partial_stride + 2 + i + 2 * j + 1] = odd[h][j];
            }
    }
}

static void attend_chunk(const Shape *shape, const bf16 *q, const bf16 *keys, const bf16 *values, float *partials,
                         int64_t chunks, int64_t kv_head, int64_t chunk) {
    int64_t n_rep = shape->n_heads / shape->n_kv_heads, size = shape->head_dim, first = chunk * CHUNK;
    int64_t keys_left = shape->start + shape->n_tokens - first, rows = keys_left < CHUNK ? keys_left : CHUNK;
    if (kv_head == 0) { /* one head has only a few bytes of each token, and would wait for most of them */
        fetch(keys + first * shape->key_stride, rows, shape->key_stride, shape->n_kv_heads * size);
        fetch(values + first * shape->value_stride, rows, shape->value_stride, shape->n_kv_heads * size);
    }
    keys += first * shape->key_stride + kv_head * size;
    values += first * shape->value_stride + kv_head * size;
    for (int64_t t = 0; t < shape->n_tokens; t++) {
        int64_t left = shape->start + t + 1 - first;
        if (left <= 0) continue;
        int count = left < CHUNK ? (int)left : CHUNK;
        for (int64_t h = kv_head * n_rep, end = h + n_rep; h < end; h += ROWS) {
            int heads = end - h < ROWS ? (int)(end - h) : ROWS;
            const bf16 *queries = q + t * shape->q_stride + h * size;
            float *partial = partial_of(partials, shape, chunks, t, h, chunk);
            int64_t stride = chunks * (size + 2);
            if (heads == 4) attend_heads(4, queries, keys, values, partial, stride, count, shape);
            else if (heads == 3) attend_heads(3, queries, keys, values, partial, stride, count, shape);
            else if (heads == 2) attend_heads(2, queries, keys, values, partial, stride, count, shape);
            else attend_heads(1, queries, keys, values, partial, stride, count, shape);
        }
    }
}

/* out [n_tokens, n_heads, head_dim] = softmax(q . keys / sqrt(head_dim)) . values, under a causal mask.
   Neighbouring query heads share a kv head; head_dim must be a multiple of 32. Returns 0, or 1 if out of memory. */
int attend(const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, const Shape *shape) {
    int64_t size = shape->head_dim, chunks = (shape->start + shape->n_tokens + CHUNK - 1) / CHUNK;
    float *partials = malloc(shape->n_tokens * shape->n_heads * chunks * (size + 2) * sizeof *partials);
    if (!partials) return 1;
#pragma omp parallel if (shape->n_tokens * shape->n_heads * shape->start * size > SERIAL)
    {
#ifdef WITH_TILES
        if (shape->use_tiles) shape_tiles(ROWS);
#endif
#pragma omp for schedule(static) collapse(2)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int64_t kv_head = 0; kv_head < shape->n_kv_heads; kv_head++)
                attend_chunk(shape, q, keys, values, partials, chunks, kv_head, chunk);
#ifdef WITH_TILES
        if (shape->use_tiles) _tile_release();
#endif
    }
#pragma omp parallel for schedule(static) collapse(2) if (shape->n_tokens * shape->n_heads * chunks * size > SERIAL)
    for (int64_t t = 0; t < shape->n_tokens; t++)
        for (int64_t h = 0; h < shape->n_heads; h++) {
            int64_t seen = (shape->start + t) / CHUNK + 1; /* chunks that token t sees a part of */
            float largest = -INFINITY, sum = 0, *first = partial_of(partials, shape, chunks, t, h, 0);
            for (int64_t c = 0; c < seen; c++)
                if (first[c * (size + 2)] > largest) largest = first[c * (size + 2)];
            for (int64_t c = 0; c < seen; c++) {
                float *partial = first + c * (size + 2), factor = expf(partial[0] - largest);
                sum += partial[1] * factor;
                for (int64_t i = 0; i < size; i++) {
                    partial[2 + i] *= factor;
                    if (c) first[2 + i] += partial[2 + i];
                }
            }
            for (int64_t i = 0; i < size; i++)
                out[(t * shape->n_heads + h) * size + i] = to_bf16(first[2 + i] / sum);
        }
    free(partials);
    return 0;
}

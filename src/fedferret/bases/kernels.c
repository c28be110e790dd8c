/* The inner loops of the bases, written for the compiler to vectorise. hashing.py defines every bit of the randomness.

   Additions to a weight follow the PyTorch fallback operation by operation (compile with -ffp-contract=off), so they
   give the same bits. The order of a sum depends on positions only, never on how the work is split into calls:
   accumulator c of sign_project adds its weights in order of position, and dense_project splits positions into CHUNKs.
   Every function works on one piece of a block, with the first element at position `start`, and calls no other
   library. */

#include <stdint.h>
#include <string.h>

#define LANES 256  /* neighbouring positions that take the same bit of LANES words */
#define TILE (32 * LANES)
#define CHUNK 4096 /* positions: their hashed states and deltas stay in the L1 cache during the loop over columns */
#define GROUP 64   /* columns that one fixed tree sums */
#define WIDTH 64   /* positions handled in parallel: several vector registers on every machine */

static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- sign buckets ---- */

typedef struct {
    uint32_t low, high;
    int64_t tile; /* the tile of `words`; -1 for none */
    uint32_t words[LANES];
} Signs;

static inline float negated_where(float value, uint32_t word, unsigned bit) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits ^= (word << (31 - bit)) & 0x80000000u;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* the words that hold the signs of a tile */
static inline void look_up(Signs *signs, int64_t tile) {
    if (tile == signs->tile) return;
    for (int i = 0; i < LANES; i++)
        signs->words[i] = mix(mix(((uint32_t)(tile * LANES) + (uint32_t)i) ^ signs->low) ^ signs->high);
    signs->tile = tile;
}

/* target[i] += values[i] with the sign of position start + i */
static void add_signed(float *restrict target, const float *restrict values, int64_t count, int64_t start,
                       Signs *signs) {
    for (int64_t done = 0; done < count;) {
        const int64_t position = start + done, tile = position / TILE, lane = position % LANES;
        look_up(signs, tile);
        const unsigned bit = (unsigned)(position / LANES % 32);
        const int64_t run = least(LANES - lane, count - done);
        const uint32_t *restrict words = signs->words + lane;
        float *restrict to = target + done;
        const float *restrict from = values + done;
        if (run == LANES)
            for (int i = 0; i < LANES; i++) to[i] += negated_where(from[i], words[i], bit);
        else
            for (int64_t i = 0; i < run; i++) to[i] += negated_where(from[i], words[i], bit);
        done += run;
    }
}

/* accumulators[p mod buckets] += signed delta at p, for the positions p that fall into buckets first to last - 1 */
void sign_project(const float *delta, int64_t count, int64_t start, float *accumulators, int64_t buckets,
                  int64_t first, int64_t last, uint32_t low, uint32_t high) {
    Signs signs = {low, high, -1, {0}};
    const int64_t stop = start + count;
    for (int64_t row = start / buckets * buckets; row < stop; row += buckets) {
        const int64_t from = greatest(start, row + first), to = least(stop, row + last);
        if (from < to) add_signed(accumulators + (from - row), delta + (from - start), to - from, from, &signs);
    }
}

/* target += the sum of the rows of values: fold_rows_ of arithmetic.py */
void fold_rows(float *restrict target, float *restrict values, int64_t rows, int64_t columns) {
    while (rows > 1) {
        const int64_t half = rows / 2;
        const float *restrict later = values + (rows - half) * columns;
        for (int64_t i = 0; i < half * columns; i++) values[i] += later[i];
        rows -= half;
    }
    for (int64_t i = 0; i < columns; i++) target[i] += values[i];
}

/* target at p += signed coordinates[p mod buckets] */
void sign_expand(float *target, int64_t count, int64_t start, const float *coordinates, int64_t buckets, uint32_t low,
                 uint32_t high) {
    Signs signs = {low, high, -1, {0}};
    const int64_t stop = start + count;
    for (int64_t row = start / buckets * buckets; row < stop; row += buckets) {
        const int64_t from = greatest(start, row), to = least(stop, row + buckets);
        add_signed(target + (from - start), coordinates + (from - row), to - from, from, &signs);
    }
}

/* ---- rotations ---- */

/* values[p] with the sign of position p */
static void flip_signs(float *values, int64_t count, uint32_t low, uint32_t high) {
    Signs signs = {low, high, -1, {0}};
    for (int64_t from = 0; from < count; from += LANES) {
        look_up(&signs, from / TILE);
        const unsigned bit = (unsigned)(from / LANES % 32);
        const int64_t run = least(LANES, count - from);
        for (int64_t i = 0; i < run; i++) values[from + i] = negated_where(values[from + i], signs.words[i], bit);
    }
}

/* the Hadamard transform of 2^m values, unscaled: the additions of rotation.py, one CHUNK after the other where they
   stay within it, so that they find their values in the L1 cache */
static void transform(float *values, int64_t length) {
    if (length > CHUNK) {
        transform(values, length / 2);
        transform(values + length / 2, length / 2);
    }
    for (int64_t half = length > CHUNK ? length / 2 : 1; half < length; half *= 2)
        for (int64_t pair = 0; pair < length; pair += 2 * half) {
            float *restrict one = values + pair, *restrict other = one + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = one[i], b = other[i];
                one[i] = a + b;
                other[i] = a - b;
            }
        }
}

/* a step of a rotation: new signs, then the transform of the first `length` values */
void rotate(float *values, int64_t count, int64_t length, float scale, uint32_t low, uint32_t high) {
    flip_signs(values, count, low, high);
    transform(values, length);
    for (int64_t i = 0; i < length; i++) values[i] *= scale;
}

/* the inverse of `rotate` */
void rotate_back(float *values, int64_t count, int64_t length, float scale, uint32_t low, uint32_t high) {
    transform(values, length);
    for (int64_t i = 0; i < length; i++) values[i] *= scale;
    flip_signs(values, count, low, high);
}

/* ---- truncated normal ---- */

/* u (b_0 + b_1 u^2 + ...), by Horner's rule */
static inline __attribute__((always_inline)) float odd_series(float u, const float *coefficients, int terms) {
    if (terms == 1) return u * coefficients[0];
    const float square = u * u;
    float polynomial = coefficients[terms - 1];
    for (int term = terms - 2; term >= 0; term--) polynomial = polynomial * square + coefficients[term];
    return polynomial * u;
}

/* one element of V */
static inline __attribute__((always_inline)) float element(uint32_t state, uint32_t column, const float *coefficients,
                                                           int terms) {
    /* the top 24 bits, signed (compilers shift the sign in), and a last bit that is always set */
    const float u = (float)(((int32_t)mix(state ^ column) >> 7) | 1) * 0x1p-24f;
    return odd_series(u, coefficients, terms);
}

/* the sum over a padded chunk of the elements of one column times delta: WIDTH parallel sums, then a tree over them */
static inline __attribute__((always_inline)) float column_sum(const uint32_t *restrict states,
                                                              const float *restrict delta, int64_t padded,
                                                              uint32_t column, const float *coefficients, int terms) {
    float sums[WIDTH] = {0};
    for (int64_t from = 0; from < padded; from += WIDTH)
        for (int i = 0; i < WIDTH; i++) sums[i] += element(states[from + i], column, coefficients, terms) * delta[from + i];
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* values[i] = elements of one column at WIDTH positions, times its coordinate */
static inline __attribute__((always_inline)) void column_products(float *restrict values,
                                                                  const uint32_t *restrict states, uint32_t column,
                                                                  float coordinate, const float *coefficients,
                                                                  int terms) {
    for (int i = 0; i < WIDTH; i++) values[i] = element(states[i], column, coefficients, terms) * coordinate;
}

/* only small blocks have long series; the usual lengths are compile-time constants, so that loops are unrolled */
#define FOR_EACH_LENGTH(terms, CALL) \
    switch (terms) {                 \
        case 1: CALL(1); break;      \
        case 2: CALL(2); break;      \
        case 3: CALL(3); break;      \
        case 4: CALL(4); break;      \
        default: CALL(terms);        \
    }

/* totals[k - first] += the sum over positions of V[p, k] delta[p], for columns first to last - 1 */
void dense_project(const float *delta, int64_t count, uint32_t start, double *totals, uint32_t first, uint32_t last,
                   const float *coefficients, int32_t terms, uint32_t low, uint32_t high) {
    uint32_t states[CHUNK];
    float chunk[CHUNK];
    for (int64_t from = 0; from < count; from += CHUNK) {
        const int64_t length = least(CHUNK, count - from), padded = (length + WIDTH - 1) / WIDTH * WIDTH;
        for (int64_t i = 0; i < padded; i++) states[i] = mix((start + (uint32_t)(from + i)) ^ low);
        memcpy(chunk, delta + from, (size_t)length * sizeof *chunk);
        memset(chunk + length, 0, (size_t)(padded - length) * sizeof *chunk);
#define SUM(length_of_series) \
    for (uint32_t k = first; k < last; k++) \
        totals[k - first] += column_sum(states, chunk, padded, mix(k ^ high), coefficients, length_of_series)
        FOR_EACH_LENGTH(terms, SUM)
    }
}

/* the sum of `rows` rows, left in the first row: fold_rows_ of arithmetic.py */
static inline void fold(float (*values)[WIDTH], int rows) {
    while (rows > 1) {
        const int half = rows / 2;
        for (int row = 0; row < half; row++)
            for (int i = 0; i < WIDTH; i++) values[row][i] += values[rows - half + row][i];
        rows -= half;
    }
}

/* target[p] += the sum over columns of V[p, k] coordinates[k] */
void dense_expand(float *target, int64_t count, uint32_t start, const float *coordinates, uint32_t columns,
                  const float *coefficients, int32_t terms, uint32_t low, uint32_t high) {
    uint32_t states[WIDTH];
    float increment[WIDTH], values[GROUP][WIDTH];
    for (int64_t from = 0; from < count; from += WIDTH) {
        for (int i = 0; i < WIDTH; i++) states[i] = mix((start + (uint32_t)(from + i)) ^ low);
        memset(increment, 0, sizeof increment);
        for (uint32_t first = 0; first < columns; first += GROUP) {
            const int group = (int)least(GROUP, columns - first);
#define MULTIPLY(length_of_series) \
    for (int k = 0; k < group; k++) \
        column_products(values[k], states, mix((first + (uint32_t)k) ^ high), coordinates[first + (uint32_t)k], \
                        coefficients, length_of_series)
            FOR_EACH_LENGTH(terms, MULTIPLY)
            fold(values, group);
            for (int i = 0; i < WIDTH; i++) increment[i] += values[0][i];
        }
        const int64_t length = least(WIDTH, count - from);
        for (int64_t i = 0; i < length; i++) target[from + i] += increment[i];
    }
}

/* ---- Gaussian directions ---- */

/* target[p] += factors[k] z(p, columns[k]) for every k in order; gaussian.py defines z and its five coefficients. A
   chunk of the target stays in the L1 cache during the loop over columns. */
void gaussian_add(float *target, int64_t count, uint32_t start, const uint32_t *columns, const float *factors,
                  int64_t number, const float *coefficients, uint32_t low, uint32_t high) {
    uint32_t states[CHUNK];
    for (int64_t from = 0; from < count; from += CHUNK) {
        const int64_t length = least(CHUNK, count - from);
        float *restrict to = target + from;
        for (int64_t i = 0; i < length; i++) states[i] = mix((start + (uint32_t)(from + i)) ^ low);
        for (int64_t k = 0; k < number; k++) {
            const uint32_t column = mix(columns[k] ^ high);
            const float factor = factors[k];
            for (int64_t i = 0; i < length; i++) {
                const uint32_t word = mix(states[i] ^ column);
                const float u = (float)((int32_t)(word & 0xFFFFu) - (int32_t)(word >> 16)) * 0x1p-16f;
                to[i] += odd_series(u, coefficients, 5) * factor;
            }
        }
    }
}

/* ---- rounding at random ---- */

/* rounded[i] = source[i] in bf16, up with the probability that keeps the mean: stochastic_rounding.py */
void round_to_bf16(const float *restrict source, uint16_t *restrict rounded, int64_t count, uint32_t start,
                   uint32_t low, uint32_t high) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, source + i, sizeof bits);
        const uint32_t random = mix(mix((start + (uint32_t)i) ^ low) ^ high) >> 16;
        const uint32_t quiet = (bits & 0x007FFFFFu) ? 0x00400000u : 0u; /* NaN stays NaN */
        const uint32_t moved = (bits & 0x7F800000u) == 0x7F800000u ? bits | quiet : bits + random;
        rounded[i] = (uint16_t)(moved >> 16);
    }
}

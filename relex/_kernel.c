/* The two inner loops of a pass over a trajectory, without the GIL: products of increments, and a prediction's sum.

   Every element of a result is one chain of operations in an order that depends on nothing but the tensor: not on the
   number of checkpoints, of threads, or on the CPU. On x86 the loops are compiled three times, and the fastest that the
   CPU has is taken; lanes are always 16 wide, multiplications are fused with their addition, so bits are the same.

   Letters: K rows (checkpoints), N elements of a block. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* What relex/kernel.py asks for; another number there means that this file was built from other sources. */
#define VERSION 3

#define LANES 16
/* Sums that do not wait for each other; rows are filled with zeros to a multiple of so many lanes. */
#define STEPS 4
/* Columns that are subtracted and multiplied at once; of every CHAIN of them sums are fp32, across them fp64. */
#define WIDTH 2048
#define CHAIN 512
/* Elements from one row of increments to the next: a power of two would put all rows into the same lines of the cache. */
#define ROW (WIDTH + LANES)
/* An increment whose square is more than 1/HEAVY of its row's in WIDTH columns is multiplied in fp64: behind it the
   small ones would be lost. So there are at most HEAVY of them, and room for rounding. */
#define HEAVY 8
#define MOST_HEAVY (2 * HEAVY)
/* Outside of these a row's products may leave the range of fp32, and are taken in fp64. */
#define SMALLEST 0x1p-40f
#define LARGEST 0x1p+50f
/* Rows of a prediction's sum that are added while the sum is in registers. */
#define TOGETHER 4
/* Zero checks: of one stretch of a tensor, its sectors' first elements and its last ones are looked at. */
#define STRETCH 32768
#define SECTOR_BYTES 512
#define FEWEST_ZEROS 4

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float lanes_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits_anywhere __attribute__((vector_size(4 * LANES), aligned(2)));
typedef int32_t signed_bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef float half_lanes __attribute__((vector_size(2 * LANES)));
typedef double wide __attribute__((vector_size(4 * LANES)));
typedef double half_wide __attribute__((vector_size(2 * LANES)));
typedef double quarter_wide __attribute__((vector_size(LANES)));

enum kind { BFLOAT16, FLOAT32 };

typedef struct {
    int32_t count;
    int32_t column[MOST_HEAVY];
    float value[MOST_HEAVY];
} heavy_t;

/* Sums over chains begin with the first chain, which GCC does not see. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE const char *at(const char *row, int kind, Py_ssize_t element) { return row + element * (kind == FLOAT32 ? 4 : 2); }

INLINE void load(lanes *to, const char *place, int kind) {
    if (kind == FLOAT32) *to = *(const lanes_anywhere *)place;
    else *to = (lanes)(__builtin_convertvector(*(const halves *)place, bits) << 16);
}

/* Two rows of lanes out of bf16 by one instruction each: the even elements, and the odd ones. */
INLINE void load_pair(lanes *even, lanes *odd, const char *place) {
    bits both = *(const bits_anywhere *)place;
    *even = (lanes)(both << 16);
    *odd = (lanes)(both & 0xffff0000);
}

INLINE float element(const char *place, int kind) {
    if (kind == FLOAT32) { float value; memcpy(&value, place, 4); return value; }
    uint16_t half; memcpy(&half, place, 2);
    uint32_t whole = (uint32_t)half << 16; float value; memcpy(&value, &whole, 4); return value;
}

INLINE uint32_t bits_of(float value) { uint32_t whole; memcpy(&whole, &value, 4); return whole; }

/* Copy row - before, n <= WIDTH elements, to out, in pairs as load_pair gives them where that is asked for (filled with zeros to a multiple of STEPS * LANES). */
INLINE void subtract(
    float *out, const char *row, const char *before, const char *next, int kind, int paired, Py_ssize_t n) {
    Py_ssize_t c = 0;
    /* A row is shorter than what the CPU fetches ahead by itself. */
    for (; paired && c + 2 * LANES <= n; c += 2 * LANES) {
        lanes even, odd, even_before, odd_before;
        __builtin_prefetch(at(next, kind, c));
        load_pair(&even, &odd, at(row, kind, c));
        if (before) {
            load_pair(&even_before, &odd_before, at(before, kind, c));
            even -= even_before;
            odd -= odd_before;
        }
        *(lanes *)(out + c) = even;
        *(lanes *)(out + c + LANES) = odd;
    }
    for (; c + LANES <= n; c += LANES) {
        lanes x, y;
        __builtin_prefetch(at(next, kind, c));
        load(&x, at(row, kind, c), kind);
        if (before) {
            load(&y, at(before, kind, c), kind);
            x -= y;
        }
        *(lanes *)(out + c) = x;
    }
    for (Py_ssize_t z = c; z < n || z % (STEPS * LANES); z += LANES) *(lanes *)(out + z) = (lanes){0};
    for (; c < n; c++) out[c] = element(at(row, kind, c), kind) - (before ? element(at(before, kind, c), kind) : 0.0f);
}

/* Set what is heavy in x to zero and keep it apart; 1 when the row has to be multiplied in fp64 instead. */
INLINE int sift(float *x, Py_ssize_t n, heavy_t *heavy) {
    lanes square[STEPS] = {0};
    signed_bits largest[STEPS] = {0};
    heavy->count = 0;
    for (Py_ssize_t c = 0; c < n; c += STEPS * LANES)
        _Pragma("GCC unroll 4") for (int s = 0; s < STEPS; s++) {
            lanes v = *(lanes *)(x + c + s * LANES);
            signed_bits magnitude = (signed_bits)v & 0x7fffffff, more = magnitude > largest[s];
            largest[s] = (magnitude & more) | (largest[s] & ~more);
            square[s] += v * v;
        }
    uint32_t top = 0;
    float sum = 0.0f;
    for (int s = 0; s < STEPS; s++)
        for (int l = 0; l < LANES; l++) {
            if ((uint32_t)largest[s][l] > top) top = (uint32_t)largest[s][l];
            sum += square[s][l];
        }
    if (top == 0) return 0;
    /* Not a number and infinity are larger than every number. */
    if (top > bits_of(LARGEST) || top < bits_of(SMALLEST)) return 1;
    float most; memcpy(&most, &top, 4);
    float bound = sum * (1.0f / HEAVY);
    if (!(most * most > bound)) return 0;
    for (Py_ssize_t c = 0; c < n; c++) {
        if (!(x[c] * x[c] > bound)) continue;
        if (heavy->count == MOST_HEAVY) return 1;
        heavy->column[heavy->count] = (int32_t)c;
        heavy->value[heavy->count++] = x[c];
    }
    for (int h = 0; h < heavy->count; h++) x[heavy->column[h]] = 0.0f;
    return 0;
}

INLINE double original(const float *x, const heavy_t *heavy, int32_t column) {
    for (int h = 0; h < heavy->count; h++) if (heavy->column[h] == column) return heavy->value[h];
    return x[column];
}

INLINE int among(const heavy_t *heavy, int32_t column) {
    for (int h = 0; h < heavy->count; h++) if (heavy->column[h] == column) return 1;
    return 0;
}

/* What two rows' heavy elements add to their product. */
INLINE double heavy_product(const float *x, const heavy_t *of_x, const float *y, const heavy_t *of_y) {
    double sum = 0.0;
    for (int h = 0; h < of_x->count; h++) sum += of_x->value[h] * original(y, of_y, of_x->column[h]);
    for (int h = 0; h < of_y->count; h++)
        if (!among(of_x, of_y->column[h])) sum += (double)x[of_y->column[h]] * of_y->value[h];
    return sum;
}

INLINE double fp64_product(const float *x, const float *y, Py_ssize_t n) {
    wide sum = {0};
    for (Py_ssize_t c = 0; c < n; c += LANES / 2) {
        wide a = __builtin_convertvector(*(half_lanes *)(x + c), wide), b = __builtin_convertvector(*(half_lanes *)(y + c), wide);
        sum += a * b;
    }
    double total = 0.0;
    for (int l = 0; l < LANES / 2; l++) total += sum[l];
    return total;
}

INLINE double add_lanes(const wide *low, const wide *high) {
    wide both = *low + *high;
    half_wide four[2];
    memcpy(four, &both, sizeof both);
    four[0] += four[1];
    quarter_wide two[2];
    memcpy(two, four, sizeof two);
    two[0] += two[1];
    return two[0][0] + two[0][1];
}

/* The squares of n elements, added in fp64. */
INLINE double squares(const char *row, int kind, Py_ssize_t n) {
    wide low = {0}, high = {0};
    Py_ssize_t c = 0;
    for (; c + LANES <= n; c += LANES) {
        lanes v;
        load(&v, at(row, kind, c), kind);
        half_lanes first, second;
        memcpy(&first, &v, sizeof first);
        memcpy(&second, (char *)&v + sizeof first, sizeof second);
        wide a = __builtin_convertvector(first, wide), b = __builtin_convertvector(second, wide);
        low += a * a;
        high += b * b;
    }
    double sum = add_lanes(&low, &high);
    for (; c < n; c++) { double v = element(at(row, kind, c), kind); sum += v * v; }
    return sum;
}

/* Whether a stretch begins a sector with zero somewhere, or ends in zeros. */
INLINE int suspect(const char *row, int kind, Py_ssize_t n) {
    if (n < FEWEST_ZEROS) return 0;
    Py_ssize_t sector = SECTOR_BYTES / (kind == FLOAT32 ? 4 : 2);
    int found = 0, zeros = 1;
    for (Py_ssize_t c = 0; c < n; c += sector) found |= element(at(row, kind, c), kind) == 0.0f;
    for (Py_ssize_t c = n - FEWEST_ZEROS; c < n; c++) zeros &= element(at(row, kind, c), kind) == 0.0f;
    return found | zeros;
}

typedef struct {
    const char *base, *rows;
    Py_ssize_t stride, count, n, first;
    int kind, relative;
    double *sums;
    Py_ssize_t across;
    float *scratch;
} gram_t;

/* R x R products at once, as many sums as the CPU has registers for, over V lanes at once: neither changes a bit. Of rows
   with themselves the lower triangle is enough: COLUMNS is how many are taken of row i. */
#define BLOCK(NAME, TARGET, R, V, WIDEN, COLUMNS)                                                                       \
    typedef float vector_##NAME __attribute__((vector_size(4 * V)));                                                    \
    TARGET INLINE void NAME(const float *x, const float *y, Py_ssize_t n, double sums[R][R]) {                          \
        double lane[R][R][LANES] __attribute__((aligned(64)));                                                          \
        for (Py_ssize_t begin = 0; begin < n; begin += CHAIN) {                                                         \
            Py_ssize_t end = begin + CHAIN < n ? begin + CHAIN : n;                                                     \
            for (int part = 0; part < LANES; part += V) {                                                               \
                vector_##NAME chain[R][R];                                                                              \
                _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)                                                     \
                    _Pragma("GCC unroll 8") for (int j = 0; j < COLUMNS; j++) chain[i][j] = (vector_##NAME){0};         \
                for (Py_ssize_t c = begin + part; c < end; c += LANES) {                                                \
                    vector_##NAME b[R];                                                                                 \
                    _Pragma("GCC unroll 8") for (int j = 0; j < R; j++) b[j] = *(const vector_##NAME *)(y + j * ROW + c); \
                    _Pragma("GCC unroll 8") for (int i = 0; i < R; i++) {                                               \
                        vector_##NAME a = *(const vector_##NAME *)(x + i * ROW + c);                                    \
                        _Pragma("GCC unroll 8") for (int j = 0; j < COLUMNS; j++) chain[i][j] += a * b[j];              \
                    }                                                                                                   \
                }                                                                                                       \
                _Pragma("GCC unroll 8") for (int i = 0; i < R; i++)                                                     \
                    _Pragma("GCC unroll 8") for (int j = 0; j < COLUMNS; j++)                                           \
                        WIDEN(lane[i][j] + part, chain[i][j], begin == 0);                                              \
            }                                                                                                           \
        }                                                                                                               \
        for (int i = 0; i < R; i++)                                                                                     \
            for (int j = 0; j < COLUMNS; j++) sums[i][j] = add_lanes((wide *)lane[i][j], (wide *)(lane[i][j] + LANES / 2)); \
    }

#define GRAM(NAME, TARGET, BLOCK_NAME, R)                                                                               \
    TARGET INLINE void NAME(const gram_t *g, int kind) {                                                                \
        Py_ssize_t groups = (g->count + R - 1) / R;                                                                     \
        heavy_t *heavy = (heavy_t *)(g->scratch + groups * R * ROW);                                                    \
        char *in_fp64 = (char *)(heavy + groups * R);                                                                   \
        memset(g->scratch + g->count * ROW, 0, (groups * R - g->count) * ROW * sizeof(float));                          \
        for (Py_ssize_t start = 0; start < g->n; start += WIDTH) {                                                      \
            Py_ssize_t n = g->n - start < WIDTH ? g->n - start : WIDTH, filled = STEPS * LANES;                         \
            Py_ssize_t padded = (n + filled - 1) / filled * filled;                                                     \
            for (Py_ssize_t k = 0; k < g->count; k++) {                                                                 \
                const char *before = k ? g->rows + (k - 1) * g->stride : g->relative ? NULL : g->base;                  \
                subtract(g->scratch + k * ROW, at(g->rows + k * g->stride, kind, start),                                \
                         before ? at(before, kind, start) : NULL,                                                       \
                         at(g->rows + (k + 1 < g->count ? k + 1 : k) * g->stride, kind, start), kind, kind == BFLOAT16, n); \
                in_fp64[k] = (char)sift(g->scratch + k * ROW, padded, heavy + k);                                       \
            }                                                                                                           \
            for (Py_ssize_t top = g->first / R; top < groups; top++)                                                    \
                for (Py_ssize_t left = 0; left <= top; left++) {                                                        \
                    double sums[R][R];                                                                                  \
                    const float *x = g->scratch + top * R * ROW, *y = g->scratch + left * R * ROW;                      \
                    if (top == left) BLOCK_NAME##_triangle(x, x, padded, sums);                                         \
                    else BLOCK_NAME(x, y, padded, sums);                                                                \
                    for (Py_ssize_t i = top * R; i < top * R + R && i < g->count; i++)                                  \
                        for (Py_ssize_t j = left * R; j < left * R + R && j <= i; j++) {                                \
                            const float *x = g->scratch + i * ROW, *y = g->scratch + j * ROW;                           \
                            double sum = sums[i - top * R][j - left * R];                                               \
                            if (in_fp64[i] || in_fp64[j]) sum = fp64_product(x, y, padded);                             \
                            if (heavy[i].count || heavy[j].count) sum += heavy_product(x, heavy + i, y, heavy + j);     \
                            g->sums[i * g->across + j] += sum;                                                          \
                        }                                                                                               \
                }                                                                                                       \
        }                                                                                                               \
    }

typedef struct {
    const char *base, *added, *rows;
    Py_ssize_t stride, count, n;
    int kind, added_kind, out_kind, relative;
    const float *coefficients;
    char *out;
} sum_t;

/* The bits of what is stored, of bfloat16 in the upper half, rounded to nearest, ties to even. */
INLINE void rounded(const lanes *total, int out_kind, signed_bits *not_finite, bits *stored) {
    bits whole = (bits)*total;
    *stored = out_kind == BFLOAT16 ? (whole + 0x7fff + ((whole >> 16) & 1)) & 0xffff0000 : whole;
    *not_finite |= ((*stored & 0x7f800000) == 0x7f800000) | ((whole & 0x7f800000) == 0x7f800000);
}

/* Add factors times (rows - from), R rows one after the other. */
INLINE void add_rows(lanes *total, const lanes *from, const char *const *rows, const char *const *next,
                     const lanes *factors, const int R, int kind, int paired, Py_ssize_t n) {
    Py_ssize_t c = 0;
    for (; paired && c + 2 * LANES <= n; c += 2 * LANES) {
        lanes low = total[c / LANES], high = total[c / LANES + 1];
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
            lanes even, odd;
            __builtin_prefetch(at(next[r], kind, c));
            load_pair(&even, &odd, at(rows[r], kind, c));
            low += (even - from[c / LANES]) * factors[r];
            high += (odd - from[c / LANES + 1]) * factors[r];
        }
        total[c / LANES] = low;
        total[c / LANES + 1] = high;
    }
    for (; c + LANES <= n; c += LANES) {
        lanes sum = total[c / LANES];
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
            lanes delta;
            __builtin_prefetch(at(next[r], kind, c));
            load(&delta, at(rows[r], kind, c), kind);
            sum += (delta - from[c / LANES]) * factors[r];
        }
        total[c / LANES] = sum;
    }
    for (int r = 0; c < n && r < R; r++) {
        lanes delta = {0};
        for (Py_ssize_t l = 0; c + l < n; l++) delta[l] = element(at(rows[r], kind, c + l), kind);
        total[c / LANES] += (delta - from[c / LANES]) * factors[r];
    }
}

/* added + sum of coefficients times (row - base), each addition fused, row after row; 1 when all of it is finite. */
INLINE int combine(const sum_t *s, int kind, int added_kind, int out_kind) {
    const int paired = kind == BFLOAT16 && added_kind == BFLOAT16 && out_kind == BFLOAT16;
    signed_bits not_finite = {0};
    lanes from[WIDTH / LANES];
    memset(from, 0, sizeof from);
    for (Py_ssize_t start = 0; start < s->n; start += WIDTH) {
        Py_ssize_t n = s->n - start < WIDTH ? s->n - start : WIDTH;
        lanes total[WIDTH / LANES];
        memset(total, 0, sizeof total);
        if (!s->relative) subtract((float *)from, at(s->base, kind, start), NULL, s->rows, kind, paired, n);
        const char *rows[TOGETHER], *next[TOGETHER];
        lanes factors[TOGETHER];
        int taken = 0;
        for (Py_ssize_t k = 0; k < s->count; k++) {
            float coefficient = s->coefficients[k];
            if (coefficient == 0.0f) continue;
            factors[taken] = coefficient - (lanes){0};
            rows[taken] = at(s->rows + k * s->stride, kind, start);
            next[taken++] = at(s->rows + (k + TOGETHER < s->count ? k + TOGETHER : k) * s->stride, kind, start);
            if (taken < TOGETHER) continue;
            add_rows(total, from, rows, next, factors, TOGETHER, kind, paired, n);
            taken = 0;
        }
        for (int r = 0; r < taken; r++) add_rows(total, from, rows + r, next + r, factors + r, 1, kind, paired, n);
        const char *added = at(s->added, added_kind, start);
        char *out = (char *)at(s->out, out_kind, start);
        Py_ssize_t c = 0;
        for (; paired && c + 2 * LANES <= n; c += 2 * LANES) {
            lanes even, odd;
            bits low, high;
            load_pair(&even, &odd, at(added, added_kind, c));
            even += total[c / LANES];
            odd += total[c / LANES + 1];
            rounded(&even, out_kind, &not_finite, &low);
            rounded(&odd, out_kind, &not_finite, &high);
            *(bits_anywhere *)(out + 2 * c) = high | low >> 16;
        }
        for (; c < n; c += LANES) {
            bits stored;
            lanes to = {0};
            if (c + LANES <= n) load(&to, at(added, added_kind, c), added_kind);
            else for (Py_ssize_t l = 0; c + l < n; l++) to[l] = element(at(added, added_kind, c + l), added_kind);
            to += total[c / LANES];
            rounded(&to, out_kind, &not_finite, &stored);
            size_t take = c + LANES <= n ? LANES : (size_t)(n - c) % LANES;
            if (out_kind == FLOAT32) memcpy(out + 4 * c, &stored, 4 * take);
            else {
                halves half = __builtin_convertvector(stored >> 16, halves);
                memcpy(out + 2 * c, &half, 2 * take);
            }
        }
    }
    for (int l = 0; l < LANES; l++) if (not_finite[l]) return 0;
    return 1;
}

#define COMBINE(s)                                                                                                      \
    if ((s)->kind == BFLOAT16 && (s)->added_kind == BFLOAT16 && (s)->out_kind == BFLOAT16)                              \
        return combine(s, BFLOAT16, BFLOAT16, BFLOAT16);                                                                \
    if ((s)->kind == FLOAT32 && (s)->added_kind == FLOAT32 && (s)->out_kind == FLOAT32)                                 \
        return combine(s, FLOAT32, FLOAT32, FLOAT32);                                                                   \
    return combine(s, (s)->kind, (s)->added_kind, (s)->out_kind);

#define VARIANT(NAME, TARGET, R, V)                                                                                     \
    BLOCK(block_##NAME, TARGET, R, V, widen_##NAME, R)                                                                  \
    BLOCK(block_##NAME##_triangle, TARGET, R, V, widen_##NAME, i + 1)                                                   \
    GRAM(gram_any_##NAME, TARGET, block_##NAME, R)                                                                      \
    TARGET static void gram_##NAME(const gram_t *g) {                                                                   \
        if (g->kind == FLOAT32) gram_any_##NAME(g, FLOAT32);                                                            \
        else gram_any_##NAME(g, BFLOAT16);                                                                              \
    }                                                                                                                   \
    TARGET static double squares_##NAME(const char *row, int kind, Py_ssize_t n) {                                      \
        return kind == FLOAT32 ? squares(row, FLOAT32, n) : squares(row, BFLOAT16, n);                                  \
    }                                                                                                                   \
    TARGET static int combine_##NAME(const sum_t *s) { COMBINE(s) }

/* Rows of scratch are counted in the largest of the shapes. */
#define LARGEST_SHAPE 5

/* Add the lanes of a sum in fp32 to those in fp64, or begin these with them. */
#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define AVX2 __attribute__((target("avx2,fma")))
AVX512 INLINE void widen_avx512(double *lane, __m512 sum, int first) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(sum)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1));
    _mm512_store_pd(lane, first ? low : _mm512_add_pd(_mm512_load_pd(lane), low));
    _mm512_store_pd(lane + 8, first ? high : _mm512_add_pd(_mm512_load_pd(lane + 8), high));
}
AVX2 INLINE void widen_avx2(double *lane, __m256 sum, int first) {
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(sum)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(sum, 1));
    _mm256_store_pd(lane, first ? low : _mm256_add_pd(_mm256_load_pd(lane), low));
    _mm256_store_pd(lane + 4, first ? high : _mm256_add_pd(_mm256_load_pd(lane + 4), high));
}
VARIANT(avx512, AVX512, 5, 16)
VARIANT(avx2, AVX2, 3, 8)
#elif defined(__aarch64__)
INLINE void widen_neon(double *lane, float32x4_t sum, int first) {
    float64x2_t low = vcvt_f64_f32(vget_low_f32(sum)), high = vcvt_high_f64_f32(sum);
    vst1q_f64(lane, first ? low : vaddq_f64(vld1q_f64(lane), low));
    vst1q_f64(lane + 2, first ? high : vaddq_f64(vld1q_f64(lane + 2), high));
}
VARIANT(neon, , 5, 4)
#else
#error "this CPU is served by the portable path"
#endif

static void (*gram_here)(const gram_t *);
static double (*squares_here)(const char *, int, Py_ssize_t);
static int (*combine_here)(const sum_t *);
static const char *cpu = "";

static int choose(const char *wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                     && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx512 && (!*wanted || !strcmp(wanted, "avx512"))) {
        gram_here = gram_avx512, squares_here = squares_avx512, combine_here = combine_avx512, cpu = "avx512";
        return 1;
    }
    if (has_avx2 && (!*wanted || !strcmp(wanted, "avx2"))) {
        gram_here = gram_avx2, squares_here = squares_avx2, combine_here = combine_avx2, cpu = "avx2";
        return 1;
    }
#elif defined(__aarch64__)
    if (!*wanted || !strcmp(wanted, "neon")) {
        gram_here = gram_neon, squares_here = squares_neon, combine_here = combine_neon, cpu = "neon";
        return 1;
    }
#endif
    return 0;
}

static Py_ssize_t size_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* Whether count rows of n elements can lie at an address, a row every stride bytes; a ValueError is set when not. */
static int lie(Py_ssize_t address, Py_ssize_t stride, Py_ssize_t count, Py_ssize_t n, int kind) {
    int fits = address && (kind == BFLOAT16 || kind == FLOAT32) && n > 0 && count > 0 && stride >= n * size_of(kind);
    if (!fits) PyErr_Format(PyExc_ValueError, "%zd rows of %zd elements cannot lie every %zd bytes", count, n, stride);
    return fits;
}

static Py_ssize_t scratch_bytes(Py_ssize_t count) {
    Py_ssize_t rows = count + LARGEST_SHAPE;
    return rows * (Py_ssize_t)(ROW * sizeof(float) + sizeof(heavy_t) + 1) + 64;
}

/* Numbers (row, stretch) of what is marked in (count, stretches). */
static PyObject *listed(const char *marked, Py_ssize_t count, Py_ssize_t stretches) {
    PyObject *list = PyList_New(0);
    for (Py_ssize_t place = 0; list && place < count * stretches; place++) {
        if (!marked[place]) continue;
        PyObject *pair = Py_BuildValue("nn", place / stretches, place % stretches);
        if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

/* Tensors come as addresses: to ask for a buffer of each takes longer than to add up a small block. Who calls has looked
   at their shapes. */
PyDoc_STRVAR(gram_doc, "Add the products of a block's increments to sums; return the squared norm of `stored`, suspects.");
static PyObject *py_gram(PyObject *self, PyObject *args) {
    Py_ssize_t base, stored, rows, sums, scratch, stride, count, n, first, across;
    int kind, stored_kind, relative;
    if (!PyArg_ParseTuple(args, "nninnnnipnnnn", &base, &stored, &stored_kind, &rows, &stride, &count, &n, &kind,
                          &relative, &first, &sums, &across, &scratch))
        return NULL;
    if (!lie(base, n * 4, 1, n, kind) || !lie(stored, n * 4, 1, n, stored_kind) || !lie(rows, stride, count, n, kind))
        return NULL;
    if (!sums || !scratch || across < count || first < 0 || first > count)
        return PyErr_Format(PyExc_ValueError, "products of %zd rows from %zd on do not fit %zd", count, first, across);
    Py_ssize_t stretches = (n + STRETCH - 1) / STRETCH;
    char *marked = PyMem_Malloc(count * stretches);
    if (!marked) return PyErr_NoMemory();
    gram_t g = {(const char *)base, (const char *)rows, stride, count, n, first, kind, relative, (double *)sums, across,
                (float *)((scratch + 63) & ~(Py_ssize_t)63)};
    double norm;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t k = 0; k < count; k++)
        for (Py_ssize_t s = 0; s < stretches; s++) {
            Py_ssize_t left = n - s * STRETCH;
            marked[k * stretches + s] =
                (char)suspect(at(g.rows + k * stride, kind, s * STRETCH), kind, left < STRETCH ? left : STRETCH);
        }
    gram_here(&g);
    norm = squares_here((const char *)stored, stored_kind, n);
    Py_END_ALLOW_THREADS
    PyObject *suspects = listed(marked, count, stretches);
    PyMem_Free(marked);
    return suspects ? Py_BuildValue("dN", norm, suspects) : NULL;
}

PyDoc_STRVAR(combine_doc, "Write added + sum of coefficients times (row - base) to out; return whether it is finite.");
static PyObject *py_combine(PyObject *self, PyObject *args) {
    Py_ssize_t base, added, rows, coefficients, out, stride, count, n;
    int kind, added_kind, out_kind, relative;
    if (!PyArg_ParseTuple(args, "nninnnnipnni", &base, &added, &added_kind, &rows, &stride, &count, &n, &kind, &relative,
                          &coefficients, &out, &out_kind))
        return NULL;
    if (!lie(base, n * 4, 1, n, kind) || !lie(added, n * 4, 1, n, added_kind) || !lie(rows, stride, count, n, kind)
        || !lie(out, n * 4, 1, n, out_kind) || !lie(coefficients, count * 4, 1, count, FLOAT32))
        return NULL;
    sum_t s = {(const char *)base, (const char *)added, (const char *)rows, stride, count, n, kind, added_kind, out_kind,
               relative, (const float *)coefficients, (char *)out};
    int finite;
    Py_BEGIN_ALLOW_THREADS
    finite = combine_here(&s);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

PyDoc_STRVAR(read_doc, "Read pieces of open files into a buffer; return whether all of them are there.");
static PyObject *py_read(PyObject *self, PyObject *args) {
    Py_buffer buffer, descriptors, positions, places, lengths;
    if (!PyArg_ParseTuple(args, "w*y*y*y*y*", &buffer, &descriptors, &positions, &places, &lengths)) return NULL;
    const int64_t *descriptor = descriptors.buf, *position = positions.buf, *place = places.buf, *length = lengths.buf;
    Py_ssize_t count = descriptors.len / 8;
    int fits = positions.len == descriptors.len && places.len == descriptors.len && lengths.len == descriptors.len, whole = 1;
    for (Py_ssize_t i = 0; fits && i < count; i++)
        fits = place[i] >= 0 && length[i] >= 0 && length[i] <= buffer.len && place[i] <= buffer.len - length[i];
    if (!fits) PyErr_SetString(PyExc_ValueError, "the pieces do not lie in the buffer");
    else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; whole && i < count; i++)
            for (int64_t done = 0; done < length[i];) {
                ssize_t got = pread((int)descriptor[i], (char *)buffer.buf + place[i] + done, length[i] - done, position[i] + done);
                if (got > 0) done += got;
                else if (got == 0 || errno != EINTR) { whole = 0; break; }
            }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&buffer), PyBuffer_Release(&descriptors), PyBuffer_Release(&positions);
    PyBuffer_Release(&places), PyBuffer_Release(&lengths);
    return fits ? PyBool_FromLong(whole) : NULL;
}

PyDoc_STRVAR(use_doc, "Take the loops made for a kind of CPU (\"\": the fastest); return its name, \"\" when it is not this one.");
static PyObject *py_use(PyObject *self, PyObject *args) {
    const char *wanted;
    if (!PyArg_ParseTuple(args, "s", &wanted)) return NULL;
    return PyUnicode_FromString(choose(wanted) ? cpu : "");
}

PyDoc_STRVAR(scratch_doc, "Return the bytes of scratch that gram takes for so many rows.");
static PyObject *py_scratch(PyObject *self, PyObject *args) {
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "n", &count)) return NULL;
    return PyLong_FromSsize_t(scratch_bytes(count));
}

static PyMethodDef methods[] = {
    {"gram", py_gram, METH_VARARGS, gram_doc},
    {"combine", py_combine, METH_VARARGS, combine_doc},
    {"read", py_read, METH_VARARGS, read_doc},
    {"use", py_use, METH_VARARGS, use_doc},
    {"scratch", py_scratch, METH_VARARGS, scratch_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
    if (!choose("")) {
        PyErr_SetString(PyExc_ImportError, "this CPU has no fused multiply-add");
        return NULL;
    }
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "VERSION", VERSION) < 0) Py_CLEAR(made);
    return made;
}

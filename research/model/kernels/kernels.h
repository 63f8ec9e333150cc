/* What the kernels share; conventions as in kernels.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

/* The widest vector of this processor. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever it lies */

static inline vec load(const float *x) { return *(const loose *)x; }

static inline void store(float *x, vec v) { *(loose *)x = v; }

/* Lane by lane a where it is above b, else b: no number in b stays, and in a gives way. */
static inline vec larger(vec a, vec b)
{
    vec out;
    for (int j = 0; j < LANES; j++) out[j] = a[j] > b[j] ? a[j] : b[j];
    return out;
}

/* e^x of x up to 88 to 1 ulp or so, in a form that vectorises: e^x = 2^n e^r with |r| <= ln(2) / 2. */
static inline float exponential_below(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return p * power.f;
}

static inline float exponential(float x) { return exponential_below(x > 88.0f ? 88.0f : x); }

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* 2^x of x up to 0 to 1 ulp or so, 1 at 0; below -125 as at -125.  2^x = 2^n 2^r with r in (-1, 0]. */
static inline vec power_of_two(vec x)
{
    x = larger((vec){0} - 125.0f, x);
    ivec n = __builtin_convertvector(x, ivec);
    vec r = x - __builtin_convertvector(n, vec);
    vec p = r * 1.0902322568e-4f + 1.2747482882e-3f;
    p = p * r + 9.5791796658e-3f;
    p = p * r + 5.5490757074e-2f;
    p = p * r + 2.4022436782e-1f;
    p = p * r + 6.9314706433e-1f;
    p = p * r + 1.0f;
    return (vec)((ivec)p + (n << 23));
}

/* The largest of n numbers, NaN not among them (a row with one is NaN afterwards by its exponentials). */
static inline float largest(const float *x, i64 n)
{
    i64 j = 0;
    float most = -INFINITY;
    if (n >= LANES) {
        vec high = (vec){0} + most;
        for (; j + LANES <= n; j += LANES) high = larger(load(x + j), high);
        float lanes[LANES];
        store(lanes, high);
#pragma GCC unroll 4
        for (int w = LANES / 2; w; w /= 2)
            for (int l = 0; l < w; l++) lanes[l] = lanes[l + w] > lanes[l] ? lanes[l + w] : lanes[l];
        most = lanes[0];
    }
    for (; j < n; j++) most = x[j] > most ? x[j] : most;
    return most;
}

/* products.c */
void gemm(char ta, char tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void few_rows_product(const float *x, const float *w, float *out, i64 m, i64 n, i64 k);
void product(i64 m, i64 n, i64 k, const float *x, const float *w, float *out);

/* kernels.c */
void rms_norm(const float *restrict x, i64 x_stride, const float *restrict weight, float eps, float *restrict y, float *restrict inverse, i64 rows, i64 d);
void swiglu(const float *restrict gate, const float *restrict up, float *restrict out, i64 n);
void choose_experts(const float *scores, i64 *ids, i64 tokens, i64 experts, i64 devices, i64 limit, i64 chosen, float *best, i64 *reachable);
i64 sort_by_expert(const i64 *restrict ids, const uint8_t *restrict kept, i64 *restrict slot, i64 *restrict ends, i64 assignments, i64 experts);
void experts_forward(const float *x, const float *gates, const i64 *slot, const i64 *ends, const float *gate_up, const float *down, float *hidden,
                     float *out, float *scratch, i64 chosen, i64 experts, i64 d, i64 f, i64 at_a_time);

/* attention.c */
void pack(const float *nope, i64 nope_row, const float *rope, i64 rope_row, const float *table, i64 table_row, float scale, float *to, i64 to_row, i64 rows,
          i64 N, i64 R);

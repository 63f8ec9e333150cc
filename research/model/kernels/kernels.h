/* What the kernels share; conventions as in kernels.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

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

/* The largest of n numbers, NaN not among them (a row with one is NaN afterwards by its exponentials). */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("finite-math-only")))
#endif
static float largest(const float *x, i64 n)
{
    float most = -INFINITY;
    for (i64 j = 0; j < n; j++) most = x[j] > most ? x[j] : most;
    return most;
}

/* kernels.c */
void few_rows_product(const float *x, const float *w, float *out, i64 m, i64 n, i64 k);
void rms_norm(const float *restrict x, i64 x_stride, const float *restrict weight, float eps, float *restrict y, float *restrict inverse, i64 rows, i64 d);
void swiglu(const float *restrict gate, const float *restrict up, float *restrict out, i64 n);
void choose_experts(const float *scores, i64 *ids, i64 tokens, i64 experts, i64 devices, i64 limit, i64 chosen, float *best, i64 *reachable);
i64 sort_by_expert(const i64 *restrict ids, const uint8_t *restrict kept, i64 *restrict slot, i64 *restrict ends, i64 assignments, i64 experts);
void experts_forward(const float *x, const float *gates, const i64 *slot, const i64 *ends, const float *gate_up, const float *down, float *hidden,
                     float *out, float *scratch, i64 chosen, i64 experts, i64 d, i64 f, i64 at_a_time);
void gemm(char ta, char tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);

/* attention.c */
void pack(const float *nope, i64 nope_row, const float *rope, i64 rope_row, const float *table, i64 table_row, float scale, float *to, i64 to_row, i64 rows,
          i64 N, i64 R);

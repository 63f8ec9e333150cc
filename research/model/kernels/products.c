/* Matrix products: torch's own sgemm, and few rows; conventions as in kernels.c. */

#include "kernels.h"

typedef void (*sgemm_t)(const char *, const char *, const int *, const int *, const int *, const float *, const float *, const int *,
                        const float *, const int *, const float *, float *, const int *);
static sgemm_t sgemm;

void set_sgemm(sgemm_t function) { sgemm = function; }

/* Row-major C (m, n) = alpha op(A) op(B) + beta C: to the column-major routine it is C^T = op(B)^T op(A)^T. */
void gemm(char ta, char tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc)
{
    if (m > 0 && n > 0)
        sgemm(&tb, &ta, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

/* The same product `times` over, for benchmarks: what the core can do at this shape without a caller's overhead. */
void repeat_product(char ta, char tb, i64 m, i64 n, i64 k, const float *a, i64 lda, const float *b, i64 ldb, float *c, i64 ldc, i64 times)
{
    for (i64 i = 0; i < times; i++) gemm(ta, tb, m, n, k, 1.0f, a, lda, b, ldb, 0.0f, c, ldc);
}

/* out (m, n) = x (m, k) w^T of few rows: the weight (n, k) streams through once, which is all the time there is.  Its four quarters side by
   side: a core fetches four long streams almost twice as fast as one, or as four that end with every row. */
void few_rows_product(const float *x, const float *w, float *out, i64 m, i64 n, i64 k)
{
    i64 quarter = n / 4;
    for (i64 j = 0; j < quarter; j++) {
        const float *restrict a = w + j * k, *restrict b = a + quarter * k, *restrict c = b + quarter * k, *restrict d = c + quarter * k;
        for (i64 i = 0; i < m; i++) {
            const float *restrict row = x + i * k;
            float *to = out + i * n + j, s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
            for (i64 q = 0; q < k; q++) {
                s0 += row[q] * a[q];
                s1 += row[q] * b[q];
                s2 += row[q] * c[q];
                s3 += row[q] * d[q];
            }
            to[0] = s0, to[quarter] = s1, to[2 * quarter] = s2, to[3 * quarter] = s3;
        }
    }
    for (i64 j = 4 * quarter; j < n; j++)
        for (i64 i = 0; i < m; i++) {
            float sum = 0.0f;
            for (i64 q = 0; q < k; q++) sum += x[i * k + q] * w[j * k + q];
            out[i * n + j] = sum;
        }
}

/* out (m, n) = x (m, k) w^T. */
void product(i64 m, i64 n, i64 k, const float *x, const float *w, float *out)
{
    if (m <= 8)
        few_rows_product(x, w, out, m, n, k);
    else
        gemm('N', 'T', m, n, k, 1.0f, x, k, w, k, 0.0f, out, n);
}

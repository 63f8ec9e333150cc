/* Matrix products: torch's own sgemm, few rows, and small ones; conventions as in kernels.c. */

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

/* ---- Small products ---- */

/* A tile of C is kept in registers: as many sums at once as hide the time that one takes. */
#if defined(__AVX512F__)
enum { ROWS = 8, VECTORS = 2 };
#else
enum { ROWS = 4, VECTORS = 2 };
#endif
enum { MOST_WEIGHTS = 1 << 17 };

static int all_by_blas;

/* Leaves small products to BLAS as well: for a benchmark that counts products there, and as the reference of a test. */
void set_all_by_blas(i64 yes) { all_by_blas = yes; }

/* Whether products of n columns are for `small_product`: whole vectors, and `weights` that stay in the cache from call to call. */
int small(i64 n, i64 weights) { return !all_by_blas && n % LANES == 0 && weights <= MOST_WEIGHTS; }

static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, i64 k, float scale, const float *a, i64 a_row, i64 a_column,
                                                       const float *b, i64 b_row, float *c, i64 c_row, int add)
{
    vec sum[ROWS][VECTORS], x[VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (vec){0};
    for (i64 q = 0; q < k; q++) {
        for (int v = 0; v < vectors; v++) x[v] = load(b + q * b_row + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += a[r * a_row + q * a_column] * x[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            float *to = c + r * c_row + v * LANES;
            store(to, add ? load(to) + scale * sum[r][v] : scale * sum[r][v]);
        }
}

/* C (m, n) = scale A B, or with `add` C += that: A (m, k) with element (i, j) at i a_row + j a_column, B (k, n), n whole vectors.  For products of
   so few multiplications that BLAS spends its time on the way to them. */
void small_product(i64 m, i64 n, i64 k, float scale, const float *a, i64 a_row, i64 a_column, const float *b, i64 b_row, float *c, i64 c_row, int add)
{
    i64 i = 0, j = 0;
    for (; j + VECTORS * LANES <= n; j += VECTORS * LANES) {
        for (i = 0; i + ROWS <= m; i += ROWS) tile(ROWS, VECTORS, k, scale, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
        for (; i < m; i++) tile(1, VECTORS, k, scale, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
    }
    for (; j < n; j += LANES) {
        for (i = 0; i + ROWS <= m; i += ROWS) tile(ROWS, 1, k, scale, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
        for (; i < m; i++) tile(1, 1, k, scale, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, add);
    }
}

/* Causal attention with rotary parts, forward and backward; conventions as in kernels.c. */

#include "kernels.h"

/* Where one operand lies: position t of sequence b and head h begins at data + b * batch + t * row + h * head. */
typedef struct { float *data; i64 batch, row, head; } Operand;

typedef struct {
    i64 B, H, groups, T, N, R, V;
    float scale;
    const float *table; i64 table_batch; /* cosine and sine of each pair, (T, R); whether keys are turned too is `turn_keys` */
    i64 turn_keys;
    const int32_t *first; /* (B, T) first position that each may see (never decreasing), or NULL for 0 */
    i64 block;            /* queries at a time */
    i64 S;                /* keys; T where nothing came before */
    const i64 *before;    /* (B) keys before the first query, or NULL for 0: query t sees keys up to before + t */
} Shape;

/* Scores are taken in whole vectors.  Their rows begin on a boundary of a cache line, an odd number of lines apart: columns of rows that
   lie a power of two apart would fall on the same few sets of the cache. */
enum { WHOLE = 16, AHEAD = 16, TOKENS = 128 };

static i64 whole(i64 n) { return (n + WHOLE - 1) / WHOLE * WHOLE; }

static i64 apart(i64 n) { return ((n + WHOLE - 1) / WHOLE | 1) * WHOLE; }

/* One vector of pairs, of a number that the compiler knows. */
static inline void turned(const float *restrict x, const float *restrict turn, float scale, float *restrict to)
{
    for (int j = 0; j < WHOLE; j += 2) {
        to[j] = (x[j] * turn[j] - x[j + 1] * turn[j + 1]) * scale;
        to[j + 1] = (x[j] * turn[j + 1] + x[j + 1] * turn[j]) * scale;
    }
}

/* to (rows, N + R), `to_row` floats from row to row = scale times both parts, the rotary one turned where there is a table, which has a row
   for all or, with `table_row` R, one for each. */
void pack(const float *nope, i64 nope_row, const float *rope, i64 rope_row, const float *table, i64 table_row, float scale, float *to, i64 to_row, i64 rows,
          i64 N, i64 R)
{
    for (i64 t = 0; t < rows; t++) {
        float *restrict out = to + t * to_row;
        const float *restrict a = nope + t * nope_row, *restrict b = rope + t * rope_row;
        __builtin_prefetch(b + AHEAD * rope_row); /* parts of rows, every so many lines: the processor does not guess them */
        for (i64 j = 0; j < N; j++) out[j] = a[j] * scale;
        out += N;
        if (!table) {
            for (i64 j = 0; j < R; j++) out[j] = b[j] * scale;
            continue;
        }
        const float *restrict turn = table + t * table_row;
        i64 j = 0;
        for (; j + WHOLE <= R; j += WHOLE) turned(b + j, turn + j, scale, out + j);
        for (; j < R; j += 2) {
            out[j] = (b[j] * turn[j] - b[j + 1] * turn[j + 1]) * scale;
            out[j + 1] = (b[j] * turn[j + 1] + b[j + 1] * turn[j]) * scale;
        }
    }
}

/* The way back of `pack`: written where the gradients lie, or added to a rotary part that heads share. */
static void unpack(const float *from, i64 from_row, const float *table, i64 table_row, float scale, float *nope, i64 nope_row, float *rope, i64 rope_row,
                   int shared, i64 rows, i64 N, i64 R)
{
    for (i64 t = 0; t < rows; t++) {
        const float *restrict in = from + t * from_row;
        float *restrict a = nope + t * nope_row, *restrict b = rope + t * rope_row;
        __builtin_prefetch(b + AHEAD * rope_row, 1);
        for (i64 j = 0; j < N; j++) a[j] = in[j] * scale;
        in += N;
        const float *restrict turn = table ? table + t * table_row : 0;
        for (i64 j = 0; j < R; j += 2) {
            float first = in[j] * scale, second = in[j + 1] * scale;
            float re = turn ? first * turn[j] + second * turn[j + 1] : first, im = turn ? second * turn[j] - first * turn[j + 1] : second;
            b[j] = shared ? b[j] + re : re;
            b[j + 1] = shared ? b[j + 1] + im : im;
        }
    }
}

/* The absorbed form's products around the attention itself, of each head: W^UK before it and W^UV behind it, (N, C) and (V, C), with their
   gradients on the way back.  They are done for a block of tokens at a time, while it is in the cache: a row holds all heads, and one head's
   part of all rows is as far apart in memory as can be. */
typedef struct {
    i64 N, V, C;
    const float *up_key, *up_value;
    float *dup_key, *dup_value;
    i64 weight_head;                     /* floats from one head's matrix to the next one's; their rows have C */
    const Operand *query, *out;          /* N of them not rotated, and V */
    const Operand *dquery, *dout;
} Absorbed;

static float *at(Operand o, i64 b, i64 h) { return o.data + b * o.batch + h * o.head; }

/* C_h = op(A_h) op(B_h) + beta C_h for every head: operands begin a head's width apart. */
static void heads_product(char ta, char tb, i64 heads, i64 m, i64 n, i64 k, const float *a, i64 lda, i64 a_head, const float *b, i64 ldb, i64 b_head,
                          float beta, float *c, i64 ldc, i64 c_head)
{
    for (i64 h = 0; h < heads; h++) gemm(ta, tb, m, n, k, 1.0f, a + h * a_head, lda, b + h * b_head, ldb, beta, c + h * c_head, ldc);
}

/* Of tokens t .. t + n of sequence b: out = x w (`N`) or x w^T (`T`) for the widths on both sides. */
static void through(char tw, i64 heads, i64 b, i64 t, i64 n, const Operand *x, i64 in, const float *w, const Absorbed *a, const Operand *out, i64 width)
{
    heads_product('N', tw, heads, n, width, in, at(*x, b, 0) + t * x->row, x->row, x->head, w, a->C, a->weight_head, 0.0f, at(*out, b, 0) + t * out->row,
                  out->row, out->head);
}

/* dw (width, C) += x^T y of these tokens. */
static void gathered(i64 heads, i64 b, i64 t, i64 n, const Operand *x, i64 width, const Operand *y, const Absorbed *a, float *dw)
{
    heads_product('T', 'N', heads, width, a->C, n, at(*x, b, 0) + t * x->row, x->row, x->head, at(*y, b, 0) + t * y->row, y->row, y->head, 1.0f, dw, a->C,
                  a->weight_head);
}

/* Queries q0 .. q0 + n of the heads of group g, a position's heads one after the other: (n G, N + R). */
static void pack_queries(const Shape *s, const Operand *qn, const Operand *qr, const float *table, i64 b, i64 g, i64 q0, i64 n, float *q)
{
    i64 G = s->H / s->groups, d = s->N + s->R;
    for (i64 i = 0; i < n; i++)
        pack(at(*qn, b, g * G) + (q0 + i) * qn->row, qn->head, at(*qr, b, g * G) + (q0 + i) * qr->row, qr->head, table + (q0 + i) * s->R, 0, s->scale,
             q + i * G * d, d, G, s->N, s->R);
}

/* Of a row of scores, from .. to can be seen: the others become -infinity as far as whole vectors reach, which is `count` scores from the
   first of them on, returned. */
static inline float *visible(float *row, i64 from, i64 to, i64 *count)
{
    float *first = row + from / WHOLE * WHOLE, *last = row + (to - 1) / WHOLE * WHOLE;
    i64 before = row + from - first, after = row + to - last;
    for (i64 j = 0; j < WHOLE; j++) first[j] = j < before ? -INFINITY : first[j];
    for (i64 j = 0; j < WHOLE; j++) last[j] = j < after ? last[j] : -INFINITY;
    *count = last + WHOLE - first;
    return first;
}

/* Those that cannot be seen are 0. */
static inline void clear(float *row, i64 from, i64 to, i64 w)
{
    float *first = row + from / WHOLE * WHOLE, *last = row + (to - 1) / WHOLE * WHOLE;
    i64 before = row + from - first, after = row + to - last;
    for (i64 j = 0; j < WHOLE; j++) first[j] = j < before ? 0.0f : first[j];
    for (i64 j = 0; j < WHOLE; j++) last[j] = j < after ? last[j] : 0.0f;
    for (float *x = row; x < first; x++) *x = 0.0f;
    for (float *x = last + WHOLE; x < row + w; x++) *x = 0.0f;
}

/* Keys that query i of a sequence sees, counted from key `lo` on; beyond S only padding asks. */
typedef struct { i64 from, to; } Seen;

static inline Seen seen(const Shape *s, const int32_t *first, i64 before, i64 lo, i64 i)
{
    return (Seen){(first ? first[i] : 0) - lo, (i + before < s->S ? i + before + 1 : s->S) - lo};
}

/* Of queries begin .. begin + n and their heads: rows of w scores (n G, `wide`) become e^(score - largest) where they are seen, and 0 elsewhere;
   with them 1 / their sums, and lse.  By turns and not row by row: within a row everything waits for its largest, and then for its sum. */
static void softmax(const Shape *s, const int32_t *first, i64 before, i64 lo, i64 begin, i64 n, float *p, i64 wide, i64 w, float *most, float *inverse,
                    float *lse)
{
    i64 G = s->H / s->groups, count;
    for (i64 i = begin, r = 0; i < begin + n; i++) {
        Seen keys = seen(s, first, before, lo, i);
        for (i64 h = 0; h < G; h++, r++) {
            float *row = visible(p + r * wide, keys.from, keys.to, &count);
            most[r] = largest(row, count);
        }
    }
    for (i64 i = begin, r = 0; i < begin + n; i++) {
        Seen keys = seen(s, first, before, lo, i);
        count = whole(keys.to) - keys.from / WHOLE * WHOLE;
        for (i64 h = 0; h < G; h++, r++) {
            float *restrict row = p + r * wide + keys.from / WHOLE * WHOLE, sum = 0.0f, top = most[r];
            for (i64 j = 0; j < count; j++) {
                row[j] = exponential_below(row[j] - top);
                sum += row[j];
            }
            inverse[r] = sum;
            clear(p + r * wide, keys.from, keys.to, w);
        }
    }
    for (i64 i = begin, r = 0; i < begin + n; i++)
        for (i64 h = 0; h < G; h++, r++) {
            lse[h * s->T + i] = most[r] + logf(inverse[r]);
            inverse[r] = 1.0f / inverse[r];
        }
}

/* Queries at a time between two of the absorbed form's products: whole blocks of the attention itself. */
static i64 tokens_at_a_time(const Shape *s, const Absorbed *a) { return a ? (TOKENS + s->block - 1) / s->block * s->block : s->T; }

/* out (B, T, H, V) and lse (B, H, T) of softmax(scale q k^T) v.  With G = H / groups and S as far apart as rows of S scores are, scratch:
   block G (S + N + R + V + 1) + S (N + R) floats on a boundary of 64 bytes.  Keys are turned by the queries' table, so `turn_keys` goes with S = T.
   The queries of all heads that share their keys are rows of one product, ordered by position and then head: one product of good size
   for many, and none of few positions more than causality asks.  They take all their keys at once: no running maximum.
   With `absorbed`, or NULL: qn is what it makes of its queries, and it goes on with out. */
void attention_forward(const Shape *s, const Absorbed *absorbed, const Operand *qn, const Operand *qr, const Operand *kn, const Operand *kr,
                       const Operand *v, const Operand *out, float *lse, float *scratch)
{
    i64 T = s->T, S = s->S, V = s->V, d = s->N + s->R, G = s->H / s->groups, most_rows = s->block * G, chunk = tokens_at_a_time(s, absorbed);
    float *p = scratch, *q = p + most_rows * apart(S), *k = q + most_rows * d, *o = k + S * d, *inverse = o + most_rows * V;
    for (i64 b = 0; b < s->B; b++)
        for (i64 g = 0; g < s->groups; g++) {
            const float *table = s->table + b * s->table_batch;
            const int32_t *first = s->first ? s->first + b * T : 0;
            i64 before = s->before ? s->before[b] : 0;
            pack(at(*kn, b, g), kn->row, at(*kr, b, g), kr->row, s->turn_keys ? table : 0, s->R, 1.0f, k, d, S, s->N, s->R);
            for (i64 t = 0; t < T; t += chunk) {
                i64 end = t + chunk < T ? t + chunk : T;
                if (absorbed) through('N', s->H, b, t, end - t, absorbed->query, absorbed->N, absorbed->up_key, absorbed, qn, absorbed->C);
                for (i64 q0 = t; q0 < end; q0 += s->block) {
                    i64 n = q0 + s->block < end ? s->block : end - q0, lo = first ? first[q0] : 0;
                    i64 w = (q0 + n + before < S ? q0 + n + before : S) - lo, wide = apart(w);
                    pack_queries(s, qn, qr, table, b, g, q0, n, q);
                    gemm('N', 'T', n * G, w, d, 1.0f, q, d, k + lo * d, d, 0.0f, p, wide);
                    for (i64 i = 0, some = (WHOLE + G - 1) / G; i < n; i += some)
                        softmax(s, first, before, lo, q0 + i, n - i < some ? n - i : some, p + i * G * wide, wide, w, o, inverse + i * G,
                                lse + (b * s->H + g * G) * T);
                    gemm('N', 'N', n * G, V, w, 1.0f, p, wide, at(*v, b, g) + lo * v->row, v->row, 0.0f, o, V);
                    for (i64 i = q0, r = 0; i < q0 + n; i++)
                        for (i64 h = g * G; h < (g + 1) * G; h++, r++) {
                            float *restrict to = at(*out, b, h) + i * out->row;
                            for (i64 j = 0; j < V; j++) to[j] = o[r * V + j] * inverse[r];
                        }
                }
                if (absorbed) through('T', s->H, b, t, end - t, out, absorbed->C, absorbed->up_value, absorbed, absorbed->out, absorbed->V);
            }
        }
}

/* Writes the gradients of all five operands, and with `absorbed` adds to those of its weights; dout and dqn are then what it makes of its own.
   scratch: block G (2 S + 2 (N + R) + V + 1) + T (2 (N + R) + V) floats. */
void attention_backward(const Shape *s, const Absorbed *absorbed, const Operand *qn, const Operand *qr, const Operand *kn, const Operand *kr,
                        const Operand *v, const Operand *out, const float *lse, const Operand *dout, const Operand *dqn, const Operand *dqr,
                        const Operand *dkn, const Operand *dkr, const Operand *dv, float *scratch)
{
    i64 T = s->T, d = s->N + s->R, V = s->V, G = s->H / s->groups, most_rows = s->block * G, chunk = tokens_at_a_time(s, absorbed);
    float *p = scratch, *ds = p + most_rows * apart(T), *q = ds + most_rows * apart(T), *dq = q + most_rows * d, *go = dq + most_rows * d,
          *k = go + most_rows * V, *dk = k + T * d, *dvalue = dk + T * d, *deltas = dvalue + T * V;
    for (i64 b = 0; b < s->B; b++)
        for (i64 g = 0; g < s->groups; g++) {
            const float *table = s->table + b * s->table_batch;
            const int32_t *first = s->first ? s->first + b * T : 0;
            pack(at(*kn, b, g), kn->row, at(*kr, b, g), kr->row, s->turn_keys ? table : 0, s->R, 1.0f, k, d, T, s->N, s->R);
            memset(dk, 0, T * (d + V) * sizeof(float));
            for (i64 t = 0; t < T; t += chunk) {
                i64 end = t + chunk < T ? t + chunk : T;
                if (absorbed) {
                    through('N', s->H, b, t, end - t, absorbed->dout, absorbed->V, absorbed->up_value, absorbed, dout, absorbed->C);
                    gathered(s->H, b, t, end - t, absorbed->dout, absorbed->V, out, absorbed, absorbed->dup_value);
                }
                for (i64 q0 = t; q0 < end; q0 += s->block) {
                    i64 n = q0 + s->block < end ? s->block : end - q0, lo = first ? first[q0] : 0, w = q0 + n - lo, wide = apart(w);
                    const float *value = at(*v, b, g) + lo * v->row;
                    pack_queries(s, qn, qr, table, b, g, q0, n, q);
                    for (i64 i = q0, r = 0; i < q0 + n; i++)
                        for (i64 h = g * G; h < (g + 1) * G; h++, r++) {
                            const float *restrict oi = at(*out, b, h) + i * out->row, *restrict gi = at(*dout, b, h) + i * dout->row;
                            float *restrict to = go + r * V, delta = 0.0f;
                            for (i64 j = 0; j < V; j++) {
                                to[j] = gi[j];
                                delta += oi[j] * gi[j];
                            }
                            deltas[r] = delta;
                        }
                    gemm('N', 'T', n * G, w, d, 1.0f, q, d, k + lo * d, d, 0.0f, p, wide);
                    gemm('N', 'T', n * G, w, V, 1.0f, go, V, value, v->row, 0.0f, ds, wide);
                    for (i64 i = q0, r = 0; i < q0 + n; i++)
                        for (i64 h = g * G; h < (g + 1) * G; h++, r++) {
                            i64 count;
                            Seen keys = seen(s, first, 0, lo, i);
                            float *restrict row = visible(p + r * wide, keys.from, keys.to, &count), *restrict back = ds + (row - p);
                            float log_sum = lse[(b * s->H + h) * T + i], delta = deltas[r];
                            for (i64 j = 0; j < count; j++) {
                                row[j] = exponential_below(row[j] - log_sum);
                                back[j] = row[j] * (back[j] - delta);
                            }
                            clear(p + r * wide, keys.from, keys.to, w);
                            clear(ds + r * wide, keys.from, keys.to, w);
                        }
                    gemm('T', 'N', w, V, n * G, 1.0f, p, wide, go, V, 1.0f, dvalue + lo * V, V);
                    gemm('N', 'N', n * G, d, w, 1.0f, ds, wide, k + lo * d, d, 0.0f, dq, d);
                    gemm('T', 'N', w, d, n * G, 1.0f, ds, wide, q, d, 1.0f, dk + lo * d, d);
                    for (i64 i = 0; i < n; i++)
                        unpack(dq + i * G * d, d, table + (q0 + i) * s->R, 0, s->scale, at(*dqn, b, g * G) + (q0 + i) * dqn->row, dqn->head,
                               at(*dqr, b, g * G) + (q0 + i) * dqr->row, dqr->head, 0, G, s->N, s->R);
                }
                if (absorbed) {
                    through('T', s->H, b, t, end - t, dqn, absorbed->C, absorbed->up_key, absorbed, absorbed->dquery, absorbed->N);
                    gathered(s->H, b, t, end - t, absorbed->query, absorbed->N, dqn, absorbed, absorbed->dup_key);
                }
            }
            unpack(dk, d, s->turn_keys ? table : 0, s->R, 1.0f, at(*dkn, b, g), dkn->row, at(*dkr, b, g), dkr->row, dkr->head == 0 && g > 0, T, s->N, s->R);
            for (i64 t = 0; t < T; t++) memcpy(at(*dv, b, g) + t * dv->row, dvalue + t * V, V * sizeof(float));
        }
}

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
enum { WHOLE = 16, AHEAD = 16 };

/* Queries are scaled by log2(e) too, so that e^score is a power of two. */
static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

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

static float *at(Operand o, i64 b, i64 h) { return o.data + b * o.batch + h * o.head; }

/* Queries t .. t + n of the heads of group g, a position's heads one after the other, for scores in powers of two: (n G, N + R). */
static void pack_queries(const Shape *s, const Operand *qn, const Operand *qr, const float *table, i64 b, i64 g, i64 t, i64 n, float *q)
{
    i64 G = s->H / s->groups, d = s->N + s->R;
    for (i64 i = t; i < t + n; i++, q += G * d)
        pack(at(*qn, b, g * G) + i * qn->row, qn->head, at(*qr, b, g * G) + i * qr->row, qr->head, table + i * s->R, 0, s->scale * LOG2_E, q, d, G, s->N, s->R);
}

/* Keys that a query sees of a row of scores, in whole lines: begin .. end of them, but not the first `before` ones nor those from `after` on of
   the last line. */
typedef struct { i64 begin, end; int32_t before, after; } Seen;

/* Of query i of a sequence, keys counted from `lo` on; beyond S only padding asks. */
static inline Seen seen(const Shape *s, const int32_t *first, i64 before, i64 lo, i64 i)
{
    i64 from = (first ? first[i] : 0) - lo, to = (i + before < s->S ? i + before + 1 : s->S) - lo, end = whole(to);
    return (Seen){from / WHOLE * WHOLE, end, from % WHOLE, to - (end - WHOLE)};
}

/* Of a line all but from .. to becomes `fill`. */
static inline void keep(float *line, int32_t from, int32_t to, float fill)
{
    for (int32_t l = 0; l < WHOLE; l += LANES) {
        ivec place;
        for (int32_t j = 0; j < LANES; j++) place[j] = l + j;
        ivec kept = (place >= from) & (place < to), other = (ivec)((vec){0} + fill);
        store(line + l, (vec)((kept & (ivec)load(line + l)) | (~kept & other)));
    }
}

/* What of these lines cannot be seen becomes `fill`. */
static inline void mask(float *row, Seen keys, float fill)
{
    if (keys.before) keep(row + keys.begin, keys.before, WHOLE, fill);
    if (keys.after < WHOLE) keep(row + keys.end - WHOLE, 0, keys.after, fill);
}

static inline void zero(float *row, i64 begin, i64 end)
{
    for (i64 j = begin; j < end; j += LANES) store(row + j, (vec){0});
}

/* Of w scores, in whole lines, those that cannot be seen become 0. */
static inline void clear(float *row, Seen keys, i64 w)
{
    mask(row, keys, 0.0f);
    zero(row, 0, keys.begin);
    zero(row, keys.end, whole(w));
}

static inline float total(vec v)
{
    float sum = 0.0f;
    for (int j = 0; j < LANES; j++) sum += v[j];
    return sum;
}

/* Memory that is wanted soon, in pieces: rows of all heads, read and written a head at a time, are no pattern that the processor foresees, and
   each line would be waited for.  While a row of scores is worked at there is time to fetch a piece. */
enum { STREAMS = 4, LINE = 16 };
typedef struct { const float *from[STREAMS]; i64 piece[STREAMS]; } Ahead;

/* Positions t .. t + n, as many pieces as a block has rows; nothing where heads do not share their keys: each takes a part of these rows. */
static void soon(Ahead *a, int stream, const Shape *s, const Operand *o, i64 b, i64 t, i64 n)
{
    if (s->groups > 1 || t >= s->T) return;
    i64 rows = s->block * s->H;
    a->from[stream] = at(*o, b, 0) + t * o->row;
    a->piece[stream] = (n * o->row + rows * LINE - 1) / (rows * LINE) * LINE;
}

static inline void fetch(Ahead *a)
{
    for (int i = 0; i < STREAMS; i++)
        for (const float *end = a->from[i] + a->piece[i]; a->from[i] < end; a->from[i] += LINE) __builtin_prefetch(a->from[i], 0, 2);
}

/* Of queries begin .. begin + n and their heads: rows of w scores (n G, `wide`), in powers of two, become 2^(score - largest) where they are
   seen, and 0 elsewhere; with them 1 / their sums, and lse.  By turns and not row by row: within a row everything waits for its largest, and
   then for its sum. */
static void softmax(const Shape *s, const int32_t *first, i64 before, i64 lo, i64 begin, i64 n, float *p, i64 wide, i64 w, float *most, float *inverse,
                    float *lse, Ahead *ahead)
{
    i64 G = s->H / s->groups;
    for (i64 i = begin, r = 0; i < begin + n; i++) {
        Seen keys = seen(s, first, before, lo, i);
        for (i64 h = 0; h < G; h++, r++) {
            mask(p + r * wide, keys, -INFINITY);
            most[r] = largest(p + r * wide + keys.begin, keys.end - keys.begin);
        }
    }
    for (i64 i = begin, r = 0; i < begin + n; i++) {
        Seen keys = seen(s, first, before, lo, i);
        for (i64 h = 0; h < G; h++, r++) {
            float *row = p + r * wide;
            vec sum = (vec){0};
            fetch(ahead);
            for (i64 j = keys.begin; j < keys.end; j += LANES) {
                vec power = power_of_two(load(row + j) - most[r]);
                store(row + j, power);
                sum += power;
            }
            inverse[r] = total(sum);
            clear(row, keys, w);
        }
    }
    for (i64 i = begin, r = 0; i < begin + n; i++)
        for (i64 h = 0; h < G; h++, r++) {
            lse[h * s->T + i] = most[r] + log2f(inverse[r]);
            inverse[r] = 1.0f / inverse[r];
        }
}

/* ---- Forward and backward ---- */

/* out (B, T, H, V) and lse (B, H, T), in powers of two, of softmax(scale q k^T) v.  With G = H / groups and S as far apart as rows of S scores
   are, scratch: block G (S + N + R + V + 1) + S (N + R) floats on a boundary of 64 bytes.  Keys are turned by the queries' table, so `turn_keys`
   goes with S = T.
   The queries of all heads that share their keys are rows of one product, ordered by position and then head: one product of good size
   for many, and none of few positions more than causality asks.  They take all their keys at once: no running maximum. */
void attention_forward(const Shape *s, const Operand *qn, const Operand *qr, const Operand *kn, const Operand *kr, const Operand *v, const Operand *out,
                       float *lse, float *scratch)
{
    i64 T = s->T, S = s->S, V = s->V, d = s->N + s->R, G = s->H / s->groups, most_rows = s->block * G;
    float *p = scratch, *q = p + most_rows * apart(S), *k = q + most_rows * d, *o = k + S * d, *inverse = o + most_rows * V;
    for (i64 b = 0; b < s->B; b++)
        for (i64 g = 0; g < s->groups; g++) {
            const float *table = s->table + b * s->table_batch;
            const int32_t *first = s->first ? s->first + b * T : 0;
            i64 before = s->before ? s->before[b] : 0;
            pack(at(*kn, b, g), kn->row, at(*kr, b, g), kr->row, s->turn_keys ? table : 0, s->R, 1.0f, k, d, S, s->N, s->R);
            for (i64 q0 = 0; q0 < T; q0 += s->block) {
                i64 n = q0 + s->block < T ? s->block : T - q0, lo = first ? first[q0] : 0;
                i64 w = (q0 + n + before < S ? q0 + n + before : S) - lo, wide = apart(w);
                Ahead ahead = {0};
                soon(&ahead, 0, s, out, b, q0, n);
                soon(&ahead, 1, s, qn, b, q0 + n, s->block);
                pack_queries(s, qn, qr, table, b, g, q0, n, q);
                gemm('N', 'T', n * G, w, d, 1.0f, q, d, k + lo * d, d, 0.0f, p, wide);
                for (i64 i = 0, some = (WHOLE + G - 1) / G; i < n; i += some)
                    softmax(s, first, before, lo, q0 + i, n - i < some ? n - i : some, p + i * G * wide, wide, w, o, inverse + i * G,
                            lse + (b * s->H + g * G) * T, &ahead);
                gemm('N', 'N', n * G, V, w, 1.0f, p, wide, at(*v, b, g) + lo * v->row, v->row, 0.0f, o, V);
                for (i64 i = q0, r = 0; i < q0 + n; i++)
                    for (i64 h = g * G; h < (g + 1) * G; h++, r++) {
                        float *restrict to = at(*out, b, h) + i * out->row;
                        for (i64 j = 0; j < V; j++) to[j] = o[r * V + j] * inverse[r];
                    }
            }
        }
}

/* Of queries t .. t + n their outputs' gradients, (n G, V), and each one's product with its output. */
static void pack_gradients(const Shape *s, const Operand *out, const Operand *dout, i64 b, i64 g, i64 t, i64 n, float *go, float *deltas)
{
    i64 G = s->H / s->groups, V = s->V;
    for (i64 i = t, r = 0; i < t + n; i++)
        for (i64 h = g * G; h < (g + 1) * G; h++, r++) {
            const float *restrict oi = at(*out, b, h) + i * out->row, *restrict gi = at(*dout, b, h) + i * dout->row;
            float *restrict to = go + r * V, delta = 0.0f;
            for (i64 j = 0; j < V; j++) {
                to[j] = gi[j];
                delta += oi[j] * gi[j];
            }
            deltas[r] = delta;
        }
}

/* Of rows of w scores, in powers of two, and the gradients of the probabilities: these probabilities, and the scores' gradients. */
static void softmax_backward(const Shape *s, const int32_t *first, i64 lo, i64 begin, i64 n, float *p, float *ds, i64 wide, i64 w, const float *lse,
                             const float *deltas, Ahead *ahead)
{
    i64 G = s->H / s->groups;
    for (i64 i = begin, r = 0; i < begin + n; i++) {
        Seen keys = seen(s, first, 0, lo, i);
        for (i64 h = 0; h < G; h++, r++) {
            float *row = p + r * wide, *back = ds + r * wide, log_sum = lse[h * s->T + i], delta = deltas[r];
            mask(row, keys, -INFINITY);
            fetch(ahead);
            for (i64 j = keys.begin; j < keys.end; j += LANES) {
                vec power = power_of_two(load(row + j) - log_sum), to = power * (load(back + j) - delta);
                store(row + j, power);
                store(back + j, to);
            }
            clear(row, keys, w);
            clear(back, keys, w);
        }
    }
}

/* Writes the gradients of all operands; of v with those of kn where dv is NULL, which says that v is kn.
   scratch: block G (2 S + 2 (N + R) + V + 1) + T (2 (N + R) + V) floats. */
void attention_backward(const Shape *s, const Operand *qn, const Operand *qr, const Operand *kn, const Operand *kr, const Operand *v, const Operand *out,
                        const float *lse, const Operand *dout, const Operand *dqn, const Operand *dqr, const Operand *dkn, const Operand *dkr,
                        const Operand *dv, float *scratch)
{
    i64 T = s->T, d = s->N + s->R, V = s->V, G = s->H / s->groups, most_rows = s->block * G, value_row = dv ? V : d;
    float *p = scratch, *ds = p + most_rows * apart(T), *q = ds + most_rows * apart(T), *dq = q + most_rows * d, *go = dq + most_rows * d,
          *k = go + most_rows * V, *dk = k + T * d, *deltas = dk + T * d, *dvalue = dv ? deltas + most_rows : dk;
    for (i64 b = 0; b < s->B; b++)
        for (i64 g = 0; g < s->groups; g++) {
            const float *table = s->table + b * s->table_batch, *value = at(*v, b, g);
            const int32_t *first = s->first ? s->first + b * T : 0;
            pack(at(*kn, b, g), kn->row, at(*kr, b, g), kr->row, s->turn_keys ? table : 0, s->R, 1.0f, k, d, T, s->N, s->R);
            memset(dk, 0, T * d * sizeof(float));
            if (dv) memset(dvalue, 0, T * V * sizeof(float));
            for (i64 q0 = 0; q0 < T; q0 += s->block) {
                i64 n = q0 + s->block < T ? s->block : T - q0, lo = first ? first[q0] : 0, w = q0 + n - lo, wide = apart(w);
                Ahead ahead = {0};
                soon(&ahead, 0, s, dqn, b, q0, n);
                soon(&ahead, 1, s, qn, b, q0 + n, s->block);
                soon(&ahead, 2, s, dout, b, q0 + n, s->block);
                soon(&ahead, 3, s, out, b, q0 + n, s->block);
                pack_queries(s, qn, qr, table, b, g, q0, n, q);
                pack_gradients(s, out, dout, b, g, q0, n, go, deltas);
                gemm('N', 'T', n * G, w, d, 1.0f, q, d, k + lo * d, d, 0.0f, p, wide);
                gemm('N', 'T', n * G, w, V, 1.0f, go, V, value + lo * v->row, v->row, 0.0f, ds, wide);
                softmax_backward(s, first, lo, q0, n, p, ds, wide, w, lse + (b * s->H + g * G) * T, deltas, &ahead);
                gemm('T', 'N', w, V, n * G, 1.0f, p, wide, go, V, 1.0f, dvalue + lo * value_row, value_row);
                gemm('N', 'N', n * G, d, w, 1.0f, ds, wide, k + lo * d, d, 0.0f, dq, d);
                gemm('T', 'N', w, d, n * G, LN_2, ds, wide, q, d, 1.0f, dk + lo * d, d); /* queries were taken in powers of two */
                for (i64 i = q0; i < q0 + n; i++)
                    unpack(dq + (i - q0) * G * d, d, table + i * s->R, 0, s->scale, at(*dqn, b, g * G) + i * dqn->row, dqn->head,
                           at(*dqr, b, g * G) + i * dqr->row, dqr->head, 0, G, s->N, s->R);
            }
            unpack(dk, d, s->turn_keys ? table : 0, s->R, 1.0f, at(*dkn, b, g), dkn->row, at(*dkr, b, g), dkr->row, dkr->head == 0 && g > 0, T, s->N, s->R);
            for (i64 t = 0; dv && t < T; t++) memcpy(at(*dv, b, g) + t * dv->row, dvalue + t * V, V * sizeof(float));
        }
}

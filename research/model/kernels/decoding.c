/* The blocks of the model for a few new tokens over a cache.  A token's products take microseconds each, and so does every call from Python:
   all blocks are one call here.  Attention and FFN add to x, as they do in the block. */

#include "kernels.h"

/* ---- Absorbed attention over a cache ---- */

#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
enum { LANE = 16, MOST = 2, AT = 6 };
#else
enum { LANE = 8, MOST = 4, AT = 3 };
#endif
/* Floats of a vector; vectors of queries at a time; rows at a time: AT MOST sums and what they are made of fill the registers. */
typedef float vector __attribute__((vector_size(4 * LANE), aligned(4), may_alias));

/* Queries are lanes here, `LANE n` of them side by side: a key's element is one factor for all of them, nothing is added up across lanes,
   and no operand is packed, which for products as flat as these takes a matrix product's routine half its time. */

/* p (w, LANE n) = scores of w keys: of rows (w, width) with `row` floats from one to the next and queries (width, LANE n), added to what is
   there. */
INLINE void add_scores(const int n, i64 w, i64 width, const float *rows, i64 row, const float *queries, float *p, int fresh)
{
    for (i64 j = 0; j < w; j += AT) {
        const int there = w - j < AT ? w - j : AT;
        const float *key[AT];
        vector *to = (vector *)(p + j * LANE * n), sums[AT][MOST];
#pragma GCC unroll 8
        for (int i = 0; i < AT; i++) {
            key[i] = rows + (j + (i < there ? i : 0)) * row;
#pragma GCC unroll 8
            for (int v = 0; v < n; v++) sums[i][v] = (vector){0.0f};
        }
        if (!fresh)
#pragma GCC unroll 8
            for (int i = 0; i < AT; i++)
                if (i < there)
#pragma GCC unroll 8
                    for (int v = 0; v < n; v++) sums[i][v] = to[i * n + v];
        for (i64 q = 0; q < width; q++) {
            const vector *query = (const vector *)(queries + q * LANE * n);
#pragma GCC unroll 8
            for (int i = 0; i < AT; i++)
#pragma GCC unroll 8
                for (int v = 0; v < n; v++) sums[i][v] += key[i][q] * query[v];
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT; i++)
            if (i < there)
#pragma GCC unroll 8
                for (int v = 0; v < n; v++) to[i * n + v] = sums[i][v];
    }
}

/* sums (width, LANE n) = sums * fade + rows^T p. */
INLINE void add_values(const int n, i64 w, i64 width, const float *rows, i64 row, const float *p, const float *fade, float *sums)
{
    for (i64 q = 0; q < width; q += AT) {
        const int there = width - q < AT ? width - q : AT;
        i64 column[AT];
        vector *to = (vector *)(sums + q * LANE * n), sum[AT][MOST];
#pragma GCC unroll 8
        for (int i = 0; i < AT; i++) {
            column[i] = i < there ? i : 0;
#pragma GCC unroll 8
            for (int v = 0; v < n; v++) sum[i][v] = to[column[i] * n + v] * ((const vector *)fade)[v];
        }
        for (i64 j = 0; j < w; j++) {
            const float *values = rows + j * row + q;
            const vector *by = (const vector *)(p + j * LANE * n);
#pragma GCC unroll 8
            for (int i = 0; i < AT; i++)
#pragma GCC unroll 8
                for (int v = 0; v < n; v++) sum[i][v] += values[column[i]] * by[v];
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT; i++)
            if (i < there)
#pragma GCC unroll 8
                for (int v = 0; v < n; v++) to[i * n + v] = sum[i][v];
    }
}

/* What LANE n queries have seen so far: the greatest score, and relative to it the sum of exponentials and (C, LANE n) of values. */
typedef struct {
    float *queries, *sums, *most, *total; /* queries (C + R, LANE n) */
    const i64 *last;                      /* (LANE n), the last row that each may see */
} Seen;

/* They look at w further rows, from row `lo` on, of which all see those before `masked`.  `next` rows behind them are fetched meanwhile. */
INLINE void look(const int n, const Seen *s, i64 lo, i64 w, i64 masked, i64 next, const float *c, i64 c_row, i64 C, const float *r, i64 r_row, i64 R,
                 float *p)
{
    float fade[LANE * MOST], top[LANE * MOST];
    add_scores(n, w, C, c, c_row, s->queries, p, 1);
    add_scores(n, w, R, r, r_row, s->queries + C * LANE * n, p, 0);
    for (int l = 0; l < LANE * n; l++) top[l] = s->most[l];
    for (i64 j = 0; j < w; j++) {
        float *row = p + j * LANE * n;
        if (lo + j >= masked)
            for (int l = 0; l < LANE * n; l++) row[l] = lo + j <= s->last[l] ? row[l] : -INFINITY;
        for (int l = 0; l < LANE * n; l++) top[l] = row[l] > top[l] ? row[l] : top[l]; /* NaN is not greater */
    }
    for (int l = 0; l < LANE * n; l++) {
        fade[l] = s->most[l] == -INFINITY ? 0.0f : exponential(s->most[l] - top[l]);
        s->total[l] *= fade[l];
        s->most[l] = top[l];
    }
    for (i64 j = 0; j < w; j++) {
        float *row = p + j * LANE * n;
        if (j < next) {
            for (i64 l = 0; l < C; l += 16) __builtin_prefetch(c + (w + j) * c_row + l, 0, 2);
            for (i64 l = 0; l < R; l += 16) __builtin_prefetch(r + (w + j) * r_row + l, 0, 2);
        }
        for (int l = 0; l < LANE * n; l++) row[l] = exponential(row[l] - top[l]);
        if (lo + j >= masked)
            for (int l = 0; l < LANE * n; l++) row[l] = lo + j <= s->last[l] ? row[l] : 0.0f; /* one that has seen nothing yet is NaN there */
        for (int l = 0; l < LANE * n; l++) s->total[l] += row[l];
    }
    add_values(n, w, C, c, c_row, p, fade, s->sums);
}

/* to (width, lanes) = from (lanes, width)^T; lanes beyond `there` are 0. */
static void transpose(const float *from, i64 there, i64 width, i64 lanes, float *to)
{
    for (i64 q = 0; q < width; q++)
        for (i64 l = 0; l < lanes; l++) to[q * lanes + l] = l < there ? from[l * width + q] : 0.0f;
}

/* The absorbed form for a few new positions (V2 section 2.1): every head attends to the latent rows themselves.
   query (B, T, H, N + R), its rotary parts not yet turned; table (B or 1, T, R); latent rows (C) and rotary keys (R) of the cache, with their strides;
   position (B, T) of each query, which sees the rows up to it, of S; weight (H, N + V, C) of kv_b_proj -> out (B, T, H, V).
   Rows are taken `chunk` at a time with a running maximum, so that each is fetched from memory once for all heads.
   With L = T H rounded up to 16, scratch: T H (C + R) + L (2 C + R + 2) + 32 chunk + 16 floats and `last`: L numbers. */
void latent_decode(const float *query, const float *table, i64 table_batch, const float *latent, i64 latent_batch, i64 latent_row, const float *rope,
                   i64 rope_batch, i64 rope_row, const i64 *position, const float *weight, float *out, float *scratch, i64 *last, float scale, i64 S, i64 B,
                   i64 T, i64 H, i64 N, i64 R, i64 V, i64 C, i64 chunk)
{
    i64 rows = T * H, lanes = (rows + LANE - 1) / LANE * LANE;
    /* Vectors that lie across two cache lines take twice as long. */
    float *queries = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63), *sums = queries + lanes * (C + R), *p = sums + lanes * C,
          *most = p + LANE * MOST * chunk, *total = most + lanes, *qc = total + lanes, *qr = qc + rows * C;
    for (i64 b = 0; b < B; b++) {
        const float *q = query + b * T * H * (N + R), *c = latent + b * latent_batch, *kr = rope + b * rope_batch;
        for (i64 h = 0; h < H; h++) {
            if (T > 1) {
                gemm('N', 'N', T, C, N, scale, q + h * (N + R), H * (N + R), weight + h * (N + V) * C, C, 0.0f, qc + h * C, H * C);
                continue;
            }
            float *restrict to = qc + h * C;
            memset(to, 0, C * sizeof(float));
            for (i64 n = 0; n < N; n++) {
                const float *restrict row = weight + (h * (N + V) + n) * C;
                float by = q[h * (N + R) + n] * scale;
                for (i64 j = 0; j < C; j++) to[j] += by * row[j];
            }
        }
        for (i64 t = 0; t < T; t++)
            for (i64 h = 0; h < H; h++)
                pack(q, 0, q + (t * H + h) * (N + R) + N, 0, table + b * table_batch + t * R, 0, scale, qr + (t * H + h) * R, R, 1, 0, R);
        i64 end = 0, masked = S;
        for (i64 t = 0; t < T; t++) {
            end = position[b * T + t] + 1 > end ? position[b * T + t] + 1 : end;
            masked = position[b * T + t] + 1 < masked ? position[b * T + t] + 1 : masked;
        }
        end = end < S ? end : S; /* beyond the rows only padding asks */
        for (i64 r = 0; r < lanes; r++) {
            most[r] = -INFINITY;
            total[r] = 0.0f;
            last[r] = r < rows ? position[b * T + r / H] : end;
        }
        memset(sums, 0, lanes * C * sizeof(float));
        for (i64 lane = 0, n; lane < lanes; lane += LANE * n) {
            n = lanes - lane >= LANE * MOST ? MOST : lanes - lane >= LANE * 2 ? 2 : 1;
            i64 there = rows - lane < LANE * n ? rows - lane : LANE * n;
            transpose(qc + lane * C, there, C, LANE * n, queries + lane * (C + R));
            transpose(qr + lane * R, there, R, LANE * n, queries + lane * (C + R) + C * LANE * n);
        }
        for (i64 lo = 0; lo < end; lo += chunk) {
            i64 w = end - lo < chunk ? end - lo : chunk, left = end - lo - w < chunk ? end - lo - w : chunk;
            for (i64 lane = 0, n; lane < lanes; lane += LANE * n) {
                n = lanes - lane >= LANE * MOST ? MOST : lanes - lane >= LANE * 2 ? 2 : 1;
                Seen seen = {queries + lane * (C + R), sums + lane * C, most + lane, total + lane, last + lane};
                const float *from = c + lo * latent_row, *from_rope = kr + lo * rope_row;
                i64 next = lane ? 0 : left;
                if (n == MOST)
                    look(MOST, &seen, lo, w, masked, next, from, latent_row, C, from_rope, rope_row, R, p);
                else if (n == 2)
                    look(2, &seen, lo, w, masked, next, from, latent_row, C, from_rope, rope_row, R, p);
                else
                    look(1, &seen, lo, w, masked, next, from, latent_row, C, from_rope, rope_row, R, p);
            }
        }
        for (i64 lane = 0, n; lane < lanes; lane += LANE * n) {
            n = lanes - lane >= LANE * MOST ? MOST : lanes - lane >= LANE * 2 ? 2 : 1;
            for (i64 l = 0; l < LANE * n && lane + l < rows; l++)
                for (i64 j = 0; j < C; j++) qc[(lane + l) * C + j] = sums[lane * C + j * LANE * n + l] / total[lane + l];
        }
        for (i64 h = 0; h < H; h++) {
            if (T > 1)
                gemm('N', 'T', T, V, C, 1.0f, qc + h * C, H * C, weight + (h * (N + V) + N) * C, C, 0.0f, out + (b * T * H + h) * V, H * V);
            else
                few_rows_product(qc + h * C, weight + (h * (N + V) + N) * C, out + (b * H + h) * V, 1, V, C);
        }
    }
}

/* ---- All blocks in one call ---- */

typedef struct { /* the new tokens, the same for every block */
    const float *table;    /* cosine and sine of each pair, (B or 1, T, R) */
    const i64 *position;   /* (B, T), the row of each */
    i64 *last;             /* as in latent_decode */
    i64 *ids, *places;     /* (L, M, K), an answer, of L blocks with experts; K M + E + `devices` numbers */
    float *gates, *scores; /* (L, M, K), (L, M, E), answers */
    float *scratch;        /* M (D + H (N + R) + 2 Q + C + R + H V + 1) floats and those of latent_decode, or
                              M (4 D + 3 S + F + 2 F K) + max(K, devices) */
    i64 B, T, S, chunk, table_batch;
} Tokens;

typedef struct {
    const float *norm, *q_a, *q_norm, *q, *kv_a, *kv_norm, *kv_b, *o; /* q_a NULL: no query latent, q is of x itself */
    float *latent, *rope;                                             /* rows of the cache */
    float eps, q_eps, kv_eps, scale;
    i64 D, H, N, R, V, C, Q, latent_batch, latent_row, rope_batch, rope_row;
} Latent;

/* x (B, T, D) += W^O [attention of each head], after the norm; the new latents and rotary keys are written to the cache. */
static void latent_step(const Latent *s, const Tokens *t, float *x)
{
    i64 M = t->B * t->T, D = s->D, W = s->C + s->R, heads = s->H * (s->N + s->R);
    float *normed = t->scratch, *query = normed + M * D, *low = query + M * heads, *low_normed = low + M * s->Q, *kv = low_normed + M * s->Q,
          *out = kv + M * W, *inverse = out + M * s->H * s->V, *rest = inverse + M;
    rms_norm(x, D, s->norm, s->eps, normed, inverse, M, D);
    if (s->q_a) {
        few_rows_product(normed, s->q_a, low, M, s->Q, D);
        rms_norm(low, s->Q, s->q_norm, s->q_eps, low_normed, inverse, M, s->Q);
        few_rows_product(low_normed, s->q, query, M, heads, s->Q);
    } else
        few_rows_product(normed, s->q, query, M, heads, D);
    few_rows_product(normed, s->kv_a, kv, M, W, D);
    for (i64 m = 0; m < M; m++) {
        i64 b = m / t->T, row = t->position[m];
        const float *turn = t->table + b * t->table_batch + m % t->T * s->R;
        rms_norm(kv + m * W, W, s->kv_norm, s->kv_eps, s->latent + b * s->latent_batch + row * s->latent_row, inverse, 1, s->C);
        pack(0, 0, kv + m * W + s->C, 0, turn, 0, 1.0f, s->rope + b * s->rope_batch + row * s->rope_row, s->R, 1, 0, s->R);
    }
    latent_decode(query, t->table, t->table_batch, s->latent, s->latent_batch, s->latent_row, s->rope, s->rope_batch, s->rope_row, t->position, s->kv_b, out,
                  rest, t->last, s->scale, t->S, t->B, t->T, s->H, s->N, s->R, s->V, s->C, t->chunk);
    few_rows_product(out, s->o, normed, M, D, s->H * s->V);
    for (i64 j = 0; j < M * D; j++) x[j] += normed[j];
}

typedef struct {
    const float *norm, *centroids, *gate_up, *down, *gate, *up, *out; /* of the routed experts, then of the FFN that all tokens pass */
    float eps, scaling;
    i64 D, E, F, K, S, devices, limit, sum_to_one; /* E 0: no routed experts; S: width of the FFN that all tokens pass, 0: there is none */
} FeedForward;

/* x (M, D) += FFN of its norm: shared experts and the chosen routed ones (V2 equations 20 to 22), or one dense FFN.
   `routed` blocks before this one have experts. */
static void feed_forward_step(const FeedForward *s, const Tokens *t, i64 routed, float *x)
{
    i64 M = t->B * t->T, D = s->D, E = s->E, K = s->K, *ids = t->ids + routed * M * K;
    float *gates = t->gates + routed * M * K, *scores = t->scores + routed * M * E;
    float *normed = t->scratch, *sum = normed + M * D, *gate = sum + M * D, *up = gate + M * s->S, *active = up + M * s->S,
          *rest = active + M * s->S;
    rms_norm(x, D, s->norm, s->eps, normed, rest, M, D);
    memset(sum, 0, M * D * sizeof(float));
    if (E) {
        float *best = rest, *hidden = best + (K > s->devices ? K : s->devices);
        i64 *slot = t->places, *ends = slot + M * K;
        few_rows_product(normed, s->centroids, scores, M, E, D);
        for (i64 m = 0; m < M; m++) {
            float *row = scores + m * E, most = largest(row, E), total = 0.0f;
            for (i64 e = 0; e < E; e++) {
                row[e] = exponential(row[e] - most);
                total += row[e];
            }
            for (i64 e = 0; e < E; e++) row[e] /= total;
        }
        choose_experts(scores, ids, M, E, s->devices, s->limit, K, best, ends + E);
        for (i64 m = 0; m < M; m++) {
            float *to = gates + m * K, total = 0.0f;
            for (i64 k = 0; k < K; k++) total += to[k] = scores[m * E + ids[m * K + k]];
            for (i64 k = 0; k < K; k++) to[k] = (s->sum_to_one ? to[k] / total : to[k]) * s->scaling;
        }
        sort_by_expert(ids, 0, slot, ends, M * K, E);
        experts_forward(normed, gates, slot, ends, s->gate_up, s->down, hidden, sum, hidden + M * K * 2 * s->F, K, E, D, s->F, M);
    }
    if (s->S) {
        float *added = rest; /* what the routed experts needed is free again */
        few_rows_product(normed, s->gate, gate, M, s->S, D);
        few_rows_product(normed, s->up, up, M, s->S, D);
        swiglu(gate, up, active, M * s->S);
        few_rows_product(active, s->out, added, M, D, s->S);
        for (i64 j = 0; j < M * D; j++) sum[j] += added[j];
    }
    for (i64 j = 0; j < M * D; j++) x[j] += sum[j];
}

typedef struct {
    Latent attention;
    FeedForward ffn;
} Block;

/* x (B, T, D) through all of them. */
void decode_blocks(const Block *blocks, i64 count, const Tokens *tokens, float *x)
{
    for (i64 i = 0, routed = 0; i < count; routed += blocks[i++].ffn.E > 0) {
        latent_step(&blocks[i].attention, tokens, x);
        feed_forward_step(&blocks[i].ffn, tokens, routed, x);
    }
}

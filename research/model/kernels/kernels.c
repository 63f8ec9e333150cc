/* What a training step on one CPU core spends outside its matrix products, fused; the products themselves are torch's own sgemm.

   All arrays are float32 and row-major; M tokens, D hidden size, E experts, K chosen, F expert width, A assignments;
   B sequences, T positions, H heads, N + R query width (R of it rotary), V value width.  Nothing here allocates: scratch is the caller's.
   NaN and infinity must come through, so that divergence is seen: no -ffast-math, only reassociation. */

#include "kernels.h"

/* ---- RMSNorm ---- */

/* y = x * inverse * weight with inverse = 1 / sqrt(mean(x^2) + eps), kept for the way back. */
void rms_norm(const float *restrict x, i64 x_stride, const float *restrict weight, float eps, float *restrict y, float *restrict inverse, i64 rows, i64 d)
{
    for (i64 m = 0; m < rows; m++) {
        const float *row = x + m * x_stride;
        float *out = y + m * d, sum = 0.0f;
        for (i64 j = 0; j < d; j++) sum += row[j] * row[j];
        float scale = 1.0f / sqrtf(sum / d + eps);
        inverse[m] = scale;
        for (i64 j = 0; j < d; j++) out[j] = row[j] * scale * weight[j];
    }
}

/* With `beside`, or NULL, a gradient that x has from elsewhere: dx is the sum. */
void rms_norm_backward(const float *restrict g, const float *restrict beside, const float *restrict x, i64 x_stride, const float *restrict weight,
                       const float *restrict inverse, float *restrict dx, float *restrict dweight, i64 rows, i64 d)
{
    memset(dweight, 0, d * sizeof(float));
    for (i64 m = 0; m < rows; m++) {
        const float *row = x + m * x_stride, *grad = g + m * d, *other = beside + m * d;
        float *out = dx + m * d, scale = inverse[m], along = 0.0f;
        for (i64 j = 0; j < d; j++) along += grad[j] * weight[j] * row[j];
        float pull = along * scale * scale * scale / d;
        for (i64 j = 0; j < d; j++) {
            dweight[j] += grad[j] * row[j] * scale;
            out[j] = grad[j] * weight[j] * scale - row[j] * pull;
        }
        if (beside)
            for (i64 j = 0; j < d; j++) out[j] += other[j];
    }
}

/* ---- SwiGLU ---- */

void swiglu(const float *restrict gate, const float *restrict up, float *restrict out, i64 n)
{
    for (i64 j = 0; j < n; j++) out[j] = gate[j] * sigmoid(gate[j]) * up[j];
}

/* Of g, the gradient of `out`: those of gate and up, the former where g was; `out` anew. */
void swiglu_backward(float *g, const float *gate, const float *up, float *out, float *dup, i64 n)
{
#pragma GCC ivdep
    for (i64 j = 0; j < n; j++) {
        float s = sigmoid(gate[j]), silu = gate[j] * s, back = g[j];
        out[j] = silu * up[j];
        dup[j] = back * silu;
        g[j] = back * up[j] * (s + silu * (1.0f - s));
    }
}

/* ---- Cross-entropy ---- */

/* Rows of logits (rows, n) become e^(logit - largest), with the largest and the sum of each: a row passes through the cache once. */
void exponentials(float *logits, i64 rows, i64 n, float *most, float *sums)
{
    for (i64 r = 0; r < rows; r++) {
        float *row = logits + r * n, top = largest(row, n), sum = 0.0f;
        for (i64 j = 0; j < n; j++) {
            row[j] = exponential_below(row[j] - top);
            sum += row[j];
        }
        most[r] = top;
        sums[r] = sum;
    }
}

/* ---- Choosing experts ---- */

/* ids (M, K): of scores (M, E) the best K of those on the `limit` of `devices` devices with the highest single score (all devices:
   limit = devices), best first, the lower expert first among equals.  A score that is no number is never above another one. */
static void insert(float value, i64 id, float *best, i64 *ids, i64 filled)
{
    i64 at = filled;
    for (; at > 0 && value > best[at - 1]; at--) {
        best[at] = best[at - 1];
        ids[at] = ids[at - 1];
    }
    best[at] = value;
    ids[at] = id;
}

void choose_experts(const float *scores, i64 *ids, i64 tokens, i64 experts, i64 devices, i64 limit, i64 chosen, float *best, i64 *reachable)
{
    i64 per_device = experts / devices;
    for (i64 m = 0; m < tokens; m++) {
        const float *row = scores + m * experts;
        i64 *to = ids + m * chosen, filled = 0;
        for (i64 d = 0; d < devices; d++) reachable[d] = d;
        if (limit < devices) {
            for (i64 d = 0; d < devices; d++) {
                float most = largest(row + d * per_device, per_device);
                if (filled < limit)
                    insert(most, d, best, reachable, filled++);
                else if (most > best[limit - 1])
                    insert(most, d, best, reachable, limit - 1);
            }
        }
        /* Devices in their order, so that equal scores fall to the lower expert. */
        for (i64 i = 1; i < limit; i++)
            for (i64 j = i; j > 0 && reachable[j] < reachable[j - 1]; j--) {
                i64 swap = reachable[j];
                reachable[j] = reachable[j - 1];
                reachable[j - 1] = swap;
            }
        filled = 0;
        for (i64 i = 0; i < limit; i++)
            for (i64 e = reachable[i] * per_device; e < (reachable[i] + 1) * per_device; e++) {
                if (filled < chosen)
                    insert(row[e], e, best, to, filled++);
                else if (row[e] > best[chosen - 1])
                    insert(row[e], e, best, to, chosen - 1);
            }
    }
}

/* ---- Routed experts ---- */

/* Assignments sorted by expert, in the order of the tokens within one: slot[a] = token * K + choice; expert e has slots
   ends[e - 1] to ends[e].  Dropped ones get no slot; kept NULL: there are none.  Returns the number of slots. */
i64 sort_by_expert(const i64 *restrict ids, const uint8_t *restrict kept, i64 *restrict slot, i64 *restrict ends, i64 assignments, i64 experts)
{
    memset(ends, 0, experts * sizeof(i64));
    for (i64 a = 0; a < assignments; a++)
        if (!kept || kept[a]) ends[ids[a]]++;
    i64 total = 0;
    for (i64 e = 0; e < experts; e++) {
        i64 load = ends[e];
        ends[e] = total;
        total += load;
    }
    for (i64 a = 0; a < assignments; a++)
        if (!kept || kept[a]) slot[ends[ids[a]]++] = a;
    return total;
}

static void gather(const float *restrict from, const i64 *restrict slot, i64 chosen, i64 rows, i64 d, float *restrict to)
{
    for (i64 r = 0; r < rows; r++) memcpy(to + r * d, from + slot[r] / chosen * d, d * sizeof(float));
}

static void scatter_add(const float *restrict from, const i64 *restrict slot, i64 chosen, i64 rows, i64 d, float *restrict to)
{
    for (i64 r = 0; r < rows; r++) {
        float *row = to + slot[r] / chosen * d;
        const float *add = from + r * d;
        for (i64 j = 0; j < d; j++) row[j] += add[j];
    }
}

/* Functions of their own for the sake of `restrict`: inside the loops over experts and rows the compiler gives up on it, and makes no vectors. */
#define APART static __attribute__((noinline))

APART void gated(const float *restrict gate, const float *restrict up, float weight, float *restrict out, i64 n)
{
    for (i64 j = 0; j < n; j++) out[j] = gate[j] * sigmoid(gate[j]) * up[j] * weight;
}

/* Of g, the gradient of `out`: those of gate and up, and (returned) of the weight; `out` anew. */
APART float gated_backward(const float *restrict g, const float *restrict gate, const float *restrict up, float weight, float *restrict out,
                           float *restrict dgate, float *restrict dup, i64 n)
{
    float dweight = 0.0f;
    for (i64 j = 0; j < n; j++) {
        float s = sigmoid(gate[j]), silu = gate[j] * s, value = silu * up[j], back = g[j] * weight;
        dweight += g[j] * value;
        out[j] = value * weight;
        dup[j] = back * silu;
        dgate[j] = back * up[j] * (s + silu * (1.0f - s));
    }
    return dweight;
}

/* out (M, D) += gate * down_e(silu(gate_e x) * up_e x) over the slots; hidden (A, 2F) is kept for the way back.
   The gate is applied where the path is narrowest.  scratch: R (2 D + F) floats; an expert's slots are taken R, `at_a_time`, at a time. */
void experts_forward(const float *x, const float *gates, const i64 *slot, const i64 *ends, const float *gate_up, const float *down, float *hidden,
                     float *out, float *scratch, i64 chosen, i64 experts, i64 d, i64 f, i64 at_a_time)
{
    float *rows = scratch, *result = rows + at_a_time * d, *active = result + at_a_time * d;
    i64 begin = 0;
    for (i64 e = 0; e < experts; e++) {
        for (i64 n; begin < ends[e]; begin += n) {
            n = ends[e] - begin < at_a_time ? ends[e] - begin : at_a_time;
            float *h = hidden + begin * 2 * f;
            gather(x, slot + begin, chosen, n, d, rows);
            product(n, 2 * f, d, rows, gate_up + e * 2 * f * d, h);
            for (i64 r = 0; r < n; r++) gated(h + r * 2 * f, h + r * 2 * f + f, gates[slot[begin + r]], active + r * f, f);
            product(n, d, f, active, down + e * d * f, result);
            scatter_add(result, slot + begin, chosen, n, d, out);
        }
    }
}

/* dx (M, D) is added to; dgates (A of M * K) and the weights' gradients are written (zeros for an expert without slots).
   scratch: R (2 D + 4 F) floats. */
void experts_backward(const float *dout, const float *x, const float *gates, const i64 *slot, const i64 *ends, const float *gate_up, const float *down,
                      const float *hidden, float *dx, float *dgates, float *dgate_up, float *ddown, float *scratch, i64 chosen, i64 experts, i64 d, i64 f,
                      i64 at_a_time)
{
    float *rows = scratch, *grad = rows + at_a_time * d, *active = grad + at_a_time * d, *dactive = active + at_a_time * f,
          *dhidden = dactive + at_a_time * f;
    i64 begin = 0;
    for (i64 e = 0; e < experts; e++) {
        const float *w_in = gate_up + e * 2 * f * d, *w_out = down + e * d * f;
        float *dw_in = dgate_up + e * 2 * f * d, *dw_out = ddown + e * d * f, beta = 0.0f;
        if (begin == ends[e]) {
            memset(dw_in, 0, 2 * f * d * sizeof(float));
            memset(dw_out, 0, f * d * sizeof(float));
        }
        while (begin < ends[e]) {
            i64 n = ends[e] - begin < at_a_time ? ends[e] - begin : at_a_time;
            gather(dout, slot + begin, chosen, n, d, grad);
            gather(x, slot + begin, chosen, n, d, rows);
            gemm('N', 'N', n, f, d, 1.0f, grad, d, w_out, f, 0.0f, dactive, f);
            for (i64 r = 0; r < n; r++) {
                const float *h = hidden + (begin + r) * 2 * f;
                float *dh = dhidden + r * 2 * f;
                i64 place = slot[begin + r];
                dgates[place] = gated_backward(dactive + r * f, h, h + f, gates[place], active + r * f, dh, dh + f, f);
            }
            gemm('T', 'N', d, f, n, 1.0f, grad, d, active, f, beta, dw_out, f);
            gemm('T', 'N', 2 * f, d, n, 1.0f, dhidden, 2 * f, rows, d, beta, dw_in, d);
            gemm('N', 'N', n, d, 2 * f, 1.0f, dhidden, 2 * f, w_in, d, 0.0f, rows, d);
            scatter_add(rows, slot + begin, chosen, n, d, dx);
            begin += n;
            beta = 1.0f;
        }
    }
}

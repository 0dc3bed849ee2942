/* Elementwise kernels and attention, forward and backward, for the CPU engine.

   Compiled once on the machine that runs it (native.py), without headers or the C library; matrix products are
   cblas_sgemm, whose address is an argument. Sums are computed in sixteen lanes whatever the machine's vectors hold,
   and products are not contracted into sums (-ffp-contract=off): the results do not depend on the compiler or the
   width of the vectors. Each position is computed from that position alone. */

typedef long i64;
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int mask_vec __attribute__((vector_size(64), aligned(4), may_alias));

enum { LANES = 16, SUM_BLOCK = 256, ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void gemm_t(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

/* exp(x), as in the Cephes library (S. Moshier): 2^n times a polynomial of the remainder. Zero below -87.33, infinite
   above 88.37, where n would not fit; NaN stays NaN. */
static inline float exp_(float x)
{
    float low = x > 88.37f ? 88.37f : x;
    float in = low >= -87.33f ? low : -87.33f;
    float n = (in * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float r = in - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    int bits = ((int)n + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    float y = x > 88.37f ? __builtin_inff() : p * power;
    y = x < -87.33f ? 0.0f : y;
    return x == x ? y : x;
}

/* log(x) of a normal positive number, as in the Cephes library. */
static inline float log_(float x)
{
    int bits;
    __builtin_memcpy(&bits, &x, 4);
    if (!(x > 0.0f) || bits >= 0x7f800000) return x * 0.0f; /* NaN */
    float e = (float)((bits >> 23) - 126);
    bits = (bits & 0x007fffff) | 0x3f000000;
    __builtin_memcpy(&x, &bits, 4);
    if (x < 0.707106781186547524f) {
        e -= 1.0f;
        x = x + x - 1.0f;
    } else
        x = x - 1.0f;
    float z = x * x;
    float p = 7.0376836292e-2f;
    p = p * x - 1.1514610310e-1f;
    p = p * x + 1.1676998740e-1f;
    p = p * x - 1.2420140846e-1f;
    p = p * x + 1.4249322787e-1f;
    p = p * x - 1.6668057665e-1f;
    p = p * x + 2.0000714765e-1f;
    p = p * x - 2.4999993993e-1f;
    p = p * x + 3.3333331174e-1f;
    float y = (p * x) * z;
    y = y + e * -2.12194440e-4f;
    y = y - 0.5f * z;
    return (x + y) + e * 0.693359375f;
}

/* The sum of the lanes, by halves. */
static inline float horizontal_sum(vec v)
{
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = v[i] + v[i + width];
    return v[0];
}

static inline float dot(const float *restrict a, const float *restrict b, i64 count)
{
    vec sum = {0};
    i64 i = 0;
    for (; i + LANES <= count; i += LANES) sum += *(const vec *)(a + i) * *(const vec *)(b + i);
    float result = horizontal_sum(sum);
    for (; i < count; i++) result += a[i] * b[i];
    return result;
}

/* Summed in blocks: many small numbers added to one large float32 would be lost. */
static inline float total(const float *x, i64 count)
{
    double result = 0.0;
    i64 i = 0;
    while (i + LANES <= count) {
        vec sum = {0};
        for (i64 end = i + SUM_BLOCK; i < end && i + LANES <= count; i += LANES) sum += *(const vec *)(x + i);
        result += horizontal_sum(sum);
    }
    for (; i < count; i++) result += x[i];
    return (float)result;
}

static inline float maximum_of(const float *x, i64 count)
{
    float maximum = x[0];
    i64 i = 0;
    if (count >= LANES) {
        vec maxima = *(const vec *)x;
        for (i = LANES; i + LANES <= count; i += LANES) {
            vec next = *(const vec *)(x + i);
            mask_vec larger = next > maxima;
            maxima = (vec)((larger & (mask_vec)next) | (~larger & (mask_vec)maxima));
        }
        for (int k = 0; k < LANES; k++) maximum = maxima[k] > maximum ? maxima[k] : maximum;
    }
    for (; i < count; i++) maximum = x[i] > maximum ? x[i] : maximum;
    return maximum;
}

static inline void copy(float *restrict to, const float *restrict from, i64 count)
{
    for (i64 i = 0; i < count; i++) to[i] = from[i];
}

static inline void clear(float *to, i64 count)
{
    for (i64 i = 0; i < count; i++) to[i] = 0.0f;
}

/* RMSNorm: out (n, d) = x scale weight, with scale (n) = 1 / sqrt(mean(x^2) + eps). */
void rms_norm(i64 n, i64 d, const float *x, const float *restrict weight, float eps, float *out, float *restrict scale)
{
    for (i64 at = 0; at < n; at++) {
        const float *row = x + at * d;
        float *restrict result = out + at * d;
        float s = 1.0f / __builtin_sqrtf(dot(row, row, d) / (float)d + eps);
        scale[at] = s;
        for (i64 i = 0; i < d; i++) result[i] = row[i] * s * weight[i];
    }
}

/* Add the gradient by x to grad_x (n, d); grad_out (n, d) is overwritten. */
void rms_norm_backward(i64 n, i64 d, const float *x, const float *restrict weight, const float *restrict scale,
                       float *grad_out, float *grad_x)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict row = x + at * d;
        float *restrict grad = grad_out + at * d, *restrict sum = grad_x + at * d;
        float r = scale[at];
        for (i64 i = 0; i < d; i++) grad[i] = grad[i] * weight[i];
        float projection = dot(grad, row, d) * (r * r * r / (float)d);
        for (i64 i = 0; i < d; i++) sum[i] = sum[i] + (grad[i] * r - row[i] * projection);
    }
}

/* out (n, d) = silu(gate) up, of gate_up (n, 2 d). */
void swiglu(i64 n, i64 d, const float *gate_up, float *out)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict gate = gate_up + at * 2 * d, *restrict up = gate + d;
        float *restrict result = out + at * d;
        for (i64 i = 0; i < d; i++) result[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
    }
}

/* Overwrite gate_up with the gradients by gate and up, and out with the output of swiglu once more. */
void swiglu_backward(i64 n, i64 d, float *gate_up, const float *grad_out, float *out)
{
    for (i64 at = 0; at < n; at++) {
        float *restrict gate = gate_up + at * 2 * d, *restrict up = gate + d, *restrict result = out + at * d;
        const float *restrict grad = grad_out + at * d;
        for (i64 i = 0; i < d; i++) {
            float g = gate[i], u = up[i];
            float sigmoid = 1.0f / (1.0f + exp_(-g));
            float silu = g * sigmoid;
            result[i] = silu * u;
            /* silu' = sigmoid + silu (1 - sigmoid) */
            gate[i] = (sigmoid + (silu - silu * sigmoid)) * u * grad[i];
            up[i] = silu * grad[i];
        }
    }
}

/* Rotary positions in place: x holds `heads` of `width` in each of n rows, `stride` apart; the halves of a head rotate
   against each other by cos and sign * sin (length, half) at `positions` (n). */
void rope(i64 n, i64 heads, i64 stride, i64 width, i64 half, float *x, const float *cos, const float *sin,
          const i64 *positions, float sign)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict c = cos + positions[at] * half, *restrict s = sin + positions[at] * half;
        for (i64 head = 0; head < heads; head++) {
            float *restrict first = x + at * stride + head * width, *restrict second = first + half;
            for (i64 i = 0; i < half; i++) {
                float a = first[i], b = second[i], sine = sign * s[i];
                first[i] = a * c[i] - b * sine;
                second[i] = b * c[i] + a * sine;
            }
        }
    }
}

/* Overwrite x (n, d) with exp(x - maximum), and write the sum of each row to sums (n). */
void exp_minus_max(i64 n, i64 d, float *x, const float *restrict maximum, float *restrict sums)
{
    for (i64 at = 0; at < n; at++) {
        float *restrict row = x + at * d;
        float top = maximum[at];
        for (i64 i = 0; i < d; i++) row[i] = exp_(row[i] - top);
        sums[at] = total(row, d);
    }
}

/* out (n) = the dot products of the rows of a and b (n, d). */
void row_dots(i64 n, i64 d, const float *a, const float *b, float *restrict out)
{
    for (i64 at = 0; at < n; at++) out[at] = dot(a + at * d, b + at * d, d);
}

/* The columns of qkv: queries, keys and values of all heads beside each other. */
typedef struct {
    i64 heads, kv_heads, width, tile;
    float scale;
    gemm_t *gemm;
} layout_t;

/* Copy the queries of a tile that share keys from rows of `columns` to stacked (group * queries, width), or back. */
static void stack(const layout_t *s, float *stacked, float *rows, i64 columns, i64 head, i64 queries, int back)
{
    i64 group = s->heads / s->kv_heads;
    for (i64 g = 0; g < group; g++)
        for (i64 q = 0; q < queries; q++) {
            float *query = stacked + (g * queries + q) * s->width;
            float *row = rows + q * columns + (head * group + g) * s->width;
            if (back)
                copy(row, query, s->width);
            else
                copy(query, row, s->width);
        }
}

/* out (., heads width) = softmax(q k^T scale) v for `count` shares, each (first position of a row, its length, first
   head of keys, one past the last); log_sums (., heads): logarithms of the sums, for the backward pass.

   Scratch: queries (group, tile, width), scores (group, tile, longest row). */
void attention(const layout_t *s, i64 count, const i64 *work, float *qkv, float *out, float *log_sums, float *queries,
               float *scores)
{
    i64 group = s->heads / s->kv_heads, w = s->width, columns = (s->heads + 2 * s->kv_heads) * w;
    for (; count; count--, work += 4)
        for (i64 start = 0; start < work[1]; start += s->tile) {
            i64 stop = start + s->tile < work[1] ? start + s->tile : work[1], n = stop - start, stacked = group * n;
            float *visible_rows = qkv + work[0] * columns, *tile_rows = visible_rows + start * columns;
            for (i64 head = work[2]; head < work[3]; head++) {
                const float *keys = visible_rows + (s->heads + head) * w, *values = keys + s->kv_heads * w;
                stack(s, queries, tile_rows, columns, head, n, 0);
                s->gemm(ROW_MAJOR, NO_TRANS, TRANS, stacked, stop, w, s->scale, queries, w, keys, columns, 0.0f, scores,
                        stop);
                float sums[stacked];
                for (i64 q_row = 0; q_row < stacked; q_row++) {
                    i64 q = q_row % n, visible = start + q + 1;
                    float *restrict row = scores + q_row * stop;
                    float top = maximum_of(row, visible);
                    for (i64 i = 0; i < visible; i++) row[i] = exp_(row[i] - top);
                    clear(row + visible, stop - visible);
                    sums[q_row] = total(row, visible);
                    log_sums[(work[0] + start + q) * s->heads + head * group + q_row / n] = log_(sums[q_row]) + top;
                }
                s->gemm(ROW_MAJOR, NO_TRANS, NO_TRANS, stacked, w, stop, 1.0f, scores, stop, values, columns, 0.0f,
                        queries, w);
                for (i64 q_row = 0; q_row < stacked; q_row++)
                    for (i64 i = 0; i < w; i++) queries[q_row * w + i] = queries[q_row * w + i] / sums[q_row];
                stack(s, queries, out + (work[0] + start) * s->heads * w, s->heads * w, head, n, 1);
            }
        }
}

/* Write grad_qkv, the gradients by queries, keys and values in the columns of qkv. deltas (., heads): dot products of
   the output and its gradient by head. The weights are recomputed from log_sums (Dao et al., 2022).

   Scratch: queries and grads (group, tile, width), weights and grad_scores (group, tile, longest row). */
void attention_backward(const layout_t *s, i64 count, const i64 *work, float *qkv, const float *deltas,
                        const float *log_sums, float *grad_out, float *grad_qkv, float *queries, float *grads,
                        float *weights, float *grad_scores)
{
    i64 group = s->heads / s->kv_heads, w = s->width, columns = (s->heads + 2 * s->kv_heads) * w;
    for (; count; count--, work += 4)
        for (i64 start = 0; start < work[1]; start += s->tile) {
            i64 stop = start + s->tile < work[1] ? start + s->tile : work[1], n = stop - start, stacked = group * n;
            float *visible_rows = qkv + work[0] * columns, *tile_rows = visible_rows + start * columns;
            float *grad_rows = grad_qkv + work[0] * columns;
            for (i64 head = work[2]; head < work[3]; head++) {
                i64 key = (s->heads + head) * w, value = key + s->kv_heads * w;
                stack(s, queries, tile_rows, columns, head, n, 0);
                stack(s, grads, grad_out + (work[0] + start) * s->heads * w, s->heads * w, head, n, 0);
                s->gemm(ROW_MAJOR, NO_TRANS, TRANS, stacked, stop, w, s->scale, queries, w, visible_rows + key,
                        columns, 0.0f, weights, stop);
                s->gemm(ROW_MAJOR, NO_TRANS, TRANS, stacked, stop, w, 1.0f, grads, w, visible_rows + value, columns,
                        0.0f, grad_scores, stop);
                for (i64 q_row = 0; q_row < stacked; q_row++) {
                    i64 q = q_row % n, visible = start + q + 1;
                    i64 number = (work[0] + start + q) * s->heads + head * group + q_row / n;
                    float *restrict weight = weights + q_row * stop, *restrict slope = grad_scores + q_row * stop;
                    float log_sum = log_sums[number], delta = deltas[number];
                    for (i64 i = 0; i < visible; i++) {
                        weight[i] = exp_(weight[i] - log_sum);
                        slope[i] = (slope[i] - delta) * weight[i];
                    }
                    clear(weight + visible, stop - visible);
                    clear(slope + visible, stop - visible);
                }
                /* Earlier tiles of the row have written the gradients of the positions before this one. */
                for (i64 q = start; q < stop; q++) {
                    clear(grad_rows + q * columns + key, w);
                    clear(grad_rows + q * columns + value, w);
                }
                s->gemm(ROW_MAJOR, TRANS, NO_TRANS, stop, w, stacked, 1.0f, weights, stop, grads, w, 1.0f,
                        grad_rows + value, columns);
                s->gemm(ROW_MAJOR, TRANS, NO_TRANS, stop, w, stacked, s->scale, grad_scores, stop, queries, w, 1.0f,
                        grad_rows + key, columns);
                s->gemm(ROW_MAJOR, NO_TRANS, NO_TRANS, stacked, w, stop, s->scale, grad_scores, stop, visible_rows + key,
                        columns, 0.0f, grads, w);
                stack(s, grads, grad_rows + start * columns, columns, head, n, 1);
            }
        }
}

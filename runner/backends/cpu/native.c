/* Element-wise parts of a model and its attention, forward and backward, for the engine of the CPU.

   Compiled once on the machine that runs it (runner/cpu/native.py), without headers or the C library: products are
   cblas_sgemm, whose address each function that needs it is given. Sums are made in sixteen lines whatever the
   machine's vectors hold, and products are not contracted into sums (-ffp-contract=off): the bits do not depend on
   the compiler or the width of the vectors. A position's numbers come from that position alone. */

typedef long i64;
typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int masks __attribute__((vector_size(64), aligned(4), may_alias));

enum { LINES = 16, PART = 256, ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };

typedef void gemm_t(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

/* exp(x), as in the Cephes library (S. Moshier): 2^n times a polynomial of the rest. Zero below -87.33, infinite above
   88.37, where n would not fit; what is no number stays so. */
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

/* log(x) of a normal number above zero, as in the Cephes library. */
static inline float log_(float x)
{
    int bits;
    __builtin_memcpy(&bits, &x, 4);
    if (!(x > 0.0f) || bits >= 0x7f800000) return x * 0.0f; /* no number, or none that has a logarithm */
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

static inline float folded(lanes v)
{
    for (int width = LINES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = v[i] + v[i + width];
    return v[0];
}

static inline float dot(const float *restrict a, const float *restrict b, i64 count)
{
    lanes sum = {0};
    i64 i = 0;
    for (; i + LINES <= count; i += LINES) sum += *(const lanes *)(a + i) * *(const lanes *)(b + i);
    float all = folded(sum);
    for (; i < count; i++) all += a[i] * b[i];
    return all;
}

/* Summed in parts: added to one large number, many small ones would be lost. */
static inline float total(const float *x, i64 count)
{
    double all = 0.0;
    i64 i = 0;
    while (i + LINES <= count) {
        lanes sum = {0};
        for (i64 end = i + PART; i < end && i + LINES <= count; i += LINES) sum += *(const lanes *)(x + i);
        all += folded(sum);
    }
    for (; i < count; i++) all += x[i];
    return (float)all;
}

static inline float largest(const float *x, i64 count)
{
    float top = x[0];
    i64 i = 0;
    if (count >= LINES) {
        lanes most = *(const lanes *)x;
        for (i = LINES; i + LINES <= count; i += LINES) {
            lanes next = *(const lanes *)(x + i);
            masks more = next > most;
            most = (lanes)((more & (masks)next) | (~more & (masks)most));
        }
        for (int k = 0; k < LINES; k++) top = most[k] > top ? most[k] : top;
    }
    for (; i < count; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static inline void copy(float *restrict to, const float *restrict from, i64 count)
{
    for (i64 i = 0; i < count; i++) to[i] = from[i];
}

static inline void clear(float *to, i64 count)
{
    for (i64 i = 0; i < count; i++) to[i] = 0.0f;
}

/* out (n, d) = x scale weight, with scale (n) = 1 / sqrt(mean(x^2) + eps). */
void rms_norm(i64 n, i64 d, const float *x, const float *restrict weight, float eps, float *out, float *restrict scale)
{
    for (i64 at = 0; at < n; at++) {
        const float *row = x + at * d;
        float *restrict made = out + at * d;
        float s = 1.0f / __builtin_sqrtf(dot(row, row, d) / (float)d + eps);
        scale[at] = s;
        for (i64 i = 0; i < d; i++) made[i] = row[i] * s * weight[i];
    }
}

/* The gradient by x, added to add_to (n, d). */
void rms_norm_back(i64 n, i64 d, const float *x, const float *restrict weight, const float *restrict scale,
                   float *by_out, float *add_to)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict row = x + at * d;
        float *restrict given = by_out + at * d, *restrict sum = add_to + at * d;
        float r = scale[at];
        for (i64 i = 0; i < d; i++) given[i] = given[i] * weight[i];
        float shared = dot(given, row, d) * (r * r * r / (float)d);
        for (i64 i = 0; i < d; i++) sum[i] = sum[i] + (given[i] * r - row[i] * shared);
    }
}

/* out (n, d) = silu(gate) up, of gate_up (n, 2 d). */
void swiglu(i64 n, i64 d, const float *gate_up, float *out)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict gate = gate_up + at * 2 * d, *restrict up = gate + d;
        float *restrict made = out + at * d;
        for (i64 i = 0; i < d; i++) made[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
    }
}

/* The gradients by gate and up over gate_up, and what swiglu made in out once more. */
void swiglu_back(i64 n, i64 d, float *gate_up, const float *by_out, float *out)
{
    for (i64 at = 0; at < n; at++) {
        float *restrict gate = gate_up + at * 2 * d, *restrict up = gate + d, *restrict made = out + at * d;
        const float *restrict given = by_out + at * d;
        for (i64 i = 0; i < d; i++) {
            float g = gate[i], u = up[i];
            float sigmoid = 1.0f / (1.0f + exp_(-g));
            float silu = g * sigmoid;
            made[i] = silu * u;
            /* silu' = sigmoid + silu (1 - sigmoid) */
            gate[i] = (sigmoid + (silu - silu * sigmoid)) * u * given[i];
            up[i] = silu * given[i];
        }
    }
}

/* Rotary positions in place: x holds `heads` of `width` in each of n lines of `step`; halves turn against each other,
   by cos and sign * sin (length, half) at `places` (n). */
void rotate(i64 n, i64 heads, i64 step, i64 width, i64 half, float *x, const float *cos, const float *sin,
            const i64 *places, float sign)
{
    for (i64 at = 0; at < n; at++) {
        const float *restrict c = cos + places[at] * half, *restrict s = sin + places[at] * half;
        for (i64 head = 0; head < heads; head++) {
            float *restrict first = x + at * step + head * width, *restrict second = first + half;
            for (i64 i = 0; i < half; i++) {
                float a = first[i], b = second[i], turn = sign * s[i];
                first[i] = a * c[i] - b * turn;
                second[i] = b * c[i] + a * turn;
            }
        }
    }
}

/* exp(x - top) over x (n, d), and the sum of each line. */
void exponentials(i64 n, i64 d, float *x, const float *restrict top, float *restrict sums)
{
    for (i64 at = 0; at < n; at++) {
        float *restrict row = x + at * d;
        float most = top[at];
        for (i64 i = 0; i < d; i++) row[i] = exp_(row[i] - most);
        sums[at] = total(row, d);
    }
}

/* out (n) = the products of lines of a and b (n, d), summed. */
void dots(i64 n, i64 d, const float *a, const float *b, float *restrict out)
{
    for (i64 at = 0; at < n; at++) out[at] = dot(a + at * d, b + at * d, d);
}

/* Of the heads in qkv, `columns` in a line: queries, keys, values beside each other. */
typedef struct {
    i64 heads, kv_heads, width, tile;
    float scale;
    gemm_t *gemm;
} shape_t;

/* The queries of a tile that share keys, one below the other: to (group * queries, width), or back. */
static void stack(const shape_t *s, float *stacked, float *lines, i64 columns, i64 head, i64 queries, int back)
{
    i64 group = s->heads / s->kv_heads;
    for (i64 g = 0; g < group; g++)
        for (i64 q = 0; q < queries; q++) {
            float *one = stacked + (g * queries + q) * s->width;
            float *line = lines + q * columns + (head * group + g) * s->width;
            if (back)
                copy(line, one, s->width);
            else
                copy(one, line, s->width);
        }
}

/* out (., heads width) = softmax(q k^T scale) v for `count` pieces of work, each (first position of a row, its length,
   first head of keys, one past the last); log_sums (., heads): logarithms of the sums, for the way back.

   Room: queries (group, tile, width), scores (group, tile, longest row). */
void attend(const shape_t *s, i64 count, const i64 *work, float *qkv, float *out, float *log_sums, float *queries,
            float *scores)
{
    i64 group = s->heads / s->kv_heads, w = s->width, columns = (s->heads + 2 * s->kv_heads) * w;
    for (; count; count--, work += 4)
        for (i64 start = 0; start < work[1]; start += s->tile) {
            i64 stop = start + s->tile < work[1] ? start + s->tile : work[1], n = stop - start, all = group * n;
            float *seen = qkv + work[0] * columns, *here = seen + start * columns;
            for (i64 head = work[2]; head < work[3]; head++) {
                const float *keys = seen + (s->heads + head) * w, *values = keys + s->kv_heads * w;
                stack(s, queries, here, columns, head, n, 0);
                s->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, all, stop, w, s->scale, queries, w, keys, columns, 0.0f, scores,
                        stop);
                float sums[all];
                for (i64 line = 0; line < all; line++) {
                    i64 q = line % n, visible = start + q + 1;
                    float *restrict row = scores + line * stop;
                    float most = largest(row, visible);
                    for (i64 i = 0; i < visible; i++) row[i] = exp_(row[i] - most);
                    clear(row + visible, stop - visible);
                    sums[line] = total(row, visible);
                    log_sums[(work[0] + start + q) * s->heads + head * group + line / n] = log_(sums[line]) + most;
                }
                s->gemm(ROW_MAJOR, PLAIN, PLAIN, all, w, stop, 1.0f, scores, stop, values, columns, 0.0f, queries, w);
                for (i64 line = 0; line < all; line++)
                    for (i64 i = 0; i < w; i++) queries[line * w + i] = queries[line * w + i] / sums[line];
                stack(s, queries, out + (work[0] + start) * s->heads * w, s->heads * w, head, n, 1);
            }
        }
}

/* The gradients by queries, keys and values into by_qkv, laid out as qkv. deltas (., heads): products of the output
   and the gradient by it, summed by head. The weights are made again from log_sums (Dao et al., 2022).

   Room: queries and given (group, tile, width), weights and slopes (group, tile, longest row). */
void attend_back(const shape_t *s, i64 count, const i64 *work, float *qkv, const float *deltas, const float *log_sums,
                 float *by_out, float *by_qkv, float *queries, float *given, float *weights, float *slopes)
{
    i64 group = s->heads / s->kv_heads, w = s->width, columns = (s->heads + 2 * s->kv_heads) * w;
    for (; count; count--, work += 4)
        for (i64 start = 0; start < work[1]; start += s->tile) {
            i64 stop = start + s->tile < work[1] ? start + s->tile : work[1], n = stop - start, all = group * n;
            float *seen = qkv + work[0] * columns, *here = seen + start * columns;
            float *made = by_qkv + work[0] * columns;
            for (i64 head = work[2]; head < work[3]; head++) {
                i64 key = (s->heads + head) * w, value = key + s->kv_heads * w;
                stack(s, queries, here, columns, head, n, 0);
                stack(s, given, by_out + (work[0] + start) * s->heads * w, s->heads * w, head, n, 0);
                s->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, all, stop, w, s->scale, queries, w, seen + key, columns, 0.0f,
                        weights, stop);
                s->gemm(ROW_MAJOR, PLAIN, TRANSPOSED, all, stop, w, 1.0f, given, w, seen + value, columns, 0.0f,
                        slopes, stop);
                for (i64 line = 0; line < all; line++) {
                    i64 q = line % n, visible = start + q + 1;
                    i64 number = (work[0] + start + q) * s->heads + head * group + line / n;
                    float *restrict weight = weights + line * stop, *restrict slope = slopes + line * stop;
                    float log_sum = log_sums[number], delta = deltas[number];
                    for (i64 i = 0; i < visible; i++) {
                        weight[i] = exp_(weight[i] - log_sum);
                        slope[i] = (slope[i] - delta) * weight[i];
                    }
                    clear(weight + visible, stop - visible);
                    clear(slope + visible, stop - visible);
                }
                /* What lies before the tile has been written by the tiles before it. */
                for (i64 q = start; q < stop; q++) {
                    clear(made + q * columns + key, w);
                    clear(made + q * columns + value, w);
                }
                s->gemm(ROW_MAJOR, TRANSPOSED, PLAIN, stop, w, all, 1.0f, weights, stop, given, w, 1.0f, made + value,
                        columns);
                s->gemm(ROW_MAJOR, TRANSPOSED, PLAIN, stop, w, all, s->scale, slopes, stop, queries, w, 1.0f,
                        made + key, columns);
                s->gemm(ROW_MAJOR, PLAIN, PLAIN, all, w, stop, s->scale, slopes, stop, seen + key, columns, 0.0f,
                        given, w);
                stack(s, given, made + start * columns, columns, head, n, 1);
            }
        }
}

// fused_merge: joins the partial attentions of rows whose keys were computed in several pieces.
//
//     lse = log Σ exp(lse_n) (+ exp(sink))      out = Σ out_n · exp(lse_n − lse)      n in order
//
//   tensors   partial_out (M, P, width) float32, partial_lse (M, P); out (M, nq, width); lse (M, nq)
//             ranges int2 (M): where the rows of each matrix's pattern start, and their number
//             rows int32: rows of out; ptr int32 into sources; sources int32: partial rows
//   grid      (ceil(most rows / 4), M)     a warp: one row
//   block     128 threads
//   smem      none
//   registers kAhead partial rows are asked for at a time: there are few rows, so that what counts is how many of
//             a row's loads wait for each other
//   needs     sm_80; width % 8 == 0
//   floor     partial results are read once
#include "reduce.cuh"

constexpr int kColumns = (MG_DIM + 127) / 128;  // float4 a lane holds
constexpr int kAhead = 8 / kColumns;
static_assert(32 % kAhead == 0, "a warp's sources are asked for in whole sets");

__device__ __forceinline__ float natural_exp(float x) {
    return kOut == 2 ? expf(x) : __expf(x);
}

extern "C" __global__ void __launch_bounds__(128, 6)
    fused_merge(out_t *__restrict__ out, float *__restrict__ lse,
                const float *__restrict__ partial_out, const float *__restrict__ partial_lse,
                i64 partials, const int2 *__restrict__ ranges, const int *__restrict__ rows,
                const int *__restrict__ ptr, const int *__restrict__ sources,
                const float *__restrict__ sink, int heads, int nq, int width) {
    const int lane = threadIdx.x % 32, matrix = blockIdx.y;
    const int2 range = __ldg(ranges + matrix);
    int at = blockIdx.x * 4 + threadIdx.x / 32;
    if (at >= range.y) return;
    at += range.x;
    const int first = __ldg(ptr + at), end = __ldg(ptr + at + 1);
    const float *logs = partial_lse + matrix * partials;
    const float *from = partial_out + matrix * partials * width;

    // 1. The largest log-sum-exp: lanes look at sources side by side; a maximum knows no order.
    const float logit = sink ? sink[matrix % heads] : -kInfinity;
    int source = 0;
    float top = logit, log = -kInfinity;  // of this lane's source, the last one of several
    for (int n = first + lane; n < end; n += 32) {
        source = __ldg(sources + n);
        log = logs[source];
        top = max_nan(top, log);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        top = max_nan(top, __shfl_xor_sync(kAllLanes, top, step));
    const float base = top == -kInfinity ? 0.0f : top;

    // 2. Sums in the order of the sources, 32 of them at a time.
    float4 sum[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
    for (int start = first; start < end; start += 32) {
        if (end - first > 32) {
            const int n = start + lane;
            source = n < end ? __ldg(sources + n) : 0;
            log = n < end ? logs[source] : -kInfinity;
        }
        const float share = start + lane < end ? natural_exp(log - base) : 0.0f;
        const int count = min(32, end - start);
        for (int i = 0; i < count; i += kAhead) {
            float by[kAhead];
            float4 more[kAhead][kColumns];
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                by[j] = __shfl_sync(kAllLanes, share, i + j);
                const int row = __shfl_sync(kAllLanes, source, i + j);
                const float4 *mine = reinterpret_cast<const float4 *>(from + i64(row) * width);
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    const int column = lane + 32 * c;
                    more[j][c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    // Where nothing was kept, nothing may have been written.
                    if (by[j] != 0.0f && 4 * column < width) more[j][c] = __ldg(mine + column);
                }
            }
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                total += by[j];
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    sum[c].x = fmaf(by[j], more[j][c].x, sum[c].x);
                    sum[c].y = fmaf(by[j], more[j][c].y, sum[c].y);
                    sum[c].z = fmaf(by[j], more[j][c].z, sum[c].z);
                    sum[c].w = fmaf(by[j], more[j][c].w, sum[c].w);
                }
            }
        }
    }
    if (sink) total += natural_exp(logit - base);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const i64 row = i64(matrix) * nq + __ldg(rows + at);
    if (lse && lane == 0) lse[row] = total == 0.0f ? -kInfinity : base + logf(total);
    out_t *to = out + row * width;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        const int column = lane + 32 * c;
        if (4 * column >= width) continue;
        store_pair(to + 4 * column, sum[c].x * inverse, sum[c].y * inverse);
        store_pair(to + 4 * column + 2, sum[c].z * inverse, sum[c].w * inverse);
    }
}

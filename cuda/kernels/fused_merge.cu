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
//   registers four sums at a time
//   needs     sm_80; width % 8 == 0
//   floor     partial results are read once
#include "reduce.cuh"

constexpr int kColumns = (MG_DIM + 127) / 128;  // float4 a lane holds

__device__ __forceinline__ float natural_exp(float x) {
    return kOut == 2 ? expf(x) : __expf(x);
}

extern "C" __global__ void __launch_bounds__(128, 8)
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
    float top = logit;
    for (int n = first + lane; n < end; n += 32) top = max_nan(top, logs[__ldg(sources + n)]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        top = max_nan(top, __shfl_xor_sync(kAllLanes, top, step));
    const float base = top == -kInfinity ? 0.0f : top;

    // 2. Sums in the order of the sources.
    float4 sum[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float total = 0.0f;
    for (int n = first; n < end; ++n) {
        const int source = __ldg(sources + n);
        const float share = natural_exp(logs[source] - base);
        if (share == 0.0f) continue;  // nothing was kept there, and nothing may have been written
        total += share;
        const float4 *mine = reinterpret_cast<const float4 *>(from + i64(source) * width);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int column = lane + 32 * c;
            if (4 * column >= width) continue;
            const float4 more = __ldg(mine + column);
            sum[c].x = fmaf(share, more.x, sum[c].x);
            sum[c].y = fmaf(share, more.y, sum[c].y);
            sum[c].z = fmaf(share, more.z, sum[c].z);
            sum[c].w = fmaf(share, more.w, sum[c].w);
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

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
//   registers kAhead partial rows are asked for at a time, the first ones beside their weights: there are few
//             rows, so that what counts is how many of a row's loads wait for each other
//   early     what the plan says is read while the kernels before it end
//   needs     sm_80; width % 8 == 0
//   floor     partial results are read once
#include "grids.cuh"
#include "reduce.cuh"

constexpr int kColumns = (MG_DIM + 127) / 128;  // float4 a lane holds
constexpr int kAhead = 8 / kColumns;
#if __CUDA_ARCH__ >= 1000
constexpr int kResident = kColumns == 1 ? 6 : 5;  // with one more, ptxas spills there
#else
constexpr int kResident = kColumns == 1 ? 7 : 5;
#endif
static_assert(32 % kAhead == 0, "a warp's sources are asked for in whole sets");

__device__ __forceinline__ float natural_exp(float x) {
    return kOut == 2 ? expf(x) : __expf(x);
}

extern "C" __global__ void __launch_bounds__(128, kResident)
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
    const int first = __ldg(ptr + at), end = __ldg(ptr + at + 1), to_row = __ldg(rows + at);
    const float *logs = partial_lse + matrix * partials;
    const float *from = partial_out + matrix * partials * width;
    const float logit = sink ? sink[matrix % heads] : -kInfinity;
    // Of this lane's source, the last one of several.
    int source = first + lane < end ? __ldg(sources + first + lane) : 0;
    // All of the above is the plan's, all below was written by the grids before.
    wait_for_grids_before();
    float log = first + lane < end ? __ldcg(logs + source) : -kInfinity;
    float4 more[kAhead][kColumns];
    const auto ask = [&](int start, int count) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int row = __shfl_sync(kAllLanes, source, start + j);
            const float4 *mine = reinterpret_cast<const float4 *>(from + i64(row) * width);
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                if (start + j < count && 4 * (lane + 32 * c) < width) more[j][c] = __ldcg(mine + lane + 32 * c);
        }
    };
    ask(0, min(32, end - first));

    // 1. The largest log-sum-exp: lanes look at sources side by side; a maximum knows no order.
    float top = max_nan(logit, log);
    for (int n = first + 32 + lane; n < end; n += 32) {
        source = __ldg(sources + n);
        log = __ldcg(logs + source);
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
            log = n < end ? __ldcg(logs + source) : -kInfinity;
        }
        const float share = start + lane < end ? natural_exp(log - base) : 0.0f;
        const int count = min(32, end - start);
        for (int i = 0; i < count; i += kAhead) {
            if (start > first || i > 0) ask(i, count);
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
                const float by = __shfl_sync(kAllLanes, share, i + j);
                if (by == 0.0f) continue;  // where nothing was kept, nothing may have been written
                total += by;
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    sum[c].x = fmaf(by, more[j][c].x, sum[c].x);
                    sum[c].y = fmaf(by, more[j][c].y, sum[c].y);
                    sum[c].z = fmaf(by, more[j][c].z, sum[c].z);
                    sum[c].w = fmaf(by, more[j][c].w, sum[c].w);
                }
            }
        }
    }
    if (sink) total += natural_exp(logit - base);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const i64 row = i64(matrix) * nq + to_row;
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

// spmm_finish.cu: the last step of a linear layer whose sums lie by features: bias, activation, rows of tokens.
//
//     out[f, n, r] = activated(first[f, r, n] + second[f, r, n] + bias[r]), rounded once
//
//   tensors   first, second VALUES (F, rows, pitch); bias (rows) or none; out (F, tokens, rows), contiguous
//   grid      (tiles of 32 tokens × tiles of 64 features, F)
//   block     256 threads: a warp reads 32 neighbouring sums of 8 features, and writes 64 features of 4 tokens
//   smem      the tile, 8.3 KB
//   floor     what is read of each element and one result written, at the rate of memory
//   needs     sm_80
#include "types.cuh"
#include "activation.cuh"

constexpr bool kTwo = MG_TWO;  // else there is no second
constexpr int kTokens = 32, kFeatures = 64, kWarps = 8;

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    spmm_finish(operand_t *__restrict__ out, const value_t *__restrict__ first, const value_t *__restrict__ second,
                const operand_t *__restrict__ bias, int rows, int tokens, int pitch) {
    __shared__ float tile[kFeatures][kTokens + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int along = (tokens + kTokens - 1) / kTokens;
    const int n0 = blockIdx.x % along * kTokens, r0 = blockIdx.x / along * kFeatures;
    const i64 f = blockIdx.y;
#pragma unroll
    for (int i = 0; i < kFeatures / kWarps; ++i) {
        const int r = warp * (kFeatures / kWarps) + i;
        if (r0 + r >= rows || n0 + lane >= tokens) continue;
        const i64 at = (f * rows + r0 + r) * pitch + n0 + lane;
        const float one = to_float(__ldcs(first + at));
        tile[r][lane] = kTwo ? one + to_float(__ldcs(second + at)) : one;
    }
    float more[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) more[h] = bias && r0 + lane + 32 * h < rows ? to_float(bias[r0 + lane + 32 * h]) : 0.f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokens / kWarps; ++i) {
        const int n = warp * (kTokens / kWarps) + i;
        if (n0 + n >= tokens) continue;
        operand_t *to = out + (f * tokens + n0 + n) * rows + r0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = lane + 32 * h;
            if (r0 + r < rows) to[r] = from_float<operand_t>(activated(tile[r][n] + more[h]));
        }
    }
}

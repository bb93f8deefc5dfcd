#pragma once
// Exchanges among the four lanes of a quad, which share the rows of a matrix fragment.
#include "types.cuh"

// Transposes the 4 × 4 words of a quad: v[i] of lane t becomes v[t] of lane i. In an accumulator of
// packed pairs lane t holds columns 2t, 2t + 1 of four tiles of 8; after it, all 8 columns of tile t.
__device__ __forceinline__ void quad_transpose(u32 (&v)[4], int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 sent = t & 2 ? v[i] : v[i + 2];
        const u32 got = __shfl_xor_sync(0xFFFFFFFFu, sent, 2);
        (t & 2 ? v[i] : v[i + 2]) = got;
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 sent = t & 1 ? v[i] : v[i + 1];
        const u32 got = __shfl_xor_sync(0xFFFFFFFFu, sent, 1);
        (t & 1 ? v[i] : v[i + 1]) = got;
    }
}

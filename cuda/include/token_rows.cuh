#pragma once
// wgmma on x as users of linear layers hold it: B is rows of tokens, and so is the result.
#include "activation.cuh"
#include "copy.cuh"
#include "tma.cuh"
#include "types.cuh"

#ifndef MG_TOKENS
#define MG_TOKENS 0
#endif
[[maybe_unused]] constexpr bool kTokens = MG_TOKENS;

// Shared-memory descriptor of an operand whose rows are kBytes of K (128, 64, 32), in the swizzle of as many; a
// step along K by 16 elements is 32 bytes.
template <int kBytes> __device__ __forceinline__ u64 wgmma_rows(u32 address) {
    static_assert(kBytes == 128 || kBytes == 64 || kBytes == 32, "rows of 32, 64 or 128 bytes");
    constexpr u64 kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;
    return ((address & 0x3FFFF) >> 4) | u64(8 * kBytes >> 4) << 32 | kSwizzle << 62;
}

__device__ __forceinline__ void stmatrix4_turned(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// Writes a warpgroup's 64 features × kWide tokens, times scale, plus the bias of each feature (nullptr: none),
// activated; whole lines of 128 bytes.
//   acc      of a wgmma: features are its rows
//   stage    4096 bytes of shared memory that are the warpgroup's alone, at a multiple of 1024
//   out      (tokens, features), contiguous, features % 8 == 0
//   feature  the warpgroup's first; token: the tile's first
template <int kWide>
__device__ __forceinline__ void store_turned(const float (&acc)[kWide / 2], float scale, const operand_t *bias, u32 stage,
                                             operand_t *out, int feature, int features, int token, int tokens) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, barrier = 2 + threadIdx.x / 128;
    float more[2] = {0.f, 0.f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int at = feature + 16 * warp + 8 * h + lane / 4;
        if (bias && at < features) more[h] = to_float(bias[at]);
    }
#pragma unroll
    for (int j = 0; j < kWide / 8; j += 4) {
        named_barrier(barrier, 128);  // what was here has been read
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i] = pack2<operand_t>(activated(fmaf(acc[4 * (j + i) + 2 * h], scale, more[h])),
                                        activated(fmaf(acc[4 * (j + i) + 2 * h + 1], scale, more[h])));
            stmatrix4_turned(swizzled(stage, lane, 2 * warp + h), v[0], v[1], v[2], v[3]);
        }
        named_barrier(barrier, 128);
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int n = 8 * warp + 4 * q + lane / 8, to = token + 8 * j + n, at = feature + lane % 8 * 8;
            const uint4 v = load_shared16(swizzled(stage, n, lane % 8));
            if (to < tokens && at < features)
                *reinterpret_cast<uint4 *>(out + static_cast<i64>(to) * features + at) = v;
        }
    }
}

#pragma once
// Metadata of N:M matrices and streamed values on their way to shared memory (sm_90).
#include "nm_left.cuh"
#include "tma.cuh"

// What L2 is told of lines that a copy brings.
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ u64 evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void tma_stream(u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2,
                                           u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
        : "memory");
}

// Metadata of one matrix: `lines` lines of `stored` words. A stage's part of it comes by plain bulk copies,
// which need no descriptor of memory that may be new with every call.
struct Words {
    const u32 *words;
    int stored, lines;

    // Bytes that `bring` copies: less than a whole stage's at the edges, whose products nobody keeps.
    template <int kRows> __device__ __forceinline__ u32 bytes(int row, int line) const {
        return max(0, min(kRows, stored - row)) * max(0, min(kSteps, lines - line)) * 4;
    }
    template <int kRows> __device__ __forceinline__ void bring(u32 to, u32 barrier, int row, int line,
                                                              u64 policy) const {
        if (row >= stored) return;
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            if (line + s < lines)
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                             "[%0], [%1], %2, [%3], %4;" ::"r"(
                                 to + s * 4 * kRows),
                             "l"(words + static_cast<i64>(line + s) * stored + row), "r"(4 * min(kRows, stored - row)),
                             "r"(barrier), "l"(policy)
                             : "memory");
    }
};

// wgmma: what there is around the warpgroup matrix multiply of sm_90a, whose shapes are in wgmma_shapes.cuh.
#pragma once

#include "types.cuh"
#include "wgmma_shapes.cuh"

// This thread's warp, known to be the same for all lanes: descriptors are then made by the uniform datapath.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0); }

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Shared-memory descriptor of a 128-byte-swizzled operand: 8-row atoms of 1024 bytes.
// K-major (K contiguous): step along K by 16 elements = 32 bytes; `leading` is ignored.
// MN-major (N contiguous): step along K by 16 rows = 2048 bytes; `leading` is the byte distance from
// one 64-column panel to the next.
__device__ __forceinline__ unsigned long long wgmma_descriptor(unsigned address,
                                                               unsigned leading) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) |
         ((unsigned long long)((leading & 0x3FFFF) >> 4) << 16) |
         ((unsigned long long)(1024 >> 4) << 32) | (1ull << 62);
}
// The same of an MN-major operand whose rows are kBytes of N (128, 64, 32), in the swizzle of as many: atoms of
// 8 rows, a step along K by 16 rows; `leading` is the byte distance from one panel of so many to the next.
template <int kBytes>
__device__ __forceinline__ unsigned long long wgmma_columns(unsigned address, unsigned leading) {
  static_assert(kBytes == 128 || kBytes == 64 || kBytes == 32, "rows of 32, 64 or 128 bytes");
  constexpr unsigned long long kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;
  return (unsigned long long)((address & 0x3FFFF) >> 4) |
         ((unsigned long long)((leading & 0x3FFFF) >> 4) << 16) |
         ((unsigned long long)(8 * kBytes >> 4) << 32) | (kSwizzle << 62);
}

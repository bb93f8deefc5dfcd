#pragma once
// Reductions across the lanes of a warp, in one fixed tree each, so that results are repeatable.
#include "types.cuh"

constexpr u32 kAllLanes = 0xffffffffu;

// Maximum that hands NaN on; fmaxf would drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Sums of kLanes registers across groups of kLanes neighbouring lanes, transposed: lane l of a group
// gets the sum over its group of a[l], in a[0]. kLanes − 1 shuffles instead of kLanes · log2(kLanes):
// at each step a lane keeps one half of its registers and trades the other for its partner's.
template <int kLanes> __device__ __forceinline__ void transpose_sum(float *a, int lane) {
#pragma unroll
    for (int width = kLanes / 2; width > 0; width /= 2) {
        const bool upper = lane & width;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const float given = upper ? a[i] : a[i + width];
            const float kept = upper ? a[i + width] : a[i];
            a[i] = kept + __shfl_xor_sync(kAllLanes, given, width);
        }
    }
}

// Sum over lanes whose numbers differ in the bits kFrom … kTo / 2 only; every one of them gets it.
template <int kFrom, int kTo> __device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
    for (int width = kFrom; width < kTo; width *= 2) x += __shfl_xor_sync(kAllLanes, x, width);
    return x;
}

#pragma once
// What MG_ACTIVATION does to a sum and its bias before they are rounded; absent or 0: nothing.
//     1 gelu, x Φ(x)   2 gelu_tanh, its approximation by tanh   3 silu, x / (1 + exp(−x))   4 relu
//
// Float32 takes the functions of the CUDA library. For gelu those are 54 instructions, which nothing hides at the end
// of a tile; halves take 17, 10 and 6 for the first three, within 1/8 of a half's last place of the exact result:
// tests/primitives/test_activations.py counts it. What is below 1e-36 may be 0.
#include "exponent.cuh"

#ifndef MG_ACTIVATION
#define MG_ACTIVATION 0
#endif
// An enumerator is no symbol: cubins of kernels without an activation are the same to the byte.
enum : int { kActivation = MG_ACTIVATION };
static_assert(kActivation >= 0 && kActivation <= 4, "MG_ACTIVATION: 0 none, 1 gelu, 2 gelu_tanh, 3 silu, 4 relu");

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / (1 + exp(−s)) for −s = x · `slope`.
__device__ __forceinline__ float gated(float x, float slope) {
    if constexpr (sizeof(operand_t) == 4) return x / (1.f + expf(x * slope));
    return x * reciprocal(1.f + exp2_fast(x * slope * kLog2e));
}

__device__ __forceinline__ float activated(float x) {
    if constexpr (kActivation == 1) {
        // Not 1 + erf, which has no digits left where x is far below 0.
        if constexpr (sizeof(operand_t) == 4) return x * (0.5f * erfcf(-0.70710678f * x));
        // Φ(−|x|) = exp(−x² / 2) · p(t), t = 1 / (1 + 0.3765 |x|): p of least relative error, 2.9e-5, to |x| = 14.
        const float t = reciprocal(fmaf(0.37650783f, fabsf(x), 1.f));
        float p = fmaf(t, -0.09096618f, 0.19796763f);
        p = fmaf(t, p, 0.08528816f);
        p = fmaf(t, p, 0.15800722f);
        p = fmaf(t, p, 0.14968893f) * t;
        const float tail = exp2_fast(x * -0.72134752f * x) * p;
        return x * (x > 0.f ? 1.f - tail : tail);
    } else if constexpr (kActivation == 2) {
        // 0.5 x (1 + tanh u) = x / (1 + exp(−2u)), which keeps its digits too; u = √(2/π) (x + 0.044715 x³).
        return gated(x, fmaf(x * x, -0.07135482f, -1.59576912f));
    } else if constexpr (kActivation == 3) {
        return gated(x, -1.f);
    } else if constexpr (kActivation == 4) {
        return x < 0.f ? 0.f : x;  // NaN stays
    } else {
        return x;
    }
}

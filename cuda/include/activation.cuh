#pragma once
// What MG_ACTIVATION does to a sum and its bias before they are rounded; absent or 0: nothing.
//     1 gelu, x Φ(x)   2 gelu_tanh, its approximation by tanh   3 silu, x / (1 + exp(−x))   4 relu
#include "types.cuh"

#ifndef MG_ACTIVATION
#define MG_ACTIVATION 0
#endif
// An enumerator is no symbol: cubins of kernels without an activation are the same to the byte.
enum : int { kActivation = MG_ACTIVATION };
static_assert(kActivation >= 0 && kActivation <= 4, "MG_ACTIVATION: 0 none, 1 gelu, 2 gelu_tanh, 3 silu, 4 relu");

__device__ __forceinline__ float activated(float x) {
    if constexpr (kActivation == 1) {
        // Not 1 + erf, which has no digits left where x is far below 0.
        return x * (0.5f * erfcf(-0.70710678f * x));
    } else if constexpr (kActivation == 2) {
        // 0.5 x (1 + tanh u) = x / (1 + exp(−2u)), which keeps its digits too; u = √(2/π) (x + 0.044715 x³).
        return x / (1.f + expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    } else if constexpr (kActivation == 3) {
        return x / (1.f + expf(-x));
    } else if constexpr (kActivation == 4) {
        return x < 0.f ? 0.f : x;  // NaN stays
    } else {
        return x;
    }
}

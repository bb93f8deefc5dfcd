#pragma once
// From the accumulators of a warp to 16 rows of a row-major result, or to 16 columns of one whose rows are tokens.
#include "activation.cuh"
#include "quad.cuh"
#include "types.cuh"

// What the bias adds to a lane's features; [2 b + e], see below.
__device__ __forceinline__ void bias_of(float (&more)[4], const operand_t *bias, int feature, int features) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        const int at = feature + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2;
        if (at < features) more[c] = to_float(bias[at]);
    }
}

// Scales, adds the bias (nullptr: none) and activates what store_tokens is then to write as it is. A pass of its own:
// with the addresses of the stores there are not enough registers.
template <int kCount>
__device__ __forceinline__ void activate_tokens(float (&acc)[kCount], float scale, const operand_t *bias, int feature,
                                                int features) {
    float more[4] = {0.f, 0.f, 0.f, 0.f};
    if (bias) bias_of(more, bias, feature, features);
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = activated(fmaf(acc[i], scale, more[i / 4 % 2 * 2 + i % 2]));
}

// Writes kWide tokens × 16 features, scaled and plus the bias (nullptr: none); kFloat: as float32.
//   acc      [8 i + 4 b + 2 h + e]: token 16 i + 8 h + g, feature 8 b + 2 t + e
//   token    this lane's first: the tile's first plus g;  feature: the line's first
//   out      (tokens, features), contiguous
template <int kWide, bool kFloat>
__device__ __forceinline__ void store_tokens(const float (&acc)[kWide / 2], float scale, const operand_t *bias, void *out,
                                             int token, int tokens, int feature, int features) {
    const int t = threadIdx.x % 4;
    float more[4] = {0.f, 0.f, 0.f, 0.f};
    if (bias) bias_of(more, bias, feature, features);
    if (!kFloat && features % 8 == 0) {
        // A lane of a quad takes 8 neighbouring features of one token: whole 16-byte stores.
#pragma unroll
        for (int i = 0; i < kWide / 16; ++i) {
            u32 v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {  // 2 h + b
                const float *from = acc + 8 * i + c % 2 * 4 + c / 2 * 2;
                v[c] = pack2<operand_t>(fmaf(from[0], scale, more[c % 2 * 2]), fmaf(from[1], scale, more[c % 2 * 2 + 1]));
            }
            quad_transpose(v, t);
            const int row = token + 16 * i + t / 2 * 8, at = feature + t % 2 * 8;
            if (row < tokens && at < features)
                *reinterpret_cast<uint4 *>(static_cast<operand_t *>(out) + static_cast<i64>(row) * features + at) =
                    make_uint4(v[0], v[1], v[2], v[3]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kWide / 2; ++i) {
        const int row = token + i / 8 * 16 + i / 2 % 2 * 8, at = feature + i / 4 % 2 * 8 + 2 * t + i % 2;
        if (row >= tokens || at >= features) continue;
        const float y = fmaf(acc[i], scale, more[i / 4 % 2 * 2 + i % 2]);
        const i64 to = static_cast<i64>(row) * features + at;
        if constexpr (kFloat)
            static_cast<float *>(out)[to] = y;
        else
            static_cast<operand_t *>(out)[to] = from_float<operand_t>(y);
    }
}

// Writes 16 rows × kWide columns, scaled; kFloat: as float32.
//   acc      [4 j + 2 h + e]: row 8 h + g, column 8 j + 2 t + e
//   row      this lane's first: the warp's first plus g;  column: the tile's first
//   out      (rows, width), contiguous, width % 8 == 0
template <int kWide, bool kFloat>
__device__ __forceinline__ void store_rows(const float (&acc)[kWide / 2], float scale, void *out, int row, int rows,
                                           int column, int width) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (kFloat && row + 8 * h >= rows) continue;
        const i64 first = static_cast<i64>(row + 8 * h) * width + column;
        if constexpr (kFloat) {
            float *to = static_cast<float *>(out) + first + 2 * t;
#pragma unroll
            for (int j = 0; j < kWide / 8; ++j)
                if (column + 8 * j < width) store_pair(to + 8 * j, acc[4 * j + 2 * h] * scale, acc[4 * j + 2 * h + 1] * scale);
        } else {
            // A lane of a quad takes 8 neighbouring columns of every 32: whole 16-byte stores.
            operand_t *to = static_cast<operand_t *>(out) + first + 8 * t;
#pragma unroll
            for (int j = 0; j < kWide / 8; j += 4) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i] = pack2<operand_t>(acc[4 * (j + i) + 2 * h] * scale, acc[4 * (j + i) + 2 * h + 1] * scale);
                quad_transpose(v, t);
                if (row + 8 * h < rows && column + 8 * (j + t) < width)
                    __stcs(reinterpret_cast<uint4 *>(to + 8 * j), make_uint4(v[0], v[1], v[2], v[3]));
            }
        }
    }
}

#pragma once
// From the accumulators of a wgmma to a row-major result in global memory.
#include "quad.cuh"
#include "types.cuh"

// Writes 64 × kWide accumulators times scale; kFloat: as float32, added to what is there if `add`.
//   out     of the matrix: rows × width, rows at 16-byte multiples, width % 8 == 0
//   row     this lane's first row: its warp's first plus lane / 4; column: the tile's first
template <int kWide, bool kFloat>
__device__ __forceinline__ void store_result(const float (&acc)[kWide / 2], float scale, void *out, int row,
                                             int rows, int column, int width, bool add) {
    const int pair = threadIdx.x % 4;
    if constexpr (kFloat) {
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = column + 8 * j + 2 * pair;
                if (row + 8 * h >= rows || at >= width) continue;
                float2 *to = reinterpret_cast<float2 *>(static_cast<float *>(out) + static_cast<i64>(row + 8 * h) * width + at);
                float2 v = make_float2(acc[4 * j + 2 * h] * scale, acc[4 * j + 2 * h + 1] * scale);
                if (add) {
                    const float2 old = *to;
                    v.x += old.x;
                    v.y += old.y;
                }
                *to = v;
            }
    } else {
        // A lane of a quad takes 8 neighbouring columns of every 32: whole 16-byte stores without shared
        // memory, which goes on filling meanwhile.
#pragma unroll
        for (int j = 0; j < kWide / 8; j += 4)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i] = pack2<operand_t>(acc[4 * (j + i) + 2 * h] * scale, acc[4 * (j + i) + 2 * h + 1] * scale);
                quad_transpose(v, pair);
                const int at = column + 8 * (j + pair);
                if (row + 8 * h < rows && at < width)
                    __stcs(reinterpret_cast<uint4 *>(static_cast<operand_t *>(out) + static_cast<i64>(row + 8 * h) * width + at),
                           make_uint4(v[0], v[1], v[2], v[3]));
            }
    }
}

#pragma once
// From the accumulators of a wgmma to a row-major result in global memory, through a little shared memory.
#include "copy.cuh"
#include "tma.cuh"
#include "types.cuh"

// Bytes a warp.
constexpr u32 kStaging = 1024;

// Writes a warp's 16 × kWide accumulators times scale, 2 bytes each: whole lines of 128 bytes, without exchanges
// between lanes, which take as long as the stores.
//   stage   kStaging bytes of shared memory that are the warp's alone, at a multiple of 1024
//   out     of the matrix: rows × width, rows at 16-byte multiples, width % 8 == 0
//   row     the warp's first; column: the tile's first
template <int kWide>
__device__ __forceinline__ void store_staged(const float (&acc)[kWide / 2], float scale, u32 stage, operand_t *out, int row,
                                             int rows, int column, int width) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kWide / 8; j += 8)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                v[i] = pack2<operand_t>(acc[4 * (j + i) + 2 * h] * scale, acc[4 * (j + i) + 2 * h + 1] * scale);
            __syncwarp();  // what was here has been read
            stmatrix4(swizzled(stage, lane % 8, lane / 8), v[0], v[1], v[2], v[3]);
            stmatrix4(swizzled(stage, lane % 8, lane / 8 + 4), v[4], v[5], v[6], v[7]);
            __syncwarp();
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const int r = 4 * q + lane / 8, to = row + 8 * h + r, at = column + 8 * j + lane % 8 * 8;
                const uint4 v8 = load_shared16(swizzled(stage, r, lane % 8));
                if (to < rows && at < width) __stcs(reinterpret_cast<uint4 *>(out + static_cast<i64>(to) * width + at), v8);
            }
        }
}

// Writes a warp's 16 × kWide accumulators times scale, kWide 16 or 32, to 16 rows that follow each other in memory.
//   stage   as above
//   out     of the first row, at a multiple of 16 bytes
template <int kWide>
__device__ __forceinline__ void store_rows(const float (&acc)[kWide / 2], float scale, u32 stage, operand_t *out) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // what was here has been read
#pragma unroll
    for (int j = 0; j < kWide / 8; j += 2) {
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)  // rows from 0 and 8, then the same of the next eight columns
            v[i] = pack2<operand_t>(acc[4 * j + 2 * i] * scale, acc[4 * j + 2 * i + 1] * scale);
        stmatrix4(chunk_of_row<2 * kWide>(stage, lane % 16, j + lane / 16), v[0], v[1], v[2], v[3]);
    }
    __syncwarp();
    constexpr int kChunks = kWide / 8;  // of a row
#pragma unroll
    for (int q = 0; q < kChunks / 2; ++q) {
        const int i = 32 * q + lane;
        const uint4 v = load_shared16(chunk_of_row<2 * kWide>(stage, i / kChunks, i % kChunks));
        __stcs(reinterpret_cast<uint4 *>(out) + i, v);
    }
}

// sddmm_pick_nm_sm90: values of a 2:4 or 1:2 matrix, scale · Σ yᵀ x over rows of tokens: a layer's gradient.
//
// A CTA multiplies a dense tile of kTall × kWide, on wgmma, and takes out of shared memory what metadata say: products
// with zeros cost what a dense product costs, but are never in global memory.
//
//   y, x      rows of tokens, see dense_tile.cuh
//   values    (F, lines, packed); slots beyond rows or columns get zero
//   metadata  (packed / 16, lines / 32, 8 g, 2 a, 2 d) words: of rows 16 a + g in the low half and 16 a + g + 8 in the
//             high half, of each group of 4 columns a nibble: two columns (formats/nm_metadata.py)
//
//   grid   CTAs that take `count` tiles in turn, `wide` of them side by side
//   block  2 warpgroups of consumers, and one that produces
//   smem   of dense_tile.cuh
//   floor  2 · lines · 2 packed · T FLOP at 800 TFLOP/s; metadata read, values written, at 4.24 TB/s
//   needs  sm_90a, rows of tokens at multiples of 16 bytes
#include "types.cuh"
#include "copy.cuh"
#include "dense_tile.cuh"

// Of a tile: words of metadata of a thread, two rows and 16 columns each.
constexpr int kWords = kTall / 2 * (kWide / 16) / kConsumers;

// The two columns of four that a nibble names.
__device__ __forceinline__ u32 kept2(u32 low, u32 high, u32 nibble) {
    return __byte_perm(low, high, ((nibble & 3) * 0x22 + 0x10) | ((nibble >> 2 & 3) * 0x22 + 0x10) << 8);
}
// Zeroes those of the two that lie at `limit` or beyond, counted from the first of the four.
__device__ __forceinline__ u32 within(u32 two, u32 nibble, int limit) {
    return (int(nibble & 3) < limit ? two & 0x0000FFFFu : 0u) | (int(nibble >> 2 & 3) < limit ? two & 0xFFFF0000u : 0u);
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_pick_nm_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                       const u32 *__restrict__ metadata, int wide, int count, operand_t *__restrict__ values, i64 slots,
                       float scale, int tokens, int rows, int columns, int lines, int packed) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const int down = (lines + kTall - 1) / kTall;
    int n = int(blockIdx.x) - int(gridDim.x), row0, column0;
    auto next = [&](DensePlace &at) {
        n += gridDim.x;
        if (n >= count) return false;
        row0 = n / wide % down * kTall, column0 = n % wide * kWide;
        at = {row0, column0, n / wide / down};
        return true;
    };
    // Bits of a word's number: d, one of C, three of g; a, two of R; the rest of C.
    const int number = threadIdx.x % kConsumers, d = number % 2, g = number / 4 % 8, a = number / 32 % 2;
    const int below = number / 64 * 32;
    auto across = [&](int i) { return (number / 2 % 2 + 2 * i) * 32; };
    u32 words[kWords];
    auto ahead = [&] {
        const int line = row0 + below;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const i64 column = (column0 + across(i)) / 32;
            const bool there = line < lines && column < packed / 16;
            words[i] = there ? __ldg(metadata + (column * (lines / 32) + line / 32) * 32 + 4 * g + 2 * a + d) : 0u;
        }
    };
    dense_tiles(y_map, x_map, ring, tokens, scale, next, ahead, [&](const DensePlace &at, u32 made) {
        if (row0 + below >= lines) return;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int column = across(i) + 16 * d;  // of the tile
            if (column0 + column >= 2 * packed) break;
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int row = below + 16 * a + 8 * b + g;
                const u32 word = words[i] >> (16 * b), from = made + row * kPitch + 2 * column;
                u32 v[8], kept[4];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4 four = load_shared16(from + 16 * h);
                    v[4 * h] = four.x, v[4 * h + 1] = four.y, v[4 * h + 2] = four.z, v[4 * h + 3] = four.w;
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) kept[n] = kept2(v[2 * n], v[2 * n + 1], word >> (4 * n));
                const int limit = row0 + row < rows ? columns - column0 - column : 0;
                if (limit < 16) {
#pragma unroll
                    for (int n = 0; n < 4; ++n) kept[n] = within(kept[n], word >> (4 * n), limit - 4 * n);
                }
                operand_t *to = values + at.matrix * slots + static_cast<i64>(row0 + row) * packed + (column0 + column) / 2;
                __stcs(reinterpret_cast<uint4 *>(to), uint4{kept[0], kept[1], kept[2], kept[3]});
            }
        }
    });
}

// nm_spread: a 2:4 or 1:2 matrix of halves as a dense one, for products that have no use for its zeros.
//
// A warp takes 32 rows of 128 columns and asks for all of them at once; neighbouring lanes exchange halves of what they
// made, so that what lanes write together lies side by side.
//
//   out       (rows, pitch)     pitch % 8 == 0
//   values    (lines, packed)   rows at multiples of 16 bytes; what lies beyond rows may hold anything
//   metadata  see nm_spread.cuh
//
//   grid   (tiles of 32 · kWarps rows, tiles of 128 columns)
//   block  kWarps warps
//   floor  values and metadata read, out written, at 4.24 TB/s
//   needs  sm_80
#include "types.cuh"
#include "nm_spread.cuh"

constexpr int kWarps = 8, kItems = 8;

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    nm_spread(operand_t *__restrict__ out, const operand_t *__restrict__ values, const u32 *__restrict__ metadata, int rows,
              int lines, int packed, int pitch) {
    const int lane = threadIdx.x % 32, row0 = (blockIdx.x * kWarps + threadIdx.x / 32) * 32, column0 = blockIdx.y * 128;
    if (row0 >= rows) return;
    // Eight lanes share 128 bytes of a row's values; four of them that are neighbours, half of them.
    const int part = lane % 4 + lane / 8 % 2 * 4, below = lane / 4 % 2 + lane / 16 * 2;
    const bool live = column0 + 16 * part < 2 * packed, odd = part % 2;
    const u32 *const lowest = metadata + (column0 / 32 + part / 2) * static_cast<i64>(lines) + row0 + 4 * below + part % 2;
    const operand_t *const first = values + (row0 + below) * static_cast<i64>(packed) + column0 / 2 + 8 * part;
    u32 words[kItems / 2];
    uint4 held[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        // One word is of this row and of that 8 below, which is the item after the next.
        if (i / 2 % 2 == 0) words[i / 4 * 2 + i % 2] = live ? __ldg(lowest + i % 2 * 16 + i / 4 * 2) : 0u;
        held[i] = uint4{0u, 0u, 0u, 0u};
        if (live && row0 + 4 * i + below < rows)
            held[i] = __ldg(reinterpret_cast<const uint4 *>(first + 4 * i * static_cast<i64>(packed)));
    }
    const int column = column0 + (part - odd) * 16 + odd * 8;
    operand_t *const to = out + (row0 + below) * static_cast<i64>(pitch) + column;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        u32 w[8];
        spread(held[i], kinds(words[i / 4 * 2 + i % 2]) >> (i / 2 % 2 * 16), w);
        uint4 ahead, behind;  // 16 bytes of each of the two lanes' first halves, then of their second ones
        u32 *const halves[2] = {&ahead.x, &behind.x};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const u32 got = __shfl_xor_sync(~0u, odd ? w[n] : w[4 + n], 1);
            halves[0][n] = odd ? got : w[n];
            halves[1][n] = odd ? w[4 + n] : got;
        }
        if (row0 + 4 * i + below >= rows) continue;
        operand_t *const at = to + 4 * i * static_cast<i64>(pitch);
        if (column < pitch) *reinterpret_cast<uint4 *>(at) = ahead;
        if (column + 16 < pitch) *reinterpret_cast<uint4 *>(at + 16) = behind;
    }
}

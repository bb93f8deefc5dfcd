// tile_order: values of 16 × 16 tiles from fragment order to rows, or back.
//
//   to, from  (n) elements, whole tiles, contiguous
//   grid      CTAs of 2048 elements
//   block     256: a thread moves 8 neighbouring elements of `from` (kBack: of `to`)
//   floor     bytes read and written, at the rate of memory
//   needs     sm_80
#include "types.cuh"

constexpr bool kBack = MG_BACK;  // to fragment order

extern "C" __global__ void __launch_bounds__(256)
    tile_order(operand_t *__restrict__ to, const operand_t *__restrict__ from, i64 n) {
    const i64 first = (static_cast<i64>(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (first >= n) return;
    // Lane 4 g + t of a warp has (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), and those 8 columns on.
    const int lane = static_cast<int>(first / 8 % 32), g = lane / 4, t = lane % 4;
    const i64 tile = first / 256 * 256;
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
        const i64 row = tile + (g + c / 2 % 2 * 8) * 16 + 2 * t + c / 4 * 8;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if constexpr (kBack)
                to[first + c + e] = from[row + e];
            else
                to[row + e] = from[first + c + e];
        }
    }
}

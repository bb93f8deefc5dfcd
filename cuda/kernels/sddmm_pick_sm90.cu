// sddmm_pick_sm90: values of single entries, scale · Σ yᵀ x over rows of tokens: the gradient of a layer's weight.
//
// A CTA multiplies a dense tile of kTall × kWide, on wgmma, and picks what is kept of it out of shared memory. So an
// entry costs what its share of a dense product costs, and only entries are written.
//
//   y, x    rows of tokens, see dense_tile.cuh
//   values  (F, slots)
//   tiles   (count) int4     first row and column of a tile, its first pick and the end of its picks
//   spots   (picks) u16      kWide · row + column in the tile; slots (picks) int of its value; by slot
//
//   grid   CTAs that take such tiles of `matrices` matrices in turn
//   block  2 warpgroups of consumers, and one that produces
//   smem   of dense_tile.cuh
//   floor  2 · tiles · kTall · kWide · T FLOP at 800 TFLOP/s; 6 B a pick to read, 2 to write
//   needs  sm_90a, rows of tokens at multiples of 16 bytes, fewer than 2³¹ − 2¹⁴ picks
#include "types.cuh"
#include "dense_tile.cuh"
#include "tile.cuh"

constexpr int kAtOnce = 8;  // picks of a thread, whose loads are under way together

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_pick_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                    const int4 *__restrict__ tiles, int count, int matrices, const u16 *__restrict__ spots,
                    const int *__restrict__ slots, operand_t *__restrict__ values, i64 all_slots, float scale, int tokens) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    int n = int(blockIdx.x) - int(gridDim.x);
    int4 tile;
    auto next = [&](DensePlace &at) {
        n += gridDim.x;
        if (n >= count * matrices) return false;
        tile = __ldg(tiles + n % count);
        at = {tile.x, tile.y, n / count};
        return true;
    };
    auto ahead = [&] {  // what is to be picked, on its way to L2
        for (int i = tile.z + threadIdx.x * 32; i < tile.w; i += kConsumers * 32) prefetch_l2(slots + i);
        for (int i = tile.z + threadIdx.x * 64; i < tile.w; i += kConsumers * 64) prefetch_l2(spots + i);
    };
    dense_tiles(y_map, x_map, ring, tokens, scale, next, ahead, [&](const DensePlace &at, u32 made) {
        u16 *const to = reinterpret_cast<u16 *>(values + at.matrix * all_slots);
        const int last = tile.w - 1;
#pragma unroll 1
        for (int first = tile.z + threadIdx.x; first < tile.w; first += kAtOnce * kConsumers) {
            int slot[kAtOnce];
            u32 spot[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {  // beyond the last it is the last, which is written again
                const int pick = min(first + i * kConsumers, last);
                slot[i] = __ldg(slots + pick), spot[i] = __ldg(spots + pick);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                u16 v;
                const u32 from = made + spot[i] / kWide * kPitch + spot[i] % kWide * 2;
                asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from));
                to[slot[i]] = v;
            }
        }
    });
}

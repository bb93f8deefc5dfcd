// sddmm_pick_tile_sm90: values of 16 × 16 tiles, scale · Σ yᵀ x over rows of tokens: a layer's gradient.
//
// A CTA multiplies a dense tile of kTall × kWide, on wgmma, of which a warp holds 16 rows: what is kept of them is written
// from registers. Products that nobody keeps cost what a dense product costs; from one tile in ten on that is less than
// mma.sync takes for tiles alone.
//
//   y, x      rows of tokens, see dense_tile.cuh
//   values    (F, slots), 256 a tile: in fragment order, or with kRows row after row; zeros beyond rows or columns
//   tiles     (count) int2, (row, column) / (kTall, kWide), of those that keep something
//   numbers   (count, kTall / 16, kWide / 16) int: of each of them, where a tile is its number, else −1
//
//   grid   CTAs that take such tiles of `matrices` matrices in turn
//   block  2 warpgroups of consumers, and one that produces
//   smem   of dense_tile.cuh
//   floor  2 · kTall · kWide · T FLOP at 800 TFLOP/s for each of `tiles`; values written, at 4.24 TB/s
//   needs  sm_90a, rows of tokens at multiples of 16 bytes
#include "types.cuh"
#include "dense_tile.cuh"

constexpr bool kRows = MG_ROWS;

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_pick_tile_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                         const int2 *__restrict__ tiles, const int *__restrict__ numbers, int count, int matrices,
                         operand_t *__restrict__ values, i64 slots, float scale, int tokens, int rows, int columns) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    int n = int(blockIdx.x) - int(gridDim.x);
    auto next = [&](DensePlace &at) {
        n += gridDim.x;
        if (n >= count * matrices) return false;
        const int2 tile = __ldg(tiles + n % count);
        at = {tile.x * kTall, tile.y * kWide, n / count};
        return true;
    };
    int number;  // of this warp's tile at 16 columns for each lane
    auto before = [&] {
        const int *const own = numbers + (static_cast<i64>(n % count) * (kTall / 16) + warp) * (kWide / 16);
        number = __ldg(own + lane % (kWide / 16));
    };
    dense_sums(y_map, x_map, ring, tokens, next, before, [&](const DensePlace &at, const float (&acc)[kWide / 2]) {
        const bool inside = at.row + kTall <= rows && at.column + kWide <= columns;
        const int row = at.row + 16 * warp + lane / 4, first = at.column + lane % 4 * 2;
        operand_t *const to = values + at.matrix * slots;
#pragma unroll
        for (int j = 0; j < kWide / 16; ++j) {
            const int n = __shfl_sync(~0u, number, j);
            if (n < 0) continue;
            u32 v[4];  // rows + 8 (h % 2), columns + 8 (h / 2)
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                float low = acc[8 * j + 2 * h] * scale, high = acc[8 * j + 2 * h + 1] * scale;
                if (!inside) {  // zeros there may have met what is not finite
                    const int column = first + 16 * j + h / 2 * 8;
                    const bool there = row + h % 2 * 8 < rows;
                    if (!there || column >= columns) low = 0.f;
                    if (!there || column + 1 >= columns) high = 0.f;
                }
                v[h] = pack2<operand_t>(low, high);
            }
            operand_t *const own = to + static_cast<i64>(n) * 256;
            if constexpr (kRows)
#pragma unroll
                for (int h = 0; h < 4; ++h)
                    __stcs(reinterpret_cast<u32 *>(own + (lane / 4 + h % 2 * 8) * 16 + h / 2 * 8 + lane % 4 * 2), v[h]);
            else
                __stcs(reinterpret_cast<uint4 *>(own + lane * 8), uint4{v[0], v[1], v[2], v[3]});
        }
    });
}

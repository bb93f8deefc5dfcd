// sddmm_pick_sm90: values of single entries, scale · Σ yᵀ x over rows of tokens: the gradient of a layer's weight.
//
// A CTA multiplies a dense tile of kRows × kWide, on wgmma, and picks what is kept of it out of shared memory. So an
// entry costs what its share of a dense product costs, and only entries are written.
//
//   y       (F, T, rows)     by a 4-D tensor map (rows, T, 1, F); x (F, T, columns) alike; boxes of 64 × 64 tokens
//   values  (F, slots)
//   tiles   (CTAs) int4      first row and column of a tile, its first pick and the end of its picks
//   spots   (picks) u16      kWide · row + column in the tile; slots (picks) int of its value; by slot
//
//   grid   (CTAs, F)
//   block  2 warpgroups of consumers, 64 rows each, and one that produces
//   smem   kStages of 64 tokens of y and x; in their place the tile's results
//   floor  2 · tiles · kRows · kWide · T FLOP at 800 TFLOP/s; 6 B a pick to read, 2 to write
//   needs  sm_90a, rows of tokens at multiples of 16 bytes, fewer than 2³¹ − 2¹⁴ picks
#include "types.cuh"
#include "ring.cuh"
#include "tile.cuh"

constexpr int kRows = 128, kWide = MG_WIDE, kStages = MG_STAGES, kConsumers = 2 * kRows;
static_assert(kWide == 128 || kWide == 256, "WIDE must be 128 or 256");
constexpr int kPanelsY = kRows / 64, kPanels = kPanelsY + kWide / 64;
constexpr u32 kPanel = 64 * 128, kStage = kPanels * kPanel;
constexpr u32 kPitch = 2 * kWide + 16;  // bytes of a row of results: lanes write to all banks
static_assert(kRows * kPitch <= kStages * kStage, "results have room");
constexpr int kAtOnce = 8;  // picks of a thread, whose loads are under way together

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_pick_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                    const int4 *__restrict__ tiles, const u16 *__restrict__ spots, const int *__restrict__ slots,
                    operand_t *__restrict__ values, i64 all_slots, float scale, int tokens) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32, matrix = blockIdx.y;
    const int4 tile = __ldg(tiles + blockIdx.x);
    const int steps = (tokens + 63) / 64;

    if (threadIdx.x == kConsumers) tma_prefetch(y_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x != kConsumers) return;
        int stage = 0;
        u32 parity = 1;
        for (int i = 0; i < steps; ++i) {
            const u32 to = ring + stage * kStage, done = full + 8 * stage;
            barrier_wait(empty + 8 * stage, parity);
            barrier_expect(done, kStage);
#pragma unroll
            for (int p = 0; p < kPanelsY; ++p) tma_load(to + p * kPanel, y_map, done, tile.x + 64 * p, 64 * i, 0, matrix);
#pragma unroll
            for (int p = kPanelsY; p < kPanels; ++p)
                tma_load(to + p * kPanel, x_map, done, tile.y + 64 * (p - kPanelsY), 64 * i, 0, matrix);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // What is to be picked, on its way to L2 meanwhile.
    for (int i = tile.z + threadIdx.x * 32; i < tile.w; i += kConsumers * 32) prefetch_l2(slots + i);
    for (int i = tile.z + threadIdx.x * 64; i < tile.w; i += kConsumers * 64) prefetch_l2(spots + i);
    float acc[kWide / 2];
#pragma unroll
    for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
    const u64 left = wgmma_descriptor(ring + warp / 4 * kPanel, kPanel);
    const u64 right = wgmma_descriptor(ring + kPanelsY * kPanel, kPanel);
    multiply_ring<kStages>(steps, full, empty, lane, [&](int stage) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            Wgmma<kWide>::template ss<1, 1>(acc, left + ((stage * kStage + k * 2048) >> 4),
                                            right + ((stage * kStage + k * 2048) >> 4), 1);
    });

    named_barrier(1, kConsumers);  // nobody reads the ring any more
    const u32 mine = ring + (16 * warp + lane / 4) * kPitch + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < kWide / 2; i += 2)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(mine + i / 2 % 2 * 8 * kPitch + i / 4 * 16),
                     "r"(pack2<operand_t>(acc[i] * scale, acc[i + 1] * scale))
                     : "memory");
    named_barrier(1, kConsumers);
    u16 *const to = reinterpret_cast<u16 *>(values + matrix * all_slots);
    const int last = tile.w - 1;
#pragma unroll 1
    for (int first = tile.z + threadIdx.x; first < tile.w; first += kAtOnce * kConsumers) {
        int slot[kAtOnce];
        u32 spot[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {  // beyond the last it is the last, which is written again
            const int at = min(first + i * kConsumers, last);
            slot[i] = __ldg(slots + at), spot[i] = __ldg(spots + at);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            u16 v;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(ring + spot[i] / kWide * kPitch + spot[i] % kWide * 2));
            to[slot[i]] = v;
        }
    }
}

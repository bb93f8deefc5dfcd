// sddmm_tokens_sm90: values of kept blocks, scale · Σ yᵀ x over rows of tokens: the gradient of a layer's weight.
//
//   y       (F, T, rows)     by a 4-D tensor map (rows, T, 1, F); x (F, T, columns) alike; boxes of 64 × 64 tokens
//   values  (F, slots)       blocks of S × S elements
//   table   (CTAs, 1 + kMost) int4: first row, number of panels, half of the block that the rows are, 0; then of each
//           panel of 64 columns: first column, first slot / 64, mask (−1 = full), half of the block that it is
//   masks   (M, S, S / 8)    bits of partial blocks
//
//   grid   (CTAs, F); a CTA takes 64 rows of one line of blocks times up to kMost panels
//   block  2 warpgroups of consumers, four panels each, and one that produces
//   smem   kStages of 64 tokens of y and of every panel; kStaging bytes a warp
//   floor  2 · nnz · T FLOP at 800 TFLOP/s; L2: 8 KiB for y and each panel of a CTA's 64 tokens, 8.6 TB/s
//   needs  sm_90a, rows of tokens at multiples of 16 bytes
#include "types.cuh"
#include "ring.cuh"
#include "staged.cuh"

constexpr int kSize = MG_SIZE, kStages = MG_STAGES, kMost = 8, kEach = 4;
static_assert(kSize == 64 || kSize == 128, "SIZE must be 64 or 128");
constexpr int kConsumers = 2 * 128;
constexpr u32 kPanel = 64 * 128, kStage = (1 + kMost) * kPanel;

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_tokens_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                      const int4 *__restrict__ table, const u8 *__restrict__ masks, operand_t *__restrict__ values,
                      i64 slots, float scale, int tokens) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u, staging = ring + kStages * kStage;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32, matrix = blockIdx.y;
    const int4 *const mine = table + static_cast<i64>(blockIdx.x) * (1 + kMost);
    const int4 head = __ldg(mine);
    const int steps = (tokens + 63) / 64;

    if (threadIdx.x == kConsumers) tma_prefetch(y_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        // Those of a warpgroup that has no panel leave at once.
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, head.y > kEach ? 8 : 4);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x != kConsumers) return;
        int column[kMost];
#pragma unroll
        for (int p = 0; p < kMost; ++p) column[p] = __ldg(&mine[1 + p].x);
        int stage = 0;
        u32 parity = 1;
        for (int i = 0; i < steps; ++i) {
            const u32 to = ring + stage * kStage, done = full + 8 * stage;
            barrier_wait(empty + 8 * stage, parity);
            barrier_expect(done, (1 + head.y) * kPanel);
            tma_load(to, y_map, done, head.x, 64 * i, 0, matrix);
#pragma unroll
            for (int p = 0; p < kMost; ++p)
                if (p < head.y) tma_load(to + (1 + p) * kPanel, x_map, done, column[p], 64 * i, 0, matrix);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warp / 4, row16 = warp % 4 * 16;
    if (group * kEach >= head.y) return;
    float acc[kEach * 32];
#pragma unroll
    for (int i = 0; i < kEach * 32; ++i) acc[i] = 0.f;
    const u64 left = wgmma_descriptor(ring, kPanel), right = wgmma_descriptor(ring + (1 + group * kEach) * kPanel, kPanel);
    // Of panels that are not there nobody looks at the sums.
    multiply_ring<kStages>(steps, full, empty, lane, [&](int stage) {
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
            Wgmma<64 * kEach>::ss<1, 1>(acc, left + ((stage * kStage + kk * 2048) >> 4),
                                        right + ((stage * kStage + kk * 2048) >> 4), 1);
    });

#pragma unroll
    for (int p = 0; p < kEach; ++p) {
        if (group * kEach + p >= head.y) break;
        const int4 panel = __ldg(mine + 1 + group * kEach + p);
        float (&sums)[32] = reinterpret_cast<float(&)[32]>(acc[32 * p]);
        if (panel.z >= 0) {
            const int row = 64 * head.z + row16 + lane / 4;
            const u8 *bits = masks + (static_cast<i64>(panel.z) * kSize + row) * (kSize / 8) + 8 * panel.w;
            const u64 low = *reinterpret_cast<const u64 *>(bits), high = *reinterpret_cast<const u64 *>(bits + kSize);
#pragma unroll
            for (int at = 0; at < 32; ++at) {
                const u32 live = static_cast<u32>((at & 2 ? high : low) >> (at / 4 * 8 + 2 * (lane % 4)));
                sums[at] = live >> (at % 2) & 1 ? sums[at] : 0.f;
            }
        }
        operand_t *to = values + matrix * slots + static_cast<i64>(panel.y) * 64;
        store_staged<64>(sums, scale, staging + warp * kStaging, to, row16, 64, 0, kSize);
    }
}

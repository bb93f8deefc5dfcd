// A dense tile of yᵀ x over rows of tokens, in registers or shared memory, for kernels that keep some of it.
//
//   y      (F, T, rows)     by a 4-D tensor map (rows, T, 1, F); x (F, T, columns) alike; boxes of 64 × 64 tokens
//   tile   kTall × kWide, by 2 warpgroups of consumers, 64 rows each; one more produces
//   smem   kStages of 64 tokens of y and x, at a multiple of 1024; behind them the tile, rounded, kPitch bytes a row
#pragma once

#include "ring.cuh"
#include "types.cuh"

constexpr int kTall = 128, kWide = MG_WIDE, kStages = MG_STAGES, kConsumers = 2 * kTall;
static_assert(kWide == 128 || kWide == 256, "WIDE must be 128 or 256");
constexpr int kPanelsY = kTall / 64, kPanels = kPanelsY + kWide / 64;
constexpr u32 kPanel = 64 * 128, kStage = kPanels * kPanel;
constexpr u32 kPitch = 2 * kWide + 16;  // lanes write to all banks
using Pool = Registers<kConsumers + 128, 40, 232>;

struct DensePlace {
    int row, column, matrix;  // of a tile's first element
};

// Makes the tiles that `next` finds, each thread with one of its own: false behind the last. Producers bring a tile while
// consumers are still with the one before. Those do `before` while data are on their way, and `after` with their sums: not
// behind this, where they would have no more registers than who produces.
template <class Next, class Before, class After>
__device__ __forceinline__ void dense_sums(const TensorMap &y_map, const TensorMap &x_map, u32 ring, int tokens, Next next,
                                           Before before, After after) {
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32, steps = (tokens + 63) / 64;

    if (threadIdx.x == kConsumers) tma_prefetch(y_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    DensePlace at;
    if (warp >= kConsumers / 32) {  // producer
        Pool::give();
        if (threadIdx.x != kConsumers) return;
        int stage = 0;
        u32 parity = 1;
        while (next(at)) {
            for (int i = 0; i < steps; ++i) {
                const u32 to = ring + stage * kStage, done = full + 8 * stage;
                barrier_wait(empty + 8 * stage, parity);
                barrier_expect(done, kStage);
#pragma unroll
                for (int p = 0; p < kPanelsY; ++p) tma_load(to + p * kPanel, y_map, done, at.row + 64 * p, 64 * i, 0, at.matrix);
#pragma unroll
                for (int p = kPanelsY; p < kPanels; ++p)
                    tma_load(to + p * kPanel, x_map, done, at.column + 64 * (p - kPanelsY), 64 * i, 0, at.matrix);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    Pool::take();
    const u64 left = wgmma_descriptor(ring + warp / 4 * kPanel, kPanel);
    const u64 right = wgmma_descriptor(ring + kPanelsY * kPanel, kPanel);
    RingPlace place;
    while (next(at)) {
        before();
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        multiply_ring<kStages>(place, steps, full, empty, lane, [&](int stage) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                Wgmma<kWide>::template ss<1, 1>(acc, left + ((stage * kStage + k * 2048) >> 4),
                                                right + ((stage * kStage + k * 2048) >> 4), 1);
        });
        after(at, acc);
    }
}

// The same with tiles times scale in shared memory, behind the ring, with whose place it does `after`.
template <class Next, class Before, class After>
__device__ __forceinline__ void dense_tiles(const TensorMap &y_map, const TensorMap &x_map, u32 ring, int tokens, float scale,
                                            Next next, Before before, After after) {
    const u32 made = ring + kStages * kStage;
    dense_sums(y_map, x_map, ring, tokens, next, before, [&](const DensePlace &at, const float (&acc)[kWide / 2]) {
        named_barrier(1, kConsumers);  // nobody reads the tile before any more
        const int lane = threadIdx.x % 32;
        const u32 mine = made + (16 * uniform_warp() + lane / 4) * kPitch + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < kWide / 2; i += 2)
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(mine + i / 2 % 2 * 8 * kPitch + i / 4 * 16),
                         "r"(pack2<operand_t>(acc[i] * scale, acc[i + 1] * scale))
                         : "memory");
        named_barrier(1, kConsumers);
        after(at, made);
    });
}

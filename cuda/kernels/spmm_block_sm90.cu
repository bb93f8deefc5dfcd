// spmm_block_sm90: out = scale · S x or scale · Sᵀ x, S in blocks of 64 or 128, on wgmma and TMA.
//
//   out    (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed
//   x      (F, E, inner, D)  by a 4-D tensor map, any strides
//   values (F, slots)        blocks of S × S elements, by a 3-D tensor map (S, items · S, F)
//   items  (n) int4          entry, block row, block column, mask (−1 = full)
//   list   (n) int           transposed: items in column-major order; else null
//   bounds (E · lines + 1)   where each block row's (or column's) items start
//   order  (E · lines)       block rows by falling number of items: the long ones start first
//   masks  (M, S, S / 8)     bits of partial blocks
//   any    (M, S / 8)        inner positions with a kept element in the mask
//
//   tiles  one block row × kGroupsN · kWide columns of one matrix; rank counts rows by `order`
//   grid   one CTA a tile, rows of one matrix first (narrow x: several CTAs share a multiprocessor and
//          the K or V of a head stays in L2); or, kPersistent, one CTA a multiprocessor that takes every
//          gridDim-th tile
//   block  128 · S / 64 · kGroupsN consumers + a producer warp (a warpgroup where registers are short)
//   smem   kStages · (S + kGroupsN · kWide) · 128 B, 64 inner positions a stage; kPersistent: results
//          S · kGroupsN · kWide · 2 B besides, so that the next tile loads while this one is written
//   floor  2 · nnz · D FLOP at 800 TFLOP/s; L2: a stage for every 64 inner positions at 8.9 TB/s
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows, no run-time mask
//
// Dead slots of partial blocks are zeroed in shared memory, whatever they held, and so are rows of x
// that such a block has no use for: 0 · NaN is NaN.
#include "types.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int kSize = MG_SIZE, kWide = MG_WIDE, kGroupsN = MG_GROUPS, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kPersistent = MG_PERSISTENT, kPartial = MG_PARTIAL;
static_assert(kSize == 64 || kSize == 128, "SIZE must be 64 or 128");
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
constexpr int kGroups = kSize / 64, kConsumers = 128 * kGroups * kGroupsN;
constexpr int kAcross = kWide * kGroupsN, kPanels = kAcross / 64;
constexpr int kStepBytesA = kSize * 128, kStepBytesB = kAcross * 128;
constexpr int kStepsPerBlock = kSize / 64;
constexpr u32 kPanelBytes = 64 * 128;
// 128 accumulators a thread leave no room for a fair share of registers: a whole warpgroup then
// produces, and gives its registers away.
constexpr bool kUneven = kWide == 256 && kConsumers == 256;
constexpr int kProducers = kUneven ? 128 : 32;

struct Item {
    int entry, row, column, mask;
};

// Keeps those of eight neighbouring halves whose bit is set.
__device__ __forceinline__ void keep8(u32 address, u32 bits) {
    u32 v[4] = {0, 0, 0, 0};
    if (bits)
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(address));
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] &= ((bits >> (2 * i)) & 1 ? 0x0000FFFFu : 0u) | ((bits >> (2 * i)) & 2 ? 0xFFFF0000u : 0u);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                 "r"(v[3])
                 : "memory");
}

struct Tile {
    int line, entry, matrix, column0, first, count;
};

extern "C" __global__ void __launch_bounds__(kConsumers + kProducers, 1)
    spmm_block_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                    const __grid_constant__ TensorMap out_map, const Item *__restrict__ items,
                    const int *__restrict__ list, const int *__restrict__ bounds,
                    const int *__restrict__ order, const u8 *__restrict__ masks,
                    const u8 *__restrict__ any, int lines, int all_lines, int across, int matrices,
                    float scale, float *__restrict__ wide_out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    const u32 stages_a = base, stages_b = base + kStages * kStepBytesA;
    const u32 results = kPersistent ? stages_b + kStages * kStepBytesB : base;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, kConsumers / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int tiles = all_lines * across * matrices;
    auto tile_of = [&](int turn, Tile &tile) {
        const int t = turn * gridDim.x + blockIdx.x;
        if (t >= tiles) return false;
        // Rows of one matrix and column tile are neighbours: few columns of x are at work at a time, so
        // L2 holds them, and the rest still streams in. Persistent CTAs meet the rows of every other
        // round from the short end, so that all end together.
        const int rest = t / all_lines;
        const int middle = (rest * all_lines + all_lines / 2) / gridDim.x;
        int rank = t - rest * all_lines;
        if (kPersistent && (middle & 1)) rank = all_lines - 1 - rank;
        tile.line = order[rank];
        tile.entry = tile.line / lines;
        tile.column0 = rest % across * kAcross;
        tile.matrix = rest / across;
        tile.first = bounds[tile.line];
        tile.count = bounds[tile.line + 1] - tile.first;
        return true;
    };
    Tile tile;

    if (warp >= kConsumers / 32) {  // producer
        if constexpr (kUneven) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x != kConsumers) return;
        tma_prefetch(values_map);
        tma_prefetch(x_map);
        tma_prefetch(out_map);
        int stage = 0, round = 0;
        for (int turn = 0; tile_of(turn, tile); ++turn)
            for (int i = 0; i < tile.count; ++i) {
                const int n = kTransposed ? list[tile.first + i] : tile.first + i;
                const Item item = items[n];
#pragma unroll
                for (int half = 0; half < kStepsPerBlock; ++half) {
                    if (round > 0) barrier_wait(empty + 8 * stage, (round - 1) & 1);
                    const u32 barrier = full + 8 * stage;
                    barrier_expect(barrier, kStepBytesA + kStepBytesB);
                    const u32 to_a = stages_a + stage * kStepBytesA;
                    const u32 to_b = stages_b + stage * kStepBytesB;
                    // A step takes 64 inner positions: columns of the block, or its rows if transposed.
#pragma unroll
                    for (int p = 0; p < kGroups; ++p)
                        tma_load(to_a + p * kPanelBytes, values_map, barrier, kTransposed ? 64 * p : 64 * half,
                                 n * kSize + (kTransposed ? 64 * half : 64 * p), tile.matrix);
                    const int inner = (kTransposed ? item.row : item.column) * kSize + 64 * half;
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(to_b + p * kPanelBytes, x_map, barrier, tile.column0 + 64 * p, inner,
                                 tile.entry, tile.matrix);
                    if (++stage == kStages) stage = 0, ++round;
                }
            }
        return;
    }

    if constexpr (kUneven) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = warp / 4 % kGroups, group_n = warp / 4 / kGroups, quad = lane / 4, pair = lane % 4;
    const int row16 = (warp % 4) * 16;  // of this warp within its group's 64
    int stage = 0, parity = 0;

    for (int turn = 0; tile_of(turn, tile); ++turn) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;

        auto mask_at = [&](int i) {
            return i < tile.count ? items[kTransposed ? list[tile.first + i] : tile.first + i].mask : -1;
        };
        int mask = mask_at(0), upcoming = -1, pending = -1;  // pending: stage still being read
#pragma unroll 1
        for (int step = 0; step < tile.count * kStepsPerBlock; ++step) {
            const int half = step % kStepsPerBlock;
            // Asked for a block ahead: its latency would stand between every two products.
            if (half == 0) upcoming = mask_at(step / kStepsPerBlock + 1);
            barrier_wait(full + 8 * stage, parity);
            const u32 panel = stages_a + stage * kStepBytesA + group * kPanelBytes;
            const u32 b = stages_b + stage * kStepBytesB;

            if (mask >= 0) {
                // Dead elements are zeroed where they lie: a byte of mask is 16 bytes of a panel's row.
                const u8 *bits = masks + static_cast<i64>(mask) * kSize * (kSize / 8);
#pragma unroll 1
                for (int i = threadIdx.x; i < kGroups * 512; i += kConsumers) {
                    const int p = i / 512, r = i / 8 % 64, chunk = i % 8;
                    const int row = kTransposed ? 64 * half + r : 64 * p + r;
                    const u32 keep = bits[row * (kSize / 8) + (kTransposed ? 8 * p : 8 * half) + chunk];
                    if (keep != 255) keep8(swizzled(stages_a + stage * kStepBytesA + p * kPanelBytes, r, chunk), keep);
                }
                // So are rows of x that nothing here keeps; two neighbouring threads take a row.
                const u64 used = *reinterpret_cast<const u64 *>(any + mask * (kSize / 8) + 8 * half);
#pragma unroll 1
                for (int i = threadIdx.x; ~used && i < 64 * kPanels * 2; i += kConsumers)
                    if (!((used >> (i / 2 % 64)) & 1))
                        for (int c = 0; c < 4; ++c)
                            keep8(b + i / 128 * kPanelBytes + i / 2 % 64 * 128 + (i % 2) * 64 + 16 * c, 0);
                proxy_fence();
                named_barrier(1, kConsumers);
            }
            // Both operands from shared memory, so that the next product can queue behind this one.
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                Wgmma<kWide>::template ss<kTransposed, 1>(
                    acc, wgmma_descriptor(panel + kk * (kTransposed ? 2048 : 32), kPanelBytes),
                    wgmma_descriptor(b + group_n * (kWide / 64) * kPanelBytes + kk * 2048, kPanelBytes), 1);
            wgmma_commit();
            if constexpr (kStages > 2) {
                wgmma_wait<1>();
                if (lane == 0 && pending >= 0) barrier_arrive(empty + 8 * pending);
                pending = stage;
            } else {  // too few stages to hold one back
                wgmma_wait<0>();
                if (lane == 0) barrier_arrive(empty + 8 * stage);
            }
            if (++stage == kStages) stage = 0, parity ^= 1;
            if (half == kStepsPerBlock - 1) mask = upcoming;
        }

        wgmma_wait<0>();
        if (lane == 0 && pending >= 0) barrier_arrive(empty + 8 * pending);

        const int row0 = (tile.line % lines) * kSize, mine = 64 * group + row16;
        const int column0 = tile.column0 + group_n * kWide;
        if constexpr (kPartial) {  // float32 partial results of a mixed layout
            const i64 plane = (static_cast<i64>(tile.matrix) * (all_lines / lines) + tile.entry) * rows;
#pragma unroll
            for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = row0 + mine + quad + 8 * h, column = column0 + 8 * j + 2 * pair;
                    if (row >= rows || column >= width) continue;
                    float2 *to = reinterpret_cast<float2 *>(wide_out + (plane + row) * width + column);
                    float2 v = make_float2(acc[4 * j + 2 * h] * scale, acc[4 * j + 2 * h + 1] * scale);
                    if (add) {
                        const float2 old = *to;
                        v.x += old.x;
                        v.y += old.y;
                    }
                    *to = v;
                }
            continue;
        }

        // Through shared memory, in the layout of the tensor map. Not persistent: over the stages,
        // which are free now. Persistent: once the last tile's store has read its results.
        if (kPersistent && threadIdx.x == 0) tma_store_wait_read<0>();
        named_barrier(1, kConsumers);
#pragma unroll
        for (int j = 0; j < kWide / 16; ++j) {
            const int m = lane / 8, row = mine + 8 * (m % 2) + lane % 8;
            const int chunk = (2 * j + m / 2) % 8, at = group_n * (kWide / 64) + j / 4;
            stmatrix4(swizzled(results + at * kSize * 128, row, chunk),
                      pack2<operand_t>(acc[8 * j] * scale, acc[8 * j + 1] * scale),
                      pack2<operand_t>(acc[8 * j + 2] * scale, acc[8 * j + 3] * scale),
                      pack2<operand_t>(acc[8 * j + 4] * scale, acc[8 * j + 5] * scale),
                      pack2<operand_t>(acc[8 * j + 6] * scale, acc[8 * j + 7] * scale));
        }
        proxy_fence();
        named_barrier(1, kConsumers);
        if (threadIdx.x == 0) {
            for (int p = 0; p < kPanels; ++p)
                if (tile.column0 + 64 * p < width)
                    tma_store(out_map, results + p * kSize * 128, tile.column0 + 64 * p, row0, tile.entry,
                              tile.matrix);
            tma_store_commit();
        }
    }
    if (threadIdx.x == 0) tma_store_wait_read<0>();
}

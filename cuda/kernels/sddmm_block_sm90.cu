// sddmm_block_sm90: values of kept blocks, scale · Q Kᵀ, in blocks of 64 or 128, on wgmma and TMA.
//
//   q      (F, E, nq, D)   by a 4-D tensor map, any strides; k alike
//   values (F, slots)      blocks of S × S elements, by a 3-D tensor map (S, items · S, F)
//   items  (n) int4        entry, block row, block column, mask (−1 = full)
//   chunks (c) int2        first item and number of items of one block row's piece
//   masks  (M, S, S / 8)   bits of partial blocks
//
//   grid   (chunks, F)     one CTA: a few blocks of one block row; Q is loaded once
//   block  128 · S / 64 consumers + 32 (a producer warp)
//   smem   Q S · 128 · P, kStages of 64 keys 64 · 128 · P, results S · 128; P = ceil(D / 64); + 1 KiB
//   floor  (Q + K + values) bytes at copy bandwidth
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows, values of the operands' dtype, no run-time mask
//
// Each warpgroup computes 64 rows of a block and stores them itself, so that one multiplies while the
// other writes.
#include "types.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int kSize = MG_SIZE, kDepth = MG_PANELS, kStages = MG_STAGES;
static_assert(kSize == 64 || kSize == 128, "SIZE must be 64 or 128");
static_assert(kDepth >= 1 && kDepth <= 4, "PANELS of 64 columns: D from 8 to 256");
constexpr int kGroups = kSize / 64, kConsumers = 128 * kGroups;
constexpr u32 kPanel = 64 * 128;  // 64 rows of 64 columns
constexpr u32 kBytesQ = kDepth * kSize * 128, kBytesK = kDepth * kPanel;

struct Item {
    int entry, row, column, mask;
};

extern "C" __global__ void __launch_bounds__(kConsumers + 32)
    sddmm_block_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap values_map, const Item *__restrict__ items,
                     const int2 *__restrict__ chunks, const u8 *__restrict__ masks, float scale) {
    extern __shared__ u8 raw[];
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    const u32 q_at = base, k_at = base + kBytesQ, out_at = k_at + kStages * kBytesK;
    __shared__ alignas(8) u64 barriers[2 * kStages + 1];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages, q_full = empty + 8 * kStages;

    const int first = chunks[blockIdx.x].x, count = chunks[blockIdx.x].y, matrix = blockIdx.y;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, kConsumers / 32);
        }
        barrier_init(q_full, 1);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp == kConsumers / 32) {  // producer
        if (lane == 0) {
            tma_prefetch(q_map);
            tma_prefetch(k_map);
            tma_prefetch(values_map);
            const Item head = items[first];
            barrier_expect(q_full, kBytesQ);
            for (int p = 0; p < kDepth; ++p)
                tma_load(q_at + p * kSize * 128, q_map, q_full, 64 * p, head.row * kSize, head.entry, matrix);
            for (int i = 0; i < count * kGroups; ++i) {
                const int stage = i % kStages, round = i / kStages;
                const int key = items[first + i / kGroups].column * kSize + i % kGroups * 64;
                if (round > 0) barrier_wait(empty + 8 * stage, (round - 1) & 1);
                barrier_expect(full + 8 * stage, kBytesK);
                for (int p = 0; p < kDepth; ++p)
                    tma_load(k_at + stage * kBytesK + p * kPanel, k_map, full + 8 * stage, 64 * p, key,
                             head.entry, matrix);
            }
        }
        return;
    }

    const int group = warp / 4, quad = lane / 4, pair = lane % 4, row16 = (warp % 4) * 16;
    const u32 mine = out_at + group * kPanel;
    const u64 queries = wgmma_descriptor(q_at + group * kPanel, 1), keys = wgmma_descriptor(k_at, 1);
    barrier_wait(q_full, 0);

    int mask = items[first].mask, upcoming = -1;
    for (int i = 0; i < count * kGroups; ++i) {
        const int stage = i % kStages, n = first + i / kGroups, half = i % kGroups;
        // Asked for a block ahead, so that nothing waits for it.
        if (half == 0) upcoming = i / kGroups + 1 < count ? items[n + 1].mask : -1;
        barrier_wait(full + 8 * stage, (i / kStages) & 1);
        float acc[32];
        wgmma_fence();
#pragma unroll
        for (int p = 0; p < kDepth; ++p)
#pragma unroll
            for (int kk = 0; kk < 4; ++kk)
                Wgmma<64>::ss<0, 0>(acc, queries + ((p * kSize * 128 + kk * 32) >> 4),
                                    keys + ((stage * kBytesK + p * kPanel + kk * 32) >> 4), p + kk > 0);
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + 8 * stage);

        const bool whole = mask < 0;
        u64 low = ~0ull, high = ~0ull;
        if (!whole) {
            const int row = 64 * group + row16 + quad;
            const u8 *bits = masks + (static_cast<i64>(mask) * kSize + row) * (kSize / 8) + 8 * half;
            low = *reinterpret_cast<const u64 *>(bits);
            high = *reinterpret_cast<const u64 *>(bits + kSize);  // eight rows on
        }
        if (half == kGroups - 1) mask = upcoming;
#pragma unroll
        for (int at = 0; at < 32; ++at) acc[at] *= scale;
        if (!whole) {
#pragma unroll
            for (int at = 0; at < 32; ++at) {
                const u32 live = static_cast<u32>((at & 2 ? high : low) >> (at / 4 * 8 + 2 * pair));
                acc[at] = live >> (at % 2) & 1 ? acc[at] : 0.f;
            }
        }
        // The last store must have read this warpgroup's shared memory.
        if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
        named_barrier(1 + group, 128);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 packed[4];
#pragma unroll
            for (int h = 0; h < 4; ++h) {  // columns 16j + 8(h / 2), rows +8(h % 2)
                const int at = 8 * j + 4 * (h / 2) + 2 * (h % 2);
                packed[h] = pack2<operand_t>(acc[at], acc[at + 1]);
            }
            const int m = lane / 8, row = row16 + 8 * (m % 2) + lane % 8;
            stmatrix4(swizzled(mine, row, 2 * j + m / 2), packed[0], packed[1], packed[2], packed[3]);
        }
        proxy_fence();
        named_barrier(1 + group, 128);
        if (threadIdx.x % 128 == 0) {
            tma_store(values_map, mine, 64 * half, n * kSize + 64 * group, matrix);
            tma_store_commit();
        }
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

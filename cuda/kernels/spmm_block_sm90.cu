// spmm_block_sm90: out = scale · S x or scale · Sᵀ x, S in blocks of 64 or 128, on wgmma and TMA.
//
//   out     (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x       (F, E, inner, D)  by a 4-D tensor map, any strides; kTokens: (F, E, D, inner), and so is out
//   values  (F, slots)        blocks of S × S elements, by a 3-D tensor map (S, items · S, F)
//   table   (n) int4          blocks in the order of the lines: item, inner block, mask (−1 = full)
//   masks   (M, S, S / 8)     bits of partial blocks
//   any     (M, S / 8)        inner positions with a kept element in the mask
//   tiles   (n) int4          see walk.cuh; line = entry · lines + block row or column
//
//   grid   CTAs that walk their tiles of one line × kAcross columns
//   block  128 · S / 64 · kGroupsN consumers + a producer warp (a warpgroup where registers are short)
//   smem   two rings: kStagesA of 64 inner positions of S, kStagesB of kDepth of x
//   floor  2 · nnz · D FLOP at 800 TFLOP/s; L2: (S + kAcross) · 128 B a tile's 64 positions, 8.9 TB/s
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows, no run-time mask
//
// Dead slots of partial blocks are zeroed in shared memory, whatever they held, and so are rows of x
// that such a block has no use for: 0 · NaN is NaN.
#include "types.cuh"
#include "copy.cuh"
#include "registers.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "result.cuh"
#include "staged.cuh"
#include "token_rows.cuh"
#include "walk.cuh"

constexpr int kSize = MG_SIZE, kWide = MG_WIDE, kGroupsN = MG_GROUPS, kDepth = MG_DEPTH;
constexpr int kStagesA = MG_STAGES_A, kStagesB = MG_STAGES_B;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kSize == 64 || kSize == 128, "SIZE must be 64 or 128");
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
static_assert(kDepth == 32 || kDepth == 64, "DEPTH must be 32 or 64");
constexpr int kGroups = kSize / 64, kConsumers = 128 * kGroups * kGroupsN;
constexpr int kAcross = kWide * kGroupsN, kPanels = kAcross / 64;
constexpr int kHalves = kSize / 64, kSubs = 64 / kDepth;
constexpr u32 kPanelA = 64 * 128, kPanelB = kDepth * 128;
constexpr u32 kStageA = kGroups * kPanelA, kStageB = kPanels * kPanelB;
// 128 accumulators a thread leave no room for a fair share of registers: a whole warpgroup then
// produces, and gives its registers away.
constexpr int kMost = kAcross < 256 ? kAcross : 256;  // tokens of a copy
constexpr bool kUneven = kWide == 256 && kConsumers == 256;
constexpr int kProducers = kUneven ? 128 : 32;
using Pool = Registers<256 + 128, 40, 232>;  // if kUneven

// Keeps those of eight neighbouring halves whose bit is set.
__device__ __forceinline__ void keep8(u32 address, u32 bits) {
    u32 v[4] = {0, 0, 0, 0};
    if (bits) {
        const uint4 eight = load_shared16(address);
        v[0] = eight.x, v[1] = eight.y, v[2] = eight.z, v[3] = eight.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] &= ((bits >> (2 * i)) & 1 ? 0x0000FFFFu : 0u) | ((bits >> (2 * i)) & 2 ? 0xFFFF0000u : 0u);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                 "r"(v[3])
                 : "memory");
}

extern "C" __global__ void __launch_bounds__(kConsumers + kProducers, 1)
    spmm_block_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                    const int4 *__restrict__ table, const int4 *__restrict__ tiles, int each, const u8 *__restrict__ masks,
                    const u8 *__restrict__ any, int lines, int entries, int across, float scale, const operand_t *__restrict__ bias, void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring_a = (shared_address(raw) + 1023) & ~1023u, ring_b = ring_a + kStagesA * kStageA;
    __shared__ alignas(8) u64 barriers[2 * (kStagesA + kStagesB)];
    const u32 full_a = shared_address(barriers), empty_a = full_a + 8 * kStagesA;
    const u32 full_b = empty_a + 8 * kStagesA, empty_b = full_b + 8 * kStagesB;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    // The first tile is asked for while the barriers are made.
    Walk walk(tiles, each);
    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStagesA; ++s) barrier_init(full_a + 8 * s, 1), barrier_init(empty_a + 8 * s, kConsumers / 32);
        for (int s = 0; s < kStagesB; ++s) barrier_init(full_b + 8 * s, 1), barrier_init(empty_b + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;

    if (warp >= kConsumers / 32) {  // producer
        if constexpr (kUneven) Pool::give();
        if (threadIdx.x != kConsumers) return;
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        int a = 0, b = 0;
        u32 parity_a = 1, parity_b = 1;
        while (walk.next(tile)) {
            const int column0 = tile.w % across * kAcross, matrix = tile.w / across, entry = tile.x / lines;
            int4 item = tile.z > 0 ? table[tile.y] : make_int4(0, 0, 0, 0);
            for (int i = 0; i < tile.z; ++i) {
                const int n = item.x, inner = item.y * kSize;
                if (i + 1 < tile.z) item = table[tile.y + i + 1];
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    barrier_wait(empty_a + 8 * a, parity_a);
                    barrier_expect(full_a + 8 * a, kStageA);
                    // 64 inner positions: columns of the block, or its rows if transposed.
#pragma unroll
                    for (int p = 0; p < kGroups; ++p)
                        tma_load(ring_a + a * kStageA + p * kPanelA, values_map, full_a + 8 * a,
                                 kTransposed ? 64 * p : 64 * half,
                                 n * kSize + (kTransposed ? 64 * half : 64 * p), matrix);
                    if (++a == kStagesA) a = 0, parity_a ^= 1;
#pragma unroll
                    for (int sub = 0; sub < kSubs; ++sub) {
                        barrier_wait(empty_b + 8 * b, parity_b);
                        barrier_expect(full_b + 8 * b, kStageB);
                        if constexpr (kTokens) {
#pragma unroll
                            for (int p = 0; p < kAcross; p += kMost)
                                tma_load(ring_b + b * kStageB + p * kDepth * 2, x_map, full_b + 8 * b,
                                         inner + 64 * half + kDepth * sub, column0 + p, entry, matrix);
                        } else
#pragma unroll
                        for (int p = 0; p < kPanels; ++p)
                            tma_load(ring_b + b * kStageB + p * kPanelB, x_map, full_b + 8 * b,
                                     column0 + 64 * p, inner + 64 * half + kDepth * sub, entry, matrix);
                        if (++b == kStagesB) b = 0, parity_b ^= 1;
                    }
                }
            }
        }
        return;
    }

    if constexpr (kUneven) Pool::take();
    const int group = warp / 4 % kGroups, group_n = warp / 4 / kGroups;
    const int row16 = (warp % 4) * 16;  // of this warp within its group's 64
    int a = 0, b = 0;
    u32 parity_a = 0, parity_b = 0;

    const u64 left_desc = wgmma_descriptor(ring_a + group * kPanelA, kPanelA);
    const u32 right0 = ring_b + group_n * (kWide / 64) * kPanelB;
    const u64 right_desc = kTokens ? wgmma_rows<kDepth * 2>(right0) : wgmma_descriptor(right0, kPanelB);
    while (walk.next(tile)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        int mask = tile.z > 0 ? table[tile.y].z : -1, upcoming = -1;
        u32 held_a = 0, held_b = 0;  // barriers of the stages that the product in flight reads
#pragma unroll 1
        for (int step = 0; step < tile.z * kHalves; ++step) {
            const int half = step % kHalves;
            // Asked for a block ahead: its latency would stand between every two products.
            if (half == 0) upcoming = step / kHalves + 1 < tile.z ? table[tile.y + step / kHalves + 1].z : -1;
            barrier_wait(full_a + 8 * a, parity_a);
            const u32 left = ring_a + a * kStageA;
            if (mask >= 0) {
                // Dead elements are zeroed where they lie: a byte of mask is 16 bytes of a panel's row.
                const u8 *bits = masks + static_cast<i64>(mask) * kSize * (kSize / 8);
#pragma unroll 1
                for (int i = threadIdx.x; i < kGroups * 512; i += kConsumers) {
                    const int p = i / 512, r = i / 8 % 64, chunk = i % 8;
                    const int row = kTransposed ? 64 * half + r : 64 * p + r;
                    const u32 keep = bits[row * (kSize / 8) + (kTransposed ? 8 * p : 8 * half) + chunk];
                    if (keep != 255) keep8(swizzled(left + p * kPanelA, r, chunk), keep);
                }
            }
#pragma unroll
            for (int sub = 0; sub < kSubs; ++sub) {
                barrier_wait(full_b + 8 * b, parity_b);
                const u32 right = ring_b + b * kStageB;
                if (mask >= 0) {
                    // So is what of x nothing here keeps; where it is in rows, two neighbouring threads take one.
                    const u64 used =
                        *reinterpret_cast<const u64 *>(any + mask * (kSize / 8) + 8 * half) >> (kDepth * sub);
                    if constexpr (kTokens) {
#pragma unroll 1
                        for (int i = threadIdx.x; ~used && i < kDepth / 8 * kAcross; i += kConsumers) {
                            const u32 keep = used >> (i % (kDepth / 8) * 8) & 255;
                            if (keep != 255) keep8(chunk_of_row<kDepth * 2>(right, i / (kDepth / 8), i % (kDepth / 8)), keep);
                        }
                    } else
#pragma unroll 1
                    for (int i = threadIdx.x; ~used && i < kDepth * kPanels * 2; i += kConsumers)
                        if (!((used >> (i / 2 % kDepth)) & 1))
                            for (int c = 0; c < 4; ++c)
                                keep8(right + i / (2 * kDepth) * kPanelB + i / 2 % kDepth * 128 + (i % 2) * 64 + 16 * c, 0);
                    proxy_fence();
                    named_barrier(1, kConsumers);
                }
                wgmma_fence();
#pragma unroll
                for (int kk = 0; kk < kDepth / 16; ++kk)
                    Wgmma<kWide>::template ss<kTransposed, !kTokens>(
                        acc, left_desc + ((a * kStageA + (sub * kDepth / 16 + kk) * (kTransposed ? 2048 : 32)) >> 4),
                        right_desc + ((b * kStageB + kk * (kTokens ? 32 : 2048)) >> 4), 1);
                wgmma_commit();
                // The product before this one is done, and what it read is free.
                wgmma_wait<1>();
                if (lane == 0) {
                    if (held_b) barrier_arrive(held_b);
                    if (held_a) barrier_arrive(held_a);
                }
                held_b = empty_b + 8 * b;
                held_a = sub == kSubs - 1 ? empty_a + 8 * a : 0;
                if (++b == kStagesB) b = 0, parity_b ^= 1;
            }
            if (++a == kStagesA) a = 0, parity_a ^= 1;
            if (half == kHalves - 1) mask = upcoming;
        }
        wgmma_wait<0>();
        if (lane == 0) {
            if (held_b) barrier_arrive(held_b);
            if (held_a) barrier_arrive(held_a);
        }

        const int row = (tile.x % lines) * kSize + 64 * group + row16, column = tile.w % across * kAcross + group_n * kWide;
        const i64 plane = (static_cast<i64>(tile.w / across) * entries + tile.x / lines) * rows * width;
        if constexpr (kTokens) {
            const u32 staging = ring_b + kStagesB * kStageB + warp / 4 * 4 * kStaging;
            store_turned<kWide>(acc, scale, bias, staging, static_cast<operand_t *>(out) + plane, row - row16, rows, column,
                                width);
        } else if constexpr (kUneven && !kPartial) {
            const u32 staging = ring_b + kStagesB * kStageB + warp * kStaging;
            store_staged<kWide>(acc, scale, staging, static_cast<operand_t *>(out) + plane, row, rows, column, width);
        } else {
            void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                                : static_cast<void *>(static_cast<operand_t *>(out) + plane);
            store_result<kWide, kPartial>(acc, scale, to, row + lane / 4, rows, column, width, add);
        }
    }
}

// spmm_pair_sm90: out = scale · S x or scale · Sᵀ x, S in whole blocks of 64, two lines of them at a time.
//
//   out     (F, rows, D)      F matrices that share the positions; rows = nq, or nk when transposed; contiguous
//   x       (F, inner, D)     any strides, by 4-D tensor maps (64, inner, D / 64, F) in boxes of kDepth rows: of all
//                             panels of a tile, and of half of them; kTokens: (F, D, inner), and so is out, by a 4-D
//                             map (inner, D, 1, F) in boxes of kDepth × half the columns of a tile
//   values  (F, slots)        blocks of 64 × 64 elements, by a 3-D map (64, items · 64, F)
//   table   (n) int4          steps of the pairs: inner block of the one line, of the other (the same: both read it),
//                             item of the one, of the other (−1 = it has none, nor an inner block)
//   tiles   (CTAs, each) int4   see walk.cuh; those of a cluster's two CTAs are of two partners: line (−1 = none),
//                             first step of the pair · 2 + whether the line is the other, steps of the pair,
//                             matrix · across + column tile
//
//   grid   clusters of two CTAs that walk their tiles of two lines × kAcross columns
//   block  2 warpgroups of consumers, of 256 columns each, and one that produces: a thread x, another S
//   smem   two rings: kStagesA of blocks of S, a CTA's own; kStagesB of kDepth of x, in step with the other CTA's:
//          a stage that both need comes in once for both, half of it asked for by each; kStaging bytes a warp
//   floor  2 · nnz · D FLOP at 800 TFLOP/s; L2: 8 KiB a tile's block, 64 KiB a pair's inner block, 8.6 TB/s
//   needs  sm_90a, D % 64 == 0, 16-byte aligned rows, no masks
//
// What a GPC takes in from L2 bounds products of scattered blocks: lines are paired so that most of what they
// ask of x is the same (plans/cuda_pairs.py).
#include "types.cuh"
#include "tma.cuh"
#include "cluster.cuh"
#include "registers.cuh"
#include "wgmma.cuh"
#include "result.cuh"
#include "staged.cuh"
#include "token_rows.cuh"
#include "walk.cuh"

constexpr int kSize = 64, kDepth = MG_DEPTH, kWide = 256, kStagesA = MG_STAGES_A, kStagesB = MG_STAGES_B;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kDepth == 32 || kDepth == 64, "DEPTH must be 32 or 64");
constexpr int kConsumers = 2 * 128, kAcross = 2 * kWide, kPanels = kAcross / 64, kSubs = kSize / kDepth;
using Pool = Registers<kConsumers + 128, 56, 224>;
constexpr u32 kPanelB = kDepth * 128, kStageA = kSize * 128, kStageB = kPanels * kPanelB;

// A stage of a ring, and the parity of its round.
template <int kCount>
struct Ring {
    int stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == kCount) stage = 0, parity ^= 1;
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kConsumers + 128, 1)
    spmm_pair_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                   const __grid_constant__ TensorMap half_map, const int4 *__restrict__ table,
                   const int4 *__restrict__ tiles, int each, int across, float scale, const operand_t *__restrict__ bias, void *__restrict__ out, int rows,
                   int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring_a = (shared_address(raw) + 1023) & ~1023u, ring_b = ring_a + kStagesA * kStageA;
    const u32 staging = ring_b + kStagesB * kStageB;
    __shared__ alignas(8) u64 barriers[2 * (kStagesA + kStagesB)];
    const u32 full_a = shared_address(barriers), empty_a = full_a + 8 * kStagesA;
    const u32 full_b = empty_a + 8 * kStagesA, empty_b = full_b + 8 * kStagesB;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const u32 rank = cluster_rank();

    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map), tma_prefetch(half_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStagesA; ++s) barrier_init(full_a + 8 * s, 1), barrier_init(empty_a + 8 * s, kConsumers / 32);
        // A stage of x is free when both CTAs have passed it, whether they read it or not.
        for (int s = 0; s < kStagesB; ++s) barrier_init(full_b + 8 * s, 1), barrier_init(empty_b + 8 * s, 2 * kConsumers / 32);
        barrier_init_fence();
    }
    cluster_sync();

    Walk walk(tiles, each);
    int4 tile;

    if (warp >= kConsumers / 32) {  // producers
        Pool::give();
        if (lane != 0) return;
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        if (warp == kConsumers / 32) {  // of x
            Ring<kStagesB> b{0, 1};
            while (walk.next(tile)) {
                const int panel = tile.w % across * kPanels, matrix = tile.w / across;
                const int4 *element = table + tile.y / 2;
                const bool second = tile.y % 2;
                int4 soon = tile.z > 0 ? __ldg(element) : make_int4(-1, -1, -1, -1);
#pragma unroll 1
                for (int i = 0; i < tile.z; ++i) {
                    const int inner = second ? soon.y : soon.x;
                    const bool both = soon.x == soon.y;
                    if (i + 1 < tile.z) soon = __ldg(++element);
#pragma unroll 1
                    for (int sub = 0; sub < kSubs; ++sub) {
                        const u32 full = full_b + 8 * b.stage, to = ring_b + b.stage * kStageB;
                        const int row = inner * kSize + kDepth * sub;
                        barrier_wait(empty_b + 8 * b.stage, b.parity);
                        if (inner < 0) {
                            barrier_arrive(full);  // so that its parity goes on with the ring's
                        } else {
                            barrier_expect(full, kStageB);
                            if constexpr (kTokens) {
                                const int column = panel * 64;
                                if (both) {
                                    tma_multicast(to + rank * (kStageB / 2), x_map, full, 3, row, column + rank * kWide, 0, matrix);
                                } else {
                                    tma_load(to, x_map, full, row, column, 0, matrix);
                                    tma_load(to + kStageB / 2, x_map, full, row, column + kWide, 0, matrix);
                                }
                            } else if (both) {
                                const u32 from = rank * (kPanels / 2);
                                tma_multicast(to + from * kPanelB, half_map, full, 3, 0, row, panel + from, matrix);
                            } else {
                                tma_load(to, x_map, full, 0, row, panel, matrix);
                            }
                        }
                        b.next();
                    }
                }
            }
            // All that the other CTA says to this one has been said, and what it sends has been waited for: it may end.
            for (int s = 0; s < kStagesB; ++s, b.next()) barrier_wait(empty_b + 8 * b.stage, b.parity);
        } else if (warp == kConsumers / 32 + 1) {  // of S
            Ring<kStagesA> a{0, 1};
            while (walk.next(tile)) {
                const int4 *element = table + tile.y / 2;
                const bool second = tile.y % 2;
                int4 soon = tile.z > 0 ? __ldg(element) : make_int4(-1, -1, -1, -1);
#pragma unroll 1
                for (int i = 0; i < tile.z; ++i) {
                    const int mine = second ? soon.w : soon.z;
                    if (i + 1 < tile.z) soon = __ldg(++element);
                    if (mine < 0) continue;
                    const u32 full = full_a + 8 * a.stage;
                    barrier_wait(empty_a + 8 * a.stage, a.parity);
                    barrier_expect(full, kStageA);
                    tma_load(ring_a + a.stage * kStageA, values_map, full, 0, mine * kSize, tile.w / across);
                    a.next();
                }
            }
        }
    } else {
        Pool::take();
        const int group = warp / 4, row16 = (warp % 4) * 16;  // of this warp within the line
        Ring<kStagesA> a{0, 0};
        Ring<kStagesB> b{0, 0};
        const u64 left_desc = wgmma_descriptor(ring_a, kStageA);
        const u32 right0 = ring_b + group * (kWide / 64) * kPanelB;
        const u64 right_desc = kTokens ? wgmma_rows<kDepth * 2>(right0) : wgmma_descriptor(right0, kPanelB);
        // A lane's barriers: of x here, of x in the other CTA, of S.
        const u32 empties = lane == 0 ? empty_b : lane == 1 ? cluster_address(empty_b, rank ^ 1) : 0;
        u32 held = 0;  // those that the product in flight has to give back
        while (walk.next(tile)) {
            float acc[kWide / 2];
#pragma unroll
            for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
            const int *item = &table[tile.y / 2].z + tile.y % 2;
            bool has = tile.z > 0 && __ldg(item) >= 0;
#pragma unroll 1
            for (int i = 0; i < tile.z; ++i) {
                const bool now = has;
                if (i + 1 < tile.z) has = __ldg(item += 4) >= 0;
                if (!now) {
                    // What the product in flight reads is given back, or the ring would wait for it.
                    wgmma_wait<0>();
                    cluster_arrive_if(held);
                    held = 0;
#pragma unroll 1
                    for (int sub = 0; sub < kSubs; ++sub) {
                        barrier_wait(full_b + 8 * b.stage, b.parity);
                        cluster_arrive_if(empties ? empties + 8 * b.stage : 0);
                        b.next();
                    }
                    continue;
                }
                barrier_wait(full_a + 8 * a.stage, a.parity);
#pragma unroll
                for (int sub = 0; sub < kSubs; ++sub) {
                    barrier_wait(full_b + 8 * b.stage, b.parity);
                    wgmma_fence();
#pragma unroll
                    for (int kk = 0; kk < kDepth / 16; ++kk)
                        Wgmma<kWide>::template ss<kTransposed, !kTokens>(
                            acc, left_desc + ((a.stage * kStageA + (sub * kDepth / 16 + kk) * (kTransposed ? 2048 : 32)) >> 4),
                            right_desc + ((b.stage * kStageB + kk * (kTokens ? 32 : 2048)) >> 4), 1);
                    wgmma_commit();
                    // The product before this one is done, and what it read is free.
                    wgmma_wait<1>();
                    cluster_arrive_if(held);
                    held = empties                              ? empties + 8 * b.stage
                           : lane == 2 && sub == kSubs - 1 ? empty_a + 8 * a.stage
                                                                : 0;
                    b.next();
                }
                a.next();
            }
            wgmma_wait<0>();
            cluster_arrive_if(held);
            held = 0;
            if (tile.x >= 0) {
                const int row = tile.x * kSize + row16, column = tile.w % across * kAcross + group * kWide;
                const i64 plane = static_cast<i64>(tile.w / across) * rows * width;
                if constexpr (kTokens)
                    store_turned<kWide>(acc, scale, bias, staging + group * 4 * kStaging, static_cast<operand_t *>(out) + plane,
                                        row - row16, rows, column, width);
                else if constexpr (kPartial)
                    store_result<kWide, true>(acc, scale, static_cast<float *>(out) + plane, row + lane / 4, rows, column,
                                              width, add);
                else
                    store_staged<kWide>(acc, scale, staging + warp * kStaging, static_cast<operand_t *>(out) + plane, row,
                                        rows, column, width);
            }
        }
    }
}

// spmm_pair_sm90: out = scale · S x or scale · Sᵀ x, S in whole blocks of 64 or 128, two lines of them at a time.
//
//   out     (F, rows, D)      F matrices that share the positions; rows = nq, or nk when transposed; contiguous
//   x       (F, inner, D)     by a 4-D tensor map, any strides
//   values  (F, slots)        blocks of S × S elements, by a 3-D tensor map (S, items · S, F)
//   table   (n) int4          blocks in the order of the lines: item, inner block, −, whether the line's partner
//                             has that inner block too
//   tiles   (CTAs, each) int4   see walk.cuh; those of a cluster's two CTAs are of two partners (−1 = none) and the
//                             same columns
//
//   grid   clusters of two CTAs that walk their tiles of two lines × kAcross columns
//   block  2 warpgroups of consumers + one that produces
//   smem   rings of 64 inner positions of S, and of kDepth of x: kShared stages that both CTAs fill for one
//          another, kOwn of a CTA alone
//   floor  2 · nnz · D FLOP at 800 TFLOP/s; L2: (S + kAcross) · 128 B a tile's 64 positions, x once where shared
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows, no masks
//
// What a GPC takes in from L2 bounds products of scattered blocks: lines are paired so that most of what they
// ask of x is the same (plans/cuda_pairs.py), and comes in once for both.
#include "types.cuh"
#include "tma.cuh"
#include "cluster.cuh"
#include "wgmma.cuh"
#include "result.cuh"
#include "walk.cuh"

constexpr int kSize = MG_SIZE, kDepth = MG_DEPTH, kWide = 256;
constexpr int kStagesA = MG_STAGES_A, kShared = MG_SHARED, kOwn = MG_OWN, kStagesB = kShared + kOwn;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kSize == 64 || kSize == 128, "SIZE must be 64 or 128");
static_assert(kDepth == 16 || kDepth == 32, "DEPTH must be 16 or 32");
constexpr int kGroups = kSize / 64, kGroupsN = 2 / kGroups, kConsumers = 2 * 128;
constexpr int kAcross = kWide * kGroupsN, kPanels = kAcross / 64, kHalves = kSize / 64, kSubs = 64 / kDepth;
constexpr u32 kPanelA = 64 * 128, kPanelB = kDepth * 128, kStageA = kGroups * kPanelA, kStageB = kPanels * kPanelB;

// Stages first … first + count − 1 of a ring, one after the other, and the parity of their round.
template <int kFirst, int kCount>
struct Ring {
    u32 stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == kFirst + kCount) stage = kFirst, parity ^= 1;
    }
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kConsumers + 128, 1)
    spmm_pair_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                   const int4 *__restrict__ table, const int4 *__restrict__ tiles, int each, int across, float scale,
                   void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring_a = (shared_address(raw) + 1023) & ~1023u, ring_b = ring_a + kStagesA * kStageA;
    __shared__ alignas(8) u64 barriers[2 * (kStagesA + kStagesB)];
    const u32 full_a = shared_address(barriers), empty_a = full_a + 8 * kStagesA;
    const u32 full_b = empty_a + 8 * kStagesA, empty_b = full_b + 8 * kStagesB;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const u32 rank = cluster_rank();

    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStagesA; ++s) barrier_init(full_a + 8 * s, 1), barrier_init(empty_a + 8 * s, kConsumers / 32);
        for (int s = 0; s < kStagesB; ++s) {
            barrier_init(full_b + 8 * s, 1);
            barrier_init(empty_b + 8 * s, (s < kShared ? 2 : 1) * kConsumers / 32);
        }
        barrier_init_fence();
    }
    cluster_sync();

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        Ring<0, kStagesA> a{0, 1};
        Ring<0, kShared> ours{0, 1};
        Ring<kShared, kOwn> mine{kShared, 1};
        Walk walk(tiles, each);
        int4 tile;
        while (threadIdx.x == kConsumers && walk.next(tile)) {
            const int column0 = tile.w % across * kAcross, matrix = tile.w / across;
            const int panels = min(kPanels, (width - column0 + 63) / 64);
            // Of a stage that is shared each CTA asks for half.
            const int begin = rank * (kPanels / 2), end = rank ? panels : min(panels, kPanels / 2);
            int4 item = tile.z > 0 ? __ldg(table + tile.y) : make_int4(0, 0, 0, 0);
            for (int i = 0; i < tile.z; ++i) {
                const int n = item.x, inner = item.y * kSize;
                const bool shared = item.w;
                if (i + 1 < tile.z) item = __ldg(table + tile.y + i + 1);
#pragma unroll 1
                for (int half = 0; half < kHalves; ++half) {
                    barrier_wait(empty_a + 8 * a.stage, a.parity);
                    barrier_expect(full_a + 8 * a.stage, kStageA);
                    // 64 inner positions: columns of the block, or its rows if transposed.
#pragma unroll
                    for (int p = 0; p < kGroups; ++p)
                        tma_load(ring_a + a.stage * kStageA + p * kPanelA, values_map, full_a + 8 * a.stage,
                                 kTransposed ? 64 * p : 64 * half, n * kSize + (kTransposed ? 64 * half : 64 * p), matrix);
                    a.next();
#pragma unroll 1
                    for (int row = inner + 64 * half; row < inner + 64 * half + 64; row += kDepth) {
                        const u32 stage = shared ? ours.stage : mine.stage, full = full_b + 8 * stage;
                        const u32 to = ring_b + stage * kStageB;
                        barrier_wait(empty_b + 8 * stage, shared ? ours.parity : mine.parity);
                        barrier_expect(full, panels * kPanelB);
                        if (shared) {
#pragma unroll 1
                            for (int p = begin; p < end; ++p)
                                tma_multicast(to + p * kPanelB, x_map, full, 3, column0 + 64 * p, row, 0, matrix);
                            ours.next();
                        } else {
#pragma unroll 1
                            for (int p = 0; p < panels; ++p)
                                tma_load(to + p * kPanelB, x_map, full, column0 + 64 * p, row, 0, matrix);
                            mine.next();
                        }
                    }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const int group = warp / 4 % kGroups, group_n = warp / 4 / kGroups;
        const int row16 = (warp % 4) * 16;  // of this warp within its group's 64
        Ring<0, kStagesA> a{0, 0};
        Ring<0, kShared> ours{0, 0};
        Ring<kShared, kOwn> mine{kShared, 0};
        Walk walk(tiles, each);
        int4 tile;
        const u64 left_desc = wgmma_descriptor(ring_a + group * kPanelA, kPanelA);
        const u64 right_desc = wgmma_descriptor(ring_b + group_n * (kWide / 64) * kPanelB, kPanelB);
        const u32 away = cluster_address(empty_b, rank ^ 1) - empty_b;  // from here to the other CTA
        // Barriers of the stages that the product in flight reads: lane 0 has that of x here, lane 1 the same
        // in the other CTA, lane 2 that of S.
        u32 held = 0;
        while (walk.next(tile)) {
            float acc[kWide / 2];
#pragma unroll
            for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
            bool shared = tile.z > 0 && __ldg(&table[tile.y].w), soon = false;
#pragma unroll 1
            for (int step = 0; step < tile.z * kHalves; ++step) {
                if (step % kHalves == 0) soon = step / kHalves + 1 < tile.z && __ldg(&table[tile.y + step / kHalves + 1].w);
                barrier_wait(full_a + 8 * a.stage, a.parity);
#pragma unroll
                for (int sub = 0; sub < kSubs; ++sub) {
                    const u32 stage = shared ? ours.stage : mine.stage;
                    barrier_wait(full_b + 8 * stage, shared ? ours.parity : mine.parity);
                    wgmma_fence();
#pragma unroll
                    for (int kk = 0; kk < kDepth / 16; ++kk)
                        Wgmma<kWide>::template ss<kTransposed, 1>(
                            acc, left_desc + ((a.stage * kStageA + (sub * kDepth / 16 + kk) * (kTransposed ? 2048 : 32)) >> 4),
                            right_desc + ((stage * kStageB + kk * 2048) >> 4), 1);
                    wgmma_commit();
                    // The product before this one is done, and what it read is free.
                    wgmma_wait<1>();
                    cluster_arrive_if(held);
                    held = lane == 0                         ? empty_b + 8 * stage
                           : lane == 1 && shared             ? empty_b + 8 * stage + away
                           : lane == 2 && sub == kSubs - 1   ? empty_a + 8 * a.stage
                                                             : 0;
                    if (shared) ours.next();
                    else mine.next();
                }
                a.next();
                if (step % kHalves == kHalves - 1) shared = soon;
            }
            wgmma_wait<0>();
            cluster_arrive_if(held);
            held = 0;
            if (tile.x < 0) continue;

            const int row = tile.x * kSize + 64 * group + row16 + lane / 4;
            const i64 plane = static_cast<i64>(tile.w / across) * rows * width;
            void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                                : static_cast<void *>(static_cast<operand_t *>(out) + plane);
            store_result<kWide, kPartial>(acc, scale, to, row, rows, tile.w % across * kAcross + group_n * kWide, width, add);
        }
    }
    // What the other CTA still sends and says arrives before this one ends.
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

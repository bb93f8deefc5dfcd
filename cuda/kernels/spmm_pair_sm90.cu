// spmm_pair_sm90: out = scale · S x or scale · Sᵀ x, S in whole blocks of 64, two lines of them at a time.
//
//   out     (F, rows, D)      F matrices that share the positions; rows = nq, or nk when transposed; contiguous
//   x       (F, inner, D)     by a 4-D tensor map, any strides
//   values  (F, slots)        blocks of 64 × 64 elements, by a 3-D tensor map (64, items · 64, F)
//   table   (n) int4          what either line of a pair has, by inner block: inner block, item of the one, of
//                             the other (−1 = none), 0
//   tiles   (CTAs, each, 2) int4   the two lines (−1 = none), first element of the pair, elements (−1 = no more
//                             tiles); then matrix, first column, groups of 128 columns (up to 3), 0
//
//   grid   CTAs that walk their tiles of a pair of lines × up to 384 columns
//   block  3 warpgroups of consumers, 128 columns of both lines each, + a warpgroup that produces
//   smem   two rings: kStagesA of 64 inner positions of both lines, kStagesB of DEPTH of x
//   floor  2 · nnz · D FLOP at 800 TFLOP/s; L2: 64 · 128 B a block + 384 · 128 B an element
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows, no masks
//
// What a multiprocessor takes in from L2 bounds products of scattered blocks: lines are paired so that most
// of what they ask of x is the same (plans/cuda_pairs.py), and comes in once for both.
#include "types.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "result.cuh"

constexpr int kGroups = 3, kWide = 128, kDepth = MG_DEPTH, kSubs = 64 / kDepth, kPanels = kGroups * kWide / 64;
constexpr int kStagesA = MG_STAGES_A, kStagesB = MG_STAGES_B, kConsumers = 128 * kGroups;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
constexpr u32 kPanelA = 64 * 128, kPanelB = kDepth * 128, kStageA = 2 * kPanelA, kStageB = kPanels * kPanelB;

struct Tile {
    int4 what, where;
};
// The tiles of a CTA, one after the other; the next is asked for while one is worked on.
struct Tiles {
    const int4 *at, *end;
    Tile soon;

    __device__ __forceinline__ Tiles(const int4 *tiles, int each)
        : at(tiles + static_cast<i64>(blockIdx.x) * each * 2), end(at + 2 * each), soon{__ldg(at), __ldg(at + 1)} {}
    __device__ __forceinline__ bool next(Tile &tile) {
        if (at == end) return false;
        tile = soon;
        if (tile.what.w < 0) return false;
        if ((at += 2) != end) soon = {__ldg(at), __ldg(at + 1)};
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    spmm_pair_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                   const int4 *__restrict__ table, const int4 *__restrict__ tiles, int each, float scale,
                   void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring_a = (shared_address(raw) + 1023) & ~1023u, ring_b = ring_a + kStagesA * kStageA;
    __shared__ alignas(8) u64 barriers[2 * (kStagesA + kStagesB)];
    const u32 full_a = shared_address(barriers), empty_a = full_a + 8 * kStagesA;
    const u32 full_b = empty_a + 8 * kStagesA, empty_b = full_b + 8 * kStagesB;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    Tiles walk(tiles, each);
    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStagesA; ++s) barrier_init(full_a + 8 * s, 1), barrier_init(empty_a + 8 * s, kConsumers / 32);
        for (int s = 0; s < kStagesB; ++s) barrier_init(full_b + 8 * s, 1), barrier_init(empty_b + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    Tile tile;

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x != kConsumers) return;
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        int a = 0, b = 0;
        u32 parity_a = 1, parity_b = 1;
        while (walk.next(tile)) {
            const int first = tile.what.z, count = tile.what.w, panels = 2 * tile.where.z;
            int4 element = count > 0 ? __ldg(table + first) : make_int4(0, -1, -1, 0);
            for (int i = 0; i < count; ++i) {
                const int4 now = element;
                if (i + 1 < count) element = __ldg(table + first + i + 1);
                barrier_wait(empty_a + 8 * a, parity_a);
                barrier_expect(full_a + 8 * a, ((now.y >= 0) + (now.z >= 0)) * kPanelA);
                if (now.y >= 0) tma_load(ring_a + a * kStageA, values_map, full_a + 8 * a, 0, now.y * 64, tile.where.x);
                if (now.z >= 0)
                    tma_load(ring_a + a * kStageA + kPanelA, values_map, full_a + 8 * a, 0, now.z * 64, tile.where.x);
                if (++a == kStagesA) a = 0, parity_a ^= 1;
#pragma unroll
                for (int sub = 0; sub < kSubs; ++sub) {
                    barrier_wait(empty_b + 8 * b, parity_b);
                    barrier_expect(full_b + 8 * b, panels * kPanelB);
#pragma unroll 2
                    for (int p = 0; p < panels; ++p)
                        tma_load(ring_b + b * kStageB + p * kPanelB, x_map, full_b + 8 * b, tile.where.y + 64 * p,
                                 now.x * 64 + kDepth * sub, 0, tile.where.x);
                    if (++b == kStagesB) b = 0, parity_b ^= 1;
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int group = warp / 4, row16 = (warp % 4) * 16;  // of this warp within a line's 64
    int a = 0, b = 0;
    u32 parity_a = 0, parity_b = 0;
    const u64 left_desc = wgmma_descriptor(ring_a, kPanelA);
    const u64 right_desc = wgmma_descriptor(ring_b + group * (kWide / 64) * kPanelB, kPanelB);
    while (walk.next(tile)) {
        const bool works = group < tile.where.z;
        float one[kWide / 2], other[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) one[i] = other[i] = 0.f;
        const int4 *elements = table + tile.what.z;
        int4 element = tile.what.w > 0 ? __ldg(elements) : make_int4(0, -1, -1, 0);
        const auto multiply = [&](float(&acc)[kWide / 2], u32 line, int sub) {
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < kDepth / 16; ++kk)
                Wgmma<kWide>::template ss<kTransposed, 1>(
                    acc,
                    left_desc + ((a * kStageA + line * kPanelA + (sub * kDepth / 16 + kk) * (kTransposed ? 2048 : 32)) >> 4),
                    right_desc + ((b * kStageB + kk * 2048) >> 4), 1);
            wgmma_commit();
        };
#pragma unroll 1
        for (int i = 0; i < tile.what.w; ++i) {
            const bool has_one = works && element.y >= 0, has_other = works && element.z >= 0;
            if (i + 1 < tile.what.w) element = __ldg(elements + i + 1);
            barrier_wait(full_a + 8 * a, parity_a);
#pragma unroll
            for (int sub = 0; sub < kSubs; ++sub) {
                barrier_wait(full_b + 8 * b, parity_b);
                if (has_one) multiply(one, 0, sub);
                if (has_other) multiply(other, 1, sub);
                wgmma_wait<0>();  // meanwhile the other warpgroups multiply
                if (lane == 0) {
                    barrier_arrive(empty_b + 8 * b);
                    if (sub == kSubs - 1) barrier_arrive(empty_a + 8 * a);
                }
                if (++b == kStagesB) b = 0, parity_b ^= 1;
            }
            if (++a == kStagesA) a = 0, parity_a ^= 1;
        }
        if (!works) continue;

        const i64 plane = static_cast<i64>(tile.where.x) * rows * width;
        void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                            : static_cast<void *>(static_cast<operand_t *>(out) + plane);
        const int column = tile.where.y + group * kWide, row = row16 + lane / 4;
        store_result<kWide, kPartial>(one, scale, to, tile.what.x * 64 + row, rows, column, width, add);
        if (tile.what.y >= 0) store_result<kWide, kPartial>(other, scale, to, tile.what.y * 64 + row, rows, column, width, add);
    }
}

// spmm_expand_sm90: out = scale · S x or scale · Sᵀ x, S of single entries, on wgmma.
//
// A CTA takes 128 rows and walks the chunks of 64 inner positions that hold an entry of them. One warpgroup
// spreads a chunk's entries over a dense 128 × 64 tile in shared memory, where the others multiply it: many
// columns of x then cost what a dense product costs, and not a gathered row for every entry.
//
//   out       (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x         (F, E, inner, D)  by a 4-D tensor map, any strides, boxes of 64 columns × 64
//   values    (F, slots)        16-bit elements
//   scattered (n) int2          slot, 1 + byte of the swizzled tile; by line, chunk, slot
//   chunks    (c + 3) int2      chunk of 64 inner positions, its first entry; then the end, three times
//   bounds    (E · rows + 1), indices, order: CSR as spmm_row has it, for what is summed up again
//   tiles     (n) int4          see walk.cuh; line = entry · groups + group of 128 rows
//
//   grid   CTAs that walk their tiles of 128 rows × kWide columns
//   block  256 consumers + 128 producers
//   smem   kStages of 128 × 64 of S and 64 × kWide of x
//   floor  2 · chunks · 128 · 64 · D FLOP at 800 TFLOP/s; shared memory: 80 B of operands a cycle of products,
//          and the tiles' coming in, of 128
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows of x, fewer than 2³¹ slots, no run-time mask
//
// A dense tile multiplies rows of x that a row of S has no use for by zero, and 0 · NaN is NaN. So all that is
// not finite in x shows: every sum that met it is not finite. Those sums alone are made again, entry by entry.
#include "types.cuh"
#include "tma.cuh"
#include "mma.cuh"
#include "wgmma.cuh"
#include "result.cuh"
#include "walk.cuh"

constexpr int kWide = MG_WIDE, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
constexpr int kRows = 128, kConsumers = 256, kProducers = 128, kPanels = kWide / 64;
constexpr u32 kLeft = kRows * 128, kPanel = 64 * 128, kRight = kPanels * kPanel, kStage = kLeft + kRight;
// Pieces of entries: of each producer, pieces whose values are under way, and pieces that are so themselves.
constexpr int kEach = 4, kPiece = kEach * kProducers, kDeep = MG_DEEP, kAhead = 4;
using sum_t = DtypeOf<kPartial ? 2 : kDtype>::type;

// The entries of a tile in pieces of at most kPiece, none of them in two chunks.
struct Pieces {
    const int2 *at;  // of the chunk after this one
    int from, begin, end, after, left;

    __device__ __forceinline__ Pieces(const int2 *chunks, int count)
        : at(chunks + 1), from(__ldg(&chunks->y)), begin(from), end(__ldg(&chunks[1].y)), after(__ldg(&chunks[2].y)), left(count) {}
    __device__ __forceinline__ int count() const { return left > 0 ? min(end - from, kPiece) : 0; }
    // Bits: there is a piece; it opens its chunk; it closes it.
    __device__ __forceinline__ u32 code() const {
        return left > 0 ? 4 + (from == begin) * 2 + (from + kPiece >= end) : 0;
    }
    __device__ __forceinline__ void next() {
        from += kPiece;
        if (from < end) return;
        --left, ++at;
        from = begin = end, end = after;
        if (left > 0) after = __ldg(&at[1].y);
    }
};

__device__ __forceinline__ bool finite(float v) { return fabsf(v) < kInfinity; }

extern "C" __global__ void __launch_bounds__(kConsumers + kProducers, 1)
    spmm_expand_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values, i64 values_free,
                     const int2 *__restrict__ scattered, const int2 *__restrict__ chunks,
                     const int4 *__restrict__ tiles, int each,                                       //
                     const operand_t *__restrict__ x, i64 x_free, i64 x_entry, i64 x_row,            //
                     const int *__restrict__ bounds, const int *__restrict__ indices, const int *__restrict__ order,
                     int groups, int entries, int across, float scale, void *__restrict__ out, int rows, int width) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    __shared__ alignas(8) int2 coming[kAhead][kPiece];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // The first tile is asked for while the barriers are made.
    Walk walk(tiles, each);
    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, kProducers / 32 + 1), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;
    int stage = 0;

    if (warp >= kConsumers / 32) {  // producers
        if constexpr (kWide == 256) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        const int mine = threadIdx.x - kConsumers;
        int loading = 0;
        u32 parity = 1, parity_x = 1;  // barriers of an empty ring let the first round pass
        while (walk.next(tile)) {
            if (tile.z == 0) continue;
            // Rows of x are asked for as soon as there is room, ahead of the entries that multiply them.
            const int column = tile.w % across * kWide, entry = tile.x / groups, matrix = tile.w / across;
            const int2 *chunk = chunks + tile.y;
            int number = __ldg(&chunk->x), unloaded = tile.z, ahead = 0;
            const auto load = [&]() {
                const u32 to = ring + loading * kStage + kLeft, barrier = full + 8 * loading;
                barrier_expect(barrier, kRight);
#pragma unroll
                for (int p = 0; p < kPanels; ++p)
                    tma_load(to + p * kPanel, x_map, barrier, column + 64 * p, number * 64, entry, matrix);
                number = __ldg(&(++chunk)->x), --unloaded, ++ahead;
                if (++loading == kStages) loading = 0, parity_x ^= 1;
            };
            const u64 from = reinterpret_cast<u64>(values) + 2 * matrix * values_free;
            Pieces pieces(chunks + tile.y, tile.z);
            // Each thread asks for entries kAhead pieces before their values, and reads but its own.
            u32 codes = 0, slot = 0;  // of the pieces under way, the first in the low bits; place in the ring
            const auto ask = [&]() {
                const int count = pieces.count();
                const int2 *const at = scattered + pieces.from + mine;
#pragma unroll
                for (int u = 0; u < kEach; ++u) {  // where there is none: zeros
                    const bool there = mine + u * kProducers < count;
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(
                                     shared_address(&coming[slot][mine + u * kProducers])),
                                 "l"(there ? at + u * kProducers : scattered), "r"(there ? 8 : 0)
                                 : "memory");
                }
                copy_commit();
                slot = (slot + 1) % kAhead;
                const u32 code = pieces.code();
                if (code) pieces.next();
                return code;
            };
            int to[kDeep][kEach];
            u16 value[kDeep][kEach];
            const auto look_up = [&](int d) {
                copy_wait<kAhead - 1>();
#pragma unroll
                for (int u = 0; u < kEach; ++u) {
                    const int2 entry = coming[slot][mine + u * kProducers];
                    to[d][u] = entry.y;
                    if (entry.y) value[d][u] = __ldg(reinterpret_cast<const u16 *>(from) + entry.x);
                }
            };
#pragma unroll
            for (int n = 0; n < kAhead; ++n) codes |= ask() << 4 * n;
#pragma unroll
            for (int d = 0; d < kDeep; ++d) look_up(d), codes |= ask() << 4 * (kAhead + d);
            while (codes) {
#pragma unroll
                for (int d = 0; d < kDeep; ++d) {
                    const u32 at = ring + stage * kStage;
                    if (codes & 2) {
                        barrier_wait(empty + 8 * stage, parity);
                        if (mine == 0) {
                            if (ahead == 0) load();
                            --ahead;
                            while (unloaded && ahead < kStages - 1 && barrier_passed(empty + 8 * loading, parity_x)) load();
                        }
                        __syncwarp();
#pragma unroll
                        for (int n = 0; n < kLeft / 16 / kProducers; ++n)
                            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + (n * kProducers + mine) * 16),
                                         "r"(0)
                                         : "memory");
                        named_barrier(1, kProducers);
                    }
#pragma unroll
                    for (int u = 0; u < kEach; ++u)
                        if (to[d][u])
                            asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + to[d][u] - 1), "h"(value[d][u]) : "memory");
                    if (codes & 1) {
                        proxy_fence();
                        __syncwarp();
                        if (lane == 0) barrier_arrive(full + 8 * stage);
                        if (++stage == kStages) stage = 0, parity ^= 1;
                    }
                    codes >>= 4;
                    look_up(d);
                    codes |= ask() << 4 * (kAhead + kDeep - 1);
                }
            }
        }
        return;
    }

    if constexpr (kWide == 256) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    const int group = warp / 4;
    u32 parity = 0;

    while (walk.next(tile)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        u32 held = 0;  // barrier of the stage that the product in flight reads
#pragma unroll 1
        for (int i = 0; i < tile.z; ++i) {
            const u32 left = ring + stage * kStage + group * kPanel, right = ring + stage * kStage + kLeft;
            barrier_wait(full + 8 * stage, parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k)
                Wgmma<kWide>::template ss<0, 1>(acc, wgmma_descriptor(left + k * 32, kPanel),
                                                wgmma_descriptor(right + k * 2048, kPanel), 1);
            wgmma_commit();
            // The product before this one is done, and what it read is free.
            wgmma_wait<1>();
            if (lane == 0 && held) barrier_arrive(held);
            held = empty + 8 * stage;
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (lane == 0 && held) barrier_arrive(held);

        // Rows of this lane with a sum that is not finite: it makes that of its zero multiples NaN.
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int j = 0; j < kWide / 2; j += 4) {
            low = fmaf(acc[j], 0.f, low), low = fmaf(acc[j + 1], 0.f, low);
            high = fmaf(acc[j + 2], 0.f, high), high = fmaf(acc[j + 3], 0.f, high);
        }
        const int entry = tile.x / groups, matrix = tile.w / across, column0 = tile.w % across * kWide;
        const int row0 = tile.x % groups * kRows + 64 * group + warp % 4 * 16;
        sum_t *const to = static_cast<sum_t *>(out) + (static_cast<i64>(matrix) * entries + entry) * rows * width;
        store_result<kWide, kPartial>(acc, scale, to, row0 + lane / 4, rows, column0, width, false);
        const u32 bad_low = __ballot_sync(0xFFFFFFFFu, low != low), bad_high = __ballot_sync(0xFFFFFFFFu, high != high);
        if (!(bad_low | bad_high)) continue;

        __syncwarp();  // what other lanes stored is read below
        const int column = column0 + lane * 8;
#pragma unroll 1
        for (int n = 0; n < 16 && row0 + n < rows; ++n) {
            if (!((n < 8 ? bad_low : bad_high) >> (n % 8 * 4) & 15) || lane * 8 >= kWide || column >= width) continue;
            const operand_t *const from = x + matrix * x_free + entry * x_entry + column;
            float sum[8] = {};
            const int *const ends = bounds + static_cast<i64>(entry) * rows + row0 + n;
#pragma unroll 4
            for (int i = __ldg(ends); i < __ldg(ends + 1); ++i) {
                const int slot = kTransposed ? __ldg(order + i) : i;
                const float weight = to_float(values[matrix * values_free + slot]);
                const Vec<operand_t> right = global16(from + __ldg(indices + i) * x_row);
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[c] = fmaf(weight, to_float(right.at[c]), sum[c]);
            }
            sum_t *const line = to + static_cast<i64>(row0 + n) * width + column;
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (!finite(to_float(line[c]))) line[c] = from_float<sum_t>(sum[c] * scale);
        }
    }
}

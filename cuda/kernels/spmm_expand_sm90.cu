// spmm_expand_sm90: out = scale · S x or scale · Sᵀ x, S of single entries, on wgmma.
//
// A CTA takes kRows rows and walks the chunks of 64 inner positions that hold an entry of them. Each producer
// warp spreads the entries of a chunk of its own over a dense tile in shared memory, where the consumers
// multiply it: many columns of x then cost what a dense product costs, not a gathered row for every entry.
//
//   out       (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x         (F, E, inner, D)  by a 4-D tensor map, any strides, boxes of 64 columns × 64
//   values    (F, slots)        16-bit elements
//   scattered (n) int2          slot, 1 + byte of the swizzled tile; by line, chunk, slot
//   chunks    (c + 3) int2      chunk of 64 inner positions, its first entry; then the end, three times
//   bounds    (E · rows + 1), indices, order: CSR as spmm_row has it, for what is summed up again
//   tiles     (n) int4          see walk.cuh; line = entry · groups + group of kRows rows
//
//   grid   CTAs that walk their tiles of kRows × kWide columns
//   block  2 · kRows consumers + 128 producers
//   smem   kStages of kRows × 64 of S and 64 × kWide of x; 512 entries of each producer warp
//   floor  2 · chunks · kRows · 64 · D FLOP at 800 TFLOP/s; shared memory: 80 B of operands a cycle of products,
//          and the tiles' coming in, of 128
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows of x, fewer than 2³¹ slots, no run-time mask
//
// A dense tile multiplies rows of x that a row of S has no use for by zero, and 0 · NaN is NaN. So all that is
// not finite in x shows: every sum that met it is not finite. Those sums alone are made again, entry by entry,
// which takes longer than gathering all of it in the first place would have.
#include "types.cuh"
#include "tma.cuh"
#include "copy.cuh"
#include "ring.cuh"
#include "result.cuh"
#include "walk.cuh"

constexpr int kRows = MG_ROWS, kWide = MG_WIDE, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kRows == 64 || kRows == 128, "ROWS must be 64 or 128");
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
constexpr int kConsumers = 2 * kRows, kProducers = 128, kPanels = kWide / 64;
constexpr u32 kLeft = kRows * 128, kPanel = 64 * 128, kRight = kPanels * kPanel, kStage = kLeft + kRight;
// Sums of 256 columns leave no room for a fair share of registers.
constexpr bool kUneven = kWide == 256 && kConsumers == 256;
using Pool = Registers<kConsumers + kProducers, 120, 192>;  // if kUneven
constexpr int kFillers = kProducers / 32;  // warps, each with a chunk of its own
static_assert(kStages >= kFillers, "a stage for each warp that fills");
constexpr int kEach = 16, kPiece = kEach * 32;  // entries that a warp has under way
using sum_t = DtypeOf<kPartial ? 2 : kDtype>::type;

// The entries of every kFillers-th chunk of a tile in pieces of at most kPiece, none of them in two chunks.
struct Pieces {
    const int2 *const chunks;
    int at, number, from, begin, end, left;  // of this chunk: its place, number along the inner side, entries
    int soon, soon_begin, soon_end;          // of the next

    __device__ __forceinline__ Pieces(const int2 *chunks, int first, int count) : chunks(chunks), at(first - kFillers), left(count + 1) {
        load();
        enter();
    }
    __device__ __forceinline__ void load() {
        const int2 *const next = chunks + at + kFillers;
        if (left > 1) soon = __ldg(&next->x), soon_begin = __ldg(&next->y), soon_end = __ldg(&next[1].y);
    }
    __device__ __forceinline__ void enter() {
        number = soon, from = begin = soon_begin, end = soon_end;
        --left, at += kFillers;
        load();
    }
    __device__ __forceinline__ int count() const { return left > 0 ? min(end - from, kPiece) : 0; }
    // Chunk, whether the piece opens it, whether it closes it; −1 after the last piece.
    __device__ __forceinline__ int note() const {
        return left > 0 ? number * 4 + (from == begin) * 2 + (from + kPiece >= end) : -1;
    }
    __device__ __forceinline__ void next() {
        from += kPiece;
        if (from >= end) enter();
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
    __shared__ alignas(8) int2 coming[kFillers][kPiece];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, 2), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;

    if (warp >= kConsumers / 32) {  // producers
        if constexpr (kUneven) Pool::give();
        const int mine = warp - kConsumers / 32;
        Walk walk(tiles, each);
        int2 *const my = coming[mine] + lane;  // what this lane asks for, and nobody else reads
        u32 before = 0;                        // chunks of the tiles before
        for (; walk.next(tile); before += tile.z) {
            // Chunks are dealt by their number in all the ring: a warp is never a round ahead of what it knows to
            // be free.
            const int first = (mine - before) & (kFillers - 1);
            if (first >= tile.z) continue;
            const int column = tile.w % across * kWide, entry = tile.x / groups, matrix = tile.w / across;
            const u16 *const from = reinterpret_cast<const u16 *>(values) + matrix * values_free;
            Pieces pieces(chunks, tile.y + first, (tile.z - first + kFillers - 1) / kFillers);
            const auto ask = [&]() {
                const int count = pieces.count() - lane, note = pieces.note();
                const int2 *const at = scattered + pieces.from + lane;
#pragma unroll
                for (int u = 0; u < kEach; ++u)  // zeros where there is none
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(my + 32 * u)),
                                 "l"(at + 32 * u), "r"(32 * u < count ? 8 : 0)
                                 : "memory");
                copy_commit();
                if (note >= 0) pieces.next();
                return note;
            };
            int to[kEach];
            u16 value[kEach];
            const auto look_up = [&]() {
                copy_wait<0>();
#pragma unroll
                for (int u = 0; u < kEach; ++u) {
                    if (u % 8 == 0) __syncwarp();  // fewer at once, in fewer registers
                    const int2 found = my[32 * u];
                    to[u] = found.y;
                    value[u] = __ldg(from + found.x);  // where there is none: of slot 0
                }
            };
            // Values are looked up a piece ahead, entries two.
            copy_wait<0>();  // for what was asked for after the last piece of the tile before
            int note = ask();
            look_up();
            int next = ask();
            for (u32 n = before + first; note >= 0; note = next, next = ask()) {
                const u32 stage = n % kStages, at = ring + stage * kStage;
                if (note & 2) {
                    // Barriers of an empty ring let the first round pass.
                    barrier_wait(empty + 8 * stage, n / kStages % 2 ^ 1);
                    if (lane == 0) {
                        barrier_expect(full + 8 * stage, kRight);
#pragma unroll
                        for (int p = 0; p < kPanels; ++p)
                            tma_load(at + kLeft + p * kPanel, x_map, full + 8 * stage, column + 64 * p, note / 4 * 64,
                                     entry, matrix);
                    }
#pragma unroll
                    for (int i = 0; i < kLeft / 512; ++i)
                        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + lane * 16 + i * 512), "r"(0)
                                     : "memory");
                    __syncwarp();
                }
#pragma unroll
                for (int u = 0; u < kEach; ++u)
                    if (to[u]) asm volatile("st.shared.u16 [%0], %1;" ::"r"(at + to[u] - 1), "h"(value[u]) : "memory");
                if (note & 1) {
                    proxy_fence();
                    __syncwarp();
                    if (lane == 0) barrier_arrive(full + 8 * stage);
                    n += kFillers;
                }
                look_up();
            }
        }
        return;
    }

    if constexpr (kUneven) Pool::take();
    const int group = warp / 4;
    const u64 left = wgmma_descriptor(ring + group * kPanel, kPanel), right = wgmma_descriptor(ring + kLeft, kPanel);
    RingPlace place;
    Walk walk(tiles, each);

    while (walk.next(tile)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        multiply_ring<kStages>(place, tile.z, full, empty, lane, [&](int stage) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                Wgmma<kWide>::template ss<0, 1>(acc, left + ((stage * kStage + k * 32) >> 4),
                                                right + ((stage * kStage + k * 2048) >> 4), 1);
        });

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
        const bool mine = lane * 8 < kWide && column < width;
        const operand_t *const from = x + matrix * x_free + entry * x_entry + column;
#pragma unroll 1
        for (int n = 0; n < 16 && row0 + n < rows; ++n) {
            if (!((n < 8 ? bad_low : bad_high) >> (n % 8 * 4) & 15)) continue;
            float sum[8] = {};
            const int *const ends = bounds + static_cast<i64>(entry) * rows + row0 + n;
            const int end = __ldg(ends + 1);
            for (int i = __ldg(ends); i < end; i += 32) {
                int index = 0;
                float weight = 0.f;
                if (i + lane < end) {
                    index = __ldg(indices + i + lane);
                    weight = to_float(values[matrix * values_free + (kTransposed ? __ldg(order + i + lane) : i + lane)]);
                }
#pragma unroll 8
                for (int k = 0; k < min(32, end - i); ++k) {
                    const int j = __shfl_sync(0xFFFFFFFFu, index, k);
                    const float w = __shfl_sync(0xFFFFFFFFu, weight, k);
                    if (!mine) continue;
                    const Vec<operand_t> right = global16(from + j * x_row);
#pragma unroll
                    for (int c = 0; c < 8; ++c) sum[c] = fmaf(w, to_float(right.at[c]), sum[c]);
                }
            }
            if (!mine) continue;
            sum_t *const line = to + static_cast<i64>(row0 + n) * width + column;
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (!finite(to_float(line[c]))) line[c] = from_float<sum_t>(sum[c] * scale);
        }
    }
}

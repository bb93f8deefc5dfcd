// spmm_tile: out = scale · S x or scale · Sᵀ x, S in 16 × 16 tiles, by mma.sync with exact skipping.
//
// A CTA takes kWarps lines of tiles, 16 rows of the result for each warp, and kWide columns of x. One or
// a few more bring those 64 inner positions of x that any of the lines meets, stage after stage; each warp walks
// its own tiles, straight from global memory into fragments, and multiplies by no others. So warps drift
// apart by as much as the ring is long, and uneven lines even out.
//
//   out     (F, rows, D); with kTokens (F, D, rows), plus the bias of each row, activated
//   x       (F, inner, D), columns contiguous; with kTokens inner positions contiguous
//   values  (F, slots), 512 bytes a tile
//   bounds  (lines + 1)   first tile of each line
//   links   (tiles) int2  where the tile's inner positions lie in its group's unions: 8 · stage + 2 · quarter,
//                         + 1 if it hangs over the edge; number of the tile in memory
//   unions  (n)           a quarter (16 inner positions; x's tile) each, or with kTokens a stage each
//   tiles   (n) int4      of each CTA: group of lines, first in unions, unions (−1 = no more tiles), repeat; a
//                         repeat is one column tile of one matrix
//
//   grid   CTAs that walk their tiles of 16 kWarps rows × kWide columns
//   block  kWarps warps and those that bring x, by TMA (kBulk, sm_90a: one of a warpgroup) or cp.async
//   smem   kStages of 64 × kWide elements of x
//   floor  tensor cores: 2 · 256 · tiles · D FLOPs at the rate of mma.sync (510 TFLOP/s on an H200), and the
//          same time for x from shared memory, 32 D bytes a tile; L2: x once for each group of lines.
//          4096³ float16 on an H200: 147 µs with 20 % of the tiles, 97 with 10 %, floors 54 and 27; the
//          data pipe of shared memory is 53 % busy, warps wait for it and for each other's stages
//   needs  sm_80, 16-byte aligned rows of x and values
#include "types.cuh"
#include "barrier.cuh"
#include "tile.cuh"
#include "tile_result.cuh"
#if MG_TMA
#include "registers.cuh"
#include "tma.cuh"
#endif

constexpr int kWarps = MG_WARPS, kWide = MG_WIDE, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kTokens = MG_TOKENS, kFloat = MG_PARTIAL, kBulk = MG_TMA;
static_assert(kTokens || !kActivation, "ACTIVATION: TOKENS only");
static_assert(kWide == 64 || kWide == 128, "WIDE must be 64 or 128");
constexpr int kProducers = kBulk ? 1 : kWarps > 8 ? 4 : kWarps > 4 ? 2 : 1;  // warps that bring x
enum : int { kThreads = (kWarps + (kBulk ? 4 : kProducers)) * 32, kCtas = kWarps > 8 ? 1 : kWarps > 4 ? 2 : 4 };
#if MG_TMA
using Pool = Registers<kThreads, 24, (kWarps > 8 ? 112 : kWarps > 4 ? 104 : 96), kCtas>;
#endif
constexpr int kPanels = kWide / 64, kQuarters = 4;
constexpr u32 kPanel = 64 * 128, kStage = kWide * 128;
constexpr int kAhead = MG_AHEAD;
constexpr bool kEarly = MG_EARLY;  // tiles whose values are under way

// What is asked of x, by TMA or by address.
struct Source {
#if MG_TMA
    const TensorMap &map;
#else
    const operand_t *x;
    i64 free, line;  // elements between matrices and between lines (inner positions, or with kTokens columns)
    int inner, width;
#endif
};

// Brings the unions of one stage: `mine` is what this lane has of unions[n · kQuarters …], kTokens: unions[n].
__device__ __forceinline__ void produce(const Source &from, u32 to, u32 full, int column, int matrix, int first, int count) {
    const int lane = threadIdx.x % 32;
    [[maybe_unused]] const int part = threadIdx.x / 32 - kWarps;  // of kProducers
#if MG_TMA
    if constexpr (kTokens) {
        if (lane == 0) {
            barrier_expect(full, kStage);
            tma_load(to, from.map, full, first * 64, column, matrix);
        }
    } else {
        if (lane == 0) barrier_expect(full, count * kPanels * 16 * 128);
        __syncwarp();
        const int quarter = lane / kPanels, panel = lane % kPanels;
        if (quarter < count)
            tma_load(to + panel * kPanel + quarter * 2048, from.map, full, column + 64 * panel, first * 16, matrix);
    }
#else
    const operand_t *x = from.x + matrix * from.free;
    if constexpr (kTokens) {
#pragma unroll 8
        for (int i = part * 32 + lane; i < kWide * 8; i += 32 * kProducers) {
            const int row = i / 8, chunk = i % 8, left = from.inner - first * 64 - chunk * 8;
            const bool live = column + row < from.width && left > 0;
            const operand_t *at = live ? x + (column + row) * from.line + first * 64 + chunk * 8 : x;
            copy_async_some(to + row * 128 + ((chunk ^ (row & 7)) << 4), at, live ? min(16, 2 * left) : 0);
        }
    } else {
#pragma unroll 4
        for (int i = part; i < kPanels * 16; i += kProducers) {
            const int row = (i / kPanels) * 4 + lane / 8, panel = i % kPanels, chunk = lane % 8;
            const int tile = __shfl_sync(~0u, first, row / 16 * kPanels), position = tile * 16 + row % 16;
            const int at = column + 64 * panel + 8 * chunk;
            if (row / 16 >= count) continue;
            const bool live = position < from.inner && at < from.width;
            copy_async_some(to + panel * kPanel + row * 128 + ((chunk ^ (row & 7)) << 4),
                            live ? x + position * from.line + at : x, live ? 16 : 0);
        }
    }
    mbarrier_arrive_copied(full);
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtas)
    spmm_tile(
#if MG_TMA
        const __grid_constant__ TensorMap x_map,
#else
        const operand_t *__restrict__ x, i64 x_free, i64 x_line,
#endif
        const operand_t *__restrict__ values, i64 slots, const int *__restrict__ bounds,
        const int2 *__restrict__ links, const int *__restrict__ unions, const int4 *__restrict__ tiles, int each,
        int lines, int across, float scale, const operand_t *__restrict__ bias, void *__restrict__ out, int rows,
        int inner, int width) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            mbarrier_init(full + 8 * s, kBulk ? 1 : 32 * kProducers), mbarrier_init(empty + 8 * s, kWarps);
#if MG_TMA
        barrier_init_fence();
#endif
    }
    __syncthreads();

    tiles += static_cast<i64>(blockIdx.x) * each;
    int stage = 0;

    if (warp >= kWarps) {
#if MG_TMA
        Pool::give();
        if (warp > kWarps) return;
        const Source from{x_map};
#else
        const Source from{x, x_free, x_line, inner, width};
#endif
        u32 parity = 1;
        constexpr int kStep = kTokens ? 1 : kQuarters;
        for (int turn = 0; turn < each; ++turn) {
            const int4 tile = __ldg(tiles + turn);
            if (tile.z < 0) break;
            const int column = tile.w % across * kWide, matrix = tile.w / across;
            // A lane holds one union of the next 32.
            auto ask = [&](int at) { return at + lane < tile.z ? __ldg(unions + tile.y + at + lane) : 0; };
            int soon = ask(0), now = 0;
            for (int n = 0; n < tile.z; n += kStep) {
                if (n % 32 == 0) now = soon, soon = ask(n + 32);
                const int mine = __shfl_sync(~0u, now, n % 32 + (kTokens ? 0 : lane / kPanels));
                mbarrier_wait(empty + 8 * stage, parity);
                produce(from, ring + stage * kStage, full + 8 * stage, column, matrix, mine, min(kStep, tile.z - n));
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        return;
    }

#if MG_TMA
    Pool::take();
#endif
    // Lane l gives ldmatrix row l % 16 of a 16 × 16 piece, 16-byte chunk l / 16 of its two, swizzled; piece j
    // of a row of 128 bytes lies at an address whose bits 5 and 6 are turned by j.
    const u32 piece = lane % 16 * 128 + (((lane / 16) ^ (lane & 7)) << 4);
    u32 parity = 0;

#pragma unroll 1
    for (int turn = 0; turn < each; ++turn) {
        const int4 tile = __ldg(tiles + turn);
        if (tile.z < 0) break;
        const int line = tile.x * kWarps + warp, matrix = tile.w / across;
        int n = 0, end = 0;
        if (line < lines) n = __ldg(bounds + line), end = __ldg(bounds + line + 1);
        const operand_t *mine = values + matrix * slots + lane * 8;

        // The values of a tile are asked for kAhead tiles ahead, and what says where they lie twice as far.
        uint4 held[kAhead];
        int2 link[kAhead];
        int place[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
            if (n + u < end) link[u] = __ldg(links + n + u);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            place[u] = link[u].x;
            if (n + u < end) held[u] = tile_load(mine + static_cast<i64>(link[u].y) * 256);
            if (n + u + kAhead < end) link[u] = __ldg(links + n + u + kAhead);
        }
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;

        int at = 0;
        auto pass = [&] {  // on to the next stage
            mbarrier_wait(full + 8 * stage, parity);
            if (lane == 0) mbarrier_arrive(empty + 8 * stage);
            ++at;
            if (++stage == kStages) stage = 0, parity ^= 1;
        };
#pragma unroll 1
        for (; n < end; n += kAhead) {
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                if (n + u >= end) break;
                const int where = place[u];
                u32 w[4];
                tile_lines<kTransposed>(w, held[u]);
                auto next = [&] {
                    place[u] = link[u].x;
                    if (n + u + kAhead < end) held[u] = tile_load(mine + static_cast<i64>(link[u].y) * 256);
                    if (n + u + 2 * kAhead < end) link[u] = __ldg(links + n + u + 2 * kAhead);
                };
                if constexpr (kEarly) next();
                if (where & 1) tile_cut(w, inner % 16);
#pragma unroll 1
                while (at < where >> 3) pass();
                mbarrier_wait(full + 8 * stage, parity);
                const int quarter = where >> 1 & 3;
                u32 b[2][4];
                if constexpr (kTokens) {
                    // x is the left operand: 16 tokens × 16 inner positions.
                    const u32 from = ring + stage * kStage + (piece ^ quarter << 5);
                    matrices<false>(b[0], from);
#pragma unroll
                    for (int i = 0; i < kWide / 16; ++i) {
                        if (i + 1 < kWide / 16) matrices<false>(b[(i + 1) % 2], from + (i + 1) * 2048);
                        mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc + 8 * i), b[i % 2], w[0], w[1]);
                        mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc + 8 * i + 4), b[i % 2], w[2], w[3]);
                    }
                } else {
                    const u32 a[4] = {w[0], w[2], w[1], w[3]};
                    const u32 from = ring + stage * kStage + quarter * 2048 + piece;
                    matrices<true>(b[0], from);
#pragma unroll
                    for (int j = 0; j < kWide / 16; ++j) {
                        if (j + 1 < kWide / 16)
                            matrices<true>(b[(j + 1) % 2], (from ^ (j + 1) % 4 << 5) + (j + 1) / 4 * kPanel);
                        const u32(&r)[4] = b[j % 2];
                        mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc + 8 * j), a, r[0], r[1]);
                        mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc + 8 * j + 4), a, r[2], r[3]);
                    }
                }
                if constexpr (!kEarly) next();
            }
        }
        const int stages = kTokens ? tile.z : (tile.z + kQuarters - 1) / kQuarters;
#pragma unroll 1
        while (at < stages) pass();

        const int column = tile.w % across * kWide;
        const i64 plane = static_cast<i64>(matrix) * rows * width;
        void *to = kFloat ? static_cast<void *>(static_cast<float *>(out) + plane)
                          : static_cast<void *>(static_cast<operand_t *>(out) + plane);
        if constexpr (kActivation) activate_tokens(acc, scale, bias, line * 16, rows);
        if constexpr (kTokens)
            store_tokens<kWide, kFloat>(acc, kActivation ? 1.f : scale, kActivation ? nullptr : bias, to,
                                        column + lane / 4, width, line * 16, rows);
        else
            store_rows<kWide, kFloat>(acc, scale, to, line * 16 + lane / 4, rows, column, width);
    }
}

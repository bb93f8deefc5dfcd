// spmm_tile_few: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles in short lines.
//
// A CTA takes one line of tiles and 8 kBlocks columns; its warps share the line's tiles evenly and add up at the
// end, in their order. Such work is latency: one load for the table, one for tiles and x, which go straight to
// registers, kAhead tiles at once. So what can be computed is computed while the table is under way, what is
// not needed before the products while tiles are, and nothing else is between the two. A table of few bytes is a
// parameter (kRoom), which is there when the kernel starts.
//
//   out     (F, rows, D) by strides, plus the bias of each row (nullptr: none), activated
//   x       (F, inner, D) by strides; kWide: inner positions contiguous, columns at 8 bytes and less than 2³¹ of
//           them apart, inner % 4 == 0
//   values  (F, slots), 512 bytes a tile
//   shares  (lines, kWarps, 1 + kAhead) int2: first cell of a warp and number of its cells, then the first of them
//   cells   (tiles) int2: inner tile, number of the tile in memory
//   table   kRoom, F = 1: u16 for each line and one more, the first of its cells; u16 numbers of cells in memory,
//           where kTransposed, else they are in order; u8 inner tiles, and kAhead bytes more
//
//   grid   (lines, tiles of columns, F); kRoom, few lines: (tiles of columns, lines), so that those who read the same
//          tiles start together
//   block  kWarps warps
//   smem   static: the warps' sums
//   floor  the latency of two loads (kRoom: one) and a store that depend on each other: of two, on an H200, caches
//          flushed, 1.4 µs behind the 4.7 of an empty kernel
//   needs  sm_80; kEdge where inner % 16 != 0
#include "types.cuh"
#include "few.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks;
constexpr bool kTransposed = MG_TRANSPOSED, kWide = MG_WIDE;
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
constexpr int kWarps = MG_WARPS, kThreads = 32 * kWarps, kAhead = MG_AHEAD;  // tiles of a warp at once
// Warps of a multiprocessor, as registers allow; from sm_100 on the compiler needs more of them for one block.
constexpr int kResident = kBlocks == 1 ? (kWide && __CUDA_ARCH__ < 1000 ? 32 : 24)
                          : kBlocks == 2 ? (kWide ? 20 : 12)
                                         : (kWide ? 24 : 16);
constexpr int kRoom = MG_ROOM;
constexpr bool kEdge = MG_EDGE, kInOrder = kRoom && !kTransposed;
using Ends = Sums<16, kColumns, kWarps>;

struct alignas(16) Table {
    u8 bytes[kRoom ? kRoom : 16];
};

// What a lane has of kAhead tiles and of x: inner positions 4t … 4t + 3 of a tile, which lie side by side in x,
// of lines g and g + 8 and of columns g, g + 8 …
struct Batch {
    u32 tile[kAhead][4];
    u32 pairs[kAhead][kBlocks][2];
    u16 single[kAhead][kBlocks][4];  // where not kWide, until they are pairs
};

extern "C" __global__ void __launch_bounds__(kThreads, kResident / kWarps)
    spmm_tile_few(const operand_t *__restrict__ x, i64 x_free, i64 x_inner, i64 x_column,
                  const operand_t *__restrict__ values, i64 slots,
#if MG_ROOM
                  const __grid_constant__ Table table,
#else
                  const int2 *__restrict__ shares, const int2 *__restrict__ cells,
#endif
                  float scale, const operand_t *__restrict__ bias,
                  out_t *__restrict__ out, i64 out_free, i64 out_row, i64 out_column, int quads, int small, int rows,
                  int inner, int width) {
    __shared__ __align__(16) float sums[Ends::kFloats];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int line = kRoom ? blockIdx.y : blockIdx.x, column = (kRoom ? blockIdx.x : blockIdx.y) * kColumns;
    const int last = min(kColumns, width - column) - 1;

    // 1. Which tiles; and while nobody knows, small work on its way to L2, whoever's it is.
    int2 head, cell[kAhead];
#if MG_ROOM
    const u16 *bounds = reinterpret_cast<const u16 *>(table.bytes), *numbers = bounds + gridDim.y + 1;
    const u32 begin = bounds[line], count = bounds[line + 1] - begin;
    const u8 *places = reinterpret_cast<const u8 *>(numbers + (kTransposed ? bounds[gridDim.y] : 0));
    head.x = begin + count * warp / kWarps, head.y = begin + count * (warp + 1) / kWarps - head.x;
    auto list = [&](int first) {  // of cells that are not there what comes next in the table
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            cell[i] = make_int2(places[first + i], kTransposed ? numbers[first + i] : first + i);
    };
    list(head.x);
#else
    const int2 *share = shares + static_cast<u64>(line * kWarps + warp) * (1 + kAhead);
    load_if(head, share, true);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_if(cell[i], share + 1 + i, true);
#endif
    if (!kRoom && small) {
        const u32 cta = blockIdx.y * gridDim.x + blockIdx.x, thread = cta * kThreads + threadIdx.x;
        if (thread < slots / 64) prefetch_l2(values + static_cast<u64>(thread) * 64);
        if (kWide && cta < width && threadIdx.x * 64 < inner) prefetch_l2(x + cta * x_column + threadIdx.x * 64);
    }
    const i64 f = kRoom ? 0 : blockIdx.z;
    const u8 *right[kBlocks];  // of columns that are not there the last: nobody keeps their sums
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
        const int c = column + min(8 * j + g, last);
        if constexpr (kWide)
            right[j] = further(reinterpret_cast<const u8 *>(x + f * x_free + 4 * t), c, u32(x_column) * 2);
        else
            right[j] = reinterpret_cast<const u8 *>(x + f * x_free + c * x_column);
        asm volatile("" : "+l"(right[j]));  // here, not when the table has come
    }
    // In a tile the lines g and g + 8 of a pair of inner positions lie side by side; transposed, pairs of lines do.
    const int s = g / 2 * 4 + g % 2;
    const u8 *left = reinterpret_cast<const u8 *>(values + f * slots);
    left += kTransposed ? (s % 8 * 4 + t) * 16 + s / 8 * 4 : (g * 4 + 2 * t % 4) * 16 + t / 2 * 8;
    asm volatile("" : "+l"(left));

    int next = head.x, rest = head.y;  // the first cell that is not done, and how many are not
    const u8 *mine = further(left, next, 512);
    Batch has;
    u32 over;  // a bit for each tile that hangs over the edge
    auto bring = [&] {
        over = 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const bool live = i < rest;
            const u8 *at = kInOrder ? mine + 512 * i : further(left, cell[i].y, 512);
            if constexpr (kTransposed) {
                load_if(has.tile[i][0], at, live), load_if(has.tile[i][1], at + 8, live);
                load_if(has.tile[i][2], at + 128, live), load_if(has.tile[i][3], at + 136, live);
            } else {
                load_if(has.tile[i][0], has.tile[i][1], at, live);
                load_if(has.tile[i][2], has.tile[i][3], at + 16, live);
            }
            const int k = cell[i].x * 16 + 4 * t;
            if (kEdge && cell[i].x == inner / 16) over |= 1u << i;
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
                if constexpr (kWide) {
                    load_if(has.pairs[i][j][0], has.pairs[i][j][1], further(right[j], cell[i].x, 32),
                            live && (!kEdge || k < inner));
                } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        load_if(has.single[i][j][e], right[j] + (k + e) * x_inner * 2, live && k + e < inner);
                }
            }
        }
        next += kAhead;
        mine += 512 * kAhead;
#if MG_ROOM
        if (kAhead < rest) list(next);
#else
        if (kAhead < rest)
#pragma unroll
            for (int i = 0; i < kAhead; ++i) load_if(cell[i], cells + next + i, kAhead + i < rest);
#endif
    };
    bring();

    // What nobody needs before.
    u32 put = shared_address(sums + (warp * kColumns + 2 * t) * Ends::kPitch + g);
    asm volatile("" : "+r"(put));
    const Ends ends(sums, bias, line * 16, rows, last + 1,
                    out + f * out_free + column * out_column + line * 16 * out_row, out_row, out_column);
    float acc[kBlocks][4];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = 0.f;

    // 2. Products.
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i >= rest) break;
            u32(&a)[4] = has.tile[i];
            if constexpr (kTransposed)
#pragma unroll
                for (int k = 0; k < 4; ++k) a[k] = turned(a[k]);
            if constexpr (!kWide)
#pragma unroll
                for (int j = 0; j < kBlocks; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        has.pairs[i][j][h] = has.single[i][j][2 * h] | u32(has.single[i][j][2 * h + 1]) << 16;
            if (kEdge && over >> i & 1) {  // what a tile has beyond may be anything, and of x there is nothing
                const int live = inner % 16 - 4 * t;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const u32 mask = (2 * h < live ? 0x0000FFFFu : 0u) | (2 * h + 1 < live ? 0xFFFF0000u : 0u);
                    a[2 * h] &= mask, a[2 * h + 1] &= mask;
#pragma unroll
                    for (int j = 0; j < kBlocks; ++j) has.pairs[i][j][h] &= mask;
                }
            }
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) mma_16x8x16<operand_t>(acc[j], a, has.pairs[i][j][0], has.pairs[i][j][1]);
        }
        rest -= kAhead;
        if (rest <= 0) break;
        bring();
    }

    // 3. Sums, in the order of warps.
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) shared_put(put + ((8 * j + i % 2) * Ends::kPitch + i / 2 * 8) * 4, acc[j][i]);
    __syncthreads();
    ends.write(scale, out_row, quads);
}

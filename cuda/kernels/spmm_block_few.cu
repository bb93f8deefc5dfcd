// spmm_block_few: out = scale · S x or scale · Sᵀ x for few columns of x, S in whole blocks of 16 to 128.
//
// A CTA takes 16 kStrips lines of a line of blocks, and 8 kBlocks columns; its warps share the line's pieces of kDeep
// inner positions evenly and add up at the end, in their order. Blocks and x go straight to registers, kAhead pieces at
// once, 16 bytes a load (8 where a block has no more than 16 inner positions): which position of a product a lane
// multiplies is free, so a lane takes kDeep / 4 neighbours.
//
//   out     (F, rows, D) by strides, plus the bias of each row (nullptr: none), activated
//   x       (F, inner, D), inner positions contiguous, columns at multiples of 16 bytes and less than 2³¹ of them apart
//   values  (F, slots), kSize² elements a block
//   shares  (block lines, kWarps, 1 + kAhead) int2: first piece of a warp and number of its pieces, then the first of them
//   cells   (pieces) int2: inner position / kDeep, first element of the piece in its block line's / 16
//
//   grid   (block lines · kSize / 16 kStrips, tiles of columns, F)
//   block  kWarps warps
//   smem   static: the warps' sums
//   floor  values, x and out at the rate of memory, behind the latency of two loads and a store that depend on each other
//   needs  sm_80, blocks without dead elements
#include "types.cuh"
#include "few.cuh"
#include "tile.cuh"

constexpr int kSize = MG_SIZE, kStrips = MG_STRIPS, kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks;
constexpr int kWarps = MG_WARPS, kThreads = 32 * kWarps, kAhead = MG_AHEAD;
constexpr bool kTransposed = MG_TRANSPOSED;
static_assert(kSize == 16 || kSize == 32 || kSize == 64 || kSize == 128, "SIZE must be 16, 32, 64 or 128");
static_assert(16 * kStrips <= kSize, "a CTA takes lines of one line of blocks");
// Inner positions of a piece; products of it; registers of a line of it.
constexpr int kDeep = kSize == 16 ? 16 : 32, kSteps = kDeep / 16, kEach = kDeep / 8;
constexpr int kRows = 16 * kStrips, kParts = kSize / kRows;
using Ends = Sums<kRows, kColumns, kWarps>;

// What a lane has of kAhead pieces and of x: inner positions t kDeep / 4 and on, of columns g, g + 8 … and of
// two lines of each 16: g and g + 8 or, transposed, g / 2 · 4 + g % 2 and two further.
struct Batch {
    u32 piece[kAhead][kStrips][2][kEach];
    u32 x[kAhead][kBlocks][kEach];
};

extern "C" __global__ void __launch_bounds__(kThreads, MG_EACH)
    spmm_block_few(const operand_t *__restrict__ x, i64 x_free, i64 x_column, const operand_t *__restrict__ values,
                   i64 slots, const int2 *__restrict__ shares, const int2 *__restrict__ cells, float scale,
                   const operand_t *__restrict__ bias, out_t *__restrict__ out, i64 out_free, i64 out_row, i64 out_column,
                   int quads, int rows, int width) {
    __shared__ __align__(16) float sums[Ends::kFloats];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int line = blockIdx.x / kParts, strip = blockIdx.x % kParts;
    const int column = blockIdx.y * kColumns, columns = min(kColumns, width - column);

    // 1. Which pieces; and what can be known without.
    const int2 *share = shares + static_cast<u64>(line * kWarps + warp) * (1 + kAhead);
    int2 head, cell[kAhead];
    load_if(head, share, true);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_if(cell[i], share + 1 + i, true);
    const i64 f = blockIdx.z;
    const u8 *right[kBlocks];  // of columns that are not there the last: nobody keeps their sums
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
        const int c = column + min(8 * j + g, columns - 1);
        right[j] = further(reinterpret_cast<const u8 *>(x + f * x_free + kDeep / 4 * t), c, u32(x_column) * 2);
        asm volatile("" : "+l"(right[j]));  // here, not when the table has come
    }
    // Transposed, the two positions of a register are two rows of the block, which movmatrix puts side by side.
    const int s = g / 2 * (kDeep / 4) + g % 2;
    const u8 *left = reinterpret_cast<const u8 *>(values + f * slots + kRows * strip * (kTransposed ? 1 : kSize) +
                                                  (kTransposed ? s * kSize + 4 * t : g * kSize + kDeep / 4 * t));
    asm volatile("" : "+l"(left));

    int next = head.x, rest = head.y;  // the first piece that is not done, and how many are not
    Batch has;
    auto bring = [&] {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const bool live = i < rest;
            const u8 *at = further(left, cell[i].y, 32);
#pragma unroll
            for (int m = 0; m < kStrips; ++m) {
                if constexpr (kTransposed) {
#pragma unroll
                    for (int p = 0; p < kEach; ++p)
                        load_once_if(has.piece[i][m][0][p], has.piece[i][m][1][p], at + 32 * m + 4 * p * kSize, live);
                } else {
                    load_once_if(has.piece[i][m][0], at + 32 * m * kSize, live);
                    load_once_if(has.piece[i][m][1], at + (32 * m + 16) * kSize, live);
                }
            }
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) load_if(has.x[i][j], further(right[j], cell[i].x, 2 * kDeep), live);
        }
        next += kAhead;
        if (kAhead < rest)
#pragma unroll
            for (int i = 0; i < kAhead; ++i) load_if(cell[i], cells + next + i, kAhead + i < rest);
    };
    bring();

    const Ends ends(sums, bias, blockIdx.x * kRows, rows, columns,
                    out + f * out_free + column * out_column + blockIdx.x * kRows * out_row, out_row, out_column);
    float acc[kStrips][kBlocks][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][j][i] = 0.f;

    // 2. Products.
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i >= rest) break;
#pragma unroll
            for (int m = 0; m < kStrips; ++m)
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    u32 a[4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const u32 v = has.piece[i][m][n % 2][2 * k + n / 2];
                        a[n] = kTransposed ? turned(v) : v;
                    }
#pragma unroll
                    for (int j = 0; j < kBlocks; ++j)
                        mma_16x8x16<operand_t>(acc[m][j], a, has.x[i][j][2 * k], has.x[i][j][2 * k + 1]);
                }
        }
        rest -= kAhead;
        if (rest <= 0) break;
        bring();
    }

    // 3. Sums, in the order of warps.
    float *mine = sums + (warp * kColumns + 2 * t) * Ends::kPitch + (kTransposed ? g / 2 * 4 + g % 2 : g);
#pragma unroll
    for (int m = 0; m < kStrips; ++m)
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                mine[(8 * j + i % 2) * Ends::kPitch + 16 * m + i / 2 * (kTransposed ? 2 : 8)] = acc[m][j][i];
    __syncthreads();
    ends.write(scale, out_row, quads);
}

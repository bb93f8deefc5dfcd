// spmm_tile_few: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles.
//
// A CTA takes one line of tiles and 8 kBlocks columns; its warps share the line's tiles among them and add up
// at the end, in the order of the warps. Each lane brings its own part of its warp's tiles into shared memory,
// kRing tiles at once, so that all of a short line is under way before anything is waited for; what is asked
// of x, 16 inner positions for each tile, comes through the caches. Nothing is aligned but values.
//
//   out     (F, rows, D) by strides, plus the bias of each row (nullptr: none), activated
//   x       (F, inner, D) by strides; kPairs: inner positions contiguous, pairs at multiples of 4 bytes
//   values  (F, slots), 512 bytes a tile
//   shares  (lines, kWarps, span) int2: first cell of a warp and number of its cells, then span − 1 of them
//   cells   (tiles) int2: inner tile, number of the tile in memory
//
//   grid   (lines, tiles of columns, F)
//   block  kWarps warps
//   smem   kRing tiles for each warp, then the warps' sums in the same place
//   floor  tile bytes at the rate of memory
//   needs  sm_80
#include "types.cuh"
#include "activation.cuh"
#include "copy.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks, kWarps = MG_WARPS, kRing = MG_RING;
constexpr bool kTransposed = MG_TRANSPOSED, kPairs = MG_PAIRS;
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
constexpr int kAhead = kBlocks == 1 ? 6 : kBlocks == 2 ? 3 : 2;  // tiles of a warp whose x is under way
constexpr int kPitch = 17;
static_assert(kRing >= kAhead, "RING: no shorter than what is asked of x");

// Two inner positions of a column of x from `at` on, zeros from `inner` on.
__device__ __forceinline__ u32 pair_of(const operand_t *column, i64 step, int at, int inner) {
    if constexpr (kPairs) {
        if (at + 1 < inner) return __ldg(reinterpret_cast<const u32 *>(column + at));
        return at < inner ? __ldg(reinterpret_cast<const u16 *>(column + at)) : 0u;
    } else {
        const u16 *from = reinterpret_cast<const u16 *>(column);
        const u32 low = at < inner ? __ldg(from + at * step) : 0u, high = at + 1 < inner ? __ldg(from + (at + 1) * step) : 0u;
        return low | high << 16;
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32, (kBlocks == 4 ? 24 : 32) / kWarps)
    spmm_tile_few(const operand_t *__restrict__ x, i64 x_free, i64 x_inner, i64 x_column,
                  const operand_t *__restrict__ values, i64 slots, const int2 *__restrict__ shares, int span,
                  const int2 *__restrict__ cells, float scale, const operand_t *__restrict__ bias,
                  out_t *__restrict__ out, i64 out_free, i64 out_row, i64 out_column, int rows, int inner, int width) {
    extern __shared__ __align__(16) u8 raw[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int line = blockIdx.x, column = blockIdx.y * kColumns;
    const i64 f = blockIdx.z;

    const int2 *share = shares + static_cast<i64>(line * kWarps + warp) * span;
    int2 cell = lane < span ? __ldg(share + lane) : make_int2(0, 0);
    // Small work is all latency: all of it is asked for before anyone knows which of it is his.
    const u32 thread = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    if (gridDim.z == 1 && slots / 64 <= gridDim.x * gridDim.y * blockDim.x) {
        if (thread < slots / 64) prefetch_l2(values + static_cast<i64>(thread) * 64);
        const u32 pieces = (inner + 63) / 64;
        if (kPairs && thread < pieces * width) prefetch_l2(x + thread / pieces * x_column + thread % pieces * 64);
    }
    const int first = __shfl_sync(~0u, cell.x, 0), count = __shfl_sync(~0u, cell.y, 0);
    // From here on lane l holds a cell of the 32 that are asked for next: first of all those of the share.
    cell = make_int2(__shfl_down_sync(~0u, cell.x, 1), __shfl_down_sync(~0u, cell.y, 1));
    auto ask = [&](int n) {  // cells n … n + 31, where the share has no more
        if (n + lane < count) cell = __ldg(cells + first + n + lane);
    };

    const operand_t *of[kBlocks];
    bool live[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
        live[j] = column + 8 * j + g < width;
        of[j] = x + f * x_free + (live[j] ? column + 8 * j + g : 0) * x_column;
    }
    // Cells come 32 at a time, or less for the first few, whichever the share has.
    int base = 0, held = span - 1;
    auto cell_of = [&](int n) {
        if (n == base + held) base = n, held = 32, ask(n);
        return make_int2(__shfl_sync(~0u, cell.x, n - base), __shfl_sync(~0u, cell.y, n - base));
    };

    // A lane's own 16 bytes of a tile, which no other reads: no barrier but its own wait.
    const operand_t *mine = values + f * slots + lane * 8;
    uint4 *ring = reinterpret_cast<uint4 *>(raw) + warp * kRing * 32 + lane;
    const u64 policy = once_policy();
    auto fetch_values = [&](int n, int item) {
        if (n < count) tile_copy_once(ring + n % kRing * 32, mine + static_cast<i64>(item) * 256, policy);
        copy_commit();
    };
    if constexpr (!kTransposed) {
        // Numbers in memory need no cells here.
#pragma unroll
        for (int n = 0; n < kRing; ++n) fetch_values(n, first + n);
    } else {
        // The first ones lie in the share, or come from memory once more.
#pragma unroll
        for (int n = 0; n < kRing; ++n) {
            int item = __shfl_sync(~0u, cell.y, n % 32);
            if (n >= held && n < count) item = __ldg(&cells[first + n].y);
            fetch_values(n, item);
        }
    }

    u32 right[kAhead][kBlocks][2];
    int where[kAhead];
    auto fetch_right = [&](int u, int n) {
        if (n >= count) return;
        where[u] = cell_of(n).x * 16;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                right[u][j][h] = live[j] ? pair_of(of[j], x_inner, where[u] + 8 * h + 2 * t, inner) : 0u;
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) fetch_right(u, u);

    float acc[kBlocks][4];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[j][c] = 0.f;
    for (int n = 0; n < count; n += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (n + u >= count) break;
            copy_wait<kRing - 1>();
            u32 w[4];
            tile_lines<kTransposed>(w, ring[(n + u) % kRing * 32]);
            if (where[u] + 16 > inner) tile_cut(w, inner % 16);
            const u32 a[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) mma_16x8x16<operand_t>(acc[j], a, right[u][j][0], right[u][j][1]);
            const int next = n + u + kRing;
            int item = first + next;
            if (kTransposed && next < count) item = __ldg(&cells[first + next].y);
            fetch_values(next, item);
            fetch_right(u, n + u + kAhead);
        }
    }
    copy_wait<0>();
    __syncthreads();
    float(*sums)[kColumns][kPitch] = reinterpret_cast<float(*)[kColumns][kPitch]>(raw);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[warp][8 * j + 2 * t + c % 2][g + c / 2 * 8] = acc[j][c];
    __syncthreads();

    // Neighbouring threads write neighbouring elements, whichever they are.
    const bool across = out_column == 1 && width > 1;
    for (int i = threadIdx.x; i < 16 * kColumns; i += kWarps * 32) {
        const int c = across ? i % kColumns : i / 16, r = across ? i / kColumns : i % 16;
        const int row = line * 16 + r;
        if (row >= rows || column + c >= width) continue;
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum += sums[k][c][r];
        const float y = activated(fmaf(sum, scale, bias ? to_float(bias[row]) : 0.f));
        out[f * out_free + row * out_row + (column + c) * out_column] = from_float<out_t>(y);
    }
}

// spmm_tile_few: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles.
//
// A CTA takes one line of tiles and 8 kBlocks columns; its 8 warps share the line's tiles among them and
// add up at the end, in the order of the warps. Values go straight from memory into fragments; what is asked
// of x, 16 inner positions for each tile, comes through the caches. Nothing is aligned but values.
//
//   out     (F, rows, D) by strides, plus the bias of each row (nullptr: none)
//   x       (F, inner, D) by strides; kPairs: inner positions contiguous, pairs at multiples of 4 bytes
//   values  (F, slots), 512 bytes a tile
//   heads   (lines, 32) int2: first tile and number of tiles of the line, then the first 31 of its cells
//   cells   (tiles) int2: inner tile, number of the tile in memory
//
//   grid   (lines, tiles of columns, F)
//   block  256
//   smem   8 warps' sums
//   floor  tile bytes at the rate of memory
//   needs  sm_80
#include "types.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks, kWarps = MG_WARPS;
constexpr bool kTransposed = MG_TRANSPOSED, kPairs = MG_PAIRS;
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
constexpr int kAhead = kBlocks == 1 ? (kPairs ? 4 : 3) : kBlocks == 2 ? 3 : 2;  // tiles of a warp that are under way
constexpr int kPitch = 17, kHead = 31;

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
                  const operand_t *__restrict__ values, i64 slots, const int2 *__restrict__ heads,
                  const int2 *__restrict__ cells, float scale, const operand_t *__restrict__ bias,
                  out_t *__restrict__ out, i64 out_free, i64 out_row, i64 out_column, int rows, int inner, int width) {
    __shared__ float sums[kWarps][kColumns][kPitch];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int line = blockIdx.x, column = blockIdx.y * kColumns;
    const i64 f = blockIdx.z;

    // Small work is all latency: all of it is asked for before anyone knows which of it is his.
    const int thread = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    if (gridDim.z == 1 && slots / 64 <= gridDim.x * gridDim.y * blockDim.x) {
        if (thread < slots / 64) prefetch_l2(values + thread * 64);
        const int pieces = (inner + 63) / 64;
        if (kPairs && thread < pieces * width) prefetch_l2(x + thread / pieces * x_column + thread % pieces * 64);
    }
    const u64 policy = once_policy();
    const int2 head = __ldg(heads + line * (kHead + 1) + lane);
    const int first = __shfl_sync(~0u, head.x, 0), all = __shfl_sync(~0u, head.y, 0);
    const int begin = all * warp / kWarps, count = all * (warp + 1) / kWarps - begin;
    const operand_t *mine = values + f * slots + lane * 8;
    const operand_t *of[kBlocks];
    bool live[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
        live[j] = column + 8 * j + g < width;
        of[j] = x + f * x_free + (live[j] ? column + 8 * j + g : 0) * x_column;
    }

    float acc[kBlocks][4];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[j][c] = 0.f;

    int2 cell;  // a lane's of the 32 tiles that are asked for next
    auto ask = [&](int n) {
        if (all <= kHead) {
            const int at = min(begin + n + lane + 1, kHead);
            cell = make_int2(__shfl_sync(~0u, head.x, at), __shfl_sync(~0u, head.y, at));
        } else if (n + lane < count) {
            cell = __ldg(cells + first + begin + n + lane);
        }
    };
    uint4 held[kAhead];
    u32 right[kAhead][kBlocks][2];
    int where[kAhead];
    auto fetch_values = [&](int u, int n) {
        if (n >= count) return;
        const int item = kTransposed ? __shfl_sync(~0u, cell.y, n % 32) : first + begin + n;
        held[u] = tile_load_once(mine + static_cast<i64>(item) * 256, policy);
    };
    auto fetch_right = [&](int u, int n) {
        if (n >= count) return;
        where[u] = __shfl_sync(~0u, cell.x, n % 32) * 16;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                right[u][j][h] = live[j] ? pair_of(of[j], x_inner, where[u] + 8 * h + 2 * t, inner) : 0u;
    };
    ask(0);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) fetch_values(u, u);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) fetch_right(u, u);
    for (int n = 0; n < count; n += kAhead) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (n + u >= count) break;
            u32 w[4];
            tile_lines<kTransposed>(w, held[u]);
            if (where[u] + 16 > inner) tile_cut(w, inner % 16);
            const u32 a[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) mma_16x8x16<operand_t>(acc[j], a, right[u][j][0], right[u][j][1]);
            const int next = n + u + kAhead;
            if (next % 32 == 0) ask(next);
            fetch_values(u, next);
            fetch_right(u, next);
        }
    }
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
        const float y = fmaf(sum, scale, bias ? to_float(bias[row]) : 0.f);
        out[f * out_free + row * out_row + (column + c) * out_column] = from_float<out_t>(y);
    }
}

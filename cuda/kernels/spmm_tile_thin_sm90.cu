// spmm_tile_thin_sm90: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles in long lines.
//
// A CTA takes some lines of tiles, 8 kBlocks columns and one of kSplit slabs of inner positions; lines are dealt
// so that CTAs have equal numbers of tiles. Its part of x comes into shared memory whole and needs no table, so
// that it is under way while the warps still learn which tiles are theirs. They share the CTA's tiles evenly,
// wherever lines end: a warp's part of a line is a segment with a place of its own, and segments are added up in
// their order, then slabs in theirs.
//
// Tiles go straight to registers, two batches of kGroup under way. All is latency and instructions: what a warp
// does for a tile is counted, and nothing that a thread computes once waits for a table.
//
//   out      (F, rows, D) by strides, plus the bias of each row (nullptr: none), activated
//   x        (F, inner, D) by strides; inner positions contiguous, columns at 16 bytes, inner % 8 == 0
//   values   (F, slots), 512 bytes a tile
//   work     (CTAs, pitch) int: for each warp its first cell, its number of cells + 2²⁰ · its first segment, and its
//            first `span` cells (32, or fewer where none has so many); then for each line of the CTA the segments
//            before it and which line it is, and one more for all
//   cells    (tiles) int2: 32 · inner tile of the slab + 2 where it hangs over the edge + 1 where the segment ends;
//            number of the tile in memory
//
//   grid   (kSplit · groups of lines, tiles of columns, F) in clusters of kSplit
//   block  kWarps warps
//   smem   what each line has, x by columns, segments, what the cluster's CTAs send
//   floor  tile bytes at the rate of memory. H200, caches flushed: 8192², a fifth of the tiles, 1 token 14.7 µs, 16
//          tokens 16.7, 64 tokens 27.5; reading the same bytes takes 12.8 of them and an empty kernel 4.2
//   needs  sm_90
#include "types.cuh"
#include "activation.cuh"
#include "cluster.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks, kWarps = MG_WARPS, kGroup = MG_GROUP, kSplit = MG_SPLIT;
constexpr bool kTransposed = MG_TRANSPOSED;
constexpr int kThreads = 32 * kWarps, kPairs = (kBlocks + 1) / 2, kMostLines = 128;
constexpr int kTable = (kMostLines + 4) * 8;
constexpr int kPitch = 20;  // floats of a segment's column of 16: lanes write to all banks
constexpr int kOfLine = 4 * kColumns, kAtOnce = kThreads / kOfLine;  // threads that add up a line; lines at a time
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
static_assert(kGroup == 2 || kGroup == 4 || kGroup == 8, "GROUP must divide the cells that lanes hold");
static_assert(kThreads % kOfLine == 0, "a thread has its place of every line");

// Keeps what it has where not live; without a choice afterwards, which would wait for the load.
__device__ __forceinline__ void pair_load(int2 &v, const int2 *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(from), "r"(int(live)));
}

// Columns of x from `from` on, `live` inner positions of each, zeros up to a whole tile: the engine copies them,
// one warp asking for each, and nobody spends instructions, so that tiles are asked for as early.
__device__ __forceinline__ void stage(u32 barrier, u8 *to, int pitch, const operand_t *from, i64 x_column, int live,
                                      int columns) {
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_expect(barrier, columns * live * 2);
    }
    __syncthreads();
    if (threadIdx.x % 32 || live <= 0) return;
#pragma unroll 1
    for (int c = threadIdx.x / 32; c < columns; c += kWarps) {
        bulk_load(shared_address(to + c * pitch), from + c * x_column, live * 2, barrier);
        if (live % 16) *reinterpret_cast<uint4 *>(to + c * pitch + live * 2) = make_uint4(0u, 0u, 0u, 0u);
    }
}

extern "C" __global__ void
#if MG_SPLIT > 1
__cluster_dims__(MG_SPLIT, 1, 1)
#endif
__launch_bounds__(kThreads)
    spmm_tile_thin_sm90(const operand_t *__restrict__ x, i64 x_free, i64 x_column,
                        const operand_t *__restrict__ values, i64 slots, const int *__restrict__ work, int work_pitch,
                        int span, const int2 *__restrict__ cells, int per, int slab, float scale,
                        const operand_t *__restrict__ bias, out_t *__restrict__ out, i64 out_free, i64 out_row,
                        i64 out_column, int quads, int rows, int inner, int width) {
    extern __shared__ __align__(16) u8 dynamic[];
    int2 *lines = reinterpret_cast<int2 *>(dynamic);  // segments before each line, and which it is
    u8 *raw = dynamic + kTable;
    const u32 arrived = shared_address(dynamic + kTable - 8);  // where the engine says that x is there
    const u32 sent = arrived - 8;                              // and others, that their sums are
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % kSplit;
    const int column = blockIdx.y * kColumns, columns = min(kColumns, width - column);
    const i64 f = blockIdx.z;
    const int begin = rank * slab, live = max(0, min(slab, inner - begin));

    // In shared memory, bytes: a column of x takes an odd number of 16, which ldmatrix reads without conflicts.
    const int pitch = 2 * slab + 16;
    float *segments = reinterpret_cast<float *>(raw + min(kColumns, width) * pitch);
    float4 *received = reinterpret_cast<float4 *>(segments + (kWarps + per) * kColumns * kPitch);

    // 1. What depends on nothing: tables, for small work all tiles on their way to L2, x. Loads of tables have no
    //    registers that nobody reads: what the compiler puts there waits for the load.
    const int *from = work + static_cast<i64>(blockIdx.x) * work_pitch, stride = 2 + 2 * span;
    const int2 head = __ldg(reinterpret_cast<const int2 *>(from + warp * stride));
    int2 cell = lane < span ? __ldg(reinterpret_cast<const int2 *>(from + warp * stride + 2) + lane) : make_int2(0, 0);
    const int2 *of_lines = reinterpret_cast<const int2 *>(from + kWarps * stride);
    const int2 mine_of_lines = threadIdx.x <= per ? __ldg(of_lines + threadIdx.x) : make_int2(0, 0);
    if constexpr (kSplit > 1) {
        if (threadIdx.x == 0) {  // every CTA of the cluster, this one too, sends what it has of this one's lines
            barrier_init(sent, 1);
            barrier_init_fence();
            barrier_expect(sent, (per - rank + kSplit - 1) / kSplit * kOfLine * 16 * kSplit);
        }
        cluster_here();
    }
    const u32 thread = (blockIdx.y * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
    if (gridDim.z == 1 && slots / 64 <= gridDim.x * gridDim.y * kThreads && thread < slots / 64)
        prefetch_l2(values + static_cast<i64>(thread) * 64);
    stage(arrived, raw, pitch, x + f * x_free + begin + column * x_column, x_column, live, columns);

    // What is needed later and depends on nothing either.
    // Columns that are not there are the last that is; nobody keeps their sums.
    u32 right[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        const int c = kBlocks == 1 ? lane % 8 : 16 * j + lane / 16 * 8 + lane % 8;
        right[j] = shared_address(raw) + min(c, columns - 1) * pitch + lane / 8 % 2 * 16;
        asm volatile("" : "+r"(right[j]));  // here, not again for every tile
    }

    // 2. Tiles. Lane l holds cell l of 32, and of the 32 after them.
    // Past its last tile a warp reads 16 bytes of that again: after a load that may not be the compiler chooses
    // what the register has, and waits for it. Without any tile it reads the table.
    const int count = head.y & 0xFFFFF, last = count - 1;
    const u8 *mine = reinterpret_cast<const u8 *>(count ? values + f * slots : reinterpret_cast<const operand_t *>(from));
    asm volatile("" : "+l"(mine));
    int2 next = make_int2(0, 0);
    auto ask = [&](int n) { pair_load(next, cells + head.x + n + lane, n + lane < count); };
    uint4 even[kGroup], odd[kGroup];
    auto bring = [&](uint4(&to)[kGroup], int n, int number) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const u32 item = __shfl_sync(~0u, number, min(n + i, last));  // lane: of 32
            to[i] = tile_load_once(mine + static_cast<u64>(item * 32 + (n + i < count ? lane : 0)) * 16);
        }
    };
    bring(even, 0, cell.y);
    bring(odd, kGroup, cell.y);
    int word = cell.x, number = cell.y;
    ask(32);
    if (threadIdx.x <= per) lines[threadIdx.x] = mine_of_lines;
    __syncthreads();
    barrier_wait(arrived, 0);

    // 3. Products.
    float acc[kBlocks][4];
    auto clear = [&] {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[j][c] = 0.f;
    };
    clear();
    float *segment = segments + (head.y >> 20) * kColumns * kPitch + 2 * t * kPitch + g;
    auto multiply = [&](const uint4(&tiles)[kGroup], int n) {
        int words[kGroup];
        u32 b[kGroup][kPairs][4];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) words[i] = __shfl_sync(~0u, word, n + i);
#pragma unroll
        for (int i = 0; i < kGroup; ++i)  // of tiles that are not there the first is read, and not used
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                if constexpr (kBlocks == 1)
                    two_matrices(b[i][j], right[j] + (words[i] & ~31));
                else
                    matrices<false>(b[i][j], right[j] + (words[i] & ~31));
            }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (n + i >= count) break;
            u32 w[4];
            tile_lines<kTransposed>(w, tiles[i]);
            if (words[i] & 2) tile_cut(w, inner % 16);
            const u32 a[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
                mma_16x8x16<operand_t>(acc[j], a, b[i][j / 2][j % 2 * 2], b[i][j / 2][j % 2 * 2 + 1]);
            if (words[i] & 1) {
#pragma unroll
                for (int j = 0; j < kBlocks; ++j)
#pragma unroll
                    for (int c = 0; c < 4; ++c) segment[(8 * j + c % 2) * kPitch + c / 2 * 8] = acc[j][c];
                segment += kColumns * kPitch;
                clear();
            }
        }
    };
    // A batch is brought as soon as the one two before it is used up: numbers run ahead of words.
    auto turn = [&](int n) {
        if (n % 32 == 0 && n < count) number = next.y;
    };
    int n = 0;
#pragma unroll 1
    do {
        if (n && n % 32 == 0) {
            word = next.x;
            asm volatile("" : "+r"(word));
            ask(n + 32);
        }
        multiply(even, n);
        turn(n + 2 * kGroup);
        bring(even, n + 2 * kGroup, number);
        multiply(odd, n + kGroup);
        bring(odd, n + 3 * kGroup, number);
        n += 2 * kGroup;
    } while (n < count);
    __syncthreads();

    // 4. Sums. A thread has four rows of one column of every line it adds up; neighbouring threads write
    //    neighbouring elements, whichever they are.
    const bool turned_out = out_column == 1 && width > 1;
    const int place = threadIdx.x % kOfLine, ahead = threadIdx.x / kOfLine;
    const int c = turned_out ? place % kColumns : place / 4, r = turned_out ? place / kColumns : place % 4;
    const float4 *of_place = reinterpret_cast<const float4 *>(segments + c * kPitch + 4 * r);
    out_t *const to_place = out + f * out_free + (column + c) * out_column + 4 * r * out_row;
    auto add = [](float4 &sum, const float4 &more) {
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    };
    auto sum_of = [&](int l) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        const int last = lines[l + 1].x;
#pragma unroll 1
        for (int s = lines[l].x; s < last; ++s) add(sum, of_place[s * (kColumns * kPitch / 4)]);
        return sum;
    };
    auto write = [&](int l, const float4 &sum) {
        const int above = lines[l].y * 16, row = above + 4 * r;
        if (c >= columns || row >= rows) return;
        out_t *to = to_place + above * out_row;
        const float v[4] = {sum.x, sum.y, sum.z, sum.w};
        out_t y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[i] = from_float<out_t>(activated(fmaf(v[i], scale, bias && row + i < rows ? to_float(bias[row + i]) : 0.f)));
        if (quads && row + 3 < rows) {
            struct alignas(4 * sizeof(out_t)) Four { out_t v[4]; };
            *reinterpret_cast<Four *>(to) = {y[0], y[1], y[2], y[3]};
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (row + i < rows) to[i * out_row] = y[i];
        }
    };
    if constexpr (kSplit == 1) {
#pragma unroll 1
        for (int l = ahead; l < per; l += kAtOnce) write(l, sum_of(l));
    } else {
        // Each CTA of the cluster finishes every kSplit-th line; all send theirs to it, and none ends before it has
        // what others send.
        const int each = (per + kSplit - 1) / kSplit * kOfLine;
        const u32 here = shared_address(received + rank * each + place);
        cluster_wait();
#pragma unroll 1
        for (int l = ahead; l < per; l += kAtOnce)
            cluster_send(cluster_address(here + l / kSplit * kOfLine * 16, l % kSplit), cluster_address(sent, l % kSplit),
                         sum_of(l));
        barrier_wait(sent, 0);
#pragma unroll 1
        for (int l = rank + kSplit * ahead; l < per; l += kSplit * kAtOnce) {
            const float4 *of_all = received + l / kSplit * kOfLine + place;
            float4 sum = of_all[0];
#pragma unroll
            for (int s = 1; s < kSplit; ++s) add(sum, of_all[s * each]);
            write(l, sum);
        }
    }
}

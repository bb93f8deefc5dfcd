// spmm_tile_thin_sm90: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles.
//
// A CTA takes some lines of tiles, 8 kBlocks columns and one of kSplit slabs of inner positions. Its part of x
// comes into shared memory whole and needs no table, so that it is under way while the warps still learn which
// tiles are theirs. They share the CTA's tiles evenly, wherever lines end: a warp's part of a line is a segment
// with a place of its own, and segments are added up in their order, then slabs in theirs.
//
//   out      (F, rows, D) by strides, plus the bias of each row (nullptr: none)
//   x        (F, inner, D) by strides; kWide: inner positions contiguous, columns at 16 bytes, inner % 8 == 0
//   values   (F, slots), 512 bytes a tile
//   work     (CTAs, pitch) int: for each warp its first cell, number of cells, first segment, 0, and its first
//            `span` cells (32, or fewer where none has so many); then the segments before each line of the CTA
//   cells    (tiles) int2: 4 · inner tile of the slab + 2 where it hangs over the edge + 1 where the segment ends;
//            number of the tile in memory
//
//   grid   (kSplit · groups of lines, tiles of columns, F) in clusters of kSplit
//   block  kWarps warps
//   smem   x by columns, kRing tiles for each warp, segments, what the cluster's CTAs send
//   floor  tile bytes at the rate of memory. H200, caches flushed: 8192², a fifth of the tiles, 1 token 14.8 µs, 16
//          tokens 17.2; reading the same bytes takes 12.2 of them and an empty kernel 2.9. 128 tokens are latency:
//          768² 6.8, 768 -> 3072 9.1, 3072 -> 768 9.6; x reaches each multiprocessor at 40 bytes a cycle
//   needs  sm_90
#include "types.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks, kWarps = MG_WARPS, kRing = MG_RING, kSplit = MG_SPLIT;
constexpr bool kTransposed = MG_TRANSPOSED, kWide = MG_WIDE;
constexpr int kThreads = 32 * kWarps, kPairs = (kBlocks + 1) / 2, kMostLines = 128;
constexpr int kPitch = 20;  // floats of a segment's column of 16: lanes write to all banks
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
static_assert(kRing <= 32, "RING: no more than the cells that lanes hold");
constexpr int kTogether = kWarps > kColumns ? kWarps / kColumns : 1;  // warps that bring one column of x

__device__ __forceinline__ u32 shared_word(u32 address) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    return r;
}

// Columns of x from `from` on, `live` inner positions of each, zeros up to a whole tile.
__device__ __forceinline__ void stage_wide(u8 *to, int pitch, const operand_t *from, i64 x_column, int live, int columns) {
    const int warp = threadIdx.x / 32;
#pragma unroll 1
    for (int c = warp / kTogether; c < columns; c += kWarps / kTogether)
#pragma unroll 1
        for (int k = warp % kTogether * 32 + threadIdx.x % 32; k < (live + 15) / 16 * 2; k += kTogether * 32)
            copy_async16(to + c * pitch + k * 16, from + c * x_column + k * 8, k * 8 < live);
}
__device__ __forceinline__ void stage_by_hand(u16 *to, int pitch, const u16 *from, i64 x_inner, i64 x_column, int live,
                                              int columns) {
    const int whole = (live + 15) / 16 * 16;
    const bool across = x_column == 1 && columns > 1;
#pragma unroll 4
    for (int i = threadIdx.x; i < whole * columns; i += kThreads) {
        const int c = across ? i % columns : i / whole, k = across ? i / columns : i % whole;
        to[c * pitch + k] = k < live ? __ldg(from + k * x_inner + c * x_column) : u16(0);
    }
}

extern "C" __global__ void
#if MG_SPLIT > 1
__cluster_dims__(MG_SPLIT, 1, 1)
#endif
__launch_bounds__(kThreads)
    spmm_tile_thin_sm90(const operand_t *__restrict__ x, i64 x_free, i64 x_inner, i64 x_column,
                        const operand_t *__restrict__ values, i64 slots, const int *__restrict__ work, int work_pitch,
                        int span, const int2 *__restrict__ cells, int per, int slab, float scale,
                        const operand_t *__restrict__ bias, out_t *__restrict__ out, i64 out_free, i64 out_row,
                        i64 out_column, int quads, int rows, int inner, int width) {
    extern __shared__ __align__(16) u8 raw[];
    __shared__ int before[kMostLines + 1];  // segments before each line
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % kSplit, line = blockIdx.x / kSplit * per;
    const int column = blockIdx.y * kColumns, columns = min(kColumns, width - column);
    const i64 f = blockIdx.z;
    const int begin = rank * slab, live = max(0, min(slab, inner - begin));

    // In shared memory, bytes: a column of x takes an odd number of 16, which ldmatrix reads without conflicts.
    const int pitch = 2 * slab + 16;
    uint4 *ring = reinterpret_cast<uint4 *>(raw + kColumns * pitch) + warp * kRing * 32 + lane;
    float *segments = reinterpret_cast<float *>(raw + kColumns * pitch + kWarps * kRing * 512);
    float4 *received = reinterpret_cast<float4 *>(segments + (kWarps + per) * kColumns * kPitch);

    // A lane's own 16 bytes of a tile, which no other reads: no barrier but its own wait.
    const operand_t *mine = values + f * slots + lane * 8;
    const u64 policy = once_policy();
    auto fetch = [&](int n, int count, int item) {
        if (n < count) tile_copy_once(ring + n % kRing * 32, mine + static_cast<i64>(item) * 256, policy);
        copy_commit();
    };

    // 1. What depends on nothing: tables, x, and for small work all tiles on their way to L2.
    const int *from = work + static_cast<i64>(blockIdx.x) * work_pitch, stride = 4 + 2 * span;
    const int4 head = __ldg(reinterpret_cast<const int4 *>(from + warp * stride));
    int2 cell = lane < span ? __ldg(reinterpret_cast<const int2 *>(from + warp * stride + 4) + lane) : make_int2(0, 0);
    const int ends = threadIdx.x <= per ? __ldg(from + kWarps * stride + threadIdx.x) : 0;
    if constexpr (kSplit > 1) cluster_here();
    const operand_t *origin = x + f * x_free + begin * x_inner + column * x_column;
    if constexpr (kWide)
        stage_wide(raw, pitch, origin, x_column, live, columns);
    else
        stage_by_hand(reinterpret_cast<u16 *>(raw), pitch / 2, reinterpret_cast<const u16 *>(origin), x_inner, x_column, live,
                      columns);
    copy_commit();
    const u32 thread = (blockIdx.y * gridDim.x + blockIdx.x) * kThreads + threadIdx.x;
    if (gridDim.z == 1 && slots / 64 <= gridDim.x * gridDim.y * kThreads && thread < slots / 64)
        prefetch_l2(values + static_cast<i64>(thread) * 64);

    // 2. Tiles. Lane l holds cell l of 32, and of the 32 after them.
    const int count = head.y;
    auto ask = [&](int n) { return n + lane < count ? __ldg(cells + head.x + n + lane) : make_int2(0, 0); };
#pragma unroll 1
    for (int n = 0; n < kRing; ++n) fetch(n, count, __shfl_sync(~0u, cell.y, n));
    int2 next = ask(32);
    if (threadIdx.x <= per) before[threadIdx.x] = ends;
    copy_wait<kRing>();  // x
    __syncthreads();

    // 3. Products.
    float acc[kBlocks][4];
    auto clear = [&] {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[j][c] = 0.f;
    };
    clear();
    // Columns that are not there are the last that is; nobody keeps their sums.
    u32 right[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
        right[j] = address_in_shared(raw) + (kBlocks == 1 ? min(g, columns - 1) * pitch + 4 * t
                                                          : min(16 * j + lane / 16 * 8 + lane % 8, columns - 1) * pitch + lane / 8 % 2 * 16);
    float *segment = segments + head.z * kColumns * kPitch + 2 * t * kPitch + g;
    int slot = 0;
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
        if (n && n % 32 == 0) cell = next, next = ask(n + 32);
        const int word = __shfl_sync(~0u, cell.x, n % 32), ahead = n % 32 + kRing;
        copy_wait<kRing - 1>();
        u32 w[4], b[kPairs][4];
        tile_lines<kTransposed>(w, ring[slot * 32]);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
            if constexpr (kBlocks == 1)
                b[0][0] = shared_word(right[0] + word / 4 * 32), b[0][1] = shared_word(right[0] + word / 4 * 32 + 16);
            else
                matrices<false>(b[j], right[j] + word / 4 * 32);
        }
        if (word & 2) tile_cut(w, inner % 16);
        const u32 a[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
        for (int j = 0; j < kBlocks; ++j)
            mma_16x8x16<operand_t>(acc[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        fetch(n + kRing, count, __shfl_sync(~0u, ahead < 32 ? cell.y : next.y, ahead % 32));
        if (++slot == kRing) slot = 0;
        if (word & 1) {
#pragma unroll
            for (int j = 0; j < kBlocks; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) segment[(8 * j + c % 2) * kPitch + c / 2 * 8] = acc[j][c];
            segment += kColumns * kPitch;
            clear();
        }
    }
    __syncthreads();

    // 4. Sums, four rows of a line at once; neighbouring threads write neighbouring elements, whichever they are.
    const bool turned_out = out_column == 1 && width > 1;
    auto place = [&](int at, int &l, int &c, int &r) {
        const int rest = at % (kColumns * 4);
        l = at / (kColumns * 4), c = turned_out ? rest % kColumns : rest / 4, r = turned_out ? rest / kColumns : rest % 4;
    };
    auto sum_of = [&](int at) {
        int l, c, r;
        place(at, l, c, r);
        const float4 *v = reinterpret_cast<const float4 *>(segments + c * kPitch + 4 * r);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        const int last = before[l + 1];
#pragma unroll 1
        for (int s = before[l]; s < last; ++s) {
            const float4 more = v[s * (kColumns * kPitch / 4)];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        return sum;
    };
    auto write = [&](int at, const float4 &sum) {
        int l, c, r;
        place(at, l, c, r);
        const int row = (line + l) * 16 + 4 * r;
        if (c >= columns || row >= rows) return;
        out_t *to = out + f * out_free + row * out_row + (column + c) * out_column;
        const float v[4] = {sum.x, sum.y, sum.z, sum.w};
        out_t y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[i] = from_float<out_t>(fmaf(v[i], scale, bias && row + i < rows ? to_float(bias[row + i]) : 0.f));
        if (quads && row + 3 < rows) {
            struct alignas(4 * sizeof(out_t)) Four { out_t v[4]; };
            *reinterpret_cast<Four *>(to) = {y[0], y[1], y[2], y[3]};
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (row + i < rows) to[i * out_row] = y[i];
        }
    };
    const int all = per * kColumns * 4;
    if constexpr (kSplit == 1) {
#pragma unroll 1
        for (int at = threadIdx.x; at < all; at += kThreads) write(at, sum_of(at));
    } else {
        // Each CTA of the cluster finishes its share of the sums; the others send theirs to it.
        const int share = all / kSplit;
        cluster_wait();
#pragma unroll 1
        for (int r = 0; r < kSplit; ++r) {
            const u32 to = cluster_address(shared_address(received + rank * share), r);
#pragma unroll 1
            for (int at = threadIdx.x; at < share; at += kThreads) {
                const float4 sum = sum_of(r * share + at);
                cluster_store(to + at * 16, sum);
            }
        }
        cluster_sync();
#pragma unroll 1
        for (int at = threadIdx.x; at < share; at += kThreads) {
            float4 sum = received[at];
#pragma unroll
            for (int s = 1; s < kSplit; ++s) {
                const float4 v = received[s * share + at];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            write(rank * share + at, sum);
        }
    }
}

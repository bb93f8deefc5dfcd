// spmm_tile_thin_sm90: out = scale · S x or scale · Sᵀ x for few columns of x, S in 16 × 16 tiles in long lines.
//
// A CTA takes some lines of tiles, 8 kBlocks columns and one of kSplit slabs of inner positions; lines are dealt
// so that CTAs have equal numbers of tiles. Its part of x comes into shared memory whole and needs no table, so
// that it is under way while the warps still learn which tiles are theirs. They share the CTA's tiles evenly,
// wherever lines end: a warp's part of a line is a segment. Its sums go straight to a place of their own with the
// CTA of the cluster that finishes the line, which adds up places in their order: by slabs, then by warps.
//
// Tiles go straight to registers, two batches of kGroup under way. All is latency and instructions: what a warp
// does for a tile is counted, and nothing that a thread computes once waits for a table.
//
//   out      (F, rows, D) by strides, plus the bias of each row (nullptr: none), activated
//   x        (F, 1, D, inner): by a map of boxes of 64 inner positions × 8 kBlocks columns, swizzled; a single column as
//            it lies. inner % 8 == 0, all else at multiples of 16 bytes
//   values   (F, slots), 512 bytes a tile
//   work     (CTAs, pitch) int: for each warp its first cell, its number of cells and its first `span` cells (32, or
//            fewer where none has so many); then for each of the `kept` lines that the CTA finishes the places before
//            it and which line it is, and one more for all
//   cells    (tiles) int2: 2¹⁸ · place + 32 · inner tile of the slab + 4 · who finishes the line (both where a segment
//            ends) + 2 where the tile hangs over the edge + 1 where a segment ends; number of the tile in memory
//
//   grid   (kSplit · groups of lines, tiles of columns, F) in clusters of kSplit
//   block  kWarps warps
//   smem   x, places of segments, what each line has
//   floor  tile bytes at the rate of memory. H200, caches flushed: 8192², a fifth of the tiles, 1 token 13.6 µs, 16
//          tokens 14.0, 64 tokens 25.4; reading the same bytes takes 12.7 of them and an empty kernel 4.7
//   needs  sm_90
#include "types.cuh"
#include "activation.cuh"
#include "cluster.cuh"
#include "tile.cuh"

constexpr int kBlocks = MG_BLOCKS, kColumns = 8 * kBlocks, kWarps = MG_WARPS, kGroup = MG_GROUP, kSplit = MG_SPLIT;
constexpr bool kTransposed = MG_TRANSPOSED;
constexpr int kThreads = 32 * kWarps, kPairs = (kBlocks + 1) / 2, kMostLines = 128;
constexpr u32 kTable = (kMostLines + 4) * 8, kPlace = 512 * kBlocks;  // bytes; a place is that of a segment
constexpr u32 kWhere = 0x3FFF0;   // bits of a cell that say where in x it is
constexpr u32 kEarly = 16 << 10;  // bytes of tiles that a CTA prefetches; of more the loads of others wait
static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4, "BLOCKS must be 1, 2 or 4");
static_assert(kGroup == 2 || kGroup == 4 || kGroup == 8, "GROUP must divide the cells that lanes hold");
static_assert(kSplit == 1 || kSplit == 2 || kSplit == 4, "a cell has two bits for who finishes its line");

// Keeps what it has where not live; without a choice afterwards, which would wait for the load.
__device__ __forceinline__ void pair_load(int2 &v, const int2 *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(from), "r"(int(live)));
}

// Two neighbouring rows of a column, of which a lane has one and its neighbour of four lanes on the other.
struct alignas(2 * sizeof(out_t)) Two { out_t v[2]; };

// The slab's part of x: the engine copies it, one lane of each warp asking for boxes, and nobody else spends
// instructions, so that tiles are asked for as early.
__device__ __forceinline__ void stage(u32 barrier, u32 to, const TensorMap &map, const operand_t *single, int begin,
                                      int live, int column) {
    const int boxes = (live + 63) / 64;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
        barrier_expect(barrier, single ? live * 2 : boxes * kColumns * 128);
    }
    __syncthreads();
    if (threadIdx.x % 32) return;
    if (single) {
        if (threadIdx.x == 0 && live) bulk_load(to, single + begin, live * 2, barrier);
        if (threadIdx.x == 32 && live % 16)  // zeros up to a whole tile
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + live * 2), "r"(0) : "memory");
        return;
    }
#pragma unroll 1
    for (int b = threadIdx.x / 32; b < boxes; b += kWarps)
        tma_load(to + b * kColumns * 128, map, barrier, begin + 64 * b, column, 0, blockIdx.z);
}

extern "C" __global__ void
#if MG_SPLIT > 1
__cluster_dims__(MG_SPLIT, 1, 1)
#endif
__launch_bounds__(kThreads)
    spmm_tile_thin_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ x, i64 x_free,
                        const operand_t *__restrict__ values, i64 slots, const int *__restrict__ work, int work_pitch,
                        int span, const int2 *__restrict__ cells, int kept, int slab, u32 staged, u32 share, float scale,
                        const operand_t *__restrict__ bias, out_t *__restrict__ out, i64 out_free, i64 out_row,
                        i64 out_column, int pairs, int rows, int inner, int width) {
    extern __shared__ u8 dynamic[];
    const u32 right_side = (shared_address(dynamic) + 1023) & ~1023u, table = right_side + staged;
    const u32 places = table + kTable;
    const u32 arrived = places - 8;  // where the engine says that x is there
    const u32 sent = arrived - 8;    // and others, that their sums are
    u8 *const of_table = dynamic + (table - shared_address(dynamic)), *const of_places = of_table + kTable;
    int2 *const lines = reinterpret_cast<int2 *>(of_table);  // places before each line, and which it is
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % kSplit, column = blockIdx.y * kColumns;
    const i64 f = blockIdx.z;
    const int begin = rank * slab, live = max(0, min(slab, inner - begin));

    // 1. What depends on nothing: tables, some of the tiles on their way to L2, x. Loads of tables have no
    //    registers that nobody reads: what the compiler puts there waits for the load.
    const int *from = work + static_cast<i64>(blockIdx.x) * work_pitch, stride = 2 + 2 * span;
    const int2 head = __ldg(reinterpret_cast<const int2 *>(from + warp * stride));
    int2 cell = lane < span ? __ldg(reinterpret_cast<const int2 *>(from + warp * stride + 2) + lane) : make_int2(0, 0);
    const int2 *of_lines = reinterpret_cast<const int2 *>(from + kWarps * stride);
    const int2 mine_of_lines = threadIdx.x <= kept ? __ldg(of_lines + threadIdx.x) : make_int2(0, 0);
    if constexpr (kSplit > 1) {
        if (threadIdx.x == 0) {
            barrier_init(sent, 1);
            barrier_init_fence();
        }
        cluster_here();
    }
    if (gridDim.z == 1) {  // of about its own tiles as many as memory is asked for at once without a table
        const u32 first = (blockIdx.x * gridDim.y + blockIdx.y) * share + threadIdx.x;
        if (threadIdx.x < min(share, kEarly / 128) && first < slots / 64)
            prefetch_l2(values + static_cast<i64>(first) * 64);
    }
    stage(arrived, right_side, x_map, width == 1 ? x + f * x_free : nullptr, begin, live, column);

    // What is needed later and depends on nothing either: where lanes find their rows of 8 × 8 matrices of x. In boxes
    // 16 bytes lie at an odd place with column % 8; all lanes read a single column.
    u32 right[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
        const int c = kBlocks == 1 ? lane % 8 : 16 * j + lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
        right[j] = width == 1 ? half * 16 : c * 128 + (half ^ c % 8) * 16;
        asm volatile("" : "+r"(right[j]));  // here, not again for every tile
    }
    // Of a cell, as it is in the table: boxes of four inner tiles lie one after the other.
    constexpr u32 kBox = kWhere & ~127u;
    const u32 apart = width == 1 ? 1 : kColumns;
    auto placed = [&](int word) { return (u32(word) & ~kBox) | (u32(word) & kBox) * apart; };

    // 2. Tiles. Lane l holds cell l of 32, and of the 32 after them.
    // Past its last tile a warp reads 16 bytes of that again: after a load that may not be the compiler chooses
    // what the register has, and waits for it. Without any tile it reads the table.
    const int count = head.y, last = count - 1;
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
    u32 word = placed(cell.x);
    int number = cell.y;
    ask(32);
    if (threadIdx.x <= kept) lines[threadIdx.x] = mine_of_lines;
    if constexpr (kSplit > 1) {
        if (threadIdx.x == kept) barrier_expect(sent, mine_of_lines.x * kPlace);
        cluster_wait();  // everybody's barrier is there
    }
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
    const u32 slot = lane * 16;
    auto end = [&](u32 item) {  // a segment goes to its place
        const u32 to = slot + (item >> 18) * kPlace, whose = item >> 2 & 3;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const float4 v = make_float4(acc[j][0], acc[j][1], acc[j][2], acc[j][3]);
            if constexpr (kSplit > 1)
                cluster_send(cluster_address(places + to, whose) + j * 512, cluster_address(sent, whose), v);
            else
                *reinterpret_cast<float4 *>(of_places + to + j * 512) = v;
        }
        clear();
    };
    auto multiply = [&](const uint4(&tiles)[kGroup], int n) {
        u32 words[kGroup], b[kGroup][kPairs][4];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) words[i] = __shfl_sync(~0u, word, n + i);
#pragma unroll
        for (int i = 0; i < kGroup; ++i)  // of tiles that are not there the first is read, and not used
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                const u32 at = right_side + ((words[i] & kWhere) ^ right[j]);
                if constexpr (kBlocks == 1)
                    two_matrices(b[i][j], at);
                else
                    matrices<false>(b[i][j], at);
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
            if (words[i] & 1) end(words[i]);
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
            word = placed(next.x);
            asm volatile("" : "+r"(word));
            ask(n + 32);
        }
        multiply(even, n);
        turn(n + 2 * kGroup);
        if (n + 2 * kGroup < count) bring(even, n + 2 * kGroup, number);
        multiply(odd, n + kGroup);
        if (n + 3 * kGroup < count) bring(odd, n + 3 * kGroup, number);
        n += 2 * kGroup;
    } while (n < count);
    if constexpr (kSplit == 1) __syncthreads();

    // 4. Sums. A warp has 8 columns of a line: a lane what the same lane of others sent. Where rows lie side by side,
    //    of two rows one lane writes the even column, and the other the odd one.
    const int block = warp % kBlocks, side = g % 2, c = column + 8 * block + 2 * t;
    const u8 *const mine_of_places = of_places + block * 512 + lane * 16;
    out_t *const there = out + f * out_free + (c + side) * out_column + (g - side);
#pragma unroll 1
    for (int l = warp / kBlocks; l < kept; l += kWarps / kBlocks) {
        const int2 line = lines[l];
        const int above = line.y * 16, row = above + g, last = lines[l + 1].x;
        const operand_t *added = bias;
        asm volatile("" : "+l"(added));  // one loop, not one more without a bias
        float upper = 0.f, lower = 0.f;
        if (added) {
            if (row < rows) upper = to_float(__ldg(added + row));
            if (row + 8 < rows) lower = to_float(__ldg(added + row + 8));
        }
        // None ends before it has what others send.
        if constexpr (kSplit > 1) barrier_wait(sent, 0);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        auto add = [&](const float4 &more) { sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w; };
#pragma unroll 1
        for (int s = line.x; s < last; s += 2) {
            const float4 *const at = reinterpret_cast<const float4 *>(mine_of_places + s * kPlace);
            const float4 more = s + 1 < last ? at[kPlace / 16] : make_float4(0.f, 0.f, 0.f, 0.f);
            add(at[0]), add(more);
        }
        const float v[4] = {activated(fmaf(sum.x, scale, upper)), activated(fmaf(sum.y, scale, upper)),
                            activated(fmaf(sum.z, scale, lower)), activated(fmaf(sum.w, scale, lower))};
        if (pairs && above + 16 <= rows) {
            const float other = __shfl_xor_sync(~0u, side ? v[0] : v[1], 4);
            const float below = __shfl_xor_sync(~0u, side ? v[2] : v[3], 4);
            if (c + side < width) {
                Two *const to = reinterpret_cast<Two *>(there + above);
                to[0] = {from_float<out_t>(side ? other : v[0]), from_float<out_t>(side ? v[1] : other)};
                to[4] = {from_float<out_t>(side ? below : v[2]), from_float<out_t>(side ? v[3] : below)};
            }
        } else {
            i64 first = c;
            asm volatile("" : "+l"(first));  // here, not where it is seldom needed
            out_t *const to = out + f * out_free + first * out_column + row * out_row;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (c + i % 2 < width && row + i / 2 * 8 < rows)
                    to[i % 2 * out_column + i / 2 * 8 * out_row] = from_float<out_t>(v[i]);
        }
    }
}

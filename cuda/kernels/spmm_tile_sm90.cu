// spmm_tile_sm90: out = scale · S x or scale · Sᵀ x, S in 16 × 16 tiles, on wgmma.
//
// A CTA takes 64 kGroups rows, 4 lines of tiles for each warpgroup, and kWide columns of x. Stage by stage come 64 inner
// positions of x and the lines' tiles there. A warpgroup multiplies by those 16 inner positions at which any of its lines
// keeps a tile: a tile is a warp's left operand as it lies in memory, and a warp whose line has none there puts zeros.
// The CTAs of a cluster, one below the other, share x: each brings its part to all.
//
//   out      (F, rows, D); with kTokens (F, D, rows), plus the bias of each row, activated
//   x        (F, inner, D), columns contiguous, by a 3-D tensor map (D, inner, F) in boxes of 64 × 64; with kTokens inner
//            positions contiguous, (inner, D, F), boxes of 64 × kWide; a CTA's part of them, the outer cut
//   values   (F, slots), 512 bytes a tile
//   records  (n, kRecord) int, of each stage of each CTA's lines: of each line two, in bytes which of the stage's tiles
//            lies at each 16 inner positions (255: none) and of its warpgroup bits of what to multiply by, and from bit 4
//            on of what hangs over the edge; then inner position / 64, number of tiles, 0, 0; numbers in memory of up to
//            kCapacity tiles
//   tiles    (clusters, n) int4   see walk.cuh; line = kCluster kLines lines of tiles, elements: stages; the records
//            of the cluster's first CTA come first
//
//   grid    CTAs in clusters that walk their tiles of 64 kGroups kCluster rows × kWide columns
//   block   kGroups warpgroups of consumers, and one that produces
//   smem    kStages of 64 × kWide elements of x and kCapacity tiles; with kTokens 4 KiB for each warpgroup
//   floor   tensor cores: 2 · 1024 · D FLOP at 800 TFLOP/s for each warpgroup and 16 inner positions that it multiplies
//           by; L2: x once for each cluster's lines and tiles once for every kWide columns, at 8.6 TB/s
//   needs   sm_90a, 16-byte aligned rows of x, of values and of the result
//
// Zeros multiply elements of x that a line has no use for, and 0 · NaN is NaN. So all that is not finite in x shows:
// every sum that met it is not finite. Those sums alone are made again, tile by tile.
#include "types.cuh"
#include "cluster.cuh"
#include "result.cuh"
#include "tile.cuh"
#include "token_rows.cuh"
#include "ring.cuh"
#include "walk.cuh"

constexpr int kGroups = MG_GROUPS, kWide = MG_WIDE, kStages = MG_STAGES, kCapacity = MG_CAPACITY;
constexpr int kCluster = MG_CLUSTER;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kTokens || kWide >= 64, "panels of x have 64 columns");
static_assert(!(kTokens && kPartial), "rows of tokens are not summed elsewhere");
static_assert(kCapacity % 4 == 0 && kCapacity <= 64, "CAPACITY: a byte says which tile, 255 none");
constexpr int kLines = 4 * kGroups, kConsumers = 128 * kGroups, kPanels = kTokens ? 1 : kWide / 64;
constexpr int kNotes = 2 * kLines, kList = 4 + kCapacity, kRecord = kNotes + kList;  // ints
constexpr int kBringers = 4, kEach = (kCapacity + 31) / 32;  // warps that bring stages, tiles of a lane
constexpr int kAhead = 2, kLists = kAhead + 1;               // lists of a warp under way, and one that is read
constexpr int kShare = (kTokens ? kWide : 64) / kCluster;  // lines of 128 bytes of a panel that a CTA brings
constexpr u32 kPanel = 64 * 128, kX = kWide * 128, kStage = kX + kCapacity * 512;
constexpr bool kMoves = kGroups == 4 && kWide == 128;  // registers, which are short for no others
using Pool = Registers<kConsumers + 128, kMoves ? 32 : 40, kMoves ? 112 : 96>;
using sum_t = DtypeOf<kPartial ? 2 : kDtype>::type;

// The stages of all tiles of a CTA, one after the other.
struct Cursor {
    Walk walk;
    int4 tile{0, 0, 0, 0};
    int n = -1;

    __device__ __forceinline__ bool next() {
        ++n;
        while (n == tile.z) {
            if (!walk.next(tile)) {
                tile.z = 0, n = -1;  // the same when asked again
                return false;
            }
            n = 0;
        }
        return true;
    }
};

__device__ __forceinline__ void bring(u32 to, const TensorMap &map, u32 barrier, int c0, int c1, int c2) {
    if constexpr (kCluster > 1)
        tma_multicast(to, map, barrier, (1 << kCluster) - 1, c0, c1, c2);
    else
        tma_load(to, map, barrier, c0, c1, c2);
}

// To all that write there.
__device__ __forceinline__ void give_back(u32 empty, int lane) {
    if constexpr (kCluster > 1) {
        if (lane < kCluster) cluster_arrive(cluster_address(empty, lane));
    } else if (lane == 0) {
        barrier_arrive(empty);
    }
}

extern "C" __global__ void
#if MG_CLUSTER > 1
__cluster_dims__(MG_CLUSTER, 1, 1)
#endif
__launch_bounds__(kConsumers + 128, 1)
    spmm_tile_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values, i64 slots,
                   const int *__restrict__ records, const int4 *__restrict__ tiles, int each, int across, float scale,
                   const operand_t *__restrict__ bias, void *__restrict__ out, int rows, int inner, int width,
                   const operand_t *__restrict__ x, i64 x_free, i64 x_inner, i64 x_column,  // to make sums again
                   const int *__restrict__ bounds, const int2 *__restrict__ cells) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages + kBringers * kLists];
    __shared__ alignas(16) int lists[kBringers][kLists][kList];
    __shared__ alignas(16) uint2 notes[kStages][kLines];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages, listed = empty + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    const int rank = kCluster > 1 ? int(cluster_rank()) : 0;

    Walk walk(tiles, each, blockIdx.x / kCluster);
    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kCluster * kConsumers / 32);
        for (int s = 0; s < kBringers * kLists; ++s) barrier_init(listed + 8 * s, 1);
        barrier_init_fence();
    }
    if constexpr (kCluster > 1)
        cluster_sync();
    else
        __syncthreads();
    auto record = [&](const int4 &tile, int n) {
        return records + static_cast<i64>(tile.y * kCluster + rank * tile.z + n) * kRecord;
    };

    int stage = 0;
    int4 tile;

    if (warp >= kConsumers / 32) {  // producers: each brings whole stages, in turn
        if constexpr (kMoves) Pool::give();
        const int mine = warp - kConsumers / 32;
        Cursor ahead{walk}, now{walk};
        for (int i = 0; i < mine; ++i) ahead.next(), now.next();
        int asked = 0;
        auto ask = [&] {  // for the list of one more stage of its own
            if (!ahead.next()) return;
            const int at = asked++ % kLists;
            if (lane == 0) {
                barrier_expect(listed + 8 * (mine * kLists + at), kList * 4);
                bulk_load(shared_address(lists[mine][at]), record(ahead.tile, ahead.n) + kNotes, kList * 4,
                          listed + 8 * (mine * kLists + at));
            }
            for (int i = 1; i < kBringers; ++i) ahead.next();
        };
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) ask();
#pragma unroll 1
        for (int i = 0; now.next(); ++i) {
            const int column = now.tile.w % across * kWide, matrix = now.tile.w / across, at = i % kLists;
            const int round = i * kBringers + mine, stage = round % kStages;
            const u32 to = ring + stage * kStage, done = full + 8 * stage;
            const operand_t *const from = values + matrix * slots;
            ask();  // into the place of the list before, which all lanes have used
            barrier_wait(listed + 8 * (mine * kLists + at), i / kLists & 1);
            const int first = lists[mine][at][0] * 64, count = lists[mine][at][1];
            int item[kEach];
#pragma unroll
            for (int h = 0; h < kEach; ++h) item[h] = lane + 32 * h < count ? lists[mine][at][4 + lane + 32 * h] : -1;
            barrier_wait(empty + 8 * stage, round / kStages & 1 ^ 1);
            if (lane == 0) {
                barrier_expect(done, kX + count * 512 + kNotes * 4);
                const int share = rank * kShare;
                if constexpr (kTokens)
                    bring(to + share * 128, x_map, done, first, column + share, matrix);
                else
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        bring(to + p * kPanel + share * 128, x_map, done, column + 64 * p, first + share, matrix);
                bulk_load(shared_address(notes[stage]), record(now.tile, now.n), kNotes * 4, done);
            }
            __syncwarp();
#pragma unroll
            for (int h = 0; h < kEach; ++h)
                if (item[h] >= 0)
                    bulk_load(to + kX + (lane + 32 * h) * 512, from + static_cast<i64>(item[h]) * 256, 512, done);
            __syncwarp();
            for (int j = 1; j < kBringers; ++j) now.next();
        }
        if constexpr (kCluster > 1) {  // others write to its shared memory as long as they work
            __syncwarp();
            cluster_sync();
        }
        return;
    }

    if constexpr (kMoves) Pool::take();
    const int group = warp / 4;
    const u64 x_desc = kTokens ? wgmma_rows<128>(ring) : wgmma_descriptor(ring, kPanel);
    u32 parity = 0;

    while (walk.next(tile)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        u32 held = 0;  // barrier of the stage that products in flight read
#pragma unroll 1
        for (int n = 0; n < tile.z; ++n) {
            const u32 at = stage * kStage, mine = ring + at + kX + lane * 16;
            barrier_wait(full + 8 * stage, parity);
            const uint2 note = notes[stage][warp];
            wgmma_wait<0>();  // what they read is free, and so are the tiles in registers
            if (held) give_back(held, lane);
            uint4 v[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const u32 which = note.x >> (8 * q) & 255;
                v[q] = make_uint4(0u, 0u, 0u, 0u);
                if (which != 255)
                    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(v[q].x), "=r"(v[q].y), "=r"(v[q].z), "=r"(v[q].w)
                                 : "r"(mine + which * 512));
            }
            u32 a[4][4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                u32 w[4];
                tile_lines<kTransposed>(w, v[q]);
                a[q][0] = w[0], a[q][1] = w[2], a[q][2] = w[1], a[q][3] = w[3];
            }
            if (note.y >> 4)  // some hang over the edge
#pragma unroll
                for (int q = 0; q < 4; ++q)
                    if (note.y >> (4 + q) & 1) {
                        u32 w[4] = {a[q][0], a[q][2], a[q][1], a[q][3]};
                        tile_cut(w, inner % 16);
                        a[q][0] = w[0], a[q][1] = w[2], a[q][2] = w[1], a[q][3] = w[3];
                    }
#pragma unroll
            for (int q = 0; q < 4; ++q)
                if (note.y >> q & 1) {
                    wgmma_fence();
                    Wgmma<kWide>::template rs<!kTokens>(acc, a[q], x_desc + ((at + q * (kTokens ? 32 : 2048)) >> 4));
                    wgmma_commit();
                }
            held = empty + 8 * stage;
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (held) give_back(held, lane);

        const int four = (tile.x * kCluster + rank) * kGroups + group, matrix = tile.w / across;
        const int column = tile.w % across * kWide, row0 = four * 64 + warp % 4 * 16;
        sum_t *const to = static_cast<sum_t *>(out) + static_cast<i64>(matrix) * rows * width;
        if constexpr (kTokens) {
            store_turned<kWide>(acc, scale, bias, ring + kStages * kStage + group * 4096,
                                static_cast<operand_t *>(out) + static_cast<i64>(matrix) * rows * width, four * 64, rows,
                                column, width);
            named_barrier(2 + group, 128);  // what other lanes stored is written again below
        } else {
            store_result<kWide, kPartial>(acc, scale, to, row0 + lane / 4, rows, column, width, false);
            __syncwarp();
        }

        // A sum that is not finite makes that of its zero multiples NaN.
        float zero = 0.f;
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) zero = fmaf(acc[i], 0.f, zero);
        const bool redo = __any_sync(~0u, zero != zero);
        if (!redo) continue;
        u64 bad = 0;
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) bad |= u64(!(fabsf(acc[i]) < kInfinity)) << i;
        const operand_t *const right = x + matrix * x_free;
#pragma unroll 1
        for (int i = 0; i < kWide / 2; ++i) {
            const int low = i / 2 % 2 * 8 + lane / 4, r = row0 + low, c = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (!(bad >> i & 1) || r >= rows || c >= width) continue;
            float sum = 0.f;
            for (int n = __ldg(bounds + r / 16), end = __ldg(bounds + r / 16 + 1); n < end; ++n) {
                const int2 cell = __ldg(cells + n);
                const operand_t *const left = values + matrix * slots + static_cast<i64>(cell.y) * 256;
#pragma unroll 1
                for (int k = 0; k < min(16, inner - 16 * cell.x); ++k) {
                    const int p = kTransposed ? k : low, q = kTransposed ? low : k;  // row and column of the tile
                    const int from = (p % 8 * 4 + q % 8 / 2) * 8 + (q / 8 * 2 + p / 8) * 2 + q % 2;
                    sum = fmaf(to_float(left[from]), to_float(right[(16 * cell.x + k) * x_inner + c * x_column]), sum);
                }
            }
            if constexpr (kTokens)
                to[static_cast<i64>(c) * rows + r] =
                    from_float<sum_t>(activated(fmaf(sum, scale, bias ? to_float(bias[r]) : 0.f)));
            else
                to[static_cast<i64>(r) * width + c] = from_float<sum_t>(sum * scale);
        }
    }
    if constexpr (kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
}

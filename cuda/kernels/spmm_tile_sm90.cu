// spmm_tile_sm90: out = scale · S x or scale · Sᵀ x, S in 16 × 16 tiles, on wgmma.
//
// A CTA takes 64 kGroups rows, 4 lines of tiles for each warpgroup, and kWide columns of x. Stage by stage come 64 inner
// positions of x and the lines' tiles there. A warpgroup multiplies by those 16 inner positions at which any of its lines
// keeps a tile: a tile is a warp's left operand as it lies in memory, and a warp whose line has none there puts zeros.
//
//   out      (F, rows, D); with kTokens (F, D, rows), plus the bias of each row, activated
//   x        (F, inner, D), columns contiguous, by a 3-D tensor map (D, inner, F) in boxes of 64 × 64; with kTokens inner
//            positions contiguous, (inner, D, F), boxes of 64 × kWide
//   values   (F, slots), 512 bytes a tile
//   records  (n, kRecord) int, of each stage of each group of lines: of each line four shorts, of each 16 inner positions
//            whether its warpgroup multiplies by them and they hang over the edge, and which of the stage's tiles lies
//            there, if one does; then inner position / 64, number of tiles, 0, 0;
//            numbers in memory of up to kCapacity tiles
//   tiles    (n) int4         see walk.cuh; line = group of kLines lines of tiles, elements: records
//
//   grid    CTAs that walk their tiles of 64 kGroups rows × kWide columns
//   block   kGroups warpgroups of consumers, and one that produces
//   smem    kStages of 64 × kWide elements of x and kCapacity tiles; with kTokens 4 KiB for each warpgroup; kMeta besides
//   floor   tensor cores: 2 · 1024 · D FLOP at 800 TFLOP/s for each warpgroup and 16 inner positions that it multiplies
//           by; L2: x once for each group of lines and tiles once for every kWide columns, at 8.6 TB/s
//   needs   sm_90a, 16-byte aligned rows of x, of values and of the result
//
// What decides is how long a warpgroup takes from stage to stage, latency by latency, while the others' products run. So
// what it notes of a stage comes with the stage before, and it looks whether a stage is there before it multiplies by the
// one before. Half a stage in registers ahead of the products in flight, and x shared by the CTAs of a cluster, were
// tried on an H200: the one was slower, the other no faster.
//
// Zeros multiply elements of x that a line has no use for, and 0 · NaN is NaN. So all that is not finite in x shows:
// every sum that met it is not finite. Those sums alone are made again, tile by tile.
#include "types.cuh"
#include "copy.cuh"
#include "result.cuh"
#include "tile.cuh"
#include "token_rows.cuh"
#include "ring.cuh"
#include "walk.cuh"

constexpr int kGroups = MG_GROUPS, kWide = MG_WIDE, kStages = MG_STAGES, kCapacity = MG_CAPACITY;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kTokens || kWide >= 64, "panels of x have 64 columns");
static_assert(!(kTokens && kPartial), "rows of tokens are not summed elsewhere");
static_assert(kCapacity % 4 == 0 && kCapacity <= 64, "CAPACITY: seven bits say which tile");
constexpr int kLines = 4 * kGroups, kConsumers = 128 * kGroups, kPanels = kTokens ? 1 : kWide / 64;
constexpr int kNotes = 2 * kLines, kList = 4 + kCapacity, kRecord = kNotes + kList;  // ints
constexpr int kMultiply = 1, kOver = 2, kNone = 4, kPlace = 0xFE00;  // of what is noted; 512 bytes a tile
constexpr int kBringers = 4, kEach = (kCapacity + 31) / 32;  // warps that bring stages, tiles of a lane
constexpr int kAhead = 2, kLists = kAhead + 1;               // lists of a warp under way, and one that is read
constexpr u32 kPanel = 64 * 128, kX = kWide * 128, kStage = kX + kCapacity * 512;
constexpr u32 kStaged = kTokens ? 4096 * kGroups : 0;
constexpr u32 kBarriers = 8 * (2 * kStages + kBringers * kLists);
constexpr u32 kMeta = kBarriers + 4 * (kStages * kNotes + kBringers * kLists * kList);
static_assert(1024 + kStages * kStage + kStaged + kMeta == MG_SHARED, "as much as is asked for, and to align it");
static_assert(kStages >= kBringers, "a producer waits for one stage at a time");
constexpr bool kMoves = kGroups == 4 && kWide == 128;  // registers, which are short for no others
using Pool = Registers<kConsumers + 128, kMoves ? 32 : 40, kMoves ? 112 : 96>;
using sum_t = DtypeOf<kPartial ? 2 : kDtype>::type;

// The stages of all tiles of a CTA, one after the other.
struct Cursor {
    Walk walk;
    int4 tile{0, 0, 0, 0};
    int n = -1;

    // So many stages on, at first from before the first; false behind the last.
    __device__ __forceinline__ bool forward(int steps) {
        n += steps;
        while (n >= tile.z) {
            n -= tile.z;
            if (!walk.next(tile)) {
                tile.z = 0, n = 0;  // the same when asked again
                return false;
            }
        }
        return true;
    }
};

// Zeros if not; in one piece, so that nothing of it comes before products have been waited for.
__device__ __forceinline__ uint4 load_if(bool there, u32 address) {
    uint4 v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "r"(address), "r"(u32(there))
        : "memory");
    return v;
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    spmm_tile_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values, i64 slots,
                   const int *__restrict__ records, const int4 *__restrict__ tiles, int each, int across, float scale,
                   const operand_t *__restrict__ bias, void *__restrict__ out, int rows, int inner, int width,
                   const operand_t *__restrict__ x, i64 x_free, i64 x_inner, i64 x_column,  // to make sums again
                   const int *__restrict__ bounds, const int2 *__restrict__ cells) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u, full = ring + kStages * kStage + kStaged;
    const u32 empty = full + 8 * kStages, listed = empty + 8 * kStages;
    const u32 notes = full + kBarriers, lists = notes + 4 * kStages * kNotes;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    Walk walk(tiles, each);
    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kConsumers / 32);
        for (int s = 0; s < kBringers * kLists; ++s) barrier_init(listed + 8 * s, 1);
        barrier_init_fence();
    }
    __syncthreads();
    auto record = [&](const int4 &tile, int n) { return records + static_cast<i64>(tile.y + n) * kRecord; };

    if (warp >= kConsumers / 32) {  // producers: each brings whole stages, in turn
        if constexpr (kMoves) Pool::give();
        const int mine = warp - kConsumers / 32;
        Cursor ahead{walk}, now{walk};
        int asked = 0, asks = 1 + mine;
        auto ask = [&] {  // for the list of one more stage of its own
            if (!ahead.forward(asks)) return;
            asks = kBringers;
            const int at = mine * kLists + asked;
            if (++asked == kLists) asked = 0;
            if (lane == 0) {
                barrier_expect(listed + 8 * at, kList * 4);
                bulk_load(lists + at * kList * 4, record(ahead.tile, ahead.n) + kNotes, kList * 4, listed + 8 * at);
            }
        };
#pragma unroll 1
        for (int i = 0; i < kAhead; ++i) ask();
        int stage = mine, list = 0, repeat = -1, column = 0, matrix = 0;
        u32 free = 1, known = 0;  // parities of what it waits for
        for (int steps = 1 + mine; now.forward(steps); steps = kBringers) {
            const u32 to = ring + stage * kStage, done = full + 8 * stage, items = lists + (mine * kLists + list) * kList * 4;
            if (now.tile.w != repeat)
                repeat = now.tile.w, column = repeat % across * kWide, matrix = repeat / across;
            const operand_t *const from = values + matrix * slots;
            ask();  // into the place of the list before, which all lanes have used
            barrier_wait(listed + 8 * (mine * kLists + list), known);
            const uint4 head = load_shared16(items);
            const int first = head.x * 64, count = head.y;
            int item[kEach];
#pragma unroll
            for (int h = 0; h < kEach; ++h)
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(item[h]) : "r"(items + 16 + 4 * min(lane + 32 * h, kCapacity - 1)));
            barrier_wait(empty + 8 * stage, free);
            if (lane == 0) {
                barrier_expect(done, kX + count * 512 + kNotes * 4);
                if constexpr (kTokens)
                    tma_load(to, x_map, done, first, column, matrix);
                else
#pragma unroll
                    for (int p = 0; p < kPanels; ++p) tma_load(to + p * kPanel, x_map, done, column + 64 * p, first, matrix);
                // What is noted of the stage that comes next.
                const int *noted = record(now.tile, now.n + 1);
                if (now.n + 1 == now.tile.z) {
                    Walk peek = now.walk;
                    int4 next;
                    bool more = peek.next(next);
                    while (more && !next.z) more = peek.next(next);
                    noted = more ? record(next, 0) : record(now.tile, now.n);
                }
                bulk_load(notes + stage * kNotes * 4, noted, kNotes * 4, done);
            }
            __syncwarp();
#pragma unroll
            for (int h = 0; h < kEach; ++h)
                if (lane + 32 * h < count)
                    bulk_load(to + kX + (lane + 32 * h) * 512, from + static_cast<i64>(item[h]) * 256, 512, done);
            __syncwarp();
            if ((stage += kBringers) >= kStages) stage -= kStages, free ^= 1;
            if (++list == kLists) list = 0, known ^= 1;
        }
        return;
    }

    if constexpr (kMoves) Pool::take();
    const int group = warp / 4;
    const u64 x_desc = kTokens ? wgmma_rows<128>(ring) : wgmma_descriptor(ring, kPanel);
    int stage = 0;
    int4 tile;
    u32 parity = 0;
    u32 mine = ring + kX + lane * 16;  // where it reads of a tile
    asm volatile("" : "+r"(mine));  // or it is made again for every stage
    bool here = false;  // the stage that comes next
    int2 note{0, 0};    // of that
    if (Cursor first{walk}; first.forward(1))
        note = __ldg(reinterpret_cast<const int2 *>(record(first.tile, 0)) + warp);

    while (walk.next(tile)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
        const bool leads = !(mine & 31 * 16);
        u32 held = 0;  // barrier of the stage that products in flight read
#pragma unroll 1
        for (int n = 0; n < tile.z; ++n) {
            const u32 at = mine + stage * kStage, barrier = full + 8 * stage;
            const int word[4] = {note.x, note.x >> 16, note.y, note.y >> 16};
            const bool over = (note.x | note.y) & (kOver | kOver << 16);
            if (!here) barrier_wait(barrier, parity);
            wgmma_wait<0>();  // what they read is free, and so are the tiles in registers
            uint4 v[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) v[q] = load_if(!(word[q] & kNone), at + (word[q] & kPlace));
            // The place of what it notes now is given back after tiles that it tells have been read.
            if (leads && held) barrier_arrive(held);
            held = barrier + 8 * kStages;
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                         : "=r"(note.x), "=r"(note.y)
                         : "r"(notes + stage * kNotes * 4 + warp * 8)
                         : "memory");
            const u32 x_at = static_cast<u32>(x_desc) + (stage * kStage >> 4);
            if (++stage == kStages) stage = 0, parity ^= 1;
            here = barrier_passed(full + 8 * stage, parity);
            u32 a[4][4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                u32 w[4];
                tile_lines<kTransposed>(w, v[q]);
                a[q][0] = w[0], a[q][1] = w[2], a[q][2] = w[1], a[q][3] = w[3];
            }
            if (over)  // the edge
#pragma unroll
                for (int q = 0; q < 4; ++q)
                    if (word[q] & kOver) {
                        u32 w[4] = {a[q][0], a[q][2], a[q][1], a[q][3]};
                        tile_cut(w, inner % 16);
                        a[q][0] = w[0], a[q][1] = w[2], a[q][2] = w[1], a[q][3] = w[3];
                    }
#pragma unroll
            for (int q = 0; q < 4; ++q)
                if (word[q] & kMultiply) {
                    wgmma_fence();
                    Wgmma<kWide>::template rs<!kTokens>(
                        acc, a[q], x_desc >> 32 << 32 | (x_at + ((kTokens ? 32 : 2048) * q >> 4)));
                    wgmma_commit();
                }
        }
        wgmma_wait<0>();
        if (leads && held) barrier_arrive(held);

        const int four = tile.x * kGroups + group, matrix = tile.w / across;
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
}

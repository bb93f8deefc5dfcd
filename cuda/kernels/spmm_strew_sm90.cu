// spmm_strew_sm90: out = scale · x Sᵀ, or scale · x S, over rows of tokens, S of single entries, on wgmma.
//
// A CTA takes kRows lines of S and kWide tokens, and walks the steps of kDeep inner positions at which its lines
// keep something. Teams of producer warps take steps in turn: they zero a dense tile in shared memory and strew the
// step's entries over it, each in one piece of two bytes. Consumers multiply the tile. So a layer costs what a dense
// one costs in products, and moves only what is kept; for few tokens the CTAs of a cluster share the steps and add
// up at the end, in their order.
//
//   out      (F, T, rows)    contiguous, rows % 8 == 0; plus the bias of each line (nullptr: none), activated
//   x        (F, T, inner)   by a 4-D tensor map (inner, T, 1, F), boxes of 64 × kWide
//   values   (F, slots)      16-bit elements
//   heads    (kParts · lines of tiles, kTeams, 3) int4: first piece of a team, number of them, steps of the CTA; then
//                            the team's first two pieces
//   pieces   (n) int4        first bundle; number of bundles; 4 · (inner positions / kDeep) + 1 if it opens its step + 2
//                            if it closes it; slot from which its slots count
//   spots    (bundles, 8) u16: byte of an entry in its tile, swizzled; slots (bundles, 8) u16 of its value; by slot.
//                            Where a step, or slots in reach of 16 bits, end, the last entry is there several times.
//   bounds   (rows + 1), indices (positions), order (positions): CSR of what is summed up again; order: slot of each
//            position (nullptr: itself)
//
//   grid   (kParts · lines of tiles, tiles of tokens, F) in clusters of kParts
//   block  2 · kRows consumers; kTeams teams of kTeam producers
//   smem   kStages of kRows × kDeep of S and kWide × kDeep of x; two pieces of spots and slots for each team
//   floor  2 · steps · kRows · kDeep · T FLOP at 800 TFLOP/s; a multiprocessor takes in 33 B a cycle: x, 6 B an
//          entry; shared memory 128 B a cycle: the tile zeroed, strewn and read, x written and read
//   needs  sm_90a, rows of tokens at multiples of 16 bytes, fewer than 2³¹ slots, no run-time mask
//
// A dense tile multiplies elements of x that a line has no use for by zero, and 0 · NaN is NaN. So all that is not
// finite in x shows: every sum that met it is not finite. Those sums alone are made again, entry by entry.
#include "cluster.cuh"
#include "copy.cuh"
#include "ring.cuh"
#include "tile.cuh"
#include "token_rows.cuh"

constexpr int kRows = MG_ROWS, kWide = MG_WIDE, kDeep = MG_DEEP, kParts = MG_PARTS, kStages = MG_STAGES;
static_assert(kRows == 64 || kRows == 128, "ROWS must be 64 or 128");
static_assert(kWide == 64 || kWide == 128 || kWide == 256 || (kParts > 1 && (kWide == 16 || kWide == 32)),
              "WIDE must be 64, 128 or 256, or 16 or 32 of a cluster");
static_assert(kDeep == 64 || kDeep == 128, "DEEP must be 64 or 128");
static_assert(kParts == 1 || kParts == 2 || kParts == 4, "PARTS must be 1, 2 or 4");
constexpr bool kUneven = kWide == 256;  // sums leave no room for a fair share of registers
static_assert(!kUneven || MG_TEAMS * MG_TEAM == 128, "what producers give consumers take");
constexpr int kConsumers = 2 * kRows, kTeams = MG_TEAMS, kTeam = MG_TEAM;
constexpr int kThreads = kConsumers + kTeams * kTeam;
using Pool = Registers<kConsumers + 128, 120, 192>;  // if kUneven
// A team that waits for a stage knows that it was given back once but for the last time: it would not tell two rounds
// from none.
static_assert(kTeams <= kStages, "a team asks for a stage at most a round ahead");
// Panels are 64 inner positions, rows of 128 bytes.
constexpr int kPanels = kDeep / 64;
constexpr u32 kPanel = kRows * 128, kLeft = kPanels * kPanel, kPanelX = kWide * 128, kRight = kPanels * kPanelX;
constexpr u32 kStage = kLeft + kRight;
// Bundles of 8 entries that a team, that a thread has at once: an eighth of a tile. What they are: two pieces a team.
constexpr int kPiece = kRows * kDeep / 64, kEach = kPiece / kTeam;
constexpr u32 kTable = kPiece * 32, kTables = kStages * kStage;
constexpr int kNotes = 8;  // of pieces, that a team has at once
constexpr int kSums = kWide / 2, kSlice = kConsumers / 32 / kParts;  // warps whose lines a CTA finishes
static_assert(kParts == 1 || kParts * kSlice * 128 * kSums <= kStages * kStage, "what a cluster sends has room");

// In the order of the program, as load_shared16 is not: the last of them back, all are. A load that nothing has waited
// for may be overtaken by a bulk copy to where it reads, however much later that begins: it stands in line behind loads
// that miss all caches.
__device__ __forceinline__ void shared16(u32 &a, u32 &b, u32 &c, u32 &d, u32 at) {
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at) : "memory");
}
__device__ __forceinline__ void put(u32 at, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(v) : "memory"); }

// Stays where it is written, before the barrier that gives away what its address is made of.
__device__ __forceinline__ u16 fetch(const u16 *from) {
    u16 v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}

extern "C" __global__ void
#if MG_PARTS > 1
__cluster_dims__(MG_PARTS, 1, 1)
#endif
__launch_bounds__(kThreads, 1)
    spmm_strew_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values, i64 all_slots,
                    const int4 *__restrict__ heads, const int4 *__restrict__ pieces, const uint4 *__restrict__ spots,
                    const uint4 *__restrict__ slots, const int *__restrict__ bounds, const int *__restrict__ indices,
                    const int *__restrict__ order, const operand_t *__restrict__ x, i64 x_free, i64 x_token, float scale,
                    const operand_t *__restrict__ bias, operand_t *__restrict__ out, int rows, int width) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages + 2 * kTeams + 1];
    __shared__ alignas(16) int4 notes[kTeams][kNotes];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages, known = empty + 8 * kStages;
    const u32 sent = known + 16 * kTeams;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const int line = blockIdx.x / kParts, rank = blockIdx.x % kParts, token = blockIdx.y * kWide, f = blockIdx.z;

    const int team = max(warp - kConsumers / 32, 0) / (kTeam / 32);
    const int4 *const begins = heads + (blockIdx.x * kTeams + team) * 3;
    const int4 head = __ldg(begins);
    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)  // each warp of a team says that its entries are there, and one that x is
            barrier_init(full + 8 * s, kTeam / 32 + 1), barrier_init(empty + 8 * s, kConsumers / 32);
        for (int s = 0; s < 2 * kTeams; ++s) barrier_init(known + 8 * s, 1);
        barrier_init(sent, 1);
        barrier_init_fence();
        if constexpr (kParts > 1) barrier_expect(sent, kParts * kSlice * 128 * kSums);
    }
    __syncthreads();
    const operand_t *const weights = values + f * all_slots;

    if (warp >= kConsumers / 32) {  // producers
        if constexpr (kUneven) Pool::give();
        const int thread = threadIdx.x % kTeam, mine = head.y;
        const u16 *const source = reinterpret_cast<const u16 *>(weights);
        const u32 tables = ring + kTables + 2 * team * kTable, arrived = known + 16 * team;
        const int4 *const from = pieces + head.x;
        const u32 noted = shared_address(notes[team]);
        auto note = [&](int n) {
            uint4 v = make_uint4(0u, 0u, 0u, 0u);
            if (n < mine) shared16(v.x, v.y, v.z, v.w, noted + n % kNotes * 16);
            return make_int4(v.x, v.y, v.z, v.w);
        };
        // What is known of pieces comes with the tables of pieces before: no load is waited for but those of values.
        auto ask = [&](int n, const int4 &piece) {
            const u32 to = tables + n % 2 * kTable, barrier = arrived + n % 2 * 8;
            const int later = n + kNotes - 2;  // takes the place of what this team is strewing
            const bool more = n >= 2 && later < mine;
            barrier_expect(barrier, piece.y * 32 + (more ? 16 : 0));
            bulk_load(to, spots + piece.x, piece.y * 16, barrier);
            bulk_load(to + kPiece * 16, slots + piece.x, piece.y * 16, barrier);
            if (more) bulk_load(noted + later % kNotes * 16, from + later, 16, barrier);
        };
        if (thread == 0) {
            const int4 first = __ldg(begins + 1), second = __ldg(begins + 2);
            if (first.y) ask(0, first);
            if (second.y) ask(1, second);
        }
        if (thread < min(mine, kNotes)) notes[team][thread] = __ldg(from + thread);
        named_barrier(4 + team, kTeam);
        u32 spot[kEach][4];
        u16 value[kEach][8];
        // Threads beyond the last bundle take it too: the same values go to the same places twice.
        auto look_up = [&](int n) {
            if (n >= mine) return;
            const int4 piece = note(n);
            const int have = piece.y;
            const u16 *const base = source + piece.w;
            barrier_wait(arrived + n % 2 * 8, n / 2 % 2);
            const u32 from = tables + n % 2 * kTable;
#pragma unroll
            for (int u = 0; u < kEach; ++u) {
                const u32 at = min(kTeam * u + thread, have - 1);
                if (u && kTeam * u >= have) break;
                u32 slot[4];
                // Slots last: addresses need them before the barrier that gives the table away.
                shared16(spot[u][0], spot[u][1], spot[u][2], spot[u][3], from + at * 16);
                shared16(slot[0], slot[1], slot[2], slot[3], from + kPiece * 16 + at * 16);
#pragma unroll
                for (int i = 0; i < 8; ++i) value[u][i] = fetch(base + (slot[i / 2] >> i % 2 * 16 & 0xFFFF));
            }
        };
        // Values are looked up a piece ahead, what they are asked for two.
        look_up(0);
        int number = team;
#pragma unroll 1
        for (int n = 0; n < mine; ++n) {
            const int4 piece = note(n);
            const u32 stage = number % kStages, tile = ring + stage * kStage, done = full + 8 * stage;
            if (piece.z & 1) {
                // Barriers of an empty ring let the first round pass.
                barrier_wait(empty + 8 * stage, number / kStages % 2 ^ 1);
                if (thread == 0) {
                    barrier_expect(done, kRight);
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(tile + kLeft + p * kPanelX, x_map, done, piece.z / 4 * kDeep + 64 * p, token, 0, f);
                }
#pragma unroll
                for (int i = 0; i < kLeft / (16 * kTeam); ++i)
                    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + (thread + i * kTeam) * 16), "r"(0)
                                 : "memory");
            }
            named_barrier(4 + team, kTeam);  // nothing is strewn over what is not zero yet; all have looked up
            if (thread == 0 && n + 2 < mine) ask(n + 2, note(n + 2));
#pragma unroll
            for (int u = 0; u < kEach; ++u) {
                if (u && kTeam * u >= piece.y) break;
#pragma unroll
                for (int i = 0; i < 8; ++i) put(tile + (spot[u][i / 2] >> i % 2 * 16 & 0xFFFF), value[u][i]);
            }
            if (piece.z & 2) {
                proxy_fence();
                __syncwarp();
                if (lane == 0) barrier_arrive(done);
                number += kTeams;
            }
            look_up(n + 1);
        }
        __syncwarp();
        if constexpr (kParts > 1) cluster_here(), cluster_wait();
        return;
    }

    if constexpr (kUneven) Pool::take();
    float acc[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0.f;
    const u64 left = wgmma_descriptor(ring + warp / 4 * 64 * 128, 0), right = wgmma_rows<128>(ring + kLeft);
    multiply_ring<kStages>(head.z, full, empty, lane, [&](int stage) {
#pragma unroll
        for (int k = 0; k < kDeep / 16; ++k)
            Wgmma<kWide>::template ss<0, 0>(acc, left + ((stage * kStage + k / 4 * kPanel + k % 4 * 32) >> 4),
                                            right + ((stage * kStage + k / 4 * kPanelX + k % 4 * 32) >> 4), 1);
    });
    if constexpr (kParts > 1) {
        cluster_here(), cluster_wait();  // nobody reads a ring any more: what the others send takes its place
        // Each CTA finishes the lines of kSlice warps; all send theirs to it, this one too, to be added in their order.
        const u32 to = ring + (warp % kSlice * 32 + lane) * 16, owner = warp / kSlice;
        const u32 there = cluster_address(to + rank * kSums / 4 * kSlice * 512, owner), counted = cluster_address(sent, owner);
#pragma unroll
        for (int i = 0; i < kSums; i += 4)
            cluster_send(there + i / 4 * kSlice * 512, counted, make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]));
        if (owner != rank) return;  // no CTA ends before it has what others send
        barrier_wait(sent, 0);
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int r = 0; r < kParts; ++r) {
                const float4 v = load_shared_floats(to + (r * kSums / 4 + i / 4) * kSlice * 512);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            acc[i] = sum.x, acc[i + 1] = sum.y, acc[i + 2] = sum.z, acc[i + 3] = sum.w;
        }
    }

    // A sum that is not finite makes that of its zero multiples NaN.
    float zero = 0.f;
#pragma unroll
    for (int i = 0; i < kSums; ++i) zero = fmaf(acc[i], 0.f, zero);
    const bool redo = __any_sync(~0u, zero != zero);
    u32 bad[(kSums + 31) / 32] = {};
    if (redo)
#pragma unroll
        for (int i = 0; i < kSums; ++i) bad[i / 32] |= u32(!(fabsf(acc[i]) < kInfinity)) << i % 32;

    operand_t *const to = out + static_cast<i64>(f) * width * rows;
    const int row0 = line * kRows + 16 * warp;
    if constexpr (kParts == 1) {
        // Through what a warpgroup alone has read of S.
        store_turned<kWide>(acc, scale, bias, ring + warp / 4 * 64 * 128, to, line * kRows + warp / 4 * 64, rows, token, width);
        named_barrier(2 + warp / 4, 128);  // what other lanes stored is written again below
    } else {
        float more[2] = {0.f, 0.f};
#pragma unroll
        for (int h = 0; h < 2; ++h)
            if (bias && row0 + 8 * h < rows) more[h] = to_float(bias[row0 + 8 * h + lane / 4]);
#pragma unroll
        for (int i = 0; i < kSums; i += 2) {
            const float b = more[i / 2 % 2];
            const u32 v = turned(pack2<operand_t>(activated(fmaf(acc[i], scale, b)), activated(fmaf(acc[i + 1], scale, b))));
            const int t = token + i / 4 * 8 + lane / 4, r = row0 + i / 2 % 2 * 8 + lane % 4 * 2;
            if (t < width && r < rows) *reinterpret_cast<u32 *>(to + static_cast<i64>(t) * rows + r) = v;
        }
        __syncwarp();
    }
    if (!redo) return;
#pragma unroll 1
    for (int n = 0; n < kSums; ++n) {
        u32 word = bad[0];
#pragma unroll
        for (int w = 1; w < (kSums + 31) / 32; ++w)
            if (n / 32 == w) word = bad[w];
        const int r = row0 + n / 2 % 2 * 8 + lane / 4, t = token + n / 4 * 8 + lane % 4 * 2 + n % 2;
        if (!(word >> n % 32 & 1) || r >= rows || t >= width) continue;
        const operand_t *const right = x + f * x_free + t * x_token;
        float sum = 0.f;
        for (int i = __ldg(bounds + r), end = __ldg(bounds + r + 1); i < end; ++i)
            sum = fmaf(to_float(weights[order ? __ldg(order + i) : i]), to_float(right[__ldg(indices + i)]), sum);
        to[static_cast<i64>(t) * rows + r] = from_float<operand_t>(activated(fmaf(sum, scale, bias ? to_float(bias[r]) : 0.f)));
    }
}

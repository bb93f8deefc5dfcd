#pragma once
// Who computes which tile: what plan_walk.cu deals to CTAs, and how.
#include "plan.cuh"

constexpr int kThreads = 1024;
constexpr int kSorted = 4096;                       // items that are sorted in shared memory
constexpr int kFew = MG_FEW, kSingly = MG_SINGLY;   // tables.FEW, tables.SINGLY

struct Walk {
    const int *costs;
    const int *given;  // nullptr: `few` has it
    u64 *keys;     // (items, up to a power of two)
    int *first;    // (sections, items): tiles before those of an item, by rank
    int *late;     // (sections, items): how many of them come last
    int *after;    // (items): tiles of the end before those of an item
    int *mine;     // (matrices, 2): which of its section's matrices of its pattern one is, and how many those are
    int *kept;     // (sections): tiles before those of a section, without the end
    int2 *tile;    // (tiles)
    int2 *taker;   // (tiles): CTA, and which of its tiles; before, what it costs
    int *starts;
    int2 *tiles;
    int *query_patterns, *key_patterns;
    int2 *merge_ranges;
    int4 *row_ranges;
    int items, patterns, entry_batches, entry_heads, batch, heads, kv, sections, nq;
    int total, ctas, spare, dealt, parts, groups, by_head;
    int few[MG_GIVEN];  // tables.FEW_GIVEN
};

struct Shared {
    union {
        u64 keys[kSorted];
        struct {
            int load[kThreads], mine[kThreads], rank[kThreads];  // of CTAs; rank is 0 between rounds
            int sorted[kThreads], who[kThreads];                 // by rank: load, and which CTA
        };
    };
    i64 sums[32];
    int ends[32];
    int count;
};
static_assert(sizeof(Shared) <= MG_SHARED && kThreads == MG_CTAS, "tables.SHARED, tables.MOST_CTAS");

// CTAs in the order in which they are free take the next tiles one each, as long as none of those that have just
// taken one would be free again before the next. Returns how many tiles that were.
__device__ int deal_round(const Walk &w, Shared &s, int at) {
    const int c = threadIdx.x, lane = c % 32, ready = min(w.ctas, w.total - at), whole = (w.ctas + 31) / 32 * 32;
    constexpr int kNever = 0x7fffffff;
    const int cost = c < ready ? w.taker[at + c].x : 0;
    // Threads side by side compare CTAs side by side with the same part of the others.
    const int parts = kThreads / whole, part = c / whole, mine = c % whole;
    if (part < parts && mine < w.ctas) {
        const int load = s.load[mine], end = w.ctas * (part + 1) / parts;
        int rank = 0;
#pragma unroll 4
        for (int other = w.ctas * part / parts; other < end; ++other) {
            const int its = s.load[other];
            rank += its < load || (its == load && other < mine);
        }
        atomicAdd(&s.rank[mine], rank);
    }
    if (c == 0) s.count = ready;
    __syncthreads();
    if (c < w.ctas) {
        const int rank = s.rank[c];
        s.sorted[rank] = s.load[c], s.who[rank] = c, s.rank[c] = 0;
    }
    __syncthreads();
    // From here on by rank. The soonest that one of those before is free again.
    const int load = c < ready ? s.sorted[c] : 0, after = c < ready ? load + cost : kNever;
    int soonest = after;
    if (c < whole) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(~0u, soonest, d);
            if (lane >= d) soonest = min(soonest, other);
        }
        if (lane == 31) s.ends[c / 32] = soonest;
        soonest = __shfl_up_sync(~0u, soonest, 1);
        if (lane == 0) soonest = kNever;
    }
    __syncthreads();
    if (c < whole) {
        for (int warp = 0; warp < c / 32; ++warp) soonest = min(soonest, s.ends[warp]);
        const u32 again = __ballot_sync(~0u, c && c < ready && load >= soonest);
        if (again && lane == 0) atomicMin(&s.count, c + __ffs(again) - 1);
    }
    __syncthreads();
    const int count = s.count;
    if (c < count) {
        const int who = s.who[c];
        w.taker[at + c] = make_int2(who, s.mine[who]++);
        s.load[who] = after;
    }
    __syncthreads();
    return count;
}

// Tiles one by one, by the first warp.
__device__ void deal_singly(const Walk &w, Shared &s, int at, int end) {
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        for (; at < end; ++at) {
            int least = 0x7fffffff, which = 0;
            for (int c = lane; c < w.ctas; c += 32)
                if (s.load[c] < least) least = s.load[c], which = c;
            const int soonest = __reduce_min_sync(~0u, least);
            const int cta = __reduce_min_sync(~0u, least == soonest ? which : 0x7fffffff);
            if (lane == cta % 32) {
                s.load[cta] = soonest + w.taker[at].x;
                w.taker[at] = make_int2(cta, s.mine[cta]++);
            }
            __syncwarp();
        }
    }
    __syncthreads();
}

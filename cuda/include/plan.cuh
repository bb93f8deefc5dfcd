#pragma once
// Plans of fused attention made on the device (attention/cuda/planner.py, tables.py): what its kernels share.
//
// A *line* is 64 queries: lines of neighbours u · nqu + unit for every distinct pattern u, then the gathered ones.
// Its *cells* are units of 64 keys; those that it may have lie in segments, 32 side by side, and those of gathered keys
// apart: a table of all units of all lines would grow with the square of their number.
#include "types.cuh"

[[maybe_unused]] constexpr int kUnit = 64;
[[maybe_unused]] constexpr int kBands = 6;          // intervals of a row
[[maybe_unused]] constexpr int kPacked = 1 << 24;   // ids of gathered units count from here: cells.PACKED
[[maybe_unused]] constexpr int kPatterns = 16;      // distinct ones, at most
[[maybe_unused]] constexpr int kNothing = 0, kWhole = 1, kMasked = 2;  // a cell: the last plus the slot of its kind

// One interval of every row: row r has at most [max(least, r + left), min(most, r + right)), and where `low` is a
// place in `given`, at most [given[low + at], given[high + at]): `at` is r >> shift, or where there are stretches of
// rows, the one that r is in; those begin at given[rows …].
struct Band {
    int low, high, rows, stretches, shift;
    int least, most, left, right;
};
// Places in `given`; −1 = none.
struct Pattern {
    int bands;
    Band band[kBands];
    int bits, bit_words;   // (nqu, bit_words): units that are kept whole
    int rows, columns;     // (nqu), (nku): lines and key units that are kept whole
    int queries, query_at; // gathered queries, rising, and where they are
    int keys, key_at;      // gathered keys, likewise
    int gathered;          // the first gathered line, from 0
};

// Counters, zero before.
struct Counters {
    int cells, masks, wrong, room;
    int light[kPatterns];
};

struct PlanWork {
    const int *given;
    const Pattern *pattern;
    Counters *counters;   // zero before, as all up to `members`
    int *shared;          // (lines, packed): cells of gathered keys
    u64 *taken;           // (patterns · nqu, packed): gathered keys that neighbours took back
    u64 *held;            // (patterns, nku): keys that masked cells keep
    int *part, *whole;    // (patterns, nku): there is a masked cell; a whole one
    u64 *kind;            // (2 · masked): digests of masks
    int *members;         // (items, 4): line + 1 of each warpgroup
    int *cell;            // (room)
    int4 *segment;        // (lines, kBands), rising: first unit, one past the last, where its cells lie
    int *number, *first;  // (2 · masked): of a kind, its number and its first cell
    int *slot;            // (masked): of a cell, its kind
    u64 *words;           // (masked, 64)
    int *counts, *place;  // (lines): cells; 4 · item + warpgroup
    int *slots;           // (lines): partial results
    int2 *merge;          // (lines): first merged row, and first of its sources
    int4 *item;           // (items): pattern | long << 8 | alone << 9; room for pieces at; steps, steps of a piece
    int2 *begin;          // (items): first step, first piece
    int4 *piece;          // units of each warpgroup, how many of all are masked
    int *rows;            // (pieces, 8): the plan's items
    int *head;            // see kHead…; costs of all pieces behind
    int nq, nk, nqu, nku, patterns, packed, lines, room, groups, shortest;
    int light_positions, light_columns;  // a cell with no more is light
    int masked;                          // masked cells that there is room for, a power of two
};

// The head: sizes, then for each pattern its items, slots and merged rows.
[[maybe_unused]] constexpr int kItems = 0, kSteps = 1, kMasks = 2, kMerged = 3, kSources = 4, kWrong = 5, kDead = 6, kLight = 7,
              kEach = 8, kCosts = kEach + 3 * kPatterns;
// Reasons for which a plan is left to layouts.
[[maybe_unused]] constexpr int kCrowded = 1, kAlike = 2;

__device__ __forceinline__ u64 low_bits(int n) {
    return n >= 64 ? ~0ull : n <= 0 ? 0ull : (1ull << n) - 1;
}

// Where the members from `least` on begin in a rising list.
__device__ __forceinline__ int lower_bound(const int *list, int count, int least) {
    int low = 0;
    while (low < count) {
        const int middle = (low + count) / 2;
        if (__ldg(list + middle) < least)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

// Members of a rising list in a unit, as a word; `at` is the index of the first one.
__device__ __forceinline__ u64 listed(const int *list, int count, int unit, int &at) {
    at = lower_bound(list, count, unit * kUnit);
    u64 word = 0;
    for (int i = at; i < count; ++i) {
        const int place = __ldg(list + i) - unit * kUnit;
        if (place >= kUnit) break;
        word |= 1ull << place;
    }
    return word;
}

// Rows of a line of neighbours that may hold anything: gathered ones, and those behind the last.
__device__ __forceinline__ u64 free_rows(const PlanWork &w, const Pattern &p, int unit) {
    int at;
    return listed(w.given + p.query_at, p.queries, unit, at) | ~low_bits(w.nq - unit * kUnit);
}

// The pattern of a gathered line, of which there are few.
__device__ __forceinline__ int pattern_of(const PlanWork &w, int line) {
    if (line < w.patterns * w.nqu) return line / w.nqu;
    const int gathered = line - w.patterns * w.nqu;
    int u = w.patterns - 1;
    while (u > 0 && __ldg(&w.pattern[u].gathered) > gathered) --u;
    return u;
}

// The cells of an item's lines, 32 units at a time: its warp looks at those in which any line may have some. Each lane
// keeps a segment of one line.
struct ItemCells {
    const PlanWork &w;
    int line[3];  // plus one; 0: none
    int begin, end, at, base;
    // This lane's unit, from nku on a gathered one, and what each line has there.
    int key, state[3];

    __device__ __forceinline__ ItemCells(const PlanWork &w, int item) : w(w), begin(0), end(0), at(0), base(0), key(0) {
        const int lane = threadIdx.x % 32, mine = lane / kBands;
#pragma unroll
        for (int g = 0; g < 3; ++g) line[g] = g < w.groups ? w.members[4 * item + g] : 0;
        const int of = mine == 0 ? line[0] : mine == 1 ? line[1] : mine == 2 ? line[2] : 0;
        if (!of) return;
        const int4 found = w.segment[i64(of - 1) * kBands + lane % kBands];
        begin = found.x, end = found.y, at = found.z;
    }
    // Whether there are more.
    __device__ __forceinline__ bool turn() {
        constexpr int kNone = 1 << 30;
        const int lane = threadIdx.x % 32;
        if (base < kNone) base = __reduce_min_sync(~0u, end > base ? max(begin, base) : kNone);
        if (base < kNone) {
            key = base + lane;
            const bool here = begin <= base && base < end;
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                const u32 its = __ballot_sync(~0u, here && lane / kBands == g);
                const int from = __shfl_sync(~0u, at - begin, its ? __ffs(its) - 1 : 0);
                state[g] = its && key < w.nku ? w.cell[from + key] : kNothing;
            }
            base += 32;
            return true;
        }
        // Behind the last unit: gathered ones.
        const int first = base - kNone;
        if (first >= w.packed) return false;
        key = w.nku + first + lane;
#pragma unroll
        for (int g = 0; g < 3; ++g)
            state[g] = line[g] && first + lane < w.packed ? w.shared[i64(line[g] - 1) * w.packed + first + lane] : kNothing;
        base += 32;
        return true;
    }
};

// Exclusive sum over a CTA of 1024; `total` is that of all. Every thread calls it; `shared` has room for 32.
template <typename T> __device__ __forceinline__ T scan1024(T x, T *shared, T &total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T sum = x;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const T other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        T all = shared[lane];
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const T other = __shfl_up_sync(~0u, all, d);
            if (lane >= d) all += other;
        }
        shared[lane] = all;
    }
    __syncthreads();
    const T before = warp ? shared[warp - 1] : T(0);
    total = shared[31];
    __syncthreads();
    return before + sum - x;
}

// plan_cells: the units that each line of 64 queries keeps, and the masks of those it keeps in part.
//
//   in        given, pattern: the ends of intervals, units that are kept whole, gathered queries and keys
//   out       cell, segment, shared, counts; words, slot, kind, number, first: masked cells and their kinds; held, part,
//             whole
//   grid      ceil(lines / 4)
//   block     128: a warp for every line
//   floor     4 bytes for every unit of a segment, 8 for every end of an interval: a launch
//   needs     sm_80
// A unit is whole if all rows' intervals hold it, empty if none touches it; what lies between is looked at row by
// row, two to a lane. A masked unit becomes whole where that changes nothing: see attention/cuda/fill.py.
#include "plan.cuh"

static_assert(kBands == MG_BANDS && sizeof(Pattern) == 4 * MG_PATTERN, "planner.BANDS, planner.PATTERN");

__device__ __forceinline__ u64 mixed(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The cell of a mask whose rows `lane` and `lane + 32` are these words.
__device__ int masked(const PlanWork &w, int lane, u64 upper, u64 lower) {
    u64 digest = mixed(upper + (lane + 1) * 0x9e3779b97f4a7c15ull) ^ mixed(lower + (lane + 33) * 0x9e3779b97f4a7c15ull);
#pragma unroll
    for (int d = 16; d; d /= 2) digest ^= __shfl_xor_sync(~0u, digest, d);
    digest |= 1;  // 0 = an empty slot
    int index = 0;
    if (lane == 0) index = atomicAdd(&w.counters->cells, 1);
    index = __shfl_sync(~0u, index, 0);
    if (index >= w.masked) {
        w.counters->wrong = kCrowded;
        return kWhole;
    }
    w.words[i64(index) * kUnit + lane] = upper;
    w.words[i64(index) * kUnit + 32 + lane] = lower;
    const int last = 2 * w.masked - 1;
    int slot = static_cast<int>(digest >> 40) & last;
    if (lane == 0) {
        for (;; slot = (slot + 1) & last) {
            const u64 there = atomicCAS(w.kind + slot, 0ull, digest);
            if (there == 0) {
                w.number[slot] = atomicAdd(&w.counters->masks, 1);
                w.first[slot] = index;
            }
            if (there == 0 || there == digest) break;
        }
        w.slot[index] = slot;
    }
    return kMasked + __shfl_sync(~0u, slot, 0);
}

__device__ __forceinline__ u64 any_of(u64 word) {
    return u64(__reduce_or_sync(~0u, u32(word >> 32))) << 32 | __reduce_or_sync(~0u, u32(word));
}

__device__ __forceinline__ u64 rows_with(bool upper, bool lower) {
    return u64(__ballot_sync(~0u, lower)) << 32 | __ballot_sync(~0u, upper);
}

constexpr int kNowhere = 1 << 30;
__device__ __forceinline__ int up(int units) { return (units + 31) & ~31; }

extern "C" __global__ void __launch_bounds__(128) plan_cells(const __grid_constant__ PlanWork w) {
    const int line = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (line >= w.lines) return;
    const int neighbours = w.patterns * w.nqu, u = pattern_of(w, line);
    const Pattern &p = w.pattern[u];
    const bool near = line < neighbours;
    const int unit = near ? line - u * w.nqu : 0;
    const int *keys = w.given + p.key_at;
    const u64 free = near ? free_rows(w, p, unit) : 0ull;
    const int bands = near ? p.bands : 0;

    // Intervals of rows lane and lane + 32. Gathered rows are left to their own lines.
    int lo[kBands][2], hi[kBands][2], low[kBands], first[kBands], last[kBands], high[kBands];
#pragma unroll
    for (int b = 0; b < kBands; ++b) {
        low[b] = w.nku, first[b] = 0, last[b] = 0, high[b] = 0;
        int starts = 0, stops = 1 << 30;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int inside = lane + 32 * half;
            lo[b][half] = hi[b][half] = 0;
            if (b < bands && !(free >> inside & 1)) {
                const Band &of = p.band[b];
                const int r = unit * kUnit + inside;
                lo[b][half] = max(of.least, r + of.left), hi[b][half] = min(of.most, r + of.right);
                if (of.low >= 0) {
                    const int at = of.stretches ? lower_bound(w.given + of.rows, of.stretches, r + 1) - 1 : r >> of.shift;
                    lo[b][half] = max(lo[b][half], __ldg(w.given + of.low + at));
                    hi[b][half] = min(hi[b][half], __ldg(w.given + of.high + at));
                }
            }
            if (lo[b][half] < hi[b][half]) {
                low[b] = min(low[b], lo[b][half] / kUnit);
                high[b] = max(high[b], (hi[b][half] + kUnit - 1) / kUnit);
            }
            // Rows that may hold anything are in nobody's way.
            if (!(free >> inside & 1)) starts = max(starts, lo[b][half]), stops = min(stops, hi[b][half]);
        }
        if (b < bands) {
            low[b] = __reduce_min_sync(~0u, low[b]), high[b] = __reduce_max_sync(~0u, high[b]);
            first[b] = (__reduce_max_sync(~0u, starts) + kUnit - 1) / kUnit;
            last[b] = __reduce_min_sync(~0u, stops) / kUnit;
        }
    }
    const bool listed_whole = !near || (p.rows >= 0 && __ldg(w.given + p.rows + unit));
    const bool anywhere = listed_whole || p.bits >= 0 || p.columns >= 0;
    // Where whole units hang over an edge, they are masks.
    const bool over = near && unit == w.nqu - 1 && w.nq % kUnit;

    // Segments: where intervals touch units, or all of them.
    int4 segment = make_int4(0, 0, 0, 0);  // of this lane
    int segments = 0, room = 0;
    for (int done = 0; segments < kBands; ++segments) {
        int start = kNowhere, end = 0;
#pragma unroll
        for (int b = 0; b < kBands; ++b)
            if (low[b] < high[b] && up(high[b]) > done) start = min(start, max(low[b] & ~31, done));
        if (anywhere) start = done ? kNowhere : 0, end = up(w.nku);
        if (start == kNowhere) break;
        for (int before = -1; !anywhere && end != before;) {
            before = end;
#pragma unroll
            for (int b = 0; b < kBands; ++b)
                if (low[b] < high[b] && (low[b] & ~31) <= max(start, end)) end = max(end, up(high[b]));
        }
        if (lane == segments) segment = make_int4(start, end, room, 0);
        room += end - start;
        done = end;
    }
    int at_room = 0;
    if (lane == 0 && room) at_room = atomicAdd(&w.counters->room, room);
    at_room = __shfl_sync(~0u, at_room, 0);
    if (at_room > w.room - room) {
        if (lane == 0) w.counters->wrong = kCrowded, w.counts[line] = 0;
        if (lane < kBands) w.segment[i64(line) * kBands + lane] = make_int4(0, 0, 0, 0);
        return;
    }
    segment.z += at_room;
    if (lane < kBands) w.segment[i64(line) * kBands + lane] = segment;

    u64 *held = w.held + i64(u) * w.nku;
    int *part = w.part + i64(u) * w.nku, *whole = w.whole + i64(u) * w.nku;
    int count = 0, light = 0;
    for (int n = 0; n < segments; ++n) {
        const int start = __shfl_sync(~0u, segment.x, n), end = __shfl_sync(~0u, segment.y, n);
        int *const row = w.cell + __shfl_sync(~0u, segment.z, n) - start;
        for (int base = start; base < end; base += 32) {
            const int key = base + lane;
            bool full = false, inside = false, touched = false, cut = false;
            if (key < w.nku) {
                full = listed_whole;
                if (near && p.bits >= 0)
                    full |= __ldg(w.given + p.bits + i64(unit) * p.bit_words + key / 32) >> (key % 32) & 1;
                // Rows that are all gathered keep nothing here.
                if (near && p.columns >= 0) full |= ~free && __ldg(w.given + p.columns + key);
#pragma unroll
                for (int b = 0; b < kBands; ++b) {
                    inside |= first[b] <= key && key < last[b];
                    touched |= low[b] <= key && key < high[b];
                }
                touched |= full;
                cut = full && !inside && (over || (key == w.nku - 1 && w.nk % kUnit));
                if (near && touched && p.keys) {
                    const int at = lower_bound(keys, p.keys, key * kUnit);
                    cut |= at < p.keys && __ldg(keys + at) < (key + 1) * kUnit;
                }
            }
            int state = touched && (full || inside) && !cut ? kWhole : kNothing;
            const u32 flagged = __ballot_sync(~0u, full);
            for (u32 open = __ballot_sync(~0u, touched && !state); open; open &= open - 1) {
                const int at = __ffs(open) - 1, mine = base + at, edge = mine * kUnit;
                int rank = 0;
                const u64 shared = near && p.keys ? listed(keys, p.keys, mine, rank) : 0ull;
                u64 word[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    u64 kept = 0;
#pragma unroll
                    for (int b = 0; b < kBands; ++b)
                        kept |= low_bits(hi[b][half] - edge) & ~low_bits(lo[b][half] - edge);
                    const bool there = !near || unit * kUnit + lane + 32 * half < w.nq;
                    if (flagged >> at & 1) kept = there ? low_bits(w.nk - edge) : 0ull;
                    word[half] = kept & ~shared;
                }
                const u64 kept = any_of(word[0] | word[1]);
                const u64 rows = rows_with(word[0] != 0, word[1] != 0);
                int found = kNothing;
                if (kept) {
                    const bool alike = __all_sync(~0u, (!word[0] || word[0] == kept) && (!word[1] || word[1] == kept));
                    const u64 lack = ~kept;
                    if (near && !(alike && !lack && rows == ~0ull)) {
                        const int positions = __reduce_add_sync(~0u, __popcll(word[0]) + __popcll(word[1]));
                        light += positions <= w.light_positions || __popcll(kept) <= w.light_columns;
                    }
                    // All that it lacks are rows that may hold anything, and columns that it takes back.
                    const bool made = alike && !(~free & ~rows) && ~free && !(lack & ~shared);
                    if (made) {
                        found = kWhole;
                        for (int c = lane; c < kUnit; c += 32)
                            if (lack >> c & 1) {
                                const int n = rank + __popcll(shared & low_bits(c));
                                atomicOr(w.taken + i64(line) * w.packed + n / kUnit, 1ull << n % kUnit);
                            }
                    } else {
                        found = masked(w, lane, word[0], word[1]);
                        if (lane == at) atomicOr(held + mine, kept);
                    }
                }
                if (lane == at) state = found;
            }
            row[key] = state;
            if (state) (state == kWhole ? whole : part)[key] = 1;
            count += __popc(__ballot_sync(~0u, state != kNothing));
        }
    }
    // Gathered keys: all of them for every row, but those that neighbours took back.
    for (int j = 0; near && j * kUnit < p.keys; ++j) {
        __syncwarp();
        const u64 kept = ~free ? low_bits(p.keys - j * kUnit) & ~__ldcg(w.taken + i64(line) * w.packed + j) : 0ull;
        const int state = kept == 0 ? kNothing : kept == ~0ull ? kWhole : masked(w, lane, kept, kept);
        if (lane == 0) w.shared[i64(line) * w.packed + j] = state;
        count += state != kNothing;
    }
    if (lane == 0) {
        w.counts[line] = count;
        if (light) atomicAdd(w.counters->light + u, light);
    }
}

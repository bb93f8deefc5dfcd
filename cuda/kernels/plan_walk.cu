// plan_walk: which CTA computes which item of which matrix, in which order, and where each matrix finds its part of
// the plan (attention/cuda/tables.py).
//
//   in        costs (items); given: the pattern of each entry, then for all patterns the starts of their items, of
//             merged rows and of row items, and how many of the latter are long
//   out       starts (ctas + 1), tiles (n, 2): item, matrix; query_patterns, key_patterns, merge_ranges, row_ranges
//   grid      1
//   block     1024
//   smem      33 KB: the sort, then what CTAs have to do
//   floor     8 bytes for every tile: a launch
//   needs     sm_80
// Heads whose keys fit L2 together (a section) are worked on together, longest items first. The shortest tiles of all
// sections come last: an end made of the last heads alone is ragged. A tile goes to the CTA that is free first.
#include "plan_deal.cuh"

constexpr int kApart = MG_APART;  // tables.APART

__device__ __forceinline__ const int *given(const Walk &w) { return w.given ? w.given : w.few; }

__device__ __forceinline__ int pattern_of_matrix(const Walk &w, int matrix) {
    const int b = w.entry_batches > 1 ? matrix / w.heads : 0, h = w.entry_heads > 1 ? matrix % w.heads : 0;
    return given(w)[b * w.entry_heads + h];
}

__device__ __forceinline__ int section_of(const Walk &w, int matrix) {
    return static_cast<int>(i64(matrix / (w.heads / w.kv)) * w.sections / (w.batch * w.kv));
}
// The first matrix of a section.
__device__ __forceinline__ int begin_of(const Walk &w, int section) {
    return static_cast<int>((i64(section) * w.batch * w.kv + w.sections - 1) / w.sections) * (w.heads / w.kv);
}

// Items by falling cost; equal ones by their number.
__device__ void sort(const Walk &w, u64 *keys, int size) {
    for (int i = threadIdx.x; i < size; i += kThreads)
        keys[i] = i < w.items ? u64(~u32(w.costs[i])) << 32 | i : ~0ull;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int step = run / 2; step; step /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += kThreads) {
                const int a = 2 * (i & -step) + (i & (step - 1)), b = a + step;
                const u64 x = keys[a], y = keys[b];
                if ((x > y) == !(a & run)) keys[a] = y, keys[b] = x;
            }
            __syncthreads();
        }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) plan_walk(const __grid_constant__ Walk w) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &s = *reinterpret_cast<Shared *>(memory);
    const int matrices = w.batch * w.heads, entries = w.entry_batches * w.entry_heads;
    const int *item_starts = given(w) + entries, *merges = item_starts + w.patterns + 1;
    const int *rows = merges + w.patterns + 1, *longer = rows + w.patterns + 1;

    for (int m = threadIdx.x; m < matrices; m += kThreads) {
        const int u = pattern_of_matrix(w, m);
        w.query_patterns[m] = u;
        w.merge_ranges[m] = make_int2(merges[u], merges[u + 1] - merges[u]);
        w.row_ranges[m] = make_int4(rows[u], longer[u], u * w.nq, 0);
        w.row_ranges[matrices + m] = make_int4(rows[u] + longer[u], rows[u + 1] - rows[u] - longer[u], u * w.nq, 0);
    }
    for (int m = threadIdx.x; m < (w.by_head ? matrices : w.batch * w.kv); m += kThreads)
        w.key_patterns[m] = pattern_of_matrix(w, w.by_head ? m : m / w.kv * w.heads);
    if (!w.total) {
        if (threadIdx.x < 2) w.starts[threadIdx.x] = 0;
        return;
    }

    int size = 2;
    while (size < w.items) size *= 2;
    u64 *keys = size <= kSorted ? s.keys : w.keys;
    sort(w, keys, size);
    const auto item_at = [&](int rank) { return static_cast<int>(keys[rank] & 0xffffffffu); };
    const auto pattern_of_item = [&](int item) {
        int u = 0;
        while (u + 1 < w.patterns && item_starts[u + 1] <= item) ++u;
        return u;
    };

    // Tiles of every item in every section, and how many of the last ones are cheap enough for the end: a warp each.
    const i64 spare = i64(w.ctas) * w.costs[item_at(0)] / (i64(w.spare) * w.sections);
    const int lane = threadIdx.x % 32;
    for (int section = threadIdx.x / 32; section < w.sections; section += kThreads / 32) {
        const int begin = begin_of(w, section), end = begin_of(w, section + 1);
        int *const first = w.first + i64(section) * w.items, *const late = w.late + i64(section) * w.items;
        const auto members = [&](int u) {
            int n = 0;
            for (int m = begin; m < end; ++m) n += w.query_patterns[m] == u;
            return n;
        };
        // A lane for every pattern, if there are no more.
        const bool few = w.patterns <= 32;
        const int of_lane = w.patterns == 1 ? end - begin : few && lane < w.patterns ? members(lane) : 0;
        i64 left = 0;
        for (int base = 0; base < w.items; base += 32) {
            const int rank = base + lane, item = item_at(min(rank, w.items - 1)), u = pattern_of_item(item);
            const int n = few ? __shfl_sync(~0u, of_lane, u) : members(u);
            if (rank >= w.items) continue;
            late[rank] = n;
            left += i64(n) * w.costs[item];
        }
#pragma unroll
        for (int d = 16; d; d /= 2) left += __shfl_xor_sync(~0u, left, d);
        int before = 0, kept = 0;
        for (int base = 0; base < w.items; base += 32) {
            const int rank = base + lane;
            const bool there = rank < w.items;
            const int n = there ? late[rank] : 0, each = there ? w.costs[item_at(rank)] : 0;
            int tiles = n;
            i64 spent = i64(n) * each;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int more = __shfl_up_sync(~0u, tiles, d);
                const i64 cost = __shfl_up_sync(~0u, spent, d);
                if (lane >= d) tiles += more, spent += cost;
            }
            const i64 behind = left - spent;
            const int last = behind >= spare ? 0 : static_cast<int>(min(i64(n), (spare - behind) / max(each, 1)));
            if (there) first[rank] = before + tiles - n, late[rank] = last;
            kept += n - last;
            before += __shfl_sync(~0u, tiles, 31);
            left -= __shfl_sync(~0u, spent, 31);
        }
        kept = __reduce_add_sync(~0u, kept);
        if (lane == 0) w.kept[section] = kept;
    }
    __syncthreads();
    int main = 0;
    for (int base = 0; base < w.sections; base += kThreads) {
        const int section = base + threadIdx.x;
        i64 total;
        const i64 at = scan1024(i64(section < w.sections ? w.kept[section] : 0), s.sums, total);
        if (section < w.sections) w.kept[section] = main + static_cast<int>(at);
        main += static_cast<int>(total);
    }
    int late_before = main;
    for (int base = 0; base < w.items; base += kThreads) {
        const int rank = base + threadIdx.x;
        int sum = 0;
        for (int section = 0; rank < w.items && section < w.sections; ++section)
            sum += w.late[i64(section) * w.items + rank];
        i64 total;
        const i64 at = scan1024(i64(sum), s.sums, total);
        if (rank < w.items) w.after[rank] = late_before + static_cast<int>(at);
        late_before += static_cast<int>(total);
    }
    __syncthreads();
    for (int m = threadIdx.x; m < matrices; m += kThreads) {
        const int section = section_of(w, m), begin = begin_of(w, section), end = begin_of(w, section + 1);
        int mine = m - begin, all = end - begin;
        if (w.patterns > 1) {
            mine = all = 0;
            for (int other = begin; other < end; ++other) {
                const bool same = w.query_patterns[other] == w.query_patterns[m];
                mine += same && other < m, all += same;
            }
        }
        w.mine[2 * m] = mine, w.mine[2 * m + 1] = all;
    }
    __syncthreads();
    for (i64 n = threadIdx.x; n < i64(matrices) * w.items; n += kThreads) {
        const int m = static_cast<int>(n / w.items), rank = static_cast<int>(n % w.items), item = item_at(rank);
        const int u = w.query_patterns[m], section = section_of(w, m);
        if (item < item_starts[u] || item >= item_starts[u + 1]) continue;
        const int mine = w.mine[2 * m], all = w.mine[2 * m + 1];
        const int late = w.late[i64(section) * w.items + rank];
        int at = w.kept[section] + w.first[i64(section) * w.items + rank] + mine;
        if (mine >= all - late) {
            at = w.after[rank] + mine - (all - late);
            for (int other = 0; other < section; ++other) at += w.late[i64(other) * w.items + rank];
        }
        w.tile[at] = make_int2(item, m);
        w.taker[at].x = w.costs[item];  // until it is dealt
    }
    __syncthreads();

    // To CTAs: one each, in turns, or to the one that is free first.
    const int ctas = min(w.ctas, w.total);
    if (w.total <= w.ctas) {
        for (int t = threadIdx.x; t < w.total; t += kThreads) w.taker[t] = make_int2(t, 0);
        for (int c = threadIdx.x; c <= w.total * w.parts; c += kThreads) w.starts[c] = c;
    } else if (!w.dealt) {
        // Every other turn goes backwards, so that all end together.
        const int turns = (w.total + ctas - 1) / ctas, rest = w.total - (turns - 1) * ctas;
        for (int t = threadIdx.x; t < w.total; t += kThreads) {
            const int turn = t / ctas, x = t % ctas;
            w.taker[t] = make_int2(turn % 2 ? ctas - 1 - x : x, turn);
        }
        for (int c = threadIdx.x; c <= ctas; c += kThreads)
            w.starts[c] = c * (turns - 1) + (turns % 2 ? min(c, rest) : max(0, c - (ctas - rest)));
    } else {
        for (int c = threadIdx.x; c < ctas; c += kThreads) s.load[c] = s.mine[c] = s.rank[c] = 0;
        __syncthreads();
        for (int at = 0; at < w.total;) {
            const int count = deal_round(w, s, at);
            at += count;
            if (count >= kFew) continue;
            const int end = min(at + kSingly, w.total);
            deal_singly(w, s, at, end);
            at = end;
        }
        i64 total;
        const i64 begin = scan1024(i64(threadIdx.x < ctas ? s.mine[threadIdx.x] : 0), s.sums, total);
        if (threadIdx.x < ctas) w.starts[threadIdx.x] = static_cast<int>(begin);
        if (threadIdx.x == 0) w.starts[ctas] = w.total;
    }
    __syncthreads();
    const int every = (1 << w.groups) - 1;
    for (int t = threadIdx.x; t < w.total; t += kThreads) {
        const int2 to = w.taker[t], tile = w.tile[t];
        if (w.parts == 1) {
            w.tiles[w.starts[to.x] + to.y] = tile;
            continue;
        }
        // A warpgroup each; or all but the last one, and the last one.
        for (int part = 0; part < w.parts; ++part) {
            const int left = w.parts == w.groups ? every ^ 1 << part : part ? every >> 1 : 1 << (w.groups - 1);
            w.tiles[t * w.parts + part] = make_int2(tile.x | left << kApart, tile.y);
        }
    }
}

// plan_lines: which lines make up an item: neighbours together, long ones with long ones.
//
//   in        counts
//   out       members, place, item (pattern, long, alone, room for its pieces); how many items, by pattern
//   grid      1
//   block     1024
//   floor     4 bytes for every line: a launch
//   needs     sm_80
// The same as attention/cuda/items.py, which says why.
#include "plan.cuh"

constexpr int kThreads = 1024;
constexpr int kLong = MG_LONG, kFew = MG_FEW;  // items.LONG, items.FEW

extern "C" __global__ void __launch_bounds__(kThreads, 1) plan_lines(const __grid_constant__ PlanWork w) {
    __shared__ int shared[32];
    __shared__ u64 units;
    __shared__ int busy;
    const int neighbours = w.patterns * w.nqu;
    int items = 0;
    for (int u = 0; u < w.patterns; ++u) {
        const int next = u + 1 < w.patterns ? w.pattern[u + 1].gathered : w.lines - neighbours;
        const int gathered = w.pattern[u].gathered, n = w.nqu + next - gathered;
        const auto line_of = [&](int i) { return i < w.nqu ? u * w.nqu + i : neighbours + gathered + i - w.nqu; };
        if (threadIdx.x == 0) units = 0, busy = 0;
        __syncthreads();
        u64 mine = 0;
        int some = 0;
        for (int i = threadIdx.x; i < n; i += kThreads) {
            const int count = w.counts[line_of(i)];
            mine += count, some += count > 0;
        }
        atomicAdd(&units, mine);
        atomicAdd(&busy, some);
        __syncthreads();
        const u64 share = min(kLong * units / (2 * max(busy, 1)), units / kFew);
        const int limit = static_cast<int>((max(share, u64(w.shortest)) + 3) / 4 * 4);
        int longs = 0;
        for (int i = threadIdx.x; i < n; i += kThreads) longs += w.counts[line_of(i)] > limit;
        int total;
        scan1024(longs, shared, total);
        longs = total;
        const int short_items = (n - longs + w.groups - 1) / w.groups, long_items = (longs + w.groups - 1) / w.groups;
        for (int base = 0, before = 0; base < n; base += kThreads, before += total) {
            const int i = base + threadIdx.x, line = i < n ? line_of(i) : 0;
            const bool is = i < n && w.counts[line] > limit;
            const int rank = before + scan1024(int(is), shared, total);
            if (i < n) {
                const int at = is ? rank : i - rank;
                const int item = items + (is ? short_items : 0) + at / w.groups;
                w.members[4 * item + at % w.groups] = line + 1;
                w.place[line] = 4 * item + at % w.groups;
                // A long line without a partner: all warpgroups work on it.
                const bool alone = is && at == longs - 1 && at % w.groups == 0;
                if (at % w.groups == 0) w.item[item] = make_int4(u | is << 8 | alone << 9, limit, 0, 0);
            }
        }
        items += short_items + long_items;
        if (threadIdx.x == 0) w.head[kEach + 3 * u] = short_items + long_items;
    }
    if (threadIdx.x == 0) w.head[kItems] = items;
    __syncthreads();
    // Room for the pieces of each: no more than its lines one by one.
    int total;
    for (int base = 0, before = 0; base < items; base += kThreads, before += total) {
        const int item = base + threadIdx.x;
        int4 is = make_int4(0, 0, 0, 0);
        int room = 0;
        if (item < items) {
            is = w.item[item];
            room = 1;
            if (is.x >> 8 & 1) {
                int sum = 0;
                for (int g = 0; g < w.groups; ++g) {
                    const int line = w.members[4 * item + g];
                    if (line) sum += w.counts[line - 1];
                }
                room = (sum + is.y - 1) / is.y;
            }
        }
        const int at = before + scan1024(room, shared, total);
        if (item < items) w.item[item] = make_int4(is.x, at, is.y, 0);
    }
}

// plan_items: the plan's items in order, where their results go, and the sizes of everything.
//
//   in        item, piece, members, counters, held, part, whole
//   out       begin, rows (the items), slots, merge; head with costs
//   grid      1
//   block     1024
//   floor     some 100 bytes for every item: a launch
//   needs     sm_80
#include "plan.cuh"

constexpr int kThreads = 1024;
constexpr int kCostUnit = MG_COST_UNIT, kCostStep = MG_COST_STEP, kCostItem = MG_COST_ITEM;  // items.COST_UNIT, …

struct Piece {
    int own[3], masked, line[3];
};

__device__ Piece piece_of(const PlanWork &w, int item, int n, const int4 &is) {
    const int4 found = w.piece[is.y + n];
    Piece made = {{found.x, found.y, found.z}, found.w, {0, 0, 0}};
    const bool alone = is.x >> 9 & 1;
    for (int g = 0; g < w.groups; ++g) made.line[g] = w.members[4 * item + (alone ? 0 : g)] - 1;
    return made;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) plan_items(const __grid_constant__ PlanWork w) {
    __shared__ int shared[32];
    __shared__ int first_item[17], first_slot[17], first_row[17];
    const int neighbours = w.patterns * w.nqu, items = w.head[kItems];
    if (threadIdx.x == 0) {
        int sum = 0;
        for (int u = 0; u < w.patterns; ++u) {
            first_item[u] = sum;
            sum += w.head[kEach + 3 * u];
        }
        first_item[w.patterns] = sum;
    }
    __syncthreads();

    // Steps, pieces and partial results before every item.
    int steps = 0, pieces = 0, slots = 0, total;
    for (int base = 0; base < items; base += kThreads) {
        const int item = base + threadIdx.x;
        int4 is = make_int4(0, 0, 0, 1);
        int cuts = 0, partial = 0;
        if (item < items) {
            is = w.item[item];
            cuts = max((is.z + is.w - 1) / is.w, 1);
            for (int n = 0; n < cuts; ++n) {
                const Piece p = piece_of(w, item, n, is);
                for (int g = 0; g < w.groups; ++g)
                    partial += p.own[g] > 0 && (p.line[g] >= neighbours || cuts > 1 || is.x >> 9 & 1);
            }
        }
        const int step = steps + scan1024(is.z, shared, total);
        steps += total;
        const int piece = pieces + scan1024(cuts, shared, total);
        pieces += total;
        const int slot = slots + scan1024(partial, shared, total);
        slots += total;
        if (item < items) {
            w.begin[item] = make_int2(step, piece);
            w.members[4 * item + 3] = slot;
            const int u = is.x & 255;
            if (item == first_item[u]) first_slot[u] = slot;
        }
    }
    if (threadIdx.x == 0) first_slot[w.patterns] = slots;
    __syncthreads();

    for (int item = threadIdx.x; item < items; item += kThreads) {
        const int4 is = w.item[item];
        const int2 begin = w.begin[item];
        const int u = is.x & 255, cuts = max((is.z + is.w - 1) / is.w, 1);
        const bool alone = is.x >> 9 & 1;
        int slot = w.members[4 * item + 3] - first_slot[u], of[3] = {0, 0, 0};
        for (int n = 0; n < cuts; ++n) {
            const Piece p = piece_of(w, item, n, is);
            int *row = w.rows + 8 * i64(begin.y + n);
            const int length = min(is.w, is.z - n * is.w);
            int own = 0;
            for (int g = 0; g < 3; ++g) {
                const int line = g < w.groups ? p.line[g] : -1;
                int unit = line < 0 ? -1 : line < neighbours ? line % w.nqu : kPacked + line - neighbours - w.pattern[u].gathered;
                int to = -1;
                if (line >= 0 && (line >= neighbours || cuts > 1 || alone)) {
                    if (p.own[g])
                        to = slot++, ++of[alone ? 0 : g];
                    else
                        unit = -1;  // nothing to do and nothing to say
                }
                row[g] = unit, row[5 + g] = to;
                own += p.own[g];
            }
            row[3] = begin.x + n * is.w, row[4] = length;
            w.head[kCosts + begin.y + n] = kCostUnit * (own + p.masked) / w.groups + kCostStep * length + kCostItem;
        }
        for (int g = 0; g < w.groups; ++g)
            if (const int line = w.members[4 * item + g]) w.slots[line - 1] = of[g];
    }
    __syncthreads();

    // Rows that are merged: those of cut lines, and gathered ones, whose neighbours hold anything.
    int merged = 0, sources = 0;
    for (int base = 0; base < neighbours; base += kThreads) {
        const int line = base + threadIdx.x;
        int rows = 0, from = 0;
        if (line < neighbours) {
            const int u = line / w.nqu, unit = line - u * w.nqu, cut = w.slots[line];
            const Pattern &p = w.pattern[u];
            int at;
            u64 word = listed(w.given + p.query_at, p.queries, unit, at);
            if (cut) rows = __popcll(~word & low_bits(w.nq - unit * kUnit)), from = rows * cut;
            for (; word; word &= word - 1, ++at) {
                const int more = w.slots[neighbours + p.gathered + at / kUnit];
                rows += more > 0, from += more;
            }
        }
        const int row = merged + scan1024(rows, shared, total);
        merged += total;
        const int source = sources + scan1024(from, shared, total);
        sources += total;
        if (line < neighbours) {
            w.merge[line] = make_int2(row, source);
            if (line % w.nqu == 0) first_row[line / w.nqu] = row;
        }
    }
    // Keys inside masked cells alone that no query keeps.
    int lost = 0;
    for (int at = threadIdx.x; at < w.patterns * w.nku; at += kThreads) {
        const int u = at / w.nku, key = at - u * w.nku;
        if (!w.part[at] || w.whole[at]) continue;
        const Pattern &p = w.pattern[u];
        int rank;
        const u64 kept = w.held[at] | listed(w.given + p.key_at, p.keys, key, rank);
        lost |= (~kept & low_bits(w.nk - key * kUnit)) != 0;
    }
    lost = __syncthreads_or(lost);
    if (threadIdx.x == 0) {
        first_row[w.patterns] = merged;
        w.head[kItems] = pieces, w.head[kSteps] = steps, w.head[kMasks] = w.counters->masks;
        w.head[kMerged] = merged, w.head[kSources] = sources, w.head[kWrong] = w.counters->wrong;
        w.head[kDead] = lost, w.head[kLight] = 0;
        for (int u = 0; u < w.patterns; ++u) {
            w.head[kLight] = max(w.head[kLight], w.counters->light[u]);
            const int begin = first_item[u], end = first_item[u + 1];
            const int last = end < items ? w.begin[end].y : pieces;
            w.head[kEach + 3 * u] = (begin < items ? last - w.begin[begin].y : 0);
            w.head[kEach + 3 * u + 1] = first_slot[u + 1] - first_slot[u];
            w.head[kEach + 3 * u + 2] = first_row[u + 1] - first_row[u];
        }
    }
}

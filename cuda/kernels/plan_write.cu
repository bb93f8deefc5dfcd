// plan_write: the tensors of the plan, now that their sizes are known.
//
//   in        everything before
//   out       steps, items, masks in register order, merge_rows, merge_ptr, merge_from, key_rows, query_rows, dead
//   grid      (n, 5): lines of a row of CTAs share one kind of tensor
//   block     128
//   floor     bytes written: a launch
//   needs     sm_80
#include "plan.cuh"

constexpr int kTurn = MG_TURN, kMostTurned = MG_MOST_TURNED;  // items.TURN, items.MOST_TURNED
static_assert(kMostTurned <= 32, "a lane for each step");

struct PlanOut {
    int4 *steps;
    int *items, *masks, *costs, *merge_rows, *merge_ptr, *merge_from, *key_rows, *query_rows;
    u8 *dead;  // nullptr: none
    int key_units, query_units, most_items, pieces;
};

// items._turned: the steps of a window that moves along, in the order of their key unit modulo their number.
__device__ void turn(int4 *steps, int n, int groups) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    const int4 own = lane < n ? __ldcg(steps + lane) : make_int4(kPacked, -2, -2, -2);
    const int units = __popc(__ballot_sync(~0u, own.x < kPacked));
    const int low = __shfl_sync(~0u, own.x, 0), high = __shfl_sync(~0u, own.x, max(units - 1, 0));
    const int mask[3] = {own.y, own.z, own.w};
    int first = 32, last = -1;  // where lines begin
#pragma unroll
    for (int g = 0; g < 3; ++g) {
        const u32 its = __ballot_sync(~0u, mask[g] != -2);
        if (its) first = min(first, __ffs(its)), last = max(last, __ffs(its));
    }
    const bool moves = first < last && last - first < groups;
    if (moves && units > 1 && high - low == units - 1 && lane < units) steps[own.x % units] = own;
}

__device__ void write_steps(const PlanWork &w, const PlanOut &out) {
    const int lane = threadIdx.x % 32;
    for (int item = blockIdx.x * 4 + threadIdx.x / 32; item < out.most_items; item += gridDim.x * 4) {
        if (!w.members[4 * item]) break;  // behind the last
        const int4 is = w.item[item];
        const bool alone = is.x >> 9 & 1;
        int at = w.begin[item].x, step = 0;
        for (ItemCells cells(w, item); cells.turn();) {
            int mask[3];
            bool there = false;
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                const int state = cells.state[g];
                there |= state != kNothing;
                mask[g] = state == kNothing ? -2 : state == kWhole ? -1 : w.number[state - kMasked];
            }
            const u32 all = __ballot_sync(~0u, there);
            const int mine = step + __popc(all & ((1u << lane) - 1));
            step += __popc(all);
            if (!there) continue;
            if (alone) {
                const int turn = mine / kTurn % w.groups, of = mask[0];
#pragma unroll
                for (int g = 0; g < 3; ++g) mask[g] = turn == g ? of : -2;
            }
            const int unit = cells.key < w.nku ? cells.key : kPacked + cells.key - w.nku;
            out.steps[at + mine] = make_int4(unit, mask[0], mask[1], mask[2]);
        }
        if (step <= min(kMostTurned, is.w) && !alone) turn(out.steps + at, step, w.groups);
    }
    for (int i = blockIdx.x * 128 + threadIdx.x; i < 8 * out.pieces; i += gridDim.x * 128) {
        out.items[i] = w.rows[i];
        if (i < out.pieces) out.costs[i] = w.head[kCosts + i];
    }
}

// cells.register_words
__device__ void write_masks(const PlanWork &w, const PlanOut &out) {
    const int cells = min(w.counters->cells, w.masked), t = threadIdx.x;
    for (int n = blockIdx.x; n < cells; n += gridDim.x) {
        const int slot = w.slot[n];
        if (w.first[slot] != n) continue;
        u32 made = 0;
        for (int h = 0; h < 2; ++h) {
            const u64 word = w.words[i64(n) * kUnit + 16 * (t / 32) + t % 32 / 4 + 8 * h] >> (2 * (t % 4));
#pragma unroll
            for (int j = 0; j < 8; ++j) made |= u32(word >> (8 * j) & 3) << (2 * j + 16 * h);
        }
        out.masks[i64(w.number[slot]) * 128 + t] = made;
    }
}

// A line's partial results, in order.
__device__ int sources_of(const PlanWork &w, int line, int inside, int *to) {
    const int place = w.place[line], item = place / 4;
    const int4 is = w.item[item];
    const int first = w.begin[item].y, cuts = max((is.z + is.w - 1) / is.w, 1);
    const bool alone = is.x >> 9 & 1;
    int count = 0;
    for (int n = 0; n < cuts; ++n)
        for (int g = alone ? 0 : place % 4; g < (alone ? w.groups : place % 4 + 1); ++g) {
            const int slot = w.rows[8 * i64(first + n) + 5 + g];
            if (slot >= 0) to[count++] = slot * kUnit + inside;
        }
    return count;
}

__device__ void write_merge(const PlanWork &w, const PlanOut &out) {
    const int lane = threadIdx.x % 32, neighbours = w.patterns * w.nqu;
    for (int line = blockIdx.x * 4 + threadIdx.x / 32; line < neighbours; line += gridDim.x * 4) {
        const int u = line / w.nqu, unit = line - u * w.nqu, cut = w.slots[line];
        const Pattern &p = w.pattern[u];
        int at;
        const u64 word = listed(w.given + p.query_at, p.queries, unit, at);
        if (!cut && !word) continue;
        int2 next = w.merge[line];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int inside = lane + 32 * half, row = unit * kUnit + inside;
            const int query = at + __popcll(word & low_bits(inside));
            const bool own = word >> inside & 1;
            const int from = own ? neighbours + p.gathered + query / kUnit : line;
            const int count = row < w.nq ? w.slots[from] : 0;
            int sum = count;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(~0u, sum, d);
                if (lane >= d) sum += other;
            }
            const u32 some = __ballot_sync(~0u, count > 0);
            if (count) {
                const int to = next.x + __popc(some & ((1u << lane) - 1)), source = next.y + sum - count;
                out.merge_rows[to] = row;
                out.merge_ptr[to] = source;
                sources_of(w, from, own ? query % kUnit : inside, out.merge_from + source);
            }
            next.x += __popc(some);
            next.y += __shfl_sync(~0u, sum, 31);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) out.merge_ptr[w.head[kMerged]] = w.head[kSources];
}

__device__ void write_lists(const PlanWork &w, const PlanOut &out) {
    for (int u = 0; u < w.patterns; ++u) {
        const Pattern &p = w.pattern[u];
        const int keys = out.key_units * kUnit, queries = out.query_units * kUnit;
        for (int i = blockIdx.x * 128 + threadIdx.x; i < keys; i += gridDim.x * 128)
            out.key_rows[u * keys + i] = i < p.keys ? w.given[p.key_at + i] : -1;
        for (int i = blockIdx.x * 128 + threadIdx.x; i < queries; i += gridDim.x * 128)
            out.query_rows[u * queries + i] = i < p.queries ? w.given[p.query_at + i] : -1;
    }
}

__device__ void write_dead(const PlanWork &w, const PlanOut &out) {
    if (!out.dead) return;
    for (i64 i = blockIdx.x * 128 + threadIdx.x; i < i64(w.patterns) * w.nk; i += gridDim.x * 128) {
        const int u = static_cast<int>(i / w.nk), key = static_cast<int>(i - i64(u) * w.nk);
        const i64 at = i64(u) * w.nku + key / kUnit;
        bool dead = w.part[at] && !w.whole[at];
        if (dead) {
            const Pattern &p = w.pattern[u];
            int rank;
            const u64 kept = w.held[at] | listed(w.given + p.key_at, p.keys, key / kUnit, rank);
            dead = !(kept >> key % kUnit & 1);
        }
        out.dead[i] = dead;
    }
}

extern "C" __global__ void __launch_bounds__(128, 8)
    plan_write(const __grid_constant__ PlanWork w, const __grid_constant__ PlanOut out) {
    switch (blockIdx.y) {
    case 0: return write_steps(w, out);
    case 1: return write_masks(w, out);
    case 2: return write_merge(w, out);
    case 3: return write_lists(w, out);
    default: return write_dead(w, out);
    }
}

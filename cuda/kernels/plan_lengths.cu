// plan_lengths: the steps of every item, its pieces, and what warpgroups do in each of them.
//
//   in        cell, members, item
//   out       item: steps, steps of a piece; piece
//   grid      (ceil(items at most / 4), 2): the second row compares masks of equal digests
//   block     128: a warp for every item
//   floor     4 bytes for every unit of the matrix: a launch
//   needs     sm_80
#include "plan.cuh"

constexpr int kTurn = MG_TURN;  // items.TURN

// Cells of one kind have to have the same words, not just the same digest.
__device__ void compare(const PlanWork &w) {
    const int cells = min(w.counters->cells, w.masked), lane = threadIdx.x % 32;
    for (int n = blockIdx.x * 4 + threadIdx.x / 32; n < cells; n += gridDim.x * 4) {
        const int first = w.first[w.slot[n]];
        if (first == n) continue;
        const u64 *a = w.words + i64(n) * kUnit, *b = w.words + i64(first) * kUnit;
        if (a[lane] != b[lane] || a[lane + 32] != b[lane + 32]) w.counters->wrong = kAlike;
    }
}

extern "C" __global__ void __launch_bounds__(128, 8) plan_lengths(const __grid_constant__ PlanWork w) {
    if (blockIdx.y) {
        compare(w);
        return;
    }
    const int item = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (item >= w.head[kItems]) return;
    const int4 is = w.item[item];  // kind, room for pieces, limit
    const bool is_long = is.x >> 8 & 1, alone = is.x >> 9 & 1;
    int length = 0;
    for (ItemCells cells(w, item); cells.turn();)
        length += __popc(__ballot_sync(~0u, (cells.state[0] | cells.state[1] | cells.state[2]) != kNothing));
    int size = max(length, 1);
    if (is_long) {
        const int cuts = max((length + is.z - 1) / is.z, 1), turns = w.groups * kTurn;
        size = ((length + cuts - 1) / cuts + turns - 1) / turns * turns;
    }
    const int pieces = max((length + size - 1) / size, 1);
    int own[3] = {0, 0, 0}, masked = 0, piece = 0, step = 0;
    for (ItemCells cells(w, item); cells.turn();) {
        const int(&state)[3] = cells.state;
        const bool there = (state[0] | state[1] | state[2]) != kNothing;
        const u32 all = __ballot_sync(~0u, there);
        const int mine = step + __popc(all & ((1u << lane) - 1));
        step += __popc(all);
        const int turn = alone ? mine / kTurn % w.groups : -1;
        for (;;) {
            // What of these steps belongs to the piece at hand.
            const bool now = there && mine / size == piece;
#pragma unroll
            for (int g = 0; g < 3; ++g) {
                const int of = alone ? (turn == g ? state[0] : kNothing) : state[g];
                own[g] += __popc(__ballot_sync(~0u, now && of != kNothing));
                masked += __popc(__ballot_sync(~0u, now && of >= kMasked));
            }
            if (step < (piece + 1) * size || piece + 1 >= pieces) break;
            if (lane == 0) w.piece[is.y + piece] = make_int4(own[0], own[1], own[2], masked);
            own[0] = own[1] = own[2] = masked = 0;
            ++piece;
        }
    }
    if (lane == 0) {
        w.piece[is.y + piece] = make_int4(own[0], own[1], own[2], masked);
        w.item[item] = make_int4(is.x, is.y, length, size);
    }
}

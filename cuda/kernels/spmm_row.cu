// spmm_row.cu — a RowLayout, or its transpose, times a dense matrix.
//
//     out[f, e, i, :] = scale · Σ_n values[f, n] · x[f, e, j, :]      n-th position = (e, i, j)
//
//   tensors   values (F, slots); x (F, E, cols, D), any strides but the last; out (F, E, rows, D)
//             items (NI) int4; indices int32                                      plans/cuda_row.py
//             order: slot of each position where positions are not in slot order (the transpose)
//   grid      OWN 0: (ceil(NI / 4), F, column tiles), a CTA computes four items of one tile
//             OWN 1: (any, 1, column tiles); its warps walk over items and matrices
//   block     128 threads: a warp gathers rows of x, 32 / LANES at a time, and adds them up in
//             registers, LANES · VECTORS pieces of 16 bytes wide; row.cuh has the map
//   smem      none
//   registers sums: VECTORS · 16 bytes as float32, loads in flight: 32;
//             ptxas 13.0, sm_90a, D = 64: 79 in half precision, 80 in float32, at most 124; 64 in
//             half precision beside others
//   needs     sm_80; rows of x and out 16-byte aligned, D in whole 16-byte pieces of x
//
// Positions beyond an item's end, and those that a run-time mask drops, read no row of x: zero times
// whatever stands there could be NaN.
#include "row.cuh"

constexpr int kKeep = MG_KEEP;    // run-time mask: 0 none, 1 over gathered rows, 2 over result rows
constexpr int kOrder = MG_ORDER;  // slots: 0 in order of positions, 1 int32 list, 2 int64 list
template <bool kWide> struct Place { using type = int; };
template <> struct Place<true> { using type = i64; };
using place_t = Place<kOrder == 2>::type;
constexpr bool kAdd = MG_ADD;     // out += (float32), for several parts one after the other
static_assert(!kAdd || kOut == 2, "ADD accumulates into float32");

// CTAs of a multiprocessor that registers leave room for; beside others, twice as many as there are.
constexpr bool kSmall = kVectors == 1 && kRegisters == 1;
// Before sm_90 ptxas would spill in as few registers.
constexpr int kCtas = kBeside && kSmall ? (__CUDA_ARCH__ >= 900 ? 8 : 5) : kOwn && kSmall ? 6 : kExact || kOwn ? 5 : 4;

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtas)
    spmm_row(out_t *__restrict__ out, i64 out_free, i64 out_entry, i64 out_row,            //
             float *__restrict__ partials, i64 partials_free,                              //
             const value_t *__restrict__ values, i64 values_free,                          //
             const operand_t *__restrict__ x, i64 x_free, i64 x_entry, u32 x_row,          // bytes
             const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,      //
             const int4 *__restrict__ items, const int *__restrict__ indices,
             const place_t *__restrict__ order, int item_count, int matrices, int rows, int pieces,
             float scale) {
    const int lane = threadIdx.x % 32;
    const int piece = blockIdx.z * (kLanes * kVectors) + lane % kLanes;
    // Bytes from this lane's first piece, or the row's start; lanes that overhang read a piece twice.
    const int mine = !kOwn ? 0 : kExact ? piece : min(piece, pieces - 1);
    int offset[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
        offset[v] = 16 * ((kExact ? piece + v * kLanes : min(piece + v * kLanes, pieces - 1)) - mine);

    // 1. Index and slot of this lane's keys are looked up one round ahead, the values only when
    //    the rows of x are on their way too.
    int next[kRegisters];
    place_t next_slot[kRegisters];
    const auto look_up = [&](const RowItem &item, i64 f, int base) {
        int count = item.count;
        const u8 *kept = keep;
        if (kKeep) {
            const int entry = item.row / rows;
            kept += f * keep_free + entry * keep_entry;
            if (kKeep == 2 && count > 0 && !kept[(item.row - entry * rows) * keep_at]) count = 0;
        }
#pragma unroll
        for (int m = 0; m < kRegisters; ++m) {
            const int key = base + own_key(lane, m);
            next[m] = -1;
            if (key >= count) continue;
            next[m] = __ldg(indices + item.first + key);
            if (kOrder) next_slot[m] = __ldg(order + item.first + key);
            if (!kOrder && !kOwn) next_slot[m] = key;
            if (kKeep == 1 && !kept[next[m] * keep_at]) next[m] = -1;
        }
    };
    RowWalk walk = RowWalk::start(item_count);
    if (walk.done(item_count, matrices)) return;
    RowItem ahead = walk.item(items, item_count, matrices, lane);
    look_up(ahead, walk.matrix, 0);
    while (true) {
        // 2. This item and matrix, and the next.
        const RowItem item = ahead;
        const i64 f = walk.matrix;
        if (kOwn) {
            walk.advance(item_count);
            ahead = walk.item(items, item_count, matrices, lane);
        }
        const int count = longest(item);
        if (kOwn && count == 0) look_up(ahead, walk.matrix, 0);
        const int entry = item.row / rows, row = item.row - entry * rows;
        const char *const base_x =
            reinterpret_cast<const char *>(x + f * x_free + entry * x_entry) + mine * 16;
        const value_t *const weights = values + f * values_free + (kOrder ? 0 : item.first);

        float sum[kVectors][kElements];
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
#pragma unroll
            for (int i = 0; i < kElements; ++i) sum[v][i] = 0.0f;

        // 3. One round; a checked one may hold keys that are not there.
        const auto round = [&](int base, bool checked) {
            int index[kRegisters];
            float weight[kRegisters];
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) {
                index[m] = next[m];
                weight[m] = 0.0f;
                const place_t slot = kOrder || !kOwn ? next_slot[m] : base + own_key(lane, m);
                if (!checked || index[m] >= 0) weight[m] = to_float(weights[slot]);
            }
            if (base + kRound < count)
                look_up(item, f, base + kRound);
            else if (kOwn)
                look_up(ahead, walk.matrix, 0);
            // Rolled where indices need no choice of register: unrolled, the loads of all batches
            // move to the front and half as many warps fit.
#pragma unroll(kRegisters == 1 ? 1 : kSteps)
            for (int start = 0; start < kSteps; start += kBatch) {
                if (checked && base + start * kAlong >= count) break;
                Piece theirs[kBatch][kVectors];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    const int j = of_step(index, start + b);
                    const char *const from = row_address(base_x, j, x_row);
#pragma unroll
                    for (int v = 0; v < kVectors; ++v) {
                        if (checked) theirs[b][v].clear();
                        if (!checked || j >= 0) theirs[b][v].load(from + offset[v]);
                    }
                }
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    const float w = of_step(weight, start + b);
#pragma unroll
                    for (int v = 0; v < kVectors; ++v)
#pragma unroll
                        for (int i = 0; i < kElements; ++i)
                            sum[v][i] = fmaf(w, theirs[b][v][i], sum[v][i]);
                }
            }
        };
        int base = 0;
        if (kKeep == 0)
            for (const int least = shortest(item); base + kRound <= least; base += kRound)
                round(base, false);
        for (; base < count; base += kRound) round(base, true);

        // 4. Groups of one item add up; the first one writes.
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                sum[v][i] = scale * (kOwn ? sum[v][i] : lane_sum<kLanes, 32>(sum[v][i]));
        const bool writes = kOwn ? item.there() : lane < kLanes;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int column = (piece + v * kLanes) * kElements;
            if (!writes || (!kExact && piece + v * kLanes >= pieces)) continue;
            if (item.partial >= 0) {
                const i64 line = f * partials_free + i64(item.partial) * (pieces * kElements);
                Pack<float, kElements>::store(partials + line + column, sum[v]);
                continue;
            }
            out_t *const to = out + f * out_free + entry * out_entry + row * out_row + column;
            if (kAdd) {
#pragma unroll
                for (int i = 0; i < kElements; ++i) sum[v][i] += to_float(to[i]);
            }
            Pack<out_t, kElements>::store(to, sum[v]);
        }
        if (!kOwn || walk.done(item_count, matrices)) return;
    }
}

// sddmm_row.cu — scores at the kept positions of a RowLayout.
//
//     out[f, n] = scale · Σ_d q[f, e, i, d] · k[f, e, j, d]      n-th position = (e, i, j)
//
//   tensors   q (F, E, rows, D), k (F, E, cols, D), any strides but the last; out (F, slots)
//             items (NI) int4; columns int32                                     plans/cuda_row.py
//   grid      OWN 0: (ceil(NI / 4), F), a CTA computes four items of a matrix
//             OWN 1: any; its warps walk over items and matrices
//   block     128 threads: a warp, or a group of LANES of its lanes, keeps its row of q in registers
//             and streams the kept rows of k, 32 / LANES of them at a time; row.cuh has the map
//   smem      none
//   registers q: VECTORS · 16 bytes as float32, sums: 8, loads in flight: 32;
//             ptxas 13.0, sm_90a, D = 64, half precision: OWN 0 60, OWN 1 70, beside others 64;
//             float32: 66, 80; at most 94
//   needs     sm_80; rows of q and k 16-byte aligned, D in whole 16-byte pieces
//
// A round's sums are turned across the lanes of a group, so that each lane ends with the score of the
// key whose index it looked up: stores are as coalesced as the loads of the indices.
#include "row.cuh"

constexpr bool kLoop = MG_LOOP;  // rows longer than LANES · VECTORS pieces, taken in passes
constexpr int kKeep = MG_KEEP;   // run-time mask: 0 none, 1 over columns, 2 over rows

// CTAs of a multiprocessor that registers leave room for; beside others, twice as many as there are.
constexpr int kCtas = kBeside && kVectors == 1 && kRegisters == 1 ? 8
                      : kLoop || (kOwn && kVectors > 1)           ? 5
                                                                  : 6;

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtas)
    sddmm_row(out_t *__restrict__ out, i64 out_free,                                    //
              const operand_t *__restrict__ q, i64 q_free, i64 q_entry, u32 q_row,      // rows: bytes
              const operand_t *__restrict__ k, i64 k_free, i64 k_entry, u32 k_row,      //
              const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,  //
              const int4 *__restrict__ items, const int *__restrict__ columns, int item_count,
              int matrices, int rows, int pieces, float scale, i64 positions, int gap) {
    const int lane = threadIdx.x % 32;
    // Slots between this part and the next hold zeros.
    if (int(threadIdx.x) < gap && (kOwn || blockIdx.x == 0))
        for (int f = kOwn ? blockIdx.x : blockIdx.y; f < matrices; f += kOwn ? gridDim.x : matrices)
            out[f * out_free + positions + threadIdx.x] = from_float<out_t>(0.0f);
    const int piece = lane % kLanes;
    // Whether this lane has something at pass `pass`, vector v.
    const auto inside = [&](int pass, int v) {
        return kExact || piece + v * kLanes + pass * (kLanes * kVectors) < pieces;
    };

    int next[kRegisters];
    const auto look_up = [&](const RowItem &item, int base) {
#pragma unroll
        for (int m = 0; m < kRegisters; ++m) {  // beyond the end: the first key there is
            const int key = base + own_key(lane, m);
            next[m] = key < item.count ? __ldg(columns + item.first + key) : 0;
        }
    };
    RowWalk walk = RowWalk::start(item_count);
    if (walk.done(item_count, matrices)) return;
    RowItem ahead = walk.item(items, item_count, matrices, lane);
    look_up(ahead, 0);
    while (true) {
        // 1. This item and matrix, and the next.
        const RowItem item = ahead;
        const i64 f = walk.matrix;
        if (kOwn) {
            walk.advance(item_count);
            ahead = walk.item(items, item_count, matrices, lane);
        }
        const int count = longest(item);
        if (kOwn && count == 0) look_up(ahead, 0);

        const int entry = item.row / rows, row = item.row - entry * rows;
        const char *const q_base = reinterpret_cast<const char *>(q + f * q_free + entry * q_entry) +
                                   u64(row) * q_row + piece * 16;
        const char *const k_base =
            reinterpret_cast<const char *>(k + f * k_free + entry * k_entry) + piece * 16;
        const u8 *const kept = keep + f * keep_free + entry * keep_entry;
        const bool row_dropped = kKeep == 2 && !kept[row * keep_at];
        out_t *const scores = out + f * out_free + item.first;

        // 2. This lane's share of the row of q.
        float mine[kVectors][kElements];
        const auto load_q = [&](int pass) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int offset = (pass * kVectors + v) * kLanes * 16;
                Piece held;
                held.clear();
                if (inside(pass, v)) held.load(q_base + offset);
#pragma unroll
                for (int i = 0; i < kElements; ++i) mine[v][i] = held[i];
            }
        };
        if (!kLoop) load_q(0);

        for (int base = 0; base < count; base += kRound) {
            int column[kRegisters];
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) column[m] = next[m];
            if (base + kRound < count)
                look_up(item, base + kRound);
            else if (kOwn)
                look_up(ahead, 0);

            // 3. Partial scores: step s of group g meets key s · kGroups + g, or its own key s.
            float sum[kSteps];
#pragma unroll
            for (int start = 0; start < kSteps; start += kBatch) {
#pragma unroll
                for (int b = 0; b < kBatch; ++b) sum[start + b] = 0.0f;
                if (base + start * kAlong >= count) continue;
                const char *from[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; ++b)
                    from[b] = row_address(k_base, of_step(column, start + b), k_row);
                const int passes =
                    kLoop ? (pieces + kLanes * kVectors - 1) / (kLanes * kVectors) : 1;
                for (int pass = 0; pass < passes; ++pass) {
                    if (kLoop) load_q(pass);
                    Piece theirs[kBatch][kVectors];
#pragma unroll
                    for (int b = 0; b < kBatch; ++b)
#pragma unroll
                        for (int v = 0; v < kVectors; ++v) {
                            const char *p = from[b] + (pass * kVectors + v) * kLanes * 16;
                            if (!kExact) theirs[b][v].clear();
                            if (inside(pass, v)) theirs[b][v].load(p);
                        }
#pragma unroll
                    for (int b = 0; b < kBatch; ++b)
#pragma unroll
                        for (int v = 0; v < kVectors; ++v)
#pragma unroll
                            for (int i = 0; i < kElements; ++i)
                                sum[start + b] =
                                    fmaf(mine[v][i], theirs[b][v][i], sum[start + b]);
                }
            }

            // 4. Each lane ends with the scores of its own keys.
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) {
                transpose_sum<kTurn>(sum + m * kTurn, lane);
                const float score = scale * lane_sum<kTurn, kLanes>(sum[m * kTurn]);
                const int key = base + own_key(lane, m);
                if (lane % kLanes >= kTurn || key >= item.count) continue;
                bool live = !row_dropped;
                if (kKeep == 1) live = kept[column[m] * keep_at];
                scores[key] = from_float<out_t>(live ? score : 0.0f);
            }
        }
        if (!kOwn || walk.done(item_count, matrices)) return;
    }
}

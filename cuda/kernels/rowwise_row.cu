// rowwise_row.cu — softmax, its backward, row sums and row copies over the rows of a RowLayout.
//
//     rowwise.cuh has the formulas (OP) and the steps (PHASE); PIECE is 1
//
//   tensors   values, grad, out (F, slots); numbers (F, E · rows) of rows: float2 for softmax, else
//             float; lse, grad_lse (F, E · rows) float32 or null
//             row_offsets, columns, row_order: plans/cuda_row.py
//   grid      (ceil(lines / rows of a CTA), ceil(F / each)): where rows are short, a CTA learns once where they are and
//             takes them of several matrices
//   block     TEAM 1: 128 threads, LANES of them per row; else 32 · TEAM threads, one row
//   smem      8 · TEAM bytes static
//   registers values held: HOLD per lane; ptxas 13.0, sm_90a: softmax 48, backward 52 … 54;
//             35 … 59 where rows are short
//   needs     sm_80
//
// A row starts at any slot. Lanes take slots by their number within the row and not by address, so
// that its sum is the same wherever it lies; loads are 64 or 128 contiguous bytes per warp.
#include "rowwise.cuh"

static_assert(kPiece == 1 && MG_MASKED, "rows have no alignment, and ends");
constexpr int kLanes = MG_LANES, kRowsOfWarp = 32 / kLanes;
constexpr bool kShort = kLanes == 8;  // no row is longer than a bundle, and most are much shorter
static_assert(kTeam == 1 || kLanes == 32, "a team's warps share one row");

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtas)
    rowwise_row(const value_t *__restrict__ values, i64 values_free,  //
                const operand_t *__restrict__ grad, i64 grad_free,    //
                out_t *__restrict__ out, i64 out_free,                //
                float *__restrict__ numbers, i64 numbers_free,        //
                float *__restrict__ lse, const float *__restrict__ grad_lse, i64 vector_free,
                const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,
                const i64 *__restrict__ row_offsets, const int *__restrict__ columns,
                const int *__restrict__ row_order, int lines, int rows, i64 positions, int gap, int matrices,
                int each) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / 32;
    const int line =
        kTeam > 1 ? int(blockIdx.x) : (int(blockIdx.x) * kWarps + warp) * kRowsOfWarp + threadIdx.x % 32 / kLanes;
    const int first = blockIdx.y * each, last = min(matrices, first + each) - 1;
    // Slots between this part and the next hold zeros.
    if (kResults && blockIdx.x == 0 && int(threadIdx.x) < gap)
        for (int f = first; f <= last; ++f) out[f * out_free + positions + threadIdx.x] = from_float<out_t>(0.0f);
    // Rows of one warp are joined by shuffles that all its lanes take part in.
    const bool here = line < lines;
    if (kRowsOfWarp == 1 && !here) return;
    const int member = kTeam > 1 ? warp : 0;

    // 1. Where this row is, in every matrix.
    const int at = row_order[here ? line : lines - 1];
    const int entry = at / rows;
    const i64 begin = row_offsets[at];
    const int count = here ? int(row_offsets[at + 1] - begin) : 0;
    values += begin;
    if (kOp == kBackward) grad += begin;
    if (kResults) out += begin;
    columns += begin;
    keep += entry * keep_entry;

    // 2. A bundle: slots lane, lane + LANES · TEAM, … of the row. Of short rows it is all, and what the warp's longest
    //    has not is not looked at.
    constexpr int kStride = kLanes * kTeam;
    const int bundles = (count + kHold * kStride - 1) / (kHold * kStride);
    const int rounds = kShort ? __reduce_max_sync(kAllLanes, (count + kLanes - 1) / kLanes) : kHold;
    const auto slot_of = [&](int bundle, int h) {
        return (bundle * kHold + h) * kStride + member * kLanes + lane;
    };
    const auto present_in = [&](int bundle) {
        return min(kHold, (count - bundle * kHold * kStride + kStride - 1) / kStride);
    };
    const auto load = [&](Bundle &held, int f, int bundle) {
        held.clear();
        const u8 *const kept = keep + f * keep_free;
        const bool dropped = kKeep == 2 && !kept[at - entry * rows];
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            if (h >= rounds) break;
            const int n = slot_of(bundle, h);
            if (n >= count) continue;
            held.load(h, values + f * values_free + n, grad + f * grad_free + n);
            bool live = !dropped;
            if (kKeep == 1) live = kept[__ldg(columns + n)];
            held.set_live(h, live);
        }
    };
    // What the slots need of the row's statistic, which goes where it is asked for.
    const auto settle = [&](Statistic found, int f) {
        join_lanes(found, kLanes);
        if constexpr (kTeam > 1) {
            __shared__ float2 shared[kTeam][1];
            join_team<1>(found, shared, warp, 0, lane == 0);
        }
        const bool writes = lane == 0 && member == 0 && here;
        if (kPhase == 1) {
            const bool two = kOp == kSoftmax;
            if (writes) write_row(numbers, f * numbers_free + at, two ? found.top : found.sum, found.sum);
            return Factors();
        }
        Factors row = factors_of(found);
        if (kOp == kSoftmax && lse && writes) lse[f * vector_free + at] = lse_of(found);
        if (kOp == kBackward && grad_lse) row.shift -= grad_lse[f * vector_free + at];
        return row;
    };
    const auto write = [&](const Bundle &held, int f, int bundle, const Factors &row) {
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            if (h >= rounds) break;
            const int n = slot_of(bundle, h);
            if (n < count) emit(out + f * out_free + n, held, h, row);
        }
    };

    Bundle held;
    if constexpr (kShort) {
        // 3. Matrix after matrix; the slots of the next are on their way while this one's are worked on.
        Factors row;
        const auto bring = [&](Bundle &to, Factors &numbers_of, int f) {
            load(to, f, 0);
            if (kPhase == 2) numbers_of = read_row(numbers, f * numbers_free + at);
        };
        bring(held, row, first);
#pragma unroll 1
        for (int f = first; f <= last; ++f) {
            Bundle ahead;
            Factors later;
            if (f < last) bring(ahead, later, f + 1);
            if (kPhase != 2) {
                Statistic found;
                absorb(found, held, present_in(0));
                row = settle(found, f);
            }
            if (kResults) write(held, f, 0, row);
            held = ahead, row = later;
        }
        return;
    }

    // 4. The row's statistic; the last bundle looked at is the first, which then needs no second look. Results.
    Factors row;
    if (kPhase != 2) {
        Statistic found;
        for (int bundle = bundles - 1; bundle >= 0; --bundle) {
            load(held, first, bundle);
            absorb(found, held, present_in(bundle));
        }
        row = settle(found, first);
        if (kPhase == 1) return;
    } else {
        row = read_row(numbers, first * numbers_free + at);
    }
    for (int bundle = 0; bundle < bundles; ++bundle) {
        if (kPhase == 2 || bundle > 0) load(held, first, bundle);
        write(held, first, bundle, row);
    }
}

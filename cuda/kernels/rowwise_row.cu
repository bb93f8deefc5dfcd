// rowwise_row.cu — softmax, its backward, row sums and row copies over the rows of a RowLayout.
//
//     rowwise.cuh has the formulas (OP) and the steps (PHASE); PIECE is 1
//
//   tensors   values, grad, out (F, slots); numbers (F, E · rows) of rows: float2 for softmax, else
//             float; lse, grad_lse (F, E · rows) float32 or null
//             row_offsets, columns, row_order: plans/cuda_row.py
//   grid      (ceil(lines / rows of a CTA), F)
//   block     TEAM 1: 128 threads, LANES of them per row; else 32 · TEAM threads, one row
//   smem      8 · TEAM bytes static
//   registers values held: HOLD per lane; ptxas 13.0, sm_90a: softmax 48, backward 52 … 54
//   needs     sm_80
//
// A row starts at any slot. Lanes take slots by their number within the row and not by address, so
// that its sum is the same wherever it lies; loads are 64 or 128 contiguous bytes per warp.
#include "rowwise.cuh"

static_assert(kPiece == 1 && MG_MASKED, "rows have no alignment, and ends");
constexpr int kLanes = MG_LANES, kRowsOfWarp = 32 / kLanes;
static_assert(kTeam == 1 || kLanes == 32, "a team's warps share one row");

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtas)
    rowwise_row(const value_t *__restrict__ values, i64 values_free,  //
                const operand_t *__restrict__ grad, i64 grad_free,    //
                out_t *__restrict__ out, i64 out_free,                //
                float *__restrict__ numbers, i64 numbers_free,        //
                float *__restrict__ lse, const float *__restrict__ grad_lse, i64 vector_free,
                const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,
                const i64 *__restrict__ row_offsets, const int *__restrict__ columns,
                const int *__restrict__ row_order, int lines, int rows, i64 positions, int gap) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / 32;
    const int line =
        kTeam > 1 ? int(blockIdx.x) : (int(blockIdx.x) * kWarps + warp) * kRowsOfWarp + threadIdx.x % 32 / kLanes;
    // Slots between this part and the next hold zeros.
    if (kResults && blockIdx.x == 0 && int(threadIdx.x) < gap)
        out[blockIdx.y * out_free + positions + threadIdx.x] = from_float<out_t>(0.0f);
    // Rows of one warp are joined by shuffles that all its lanes take part in.
    const bool here = line < lines;
    if (kRowsOfWarp == 1 && !here) return;
    const int member = kTeam > 1 ? warp : 0;
    const i64 f = blockIdx.y;

    // 1. Where this row is.
    const int at = row_order[here ? line : lines - 1];
    const int entry = at / rows;
    const i64 begin = row_offsets[at];
    const int count = here ? int(row_offsets[at + 1] - begin) : 0;
    values += f * values_free + begin;
    if (kOp == kBackward) grad += f * grad_free + begin;
    if (kResults) out += f * out_free + begin;
    columns += begin;
    const u8 *const kept = keep + f * keep_free + entry * keep_entry;
    const bool dropped = kKeep == 2 && !kept[at - entry * rows];

    // 2. A bundle: slots lane, lane + LANES · TEAM, … of the row.
    constexpr int kStride = kLanes * kTeam;
    Bundle held;
    const int bundles = (count + kHold * kStride - 1) / (kHold * kStride);
    const auto slot_of = [&](int bundle, int h) {
        return (bundle * kHold + h) * kStride + member * kLanes + lane;
    };
    const auto present_in = [&](int bundle) {
        return min(kHold, (count - bundle * kHold * kStride + kStride - 1) / kStride);
    };
    const auto load = [&](int bundle) {
        held.clear();
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            const int n = slot_of(bundle, h);
            if (n >= count) continue;
            held.load(h, values + n, grad + n);
            bool live = !dropped;
            if (kKeep == 1) live = kept[__ldg(columns + n)];
            held.set_live(h, live);
        }
    };

    // 3. The row's statistic; the last bundle looked at is the first, which then needs no second look.
    Factors row_numbers;
    if (kPhase != 2) {
        Statistic found;
        for (int bundle = bundles - 1; bundle >= 0; --bundle) {
            load(bundle);
            absorb(found, held, present_in(bundle));
        }
        join_lanes(found, kLanes);
        if constexpr (kTeam > 1) {
            __shared__ float2 shared[kTeam][1];
            join_team<1>(found, shared, warp, 0, lane == 0);
        }
        const bool writes = lane == 0 && member == 0 && here;
        if (kPhase == 1) {
            const bool two = kOp == kSoftmax;
            if (writes)
                write_row(numbers, f * numbers_free + at, two ? found.top : found.sum, found.sum);
            return;
        }
        row_numbers = factors_of(found);
        if (kOp == kSoftmax && lse && writes) lse[f * vector_free + at] = lse_of(found);
        if (kOp == kBackward && grad_lse) row_numbers.shift -= grad_lse[f * vector_free + at];
    } else {
        row_numbers = read_row(numbers, f * numbers_free + at);
    }

    // 4. Results.
    for (int bundle = 0; bundle < bundles; ++bundle) {
        if (kPhase == 2 || bundle > 0) load(bundle);
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            const int n = slot_of(bundle, h);
            if (n < count) emit(out + n, held, h, row_numbers);
        }
    }
}

// rowwise_block.cu — softmax, its backward, row sums and row copies over the blocks of a BlockLayout.
//
//     rowwise.cuh has the formulas (OP) and the steps (PHASE)
//
//   tensors   values, grad, out (F, slots); numbers (F, E · rows) of rows: float2 for softmax, else
//             float; in PHASE 3 (F, OTHERS · E · rows), what the other parts found, and joint
//             (F, E · rows), written; lse, grad_lse (F, E · rows) float32 or null
//             items, row_ptr, row_order, masks: plans/cuda_block.py
//   grid      (ceil(lines · SIZE / rows of a warp / teams of a CTA), F)
//   block     TEAM 1: 128 threads, four warps with rows of their own; else 32 · TEAM threads, a team
//             A warp has kRows neighbouring rows of a block row: PIECE slots a lane, so that it reads
//             512 contiguous bytes (half precision) of every block; the team's warps take turns
//   smem      8 · TEAM · kRows bytes static
//   registers values held: HOLD pieces; ptxas 13.0, sm_90a, SIZE 64, half precision: softmax
//             48, 64 at HOLD 4, 8, masked 40 at HOLD 2; backward 71, 106, 54
//   needs     sm_80; values, grad, out 16-byte aligned, slots · size of a value % 16 == 0
//
// Values are read once if HOLD · TEAM blocks cover a row, else twice. The team depends on the number
// of blocks of a row alone, so that a row's sum never depends on other rows.
#include "rowwise.cuh"

constexpr int kSize = MG_SIZE;
constexpr int kOthers = MG_OTHERS;  // parts besides
constexpr int kArea = kSize * kSize;
constexpr int kPerRow = kSize / kPiece;             // lanes that share a row of a block
constexpr int kRows = 32 / kPerRow;                 // rows of a warp
constexpr int kRuns = kSize / kRows;                // warps that share a block row
static_assert(kPerRow <= 32, "a row of a block must fit into a warp");

// Bits of the slots that the run-time mask keeps: PIECE bytes of it, 0 or 1 each.
__device__ __forceinline__ u32 kept_bits(const u8 *kept) {
    u32 bits = 0;
#pragma unroll
    for (int w = 0; w < kPiece; w += 4) {
        const u32 bytes = __ldg(reinterpret_cast<const u32 *>(kept + w));
        // 0x01 in byte i to bit i: the product's top nibble.
        bits |= (bytes * 0x10204080u >> 28) << w;
    }
    return bits;
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, kCtas)
    rowwise_block(const value_t *__restrict__ values, i64 values_free,  //
                  const operand_t *__restrict__ grad, i64 grad_free,    //
                  out_t *__restrict__ out, i64 out_free,                //
                  float *__restrict__ numbers, i64 numbers_free,        //
                  float *__restrict__ lse, const float *__restrict__ grad_lse, i64 vector_free,
                  float *__restrict__ joint, const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,
                  const int4 *__restrict__ items, const int *__restrict__ row_ptr,
                  const int *__restrict__ row_order, const u8 *__restrict__ masks, int lines,
                  int rows, int block_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int unit = kTeam > 1 ? int(blockIdx.x) : int(blockIdx.x) * kWarps + warp;
    const int member = kTeam > 1 ? warp : 0;
    const int line = unit / kRuns;
    if (line >= lines) return;  // whole warps; a team is whole CTAs
    const i64 f = blockIdx.y;

    // 1. Where this warp's rows are.
    const int block_row = row_order[line];
    const int entry = block_row / block_rows;
    const int begin = row_ptr[block_row], count = row_ptr[block_row + 1] - begin;
    const int inside = (unit % kRuns) * (32 * kPiece) + lane * kPiece;  // slot within a block
    const int column = inside % kSize;
    const int row = (block_row - entry * block_rows) * kSize + inside / kSize;
    const bool exists = row < rows;  // the last block row may overhang
    const i64 at = i64(entry) * rows + row;
    const i64 first = i64(begin) * kArea + inside;
    values += f * values_free + first;
    if (kOp == kBackward) grad += f * grad_free + first;
    if (kResults) out += f * out_free + first;
    const u8 *const kept = keep + f * keep_free + entry * keep_entry;
    const bool dropped = kKeep == 2 && !(exists && kept[row]);

    // 2. A bundle: blocks first + member, + TEAM, … of this row.
    Bundle held;
    const int bundles = (count + kHold * kTeam - 1) / (kHold * kTeam);
    const auto block_of = [&](int bundle, int h) { return (bundle * kHold + h) * kTeam + member; };
    const auto present_in = [&](int bundle) {
        return min(kHold, (count - block_of(bundle, 0) + kTeam - 1) / kTeam);
    };
    const auto load = [&](int bundle) {
        if (kMasked) held.clear();
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            const int n = block_of(bundle, h);
            if (n >= count) continue;
            held.load(h, values + i64(n) * kArea, grad + i64(n) * kArea);
            if (!kMasked) continue;
            u32 bits = dropped ? 0u : kWhole;
            const int4 item = __ldg(items + begin + n);
            if (item.w >= 0) {
                const u32 byte = __ldg(masks + (i64(item.w) * kArea + inside) / 8);
                bits &= byte >> (inside % 8);
            }
            if (kKeep == 1) bits &= kept_bits(kept + item.z * kSize + column);
            held.set_live(h, bits);
        }
    };

    // 3. Row statistics; the last bundle looked at is the first, which then needs no second look.
    Factors row_numbers;
    if (kPhase != 2) {
        Statistic found;
        for (int bundle = bundles - 1; bundle >= 0; --bundle) {
            load(bundle);
            absorb(found, held, present_in(bundle));
        }
        join_lanes(found, kPerRow);
        const bool first_lane = lane % kPerRow == 0;
        if constexpr (kTeam > 1) {
            __shared__ float2 shared[kTeam][kRows];
            join_team<kRows>(found, shared, warp, lane / kPerRow, first_lane);
        }
        const bool writes = exists && first_lane && member == 0;
        if (kPhase == 1) {
            const bool two = kOp == kSoftmax;
            if (writes)
                write_row(numbers, f * numbers_free + at, two ? found.top : found.sum, found.sum);
            return;
        }
        if (kPhase == 3 && exists) {
#pragma unroll
            for (int part = 0; part < kOthers; ++part)
                join_found(found, numbers, f * numbers_free + i64(part) * vector_free + at);
        }
        row_numbers = factors_of(found);
        if (kOp == kSoftmax && lse && writes) lse[f * vector_free + at] = lse_of(found);
        if (kOp == kBackward && grad_lse && exists)
            row_numbers.shift -= grad_lse[f * vector_free + at];
        if (kPhase == 3 && writes)
            write_row(joint, f * vector_free + at, row_numbers.shift, row_numbers.inverse);
    } else if (exists) {
        row_numbers = read_row(numbers, f * numbers_free + at);
    }

    // 4. Results.
    for (int bundle = 0; bundle < bundles; ++bundle) {
        if (kPhase == 2 || bundle > 0) load(bundle);
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            const int n = block_of(bundle, h);
            if (n < count) emit(out + i64(n) * kArea, held, h, row_numbers);
        }
    }
}

// rowwise_nm: softmax, its backward, row sums and row copies over packed N:M values.
//
//     rowwise.cuh has the formulas (OP) and the steps (PHASE); nm.cuh the metadata
//
//   tensors   values, grad, out (matrices, slots); numbers, lse, grad_lse (F, E · nq) float32
//             metadata int16, read where some columns of a piece are dead and others are not
//             SIZE 0        a matrix is rows × columns / 2 slots, rows and columns padded (32, 64)
//             SIZE 16 … 64  blocks of S × S / 2 slots; items, row_ptr, row_order, masks: plans/nm.py
//   grid      matrices · pieces; a matrix is one entry, or the `own` entries of a static pattern
//   block     TEAM 1: 128 threads, four warps with rows of their own; else 32 · TEAM threads, a team
//             SIZE 0: LANES threads a row; else a warp has neighbouring rows of a block row
//   smem      8 · TEAM · rows of a warp, static
//   floor     bytes of values read and written at copy bandwidth
//   needs     sm_80; values, grad, out 16-byte aligned; keep padded to 128 columns
//
// Values are read once where HOLD pieces a lane cover a row, else twice. Teams and pieces depend on
// the length of a row alone, so that its sum never depends on other rows.
#include "nm.cuh"
#include "rowwise.cuh"

constexpr int kSize = MG_SIZE;
constexpr int kBlock = kSize ? kSize : 64;
constexpr int kLanes = kSize ? kSize / 2 / kPiece : MG_LANES;  // that share a row of a block, or a row
constexpr int kRows = 32 / kLanes;                             // rows of a warp
constexpr int kRuns = kSize ? kSize / kRows : 1;               // warps that share a block row
constexpr int kSpan = 2 * kPiece;                              // columns of a piece
constexpr int kBlockWords = kBlock / kWordColumns;
static_assert(kSize == 0 || kRuns > 0, "a warp has rows of one block row");
static_assert(kSpan == 8 || kSpan == 16, "pieces of 4 or 8 slots");
static_assert(kTeam == 1 || kLanes == 32 || kSize, "a team's warps share one row");
constexpr u32 kAllColumns = (1u << kSpan) - 1;

// Bits of bools that are 8-byte aligned.
__device__ __forceinline__ u32 kept_bits(const u8 *kept) {
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < kSpan; i += 8) {
        const u64 bytes = __ldg(reinterpret_cast<const u64 *>(kept + i));
        bits |= u32(bytes * 0x0102040810204080ull >> 56) << i;
    }
    return bits;
}

// Live slots of a piece whose columns are live as given; `word` finds the metadata of a column.
template <class Word> __device__ __forceinline__ u32 live_slots(u32 columns, int column, Word word) {
    if (columns == kAllColumns || columns == 0) return columns ? kWhole : 0u;
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < kPiece / 2; ++j) {
        const int at = column + 4 * j;
        const u32 code = u32(__ldg(word(at))) >> (at % kWordColumns / 4 * kCodeBits);
        bits |= (columns >> (4 * j + first_of(code)) & 1u) << (2 * j);
        bits |= (columns >> (4 * j + second_of(code)) & 1u) << (2 * j + 1);
    }
    return bits;
}

// Looking up what is live takes registers beside those held.
constexpr int kFit = kMasked && kHold >= 8 && kCtas > 1 ? kCtas - 1 : kCtas;

extern "C" __global__ void __launch_bounds__(32 * kWarps, kFit)
    rowwise_nm(const value_t *__restrict__ values, const operand_t *__restrict__ grad,
               out_t *__restrict__ out, float *__restrict__ numbers, float *__restrict__ lse,
               const float *__restrict__ grad_lse,                                 //
               const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,         //
               const u16 *__restrict__ metadata, const int4 *__restrict__ items,
               const int *__restrict__ row_ptr, const int *__restrict__ row_order,
               const u8 *__restrict__ masks, int first_line, int lines, int pieces, int reps, int own,
               int blocks, int nq, int nk) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int matrix = blockIdx.x / pieces, piece = blockIdx.x % pieces;
    const int unit = kTeam > 1 ? piece : piece * kWarps + warp;
    const int member = kTeam > 1 ? warp : 0;
    const int f = matrix / reps, rep = matrix % reps;

    // 1. Where this lane's row is: its first slot in values, its number among all rows.
    int row, entry = rep, count, column = 0;
    i64 first, begin = 0;
    const u16 *words;
    const int row_end = (nq + 31) / 32 * 32, column_end = (nk + 63) / 64 * 64;
    bool here;
    if constexpr (kSize == 0) {
        row = unit * kRows + lane / kLanes;
        here = row < row_end;
        if (kRows == 1 && !here) return;
        count = here ? column_end / kSpan : 0;
        first = (i64(matrix) * row_end + row) * (column_end / 2) + (member * kLanes + lane % kLanes) * kPiece;
        words = metadata + i64(rep) * row_end * (column_end / kWordColumns);
    } else {
        const int line = unit / kRuns;
        if (line >= lines) return;  // whole warps; a team is whole CTAs
        const int block_rows = (nq + kBlock - 1) / kBlock, block_row = row_order[first_line + line];
        const int inner = block_row / block_rows, down = unit % kRuns * kRows + lane / kLanes;
        entry = rep * own + inner;
        row = (block_row - inner * block_rows) * kSize + down;
        begin = row_ptr[block_row], count = row_ptr[block_row + 1] - int(begin);
        column = lane % kLanes * kSpan;
        first = (i64(matrix) * blocks + begin) * (kSize * kSize / 2) + down * (kSize / 2) + column / 2;
        words = metadata + (i64(rep) * blocks + begin) * (kSize * kBlockWords);
        here = true;
    }
    const bool exists = row < nq;
    const i64 at = (i64(f) * reps * own + entry) * nq + row;
    values += first;
    if (kOp == kBackward) grad += first;
    if (kResults) out += first;
    const u8 *const kept = keep + f * keep_free + entry * keep_entry;
    const bool dropped = !exists || (kKeep == 2 && !kept[row]);

    // 2. A bundle: pieces of this row, or blocks.
    constexpr int kStep = kSize ? kTeam : kTeam * kLanes;  // from one of a lane's pieces to the next
    const int mine = kSize ? member : member * kLanes + lane % kLanes;
    const auto piece_of = [&](int bundle, int h) { return (bundle * kHold + h) * kStep + mine; };
    const auto slot_of = [&](int bundle, int h) {
        if constexpr (kSize == 0) return i64((bundle * kHold + h) * kStep) * kPiece;
        return i64(piece_of(bundle, h)) * (kSize * kSize / 2);
    };
    const int bundles = (count + kHold * kStep - 1) / (kHold * kStep);
    const auto present_in = [&](int bundle) {
        return min(kHold, (count - piece_of(bundle, 0) + kStep - 1) / kStep);
    };
    const auto live_in = [&](int n) -> u32 {
        if (dropped) return 0u;
        u32 columns = kAllColumns;
        int wide = n * kSpan;  // first column in the matrix
        if constexpr (kSize != 0) {
            const int4 item = __ldg(items + begin + n);
            wide = item.z * kSize + column;
            if (item.w >= 0) {
                const u8 *bits = masks + ((i64(item.w) * kBlock + row % kBlock) * kBlock + column) / 8;
                columns = kSpan == 16 ? __ldg(reinterpret_cast<const u16 *>(bits)) : __ldg(bits);
            }
        } else {
            const int left = nk - wide;
            if (left < kSpan) columns = left <= 0 ? 0u : (1u << left) - 1;
        }
        if (kKeep == 1 && columns) columns &= kept_bits(kept + wide);
        return live_slots(columns, kSize ? column : wide, [&](int c) {
            if constexpr (kSize == 0)
                return words + word_at(row, c / kWordColumns, row_end, column_end / kWordColumns, true);
            return words + i64(n) * (kSize * kBlockWords) +
                   word_at(row % kBlock, c / kWordColumns, kBlock, kBlockWords, kSize > 16);
        });
    };
    Bundle held;
    const auto load = [&](int bundle) {
        if (kMasked) held.clear();
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            if (piece_of(bundle, h) >= count) continue;
            held.load(h, values + slot_of(bundle, h), grad + slot_of(bundle, h));
            if (kMasked) held.set_live(h, live_in(piece_of(bundle, h)));
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
        const bool leads = lane % kLanes == 0;
        if constexpr (kTeam > 1) {
            __shared__ float2 shared[kTeam][kRows];
            join_team<kRows>(found, shared, warp, lane / kLanes, leads);
        }
        const bool writes = here && exists && leads && member == 0;
        if (kPhase == 1) {
            if (writes) numbers[at] = found.sum;
            return;
        }
        row_numbers = factors_of(found);
        if (kOp == kSoftmax && lse && writes) lse[at] = lse_of(found);
        if (kOp == kBackward && grad_lse && exists) row_numbers.shift -= grad_lse[at];
    } else if (exists) {
        row_numbers = read_row(numbers, at);
    }

    // 4. Results.
    for (int bundle = 0; bundle < bundles; ++bundle) {
        if (kPhase == 2 || bundle > 0) load(bundle);
#pragma unroll
        for (int h = 0; h < kHold; ++h)
            if (piece_of(bundle, h) < count) emit(out + slot_of(bundle, h), held, h, row_numbers);
    }
}

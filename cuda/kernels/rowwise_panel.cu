// rowwise_panel.cu — softmax, its backward, row sums and row copies over panels, one step at a time.
//
//     rowwise.cuh has the formulas (OP) and the steps (PHASE 1 or 2)
//
//   tensors   values, grad, out (F, slots). PHASE 1: numbers (F, places), a place for every row of
//             every item. PHASE 2: numbers (F, E · rows), of matrix rows. float2 for softmax
//             items (NI, 8) int64, pieces of panels of about 2048 slots      plans/cuda_rowwise.py
//   grid      (ceil(NI / 4), F)
//   block     128 threads, an item per warp: its columns over as many lanes as they fill (a power of
//             two), its rows over the lanes that are left, then one set of rows after the other
//   smem      none
//   registers values held: HOLD pieces; ptxas 13.0, sm_90a: 48 … 95
//   needs     sm_80; values, grad, out 16-byte aligned, slots · size of a value % 16 == 0
//
// A matrix row may lie in several panels and a wide panel in several items; rowwise_merge joins them.
#include "rowwise.cuh"

static_assert(kPhase != 0 && kTeam == 1 && MG_MASKED, "panels are taken one step at a time");

extern "C" __global__ void __launch_bounds__(32 * kWarps, 4)
    rowwise_panel(const value_t *__restrict__ values, i64 values_free,  //
                  const operand_t *__restrict__ grad, i64 grad_free,    //
                  out_t *__restrict__ out, i64 out_free,                //
                  float *__restrict__ numbers, i64 numbers_free,        //
                  const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,
                  const longlong2 *__restrict__ items, const int *__restrict__ row_list,
                  const int *__restrict__ col_list, const u8 *__restrict__ mask_bits,
                  int item_count, int rows) {
    const int lane = threadIdx.x % 32;
    const int n = blockIdx.x * kWarps + threadIdx.x / 32;
    if (n >= item_count) return;
    const i64 f = blockIdx.y;

    // 1. The item: slot of its first element, its mask or −1, pitch, rows and columns, first place,
    //    where row and column numbers start (−1 − offset: in a list), entry and slots to clear.
    const longlong2 a = __ldg(items + 4 * n), b = __ldg(items + 4 * n + 1);
    const longlong2 c = __ldg(items + 4 * n + 2), d = __ldg(items + 4 * n + 3);
    const i64 mask = a.y, pitch = b.x;
    const int height = int(b.y), width = int(b.y >> 32);
    const int entry = int(d.y), gap = int(d.y >> 32);
    const int pieces = (width + 7) / 8 * (8 / kPiece);  // the padding of a row is cleared too
    int lanes = 1;
    while (lanes < pieces && lanes < 32) lanes *= 2;
    const int across = lane % lanes, down = lane / lanes, step = 32 / lanes;
    values += f * values_free + a.x;
    if (kOp == kBackward) grad += f * grad_free + a.x;
    if (kResults) out += f * out_free + a.x;
    const u8 *const kept = keep + f * keep_free + entry * keep_entry;

    Bundle held;
    const int bundles = (pieces + kHold * lanes - 1) / (kHold * lanes);
    const auto piece_of = [&](int bundle, int h) { return (bundle * kHold + h) * lanes + across; };
    const auto load = [&](int bundle, int r, bool dropped) {
        held.clear();
#pragma unroll
        for (int h = 0; h < kHold; ++h) {
            const int piece = piece_of(bundle, h);
            if (piece >= pieces || r >= height) continue;
            const i64 offset = r * pitch + piece * kPiece;
            held.load(h, values + offset, grad + offset);
            const int first = piece * kPiece, left = width - first;
            u32 bits = dropped || left <= 0 ? 0u : left >= kPiece ? kWhole : (1u << left) - 1u;
            if (mask >= 0) bits &= u32(__ldg(mask_bits + mask + offset / 8)) >> (first % 8);
            if (kKeep == 1) {
#pragma unroll
                for (int i = 0; i < kPiece; ++i)
                    if (bits >> i & 1u) {
                        const i64 j = d.x >= 0 ? d.x + first + i : col_list[-1 - d.x + first + i];
                        if (!kept[j]) bits &= ~(1u << i);
                    }
            }
            held.set_live(h, bits);
        }
    };

    // 2. Sets of rows; every lane goes along, also those whose row is beyond the item.
    for (int top = 0; top < height; top += step) {
        const int r = top + down;
        int row = 0;
        if (r < height)
            row = entry * rows + int(c.y >= 0 ? c.y + r : row_list[-1 - c.y + r]);
        const bool dropped = kKeep == 2 && !kept[row - entry * rows];
        Factors row_numbers;
        if (kPhase == 2 && r < height) row_numbers = read_row(numbers, f * numbers_free + row);
        Statistic found;
        for (int bundle = 0; bundle < bundles; ++bundle) {
            load(bundle, r, dropped);
            if (kPhase == 1) {
                absorb(found, held, kHold);
                continue;
            }
#pragma unroll
            for (int h = 0; h < kHold; ++h) {
                const int piece = piece_of(bundle, h);
                if (piece < pieces && r < height)
                    emit(out + r * pitch + piece * kPiece, held, h, row_numbers);
            }
        }
        if (kPhase == 1) {
            join_lanes(found, lanes);
            if (across == 0 && r < height)
                write_row(numbers, f * numbers_free + c.x + r,
                          kOp == kSoftmax ? found.top : found.sum, found.sum);
        }
    }

    // 3. What is left between the panel's last slot and the next panel.
    if (kPhase == 2)
        for (int i = lane; i < gap; i += 32)
            out[(height - 1) * pitch + (width + 7) / 8 * 8 + i] = from_float<out_t>(0.0f);
}

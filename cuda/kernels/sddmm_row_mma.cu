// sddmm_row_mma.cu — scores at the kept positions of short rows of a RowLayout, half precision.
//
//     out[f, n] = scale · Σ_d q[f, e, i, d] · k[f, e, j, d]      n-th position = (e, i, j)
//
//   tensors   as sddmm_row.cu, float16 or bfloat16 q and k
//   grid      any; its warps walk over items and matrices (row.cuh, OWN 1)
//   block     128 threads: a warp takes four items, eight kept rows of k of each per round
//   smem      none
//   registers q: 4 · PIECES, gathered pieces: 32, sums: 8;
//             ptxas 13.0, sm_90a: 64 at D = 64 beside other kernels
//   needs     sm_80; rows of q and k 16-byte aligned, D in whole 16-byte pieces, at most 128
//
// The gathered pieces are the A operand of mma.m16n8k16 as they come: rows 0–7 are keys of one item,
// rows 8–15 of another, and columns 0–3 of B the four rows of q. Of the 32 sums of a fragment those
// of a key with its own row count, so that nothing in one row ever touches another. That is a
// fraction of the tensor core's work, and less than a quarter of the instructions that converting,
// multiplying and adding across lanes take: the kernel waits for L2 with few warps.
#include "mma.cuh"
#include "row.cuh"

constexpr int kPieces = MG_PIECES;  // 16-byte pieces of a row per lane: t, t + 4, …
constexpr int kKeep = MG_KEEP;      // run-time mask: 0 none, 1 over columns, 2 over rows
constexpr int kPairs = kItems / 2;
constexpr int kTogether = kPieces <= 2 ? kPairs : 1;  // pairs of items whose loads fly together
static_assert(kOwn && kItems == 4 && kRound == 8 && kRegisters == 1, "eight keys of four items");
static_assert(kDtype != 2 && kPieces <= 4, "half precision, D of at most 128");

extern "C" __global__ void __launch_bounds__(32 * kWarps, kPieces > 2 ? 4 : kPieces < 2 ? 5 : kBeside && kKeep != 1 ? 8 : 6)
    sddmm_row_mma(out_t *__restrict__ out, i64 out_free,                                    //
                  const operand_t *__restrict__ q, i64 q_free, i64 q_entry, u32 q_row,      // bytes
                  const operand_t *__restrict__ k, i64 k_free, i64 k_entry, u32 k_row,      //
                  const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,  //
                  const int4 *__restrict__ items, const int *__restrict__ columns,
                  int item_count, int matrices, int rows, int pieces, float scale, i64 positions,
                  int gap) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Slots between this part and the next hold zeros.
    if (int(threadIdx.x) < gap)
        for (int f = blockIdx.x; f < matrices; f += gridDim.x)
            out[f * out_free + positions + threadIdx.x] = from_float<out_t>(0.0f);
    const auto inside = [&](int v) { return kExact || t + 4 * v < pieces; };

    int next = 0;
    const auto look_up = [&](const RowItem &item, int base) {  // beyond the end: the first row of k
        const int key = base + lane % kRound;
        next = key < item.count ? __ldg(columns + item.first + key) : 0;
    };
    RowWalk walk = RowWalk::start(item_count);
    if (walk.done(item_count, matrices)) return;
    RowItem ahead = walk.item(items, item_count, matrices, lane);
    look_up(ahead, 0);
    while (true) {
        // 1. Items of this lane's eight, lane / 8, and the next.
        const RowItem item = ahead;
        const i64 f = walk.matrix;
        walk.advance(item_count);
        ahead = walk.item(items, item_count, matrices, lane);
        const int count = longest(item);
        if (count == 0) look_up(ahead, 0);
        const int entry = item.row / rows, row = item.row - entry * rows;
        const char *const k_base = reinterpret_cast<const char *>(k + f * k_free + entry * k_entry);
        const u8 *const kept = keep + f * keep_free + entry * keep_entry;
        const bool row_dropped = kKeep == 2 && !kept[row * keep_at];
        out_t *const scores = out + f * out_free + item.first;

        // 2. B: this lane's pieces of the row of q of item g % 4.
        const u64 q_mine = reinterpret_cast<u64>(q + f * q_free + entry * q_entry) + u64(row) * q_row;
        const char *const q_base =
            reinterpret_cast<const char *>(__shfl_sync(kAllLanes, q_mine, g % 4 * 8)) + t * 16;
        Piece mine[kPieces];
#pragma unroll
        for (int v = 0; v < kPieces; ++v) {
            mine[v].clear();
            if (inside(v)) mine[v].load(q_base + v * 64);
        }

        for (int base = 0; base < count; base += kRound) {
            const int column = next;
            if (base + kRound < count)
                look_up(item, base + kRound);
            else
                look_up(ahead, 0);

            // 3. A: key g of each item. Sums of pair p: c[p][0] of item 2 p, c[p][3] of 2 p + 1, in
            //    the lanes that hold columns 2 p and 2 p + 1.
            const u64 address = reinterpret_cast<u64>(row_address(k_base, column, k_row));
            float c[kPairs][4] = {};
#pragma unroll
            for (int start = 0; start < kPairs; start += kTogether) {
                Piece theirs[kTogether][2][kPieces];
#pragma unroll
                for (int p = 0; p < kTogether; ++p)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int of = ((start + p) * 2 + half) * 8 + g;
                        const char *const from =
                            reinterpret_cast<const char *>(__shfl_sync(kAllLanes, address, of)) +
                            t * 16;
#pragma unroll
                        for (int v = 0; v < kPieces; ++v) {
                            if (!kExact) theirs[p][half][v].clear();
                            if (inside(v)) theirs[p][half][v].load(from + v * 64);
                        }
                    }
#pragma unroll
                for (int p = 0; p < kTogether; ++p)
#pragma unroll
                    for (int v = 0; v < kPieces; ++v)
#pragma unroll
                        for (int w = 0; w < 4; w += 2) {
                            const u32 (&even)[4] = theirs[p][0][v].word;
                            const u32 (&odd)[4] = theirs[p][1][v].word;
                            const u32 a[4] = {even[w], odd[w], even[w + 1], odd[w + 1]};
                            mma_16x8x16<operand_t>(c[start + p], a, mine[v].word[w],
                                                   mine[v].word[w + 1]);
                        }
            }

            // 4. To the lane that looked up the key: lane 8 · item + key.
            const int from = lane % 8 * 4 + lane / 16;
            const float even = __shfl_sync(kAllLanes, t ? c[1][0] : c[0][0], from);
            const float odd = __shfl_sync(kAllLanes, t ? c[1][3] : c[0][3], from);
            const float score = scale * (lane / 8 % 2 ? odd : even);
            const int key = base + lane % kRound;
            if (key >= item.count) continue;
            bool live = !row_dropped;
            if (kKeep == 1) live = kept[column * keep_at];
            scores[key] = from_float<out_t>(live ? score : 0.0f);
        }
        if (walk.done(item_count, matrices)) return;
    }
}

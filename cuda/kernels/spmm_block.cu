// spmm_block.cu: a BlockLayout, or its transpose, times a dense matrix.
//
//   tensors   values (F, slots); x (F, E, inner, D), any strides but the last; out (F, E, outer, D)
//             items (NBE) int4: entry, block row, block column, mask      plans/cuda_block.py
//             listed (NBE): items by columns (the transpose); bounds into it; order: longest first
//             masks (M, S, S / 8), used (M, S / 8): inner positions with a live element
//             keep bool over inner or outer positions, any strides
//   grid      (E * block rows * max(S / 64, 1), column tiles of x, F)
//             a CTA: min(S, 64) rows of one block row of the result x WIDE columns
//   block     128 threads: 2 x 2 warps (S >= 64), 1 x 4 below
//   smem      SpmmShared::kBytes: 3 stages of (rows + WIDE) x 64 elements (32 of float32)
//   registers accumulators S / 2 (WIDE 64) or S (WIDE 128), at most 64; at S 64: 122 (WIDE 64),
//             168 (128), 128 (float32), 156 (TF32)
//   needs     sm_80; rows of x and out 16-byte aligned, D % 8 == 0
//
// Blocks smaller than a step go through side by side, larger ones in pieces. Sums run over the blocks
// of a block row in order: a result depends on its own row alone. spmm.cuh has the pipeline.
#include "spmm.cuh"

constexpr int kSize = MG_SIZE;
constexpr bool kTransposed = MG_TRANSPOSED;
constexpr int kKeep = MG_KEEP;  // run-time mask: 0 none, 1 over inner positions, 2 over outer ones
constexpr bool kAdd = MG_ADD;   // out += (float32), for several parts one after the other
static_assert(kSize == 16 || kSize == 32 || kSize == 64 || kSize == 128, "SIZE: 16, 32, 64, 128");
static_assert(!kAdd || kOut == 2, "ADD accumulates into float32");
constexpr int kRows = kSize < 64 ? kSize : 64;
constexpr int kHalves = kSize / kRows;

struct BlockWalk {
    struct Note {
        int block, mask, item;  // inner block, mask, item; block < 0: none
    };
    int steps;
    int first, count;   // of this block row
    int down;           // first result row inside the block
    int inner;          // rows of x
    i64 shift;          // first slot
    const int4 *items;  // of all entries
    const int *listed;
    const u8 *masks, *used;
    const u8 *kept;  // of this entry
    i64 keep_at;

    __device__ __forceinline__ Note note(int step, int k) const {
        const int n = (step * kDepth + k) / kSize;
        if (n >= count) return {-1, -1, -1};
        const int item = kTransposed ? __ldg(listed + first + n) : first + n;
        const int4 raw = __ldg(items + item);
        return {kTransposed ? raw.y : raw.z, raw.w, item};
    }
    __device__ __forceinline__ int source(const Note &note, int step, int k) const {
        if (note.block < 0) return -1;
        const int inside = (step * kDepth + k) % kSize;
        const int row = note.block * kSize + inside;
        if (row >= inner) return -1;
        if (note.mask >= 0) {
            const u32 byte = __ldg(used + i64(note.mask) * (kSize / 8) + inside / 8);
            if (!(byte >> (inside % 8) & 1)) return -1;
        }
        if (kKeep == 1 && !kept[row * keep_at]) return -1;
        return row;
    }
    __device__ __forceinline__ int2 tag(const Note &note) const {
        return make_int2(note.item, note.mask);
    }
    __device__ __forceinline__ bool locate(int2 tag, int step, int m, int k, i64 &slot,
                                           u32 &bits) const {
        if (tag.x < 0) return false;
        const int inside = (step * kDepth + k) % kSize;
        const int row = kTransposed ? inside : down + m, column = kTransposed ? down + m : inside;
        const int at = row * kSize + column;
        slot = shift + i64(tag.x) * (kSize * kSize) + at;
        bits = kFull;
        if (tag.y >= 0) {
            const u32 byte = __ldg(masks + i64(tag.y) * (kSize * kSize / 8) + at / 8);
            bits = byte >> (at % 8) & kFull;
        }
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, kValues == kDtype ? 3 : 2)
    spmm_block(out_t *__restrict__ out, const value_t *__restrict__ values, i64 slots, i64 shift,
               const operand_t *__restrict__ x, i64 x_free, i64 x_entry, i64 x_row,        //
               const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,    //
               const int4 *__restrict__ items, const int *__restrict__ listed,
               const int *__restrict__ bounds, const int *__restrict__ order,
               const u8 *__restrict__ masks, const u8 *__restrict__ used, int entries,
               int block_rows, int outer, int inner, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    using Split = Warps<kRows, kWide>;
    const int line = order[blockIdx.x / kHalves], down = blockIdx.x % kHalves * kRows;
    const int e = line / block_rows, first_row = line % block_rows * kSize + down;
    const i64 f = blockIdx.z;
    const int from = blockIdx.y * kWide;
    const int first = bounds[line], count = bounds[line + 1] - first;
    const u8 *kept = keep + f * keep_free + e * keep_entry;
    const int steps = (count * kSize + kDepth - 1) / kDepth;
    const BlockWalk walk{steps, first, count, down, inner, shift, items, listed,
                         masks, used,  kept,  keep_at};

    float acc[Split::kM / 16][Split::kN / 8][4];
    spmm_tiles<kTransposed, kRows>(acc, shared, values + f * slots,
                                   x + f * x_free + e * x_entry, x_row, from, width, walk);

    out_t *mine = out + ((f * entries + e) * outer + first_row) * width;
    spmm_store<kRows, kAdd>(
        acc, scale, from, width,
        [&](int m) { return first_row + m < outer ? mine + i64(m) * width : nullptr; },
        [&](int m) { return kKeep == 2 && !kept[(first_row + m) * keep_at]; });
}

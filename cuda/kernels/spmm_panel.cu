// spmm_panel.cu: panels, or their transposes, times a dense matrix; float32 partial sums.
//
//   tensors   values (F, slots); x (F, E, inner, D), any strides but the last
//             partials float32 (F, W * 64, D): 64 rows for each work item
//             panels (P) 11 int64, panel.cuh; lists, mask_bits            plans/cuda_panel.py
//             used: bytes, 1 for each inner position of a masked panel with a live element
//             work (W) int4: panel, first outer position, first inner one, inner ones
//             keep bool over inner or outer positions, any strides
//   grid      (W, column tiles of x, F)    a CTA: 64 outer positions of a panel x WIDE columns
//   block     128 threads: 2 x 2 warps
//   smem      SpmmShared::kBytes
//   registers accumulators 32 (WIDE 64) or 64; 140 (WIDE 64), 168 (128), 167 (float32)
//   needs     sm_80; rows of x 16-byte aligned, D % 8 == 0
//
// Outer positions are the panel's rows and inner ones its columns; the other way round for the
// transpose. Long inner ranges are cut into work items by the plan; spmm_merge adds the partial sums
// of a result row in work order.
#include "panel.cuh"
#include "spmm.cuh"

constexpr bool kTransposed = MG_TRANSPOSED;
constexpr int kKeep = MG_KEEP;  // run-time mask: 0 none, 1 over inner positions, 2 over outer ones
constexpr int kRows = 64;

struct PanelWalk {
    struct Note {
        int row;  // of x, or negative
    };
    int steps;
    int first, end;    // inner positions of the panel
    int outer0;        // first outer position
    int outer, pitch;  // outer positions; slots of a row
    int start;         // of the inner range, or -1: listed
    const int *list;   // of the panel
    const u8 *used;    // of the panel, or nullptr
    const u8 *mask;    // of the panel, or nullptr
    i64 slot;          // of the panel
    const u8 *kept;
    i64 keep_at;

    __device__ __forceinline__ Note note(int step, int k) const {
        const int at = first + step * kDepth + k;
        if (at >= end || (used && !__ldg(used + at))) return {-1};
        return {start >= 0 ? start + at : __ldg(list + at)};
    }
    __device__ __forceinline__ int source(const Note &note, int, int) const {
        if (note.row < 0 || (kKeep == 1 && !kept[note.row * keep_at])) return -1;
        return note.row;
    }
    __device__ __forceinline__ int2 tag(const Note &) const { return make_int2(-1, -1); }
    __device__ __forceinline__ bool locate(int2, int step, int m, int k, i64 &slot_at,
                                           u32 &bits) const {
        const int in = first + step * kDepth + k, out = outer0 + m;
        // Whole chunks lie inside the pitch; what overhangs `end` there is dead or meets no row.
        if (in >= end || out >= outer) return false;
        const i64 at = kTransposed ? i64(in) * pitch + out : i64(out) * pitch + in;
        slot_at = slot + at;
        bits = mask ? u32(__ldg(mask + at / 8)) >> (at % 8) & kFull : kFull;
        return true;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, kValues == kDtype ? 3 : 2)
    spmm_panel(float *__restrict__ partials, const value_t *__restrict__ values, i64 slots,  //
               const operand_t *__restrict__ x, i64 x_free, i64 x_entry, i64 x_row,          //
               const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,      //
               const Panel *__restrict__ panels, const int *__restrict__ row_list,
               const int *__restrict__ column_list, const u8 *__restrict__ mask_bits,
                const u8 *__restrict__ used,
               const int4 *__restrict__ work, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    using Split = Warps<kRows, kWide>;
    const int4 item = work[blockIdx.x];
    const Panel panel = panels[item.x];
    const i64 f = blockIdx.z, e = panel.entry;
    const int from = blockIdx.y * kWide;
    const u8 *kept = keep + f * keep_free + e * keep_entry;
    const int outer = int(kTransposed ? panel.columns : panel.rows);
    const int start = int(kTransposed ? panel.row_start : panel.column_start);
    const int *list = kTransposed ? row_list + panel.row_at : column_list + panel.column_at;
    const i64 used_at = kTransposed ? panel.row_used : panel.column_used;
    const PanelWalk walk{(item.w + kDepth - 1) / kDepth,
                         item.z,
                         item.z + item.w,
                         item.y,
                         outer,
                         int(panel.pitch()),
                         start,
                         list,
                         used_at < 0 ? nullptr : used + used_at,
                         panel.mask < 0 ? nullptr : mask_bits + panel.mask,
                         panel.slot,
                         kept,
                         keep_at};

    float acc[Split::kM / 16][Split::kN / 8][4];
    spmm_tiles<kTransposed, kRows>(acc, shared, values + f * slots,
                                   x + f * x_free + e * x_entry, x_row, from, width, walk);

    float *mine = partials + (f * gridDim.x + blockIdx.x) * i64(kRows) * width;
    spmm_store<kRows, false>(
        acc, scale, from, width,
        [&](int m) { return item.y + m < outer ? mine + i64(m) * width : nullptr; },
        [&](int m) {
            if (kKeep != 2) return false;
            const i64 at = item.y + m;
            const int mine_at =
                kTransposed ? panel.column(column_list, at) : panel.row(row_list, at);
            return !kept[mine_at * keep_at];
        });
}

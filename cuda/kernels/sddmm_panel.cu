// sddmm_panel.cu: values of panels, scale * Q K^T at every slot; rows and columns gathered.
//
//   tensors   q (F, E, nq, D), k (F, E, nk, D), any strides but the last; out (F, slots)
//             panels (P) 11 int64, panel.cuh; row_list, column_list, mask_bits
//             tiles (T) int4: panel, first row, first column, columns        plans/cuda_panel.py
//             keep bool (F, E, nk) or (F, E, nq), any strides
//   grid      (T, F)     a CTA: 64 rows and at most 256 columns of one panel
//   block     128 threads: 2 x 2 warps of 32 x 32
//   smem      SddmmShared::kBytes
//   registers accumulators 32, Q fragments D / 2; 115 (D 16), 165 (64), 233 (128), 167 (float32)
//   needs     sm_80; rows of q and k 16-byte aligned, D % 8 == 0, D <= 256
//
// Padding columns of the pitch, and the slots between a panel and the next multiple of 128, are
// written zero.
#include "panel.cuh"
#include "sddmm.cuh"

constexpr int kKeep = MG_KEEP;  // run-time mask: 0 none, 1 over columns (keys), 2 over rows
constexpr int kRows = 64;

struct PanelPlace {
    out_t *out;      // the tile's first element
    const u8 *mask;  // the byte of the tile's first element, or nullptr
    i64 pitch;
    int height, width;  // rows and columns stored, the pitch's padding included

    template <int kWidth> __device__ __forceinline__ u32 live(int row, int column) const {
        if (!mask) return ~0u;
        const u8 *at = mask + row * (pitch / 8) + column / 8;
        u32 bits = 0;
#pragma unroll
        for (int b = 0; b < kWidth / 8; ++b)
            if (column + 8 * b < width) bits |= u32(__ldg(at + b)) << (8 * b);
        return bits;
    }
    __device__ __forceinline__ out_t *at(int row, int column) const {
        return row < height && column < width ? out + row * pitch + column : nullptr;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, kDim > 64 || kDtype == 2 ? 2 : 3)
    sddmm_panel(out_t *__restrict__ out, i64 slots,                                        //
                const operand_t *__restrict__ q, i64 q_free, i64 q_entry, i64 q_row,       //
                const operand_t *__restrict__ k, i64 k_free, i64 k_entry, i64 k_row,       //
                const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,   //
                const Panel *__restrict__ panels, const int *__restrict__ row_list,
                const int *__restrict__ column_list, const u8 *__restrict__ mask_bits,
                const int4 *__restrict__ tiles, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    int *rows = reinterpret_cast<int *>(shared), *columns = rows + kRows;
    const int4 tile = tiles[blockIdx.x];
    const Panel panel = panels[tile.x];
    const i64 f = blockIdx.y, e = panel.entry;
    const u8 *kept = keep + f * keep_free + e * keep_entry;

    for (int i = threadIdx.x; i < kRows; i += kThreads) {
        int row = -1;
        if (tile.y + i < panel.rows) {
            row = panel.row(row_list, tile.y + i);
            if (kKeep == 2 && !kept[row * keep_at]) row = -1;
        }
        rows[i] = row;
    }
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
        int column = -1;
        if (i < tile.w && tile.z + i < panel.columns) {
            column = panel.column(column_list, tile.z + i);
            if (kKeep == 1 && !kept[column * keep_at]) column = -1;
        }
        columns[i] = column;
    }

    const i64 pitch = panel.pitch();
    out_t *mine = out + f * slots + panel.slot;
    const i64 left = panel.rows - tile.y;
    const int height = left < kRows ? int(left) : kRows;
    const int stored = (tile.w + 7) / 8 * 8;  // tiles start at multiples of 64
    if (left <= kRows && tile.z == 0) {  // the panel's last rows: the gap after it is this CTA's
        const i64 end = panel.rows * pitch, next = (end + 127) / 128 * 128;
        for (i64 i = end + threadIdx.x; i < next; i += kThreads) mine[i] = from_float<out_t>(0.0f);
    }
    __syncthreads();

    const u8 *mask = panel.mask < 0
                         ? nullptr
                         : mask_bits + panel.mask + tile.y * (pitch / 8) + tile.z / 8;
    const PanelPlace place{mine + tile.y * pitch + tile.z, mask, pitch, height, stored};
    const int groups = (stored + kGroup - 1) / kGroup;
    sddmm_tiles<kRows>(shared, groups, q + f * q_free + e * q_entry, q_row,
                       k + f * k_free + e * k_entry, k_row, width, scale, place);
}

// spmm_nm_any.cu: an N:M matrix of any encoding and dtype, or its transpose, times a dense matrix.
//
//   tensors   values (F, slots); metadata (E, ...), see nm_patch.cuh; out (F, E, outer, N) or, TURNED,
//             (F, E, N, outer), contiguous; x (F, E, inner, N) with N contiguous (MAJOR 1) or inner (MAJOR 0)
//             keep bool (F, E, n), any strides; bias (outer) or none, TURNED only
//   grid      (row tiles of 64, column tiles of WIDE, matrices)
//   block     128 threads, 2 x 2 warps
//   smem      3 stages of a dense patch of S and as much of x: 64 x kDepth and WIDE x kDepth
//   floor     2 · outer · inner · N FLOP at 500 TFLOP/s of mma.sync (halves): what N:M leaves out is computed
//   needs     sm_80; rows of x 16-byte aligned and multiples of 8 elements long, N % 8 == 0 unless TURNED
//
// S is expanded on chip. Dead slots are left out whatever they hold; rows of x that no element of the patch
// meets are zeros in it: 0 · NaN is NaN.
#include "activation.cuh"
#include "nm_patch.cuh"

constexpr bool kTransposed = MG_TRANSPOSED, kMajor = MG_MAJOR, kTurned = MG_TURNED;
static_assert(kTurned || !kActivation, "ACTIVATION: TURNED only");
constexpr int kWide = MG_WIDE, kRows = 64, kStages = 3;
using Split = Warps<kRows, kWide>;
constexpr int kDown = kTransposed ? kDepth : kRows, kAcross = kTransposed ? kRows : kDepth;  // of a patch of S
constexpr int kLeftPitch = kAcross + kPad, kLeft = kDown * kLeftPitch;
constexpr int kRightPitch = (kMajor ? kWide : kDepth) + kPad, kRight = (kMajor ? kDepth : kWide) * kRightPitch;
constexpr int kUsed = kDepth / 32;

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    spmm_nm_any(out_t *__restrict__ out, const value_t *__restrict__ values, const u8 *__restrict__ metadata,
                const operand_t *__restrict__ x, i64 x_free, i64 x_entry, i64 x_line,   //
                const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,  //
                const operand_t *__restrict__ bias, i64 metadata_entry, int entries, int rows, int columns,
                int stored, int packed, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 used[kStages][kUsed];
    __shared__ int lines[kStages][kMajor ? kDepth : kWide];
    operand_t *stages = reinterpret_cast<operand_t *>(shared);
    const int tid = threadIdx.x, warp = tid / 32;
    const int m0 = warp / Split::kAcross * Split::kM, n0 = warp % Split::kAcross * Split::kN;
    const i64 matrix = blockIdx.z, f = matrix / entries, e = matrix % entries;
    const int first = blockIdx.x * kRows, from = blockIdx.y * kWide;
    const int outer = kTransposed ? columns : rows, inner = kTransposed ? rows : columns;
    const Matrix s{values + matrix * stored * packed, metadata + e * metadata_entry,
                   keep + f * keep_free + e * keep_entry, keep_at, rows, columns, stored, packed};
    const operand_t *right = x + f * x_free + e * x_entry;
    const int steps = (inner + kDepth - 1) / kDepth;

    auto issue = [&](int step) {  // everybody
        const int at = step % kStages, k0 = step * kDepth;
        operand_t *left = stages + at * (kLeft + kRight), *to = left + kLeft;
        __syncthreads();  // nobody multiplies what was here
        if (step < steps) {
            for (int i = tid; i < kLeft / kChunk; i += kThreads) store16(left + i * kChunk, zero16<operand_t>());
            // Every row keeps something; so all of them are in use where no mask drops any.
            if (tid < kUsed) {
                const int left_over = inner - k0 - 32 * tid;
                used[at][tid] = !kTransposed || kKeep || left_over <= 0 ? 0 : left_over >= 32 ? ~0u : (1u << left_over) - 1;
            }
        }
        __syncthreads();
        if (step < steps) {
            const int row0 = kTransposed ? k0 : first, column0 = kTransposed ? first : k0;
            each_stored<kDown, kAcross>(s, row0, column0, [&](int row, int column, i64 slot, bool live) {
                if (!live) return;
                const int down = row - row0, across = column - column0;
                left[down * kLeftPitch + across] = from_float<operand_t>(to_float(s.values[slot]));
                if constexpr (!kTransposed || kKeep) note_used(used[at], kTransposed ? down : across);
            });
        }
        __syncthreads();
        if (step < steps) {
            if constexpr (kMajor) {
                if (tid < kDepth) lines[at][tid] = used[at][tid / 32] >> (tid % 32) & 1 ? k0 + tid : -1;
            } else {
                for (int n = tid; n < kWide; n += kThreads) lines[at][n] = from + n < width ? from + n : -1;
            }
        }
        __syncthreads();
        if (step < steps) {
            if constexpr (kMajor)
                load_rows<kDepth, kWide, kRightPitch>(to, lines[at], right, x_line, from, width);
            else
                load_rows<kWide, kDepth, kRightPitch>(to, lines[at], right, x_line, k0, (inner + 7) / 8 * 8);
        }
        copy_commit();
    };

    float acc[Split::kM / 16][Split::kN / 8][4];
    clear(acc);
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) issue(s);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        issue(step + kStages - 1);
        copy_wait<kStages - 1>();
        __syncthreads();
        operand_t *left = stages + step % kStages * (kLeft + kRight), *to = left + kLeft;
        if constexpr (!kMajor) {
            bool all = true;
#pragma unroll
            for (int w = 0; w < kUsed; ++w) all = all && used[step % kStages][w] == ~0u;
            if (!all) {
                for (int i = tid; i < kWide * kDepth; i += kThreads)
                    if (!(used[step % kStages][i % kDepth / 32] >> (i % 32) & 1))
                        to[i / kDepth * kRightPitch + i % kDepth] = from_float<operand_t>(0.f);
                __syncthreads();
            }
        }
        product<kTransposed, kMajor, kDepth>(acc, left + m0 * (kTransposed ? 1 : kLeftPitch), kLeftPitch,
                                             to + n0 * (kMajor ? 1 : kRightPitch), kRightPitch);
    }

    const int lane = tid % 32, g = lane / 4, t = lane % 4;
    out_t *mine = out + matrix * outer * width;
#pragma unroll
    for (int i = 0; i < Split::kM / 16; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + m0 + 16 * i + 8 * h + g;
            if (row >= outer) continue;
            const float plus = kTurned && bias ? to_float(bias[row]) : 0.f;
#pragma unroll
            for (int j = 0; j < Split::kN / 8; ++j) {
                const int column = from + n0 + 8 * j + 2 * t;
                const float low = acc[i][j][2 * h] * scale, high = acc[i][j][2 * h + 1] * scale;
                if constexpr (kTurned) {
                    if (column < width) mine[static_cast<i64>(column) * outer + row] = from_float<out_t>(activated(low + plus));
                    if (column + 1 < width)
                        mine[static_cast<i64>(column + 1) * outer + row] = from_float<out_t>(activated(high + plus));
                } else if (column < width) {
                    store_pair(mine + static_cast<i64>(row) * width + column, low, high);
                }
            }
        }
}

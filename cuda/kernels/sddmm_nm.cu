// sddmm_nm.cu: scale · q kᵀ at the slots of an N:M matrix of any encoding and dtype.
//
//   tensors   values (F, slots), every slot is written: dead ones with zero; metadata (E, ...), nm_patch.cuh
//             q (F, E, rows, D), k (F, E, columns, D): D contiguous, or (MAJOR 1) rows and columns contiguous
//             keep bool (F, E, n), any strides
//   grid      (row tiles of 64, column tiles of 64, matrices)
//   block     128 threads, 2 x 2 warps
//   smem      3 stages of 64 x kDepth of q and of k; then the scores, 64 x 64 float32
//   floor     2 · rows · columns · D FLOP at 500 TFLOP/s of mma.sync (halves): all scores are computed
//   needs     sm_80; lines of q and k 16-byte aligned and multiples of 8 elements long
#include "nm_patch.cuh"

constexpr bool kMajor = MG_MAJOR;
constexpr int kTile = 64, kStages = 3;
using Split = Warps<kTile, kTile>;
constexpr int kPitch = (kMajor ? kTile : kDepth) + kPad, kSide = (kMajor ? kDepth : kTile) * kPitch;
constexpr int kScores = kTile + 1;

// The stored value and its dtype: MG_VALUES is what is written.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    sddmm_nm(value_t *__restrict__ values, const u8 *__restrict__ metadata,
             const operand_t *__restrict__ q, i64 q_free, i64 q_entry, i64 q_line,     //
             const operand_t *__restrict__ k, i64 k_free, i64 k_entry, i64 k_line,     //
             const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,  //
             i64 metadata_entry, int entries, int rows, int columns, int stored, int packed, int depth, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ int left_lines[kStages][kTile], right_lines[kStages][kTile];
    operand_t *stages = reinterpret_cast<operand_t *>(shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int m0 = warp / Split::kAcross * Split::kM, n0 = warp % Split::kAcross * Split::kN;
    const i64 matrix = blockIdx.z, f = matrix / entries, e = matrix % entries;
    const int row0 = blockIdx.x * kTile, column0 = blockIdx.y * kTile;
    const operand_t *left = q + f * q_free + e * q_entry, *right = k + f * k_free + e * k_entry;
    value_t *to = values + matrix * stored * packed;
    const Matrix s{to, metadata + e * metadata_entry, keep + f * keep_free + e * keep_entry, keep_at, rows, columns,
                   stored, packed};
    const int steps = (depth + kDepth - 1) / kDepth;
    auto issue = [&](int step) {
        const int at = step % kStages;
        if (step < steps) {
            operand_t *a = stages + at * 2 * kSide, *b = a + kSide;
            if constexpr (kMajor) {
                if (tid < kDepth) left_lines[at][tid] = step * kDepth + tid < depth ? step * kDepth + tid : -1;
                __syncthreads();
                load_rows<kDepth, kTile, kPitch>(a, left_lines[at], left, q_line, row0, (rows + 7) / 8 * 8);
                load_rows<kDepth, kTile, kPitch>(b, left_lines[at], right, k_line, column0, (columns + 7) / 8 * 8);
            } else {
                if (tid < kTile) {
                    left_lines[at][tid] = row0 + tid < rows ? row0 + tid : -1;
                    right_lines[at][tid] = column0 + tid < columns ? column0 + tid : -1;
                }
                __syncthreads();
                load_rows<kTile, kDepth, kPitch>(a, left_lines[at], left, q_line, step * kDepth, (depth + 7) / 8 * 8);
                load_rows<kTile, kDepth, kPitch>(b, right_lines[at], right, k_line, step * kDepth, (depth + 7) / 8 * 8);
            }
        }
        copy_commit();
    };

    float acc[Split::kM / 16][Split::kN / 8][4];
    clear(acc);
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) issue(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();
        issue(step + kStages - 1);
        const operand_t *a = stages + step % kStages * 2 * kSide, *b = a + kSide;
        product<kMajor, kMajor, kDepth>(acc, a + m0 * (kMajor ? 1 : kPitch), kPitch,
                                        b + n0 * (kMajor ? 1 : kPitch), kPitch);
    }
    copy_wait<0>();
    __syncthreads();

    float *scores = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int i = 0; i < Split::kM / 16; ++i)
#pragma unroll
        for (int j = 0; j < Split::kN / 8; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                scores[(m0 + 16 * i + 8 * (c / 2) + g) * kScores + n0 + 8 * j + 2 * t + c % 2] = acc[i][j][c] * scale;
    __syncthreads();
    each_stored<kTile, kTile>(s, row0, column0, [&](int row, int column, i64 slot, bool live) {
        const float score = live ? scores[(row - row0) * kScores + column - column0] : 0.f;
        to[slot] = from_float<value_t>(score);
    });
}

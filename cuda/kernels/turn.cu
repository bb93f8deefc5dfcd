// turn.cu: the transpose of a matrix, rounded to another dtype, plus a bias: between rows of tokens and of features.
//
//     out[c, r] = in[r, c] + bias[r]        r < rows; 0 for r from there to pitch
//
//   tensors   in (rows, columns) DTYPE, columns contiguous, rows `step` apart; bias (rows) OUT (BIAS 1)
//             out (columns, pitch) OUT, contiguous
//   grid      (ceil(columns / 32), ceil(pitch / 32))
//   block     256 threads
//   smem      32 × 32 elements, padded
//   needs     sm_80
//
// Without a bias and between equal dtypes bits are moved as they are.
#include "types.cuh"

constexpr bool kBias = MG_BIAS;
constexpr int kSide = 32;

extern "C" __global__ void __launch_bounds__(256)
    turn(out_t *__restrict__ out, const operand_t *__restrict__ in, const out_t *__restrict__ bias, i64 step, i32 rows,
         i32 columns, i32 pitch) {
    __shared__ operand_t tile[kSide][kSide + 4 / sizeof(operand_t)];
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
    const int row = blockIdx.y * kSide, column = blockIdx.x * kSide;
#pragma unroll
    for (int j = y; j < kSide; j += 8)
        if (row + j < rows && column + x < columns) tile[j][x] = in[i64(row + j) * step + column + x];
    __syncthreads();
    const int r = row + x;
    if (r >= pitch) return;
    const float plus = kBias && r < rows ? to_float(bias[r]) : 0.0f;
#pragma unroll
    for (int j = y; j < kSide; j += 8) {
        if (column + j >= columns) return;
        out_t made = from_float<out_t>(0.0f);
        if (r < rows) {
            if constexpr (kBias || kDtype != kOut)
                made = from_float<out_t>(to_float(tile[x][j]) + plus);
            else
                made = tile[x][j];
        }
        out[i64(column + j) * pitch + r] = made;
    }
}

// turn.cu: rows of tokens as rows of features, which some kernels take.
//
//     out[c, r] = in[r, c]        0 for r from rows to pitch
//
//   tensors   in (rows, columns), columns contiguous, rows `step` apart; out (columns, pitch), contiguous
//   grid      (ceil(columns / 32), ceil(pitch / 32))
//   block     256 threads
//   smem      32 × 32 elements, padded
//   floor     each element read and written once, at the rate of memory
//   needs     sm_80
#include "types.cuh"

constexpr int kSide = 32;

extern "C" __global__ void __launch_bounds__(256)
    turn(operand_t *__restrict__ out, const operand_t *__restrict__ in, i64 step, i32 rows, i32 columns, i32 pitch) {
    __shared__ operand_t tile[kSide][kSide + 4 / sizeof(operand_t)];
    const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
    const int row = blockIdx.y * kSide, column = blockIdx.x * kSide;
#pragma unroll
    for (int j = y; j < kSide; j += 8)
        if (row + j < rows && column + x < columns) tile[j][x] = in[i64(row + j) * step + column + x];
    __syncthreads();
    const int r = row + x;
    if (r >= pitch) return;
#pragma unroll
    for (int j = y; j < kSide; j += 8) {
        if (column + j >= columns) return;
        out[i64(column + j) * pitch + r] = r < rows ? tile[x][j] : from_float<operand_t>(0.0f);
    }
}

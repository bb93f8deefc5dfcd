// nm_expand.cu: an N:M matrix as a dense one, for products that have no use for its zeros.
//
//   tensors   values (slots); metadata, see nm_patch.cuh; out (rows, pitch), pitch % 8 == 0
//   grid      (row tiles of 64, column tiles of kDepth)
//   block     128 threads
//   smem      a tile of 64 x kDepth
//   floor     values and metadata read, out written, at 4.24 TB/s
//   needs     sm_80
//
// Dead slots are zeros whatever they hold.
#include "nm_patch.cuh"

constexpr int kTile = 64, kPitch = kDepth + kPad;

extern "C" __global__ void __launch_bounds__(kThreads)
    nm_expand(operand_t *__restrict__ out, const value_t *__restrict__ values, const u8 *__restrict__ metadata,
              int rows, int columns, int stored, int packed, int pitch) {
    __shared__ __align__(16) operand_t tile[kTile * kPitch];
    const int row0 = blockIdx.x * kTile, column0 = blockIdx.y * kDepth;
    const Matrix s{values, metadata, nullptr, 0, rows, columns, stored, packed};
    for (int i = threadIdx.x; i < kTile * kPitch / kChunk; i += kThreads)
        store16(tile + i * kChunk, zero16<operand_t>());
    __syncthreads();
    each_stored<kTile, kDepth>(s, row0, column0, [&](int row, int column, i64 slot, bool live) {
        if (live)
            tile[(row - row0) * kPitch + column - column0] = from_float<operand_t>(to_float(s.values[slot]));
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kDepth / kChunk; i += kThreads) {
        const int row = i / (kDepth / kChunk), column = i % (kDepth / kChunk) * kChunk;
        if (row0 + row < rows && column0 + column < pitch)
            store16(out + static_cast<i64>(row0 + row) * pitch + column0 + column, load16(tile + row * kPitch + column));
    }
}

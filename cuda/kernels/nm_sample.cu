// nm_sample.cu: the elements of a dense matrix at the slots of an N:M one.
//
//   tensors   values (slots), every slot is written: dead ones with zero; metadata, see nm_patch.cuh
//             dense (rows, pitch)
//   grid      (row tiles of 64, column tiles of 64)
//   block     128 threads
//   floor     dense and metadata read, values written, at 4.24 TB/s
//   needs     sm_80
#include "nm_patch.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    nm_sample(value_t *__restrict__ values, const u8 *__restrict__ metadata, const operand_t *__restrict__ dense,
              int rows, int columns, int stored, int packed, int pitch) {
    const Matrix s{values, metadata, nullptr, 0, rows, columns, stored, packed};
    each_stored<64, 64>(s, blockIdx.x * 64, blockIdx.y * 64, [&](int row, int column, i64 slot, bool live) {
        const float v = live ? to_float(dense[static_cast<i64>(row) * pitch + column]) : 0.f;
        values[slot] = from_float<value_t>(v);
    });
}

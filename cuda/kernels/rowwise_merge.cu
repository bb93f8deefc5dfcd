// rowwise_merge.cu — joins the row statistics of the parts of a layout, in a fixed order.
//
//     OP 0 softmax    top, Σ exp(x − top) of every part  ->  joint top and 1 / sum, and lse
//     OP 1 backward   Σ p · g of every part              ->  joint sum − grad_lse
//     OP 2 sum        sums of every part                 ->  joint sum
//
//   tensors   found (F, DENSE · lines + places), of the DENSE parts that have a place for every row,
//             then of panels; made (F, lines); float2 for softmax, else float. lines = E · rows
//             piece_ptr (lines + 1) int32 into piece_list int32: places of each row in panels, or null
//             lse, grad_lse (F, lines) float32 or null
//   grid      (ceil(lines / 128), F)
//   block     128 threads, a row each
//   smem      none
//   registers ptxas 13.0, sm_90a: 39 … 52
//   needs     sm_80
#include "rowwise.cuh"

constexpr int kDense = MG_DENSE;

extern "C" __global__ void __launch_bounds__(128, 8)
    rowwise_merge(const float *__restrict__ found, i64 found_free, float *__restrict__ made,
                  float *__restrict__ lse, const float *__restrict__ grad_lse,
                  const int *__restrict__ piece_ptr, const int *__restrict__ piece_list, int lines) {
    const int line = blockIdx.x * 128 + threadIdx.x;
    if (line >= lines) return;
    const i64 f = blockIdx.y, base = f * found_free, at = f * lines + line;
    const int begin = piece_ptr ? piece_ptr[line] : 0;
    const int end = piece_ptr ? piece_ptr[line + 1] : 0;

    Statistic all;
#pragma unroll
    for (int part = 0; part < kDense; ++part) join_found(all, found, base + i64(part) * lines + line);
    for (int n = begin; n < end; ++n) join_found(all, found, base + i64(kDense) * lines + piece_list[n]);

    Factors numbers = factors_of(all);
    if (kOp == kSoftmax && lse) lse[at] = lse_of(all);
    if (kOp == kBackward && grad_lse) numbers.shift -= grad_lse[at];
    write_row(made, at, numbers.shift, numbers.inverse);
}

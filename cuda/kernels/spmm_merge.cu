// spmm_merge.cu: adds float32 partial sums of result rows in a fixed order.
//
//   tensors   partials float32 (F, parts, D); out (F, E, rows, D)
//             lines (T): rows of out, e * rows + i; bounds (T + 1) into sources; sources: partial rows
//   grid      (ceil(T / 4), F)     a warp: one row of out
//   block     128 threads
//   smem      none
//   registers two sums and addresses
//   needs     sm_80; D % 8 == 0
#include "types.cuh"

constexpr bool kAdd = MG_ADD;  // out += (float32), for several parts one after the other
static_assert(!kAdd || kOut == 2, "ADD accumulates into float32");

extern "C" __global__ void __launch_bounds__(128)
    spmm_merge(out_t *__restrict__ out, const float *__restrict__ partials, i64 parts,
               const int *__restrict__ lines, const int *__restrict__ bounds,
               const int *__restrict__ sources, int count, i64 rows, int width) {
    const int at = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (at >= count) return;
    const i64 f = blockIdx.y;
    const int first = bounds[at], end = bounds[at + 1];
    out_t *to = out + (f * rows + lines[at]) * width;
    const float *from = partials + f * parts * width;
    for (int column = 2 * lane; column < width; column += 64) {
        float2 sum = make_float2(0.0f, 0.0f);
        if constexpr (kAdd) sum = *reinterpret_cast<const float2 *>(to + column);
        for (int n = first; n < end; ++n) {
            const i64 row = __ldg(sources + n);
            const float2 more =
                __ldg(reinterpret_cast<const float2 *>(from + row * width + column));
            sum.x += more.x;
            sum.y += more.y;
        }
        store_pair(to + column, sum.x, sum.y);
    }
}

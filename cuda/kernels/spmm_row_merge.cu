// spmm_row_merge.cu — adds up the partial results of rows that spmm_row cut into several items.
//
//     out[f, e, i, :] = Σ_p partials[f, first + p, :]      in rising order of p
//
//   tensors   partials (F, P, D) float32; splits (NS) int4: row, first partial, their number, unused
//   grid      (NS, ceil(D / 512), F)     a CTA merges up to 512 columns of one row
//   block     128 threads, four columns each
//   smem      none
//   registers ptxas 13.0, sm_90a: 32
//   needs     sm_80; D % 4 == 0; out rows aligned to four elements
#include "types.cuh"

constexpr bool kAdd = MG_ADD;  // out += (float32)

extern "C" __global__ void __launch_bounds__(128)
    spmm_row_merge(out_t *__restrict__ out, i64 out_free, i64 out_entry, i64 out_row,
                   const float *__restrict__ partials, i64 partials_free,
                   const int4 *__restrict__ splits, int rows, int width) {
    const int4 split = __ldg(splits + blockIdx.x);
    const int column = (blockIdx.y * 128 + threadIdx.x) * 4;
    if (column >= width) return;
    const int entry = split.x / rows, row = split.x - entry * rows;
    const i64 f = blockIdx.z;
    const float *from = partials + f * partials_free + i64(split.y) * width + column;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int p = 0; p < split.z; ++p, from += width) {
        const float4 more = *reinterpret_cast<const float4 *>(from);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    struct alignas(4 * sizeof(out_t)) Four {
        out_t at[4];
    };
    Four *const to = reinterpret_cast<Four *>(out + f * out_free + entry * out_entry +
                                              row * out_row + column);
    if (kAdd) {
        const Four old = *to;
        sum.x += to_float(old.at[0]), sum.y += to_float(old.at[1]);
        sum.z += to_float(old.at[2]), sum.w += to_float(old.at[3]);
    }
    *to = {from_float<out_t>(sum.x), from_float<out_t>(sum.y), from_float<out_t>(sum.z),
           from_float<out_t>(sum.w)};
}

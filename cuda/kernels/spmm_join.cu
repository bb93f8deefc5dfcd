// spmm_join.cu: the sum of two float32 partial results, rounded once.
//
//     out[n] = first[n] + second[n]
//
//   tensors   first, second float32 (count); out (count)        all contiguous, 16-byte aligned
//   grid      (ceil(count / 2048))     a CTA takes 2048 elements, a thread eight neighbours
//   block     256 threads
//   smem      none
//   registers two pieces of eight
//   needs     sm_80; count a multiple of 8
#include "types.cuh"

constexpr bool kTwo = MG_TWO;  // else there is no second

extern "C" __global__ void __launch_bounds__(256)
    spmm_join(out_t *__restrict__ out, const float *__restrict__ first,
              const float *__restrict__ second, i64 count) {
    const i64 at = (i64(blockIdx.x) * 256 + threadIdx.x) * 8;
    if (at >= count) return;
    float sum[8];
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
        const Vec<float> one = stream16(first + at + half);
        Vec<float> other = zero16<float>();
        if (kTwo) other = stream16(second + at + half);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[half + i] = kTwo ? one.at[i] + other.at[i] : one.at[i];
    }
#pragma unroll
    for (int start = 0; start < 8; start += Vec<out_t>::kCount) {
        Vec<out_t> made;
#pragma unroll
        for (int i = 0; i < Vec<out_t>::kCount; ++i) made.at[i] = from_float<out_t>(sum[start + i]);
        store16(out + at + start, made);
    }
}

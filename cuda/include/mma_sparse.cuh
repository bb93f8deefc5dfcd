#pragma once
// mma.sp: the warp's matrix multiply with a sparse left operand, sm_80 and later.
#include "mma.cuh"

// c += a b, 16 x 8, over 64 bytes of a dense row: k32 of halves (2:4), or k16 of TF32 (1:2). g = lane / 4,
// t = lane % 4. A lane holds, of the packed left operand and the right one,
//     a[0] (g, bytes 4t..)  a[1] (g+8, 4t..)  a[2] (g, 16+4t..)  a[3] (g+8, 16+4t..)
//     b[i] (k bytes 16i + 4t.., column g)
//     c as of mma_16x8x16
// kSelect: lanes 2s and 2s + 1 of each quad bring the metadata, as in wgmma_sparse.cuh.
template <int kSelect>
__device__ __forceinline__ void mma_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
#if MG_DTYPE == 0
#define MG_SPARSE_MMA "m16n8k32.row.col.f32.f16.f16.f32"
#elif MG_DTYPE == 1
#define MG_SPARSE_MMA "m16n8k32.row.col.f32.bf16.bf16.f32"
#else
#define MG_SPARSE_MMA "m16n8k16.row.col.f32.tf32.tf32.f32"
#endif
    asm volatile("mma.sp::ordered_metadata.sync.aligned." MG_SPARSE_MMA " {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(metadata), "n"(kSelect));
}

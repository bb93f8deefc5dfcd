#pragma once
// Tensor-core instructions of sm_80 and later, each wrapped once, with its register layout.
//
// g = lane / 4, t = lane % 4 throughout. A fragment register holds two 16-bit neighbours, the first
// in the low half.
#include "copy.cuh"
#include "types.cuh"

// Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes, aligned); register i of a lane receives (row g, columns 2t, 2t + 1) of matrix i.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void *row) {
    load_matrices(r, shared_address(row));
}
// The same, each matrix transposed: register i receives (rows 2t, 2t + 1, column g) of matrix i.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], const void *row) {
    load_matrices_transposed(r, shared_address(row));
}

// c += a b, m16n8k16, float32 accumulators. A lane holds
//     a[0] (g, 2t..)  a[1] (g+8, 2t..)  a[2] (g, 2t+8..)  a[3] (g+8, 2t+8..)      row, k
//     b0   (2t.., g)  b1   (2t+8.., g)                                            k, column
//     c[0] (g, 2t)    c[1] (g, 2t+1)    c[2] (g+8, 2t)    c[3] (g+8, 2t+1)        row, column
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const u32 (&a)[4], u32 b0,
                                                    u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const u32 (&a)[4], u32 b0,
                                                           u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Float32 operands never reach the 16-bit form; here so that code for both compiles.
template <>
__device__ __forceinline__ void mma_16x8x16<float>(float (&)[4], const u32 (&)[4], u32, u32) {}

// Float32 rounded to TF32, ties away from zero, as cuBLAS does.
__device__ __forceinline__ u32 to_tf32(float x) {
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}
// c += a b, m16n8k8, TF32 operands. A lane holds
//     a[0] (g, t)   a[1] (g+8, t)   a[2] (g, t+4)   a[3] (g+8, t+4)      row, k
//     b0   (t, g)   b1   (t+4, g)                                        k, column
//     c as above
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#pragma once
// Tiles of a TileLayout as operands of mma.sync: 16 x 16 values of two bytes in fragment order.
//
// Lane 4 g + t of a warp has 16 bytes of a tile, the elements (g, 2t..), (g + 8, 2t..), (g, 2t + 8..),
// (g + 8, 2t + 8..). Lines are the tile's rows, or its columns where the product is with the transpose;
// inner positions are the other side, which is summed over.
#include "mma.cuh"
#include "types.cuh"

// A lane's share of a tile; read by every CTA of a band of x, so it stays in L2 but not in L1.
__device__ __forceinline__ uint4 tile_load(const operand_t *from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ void prefetch_l2(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// The same of a tile that nothing reads again soon: its place in L2 is the first to be given away.
__device__ __forceinline__ uint4 tile_load_once(const void *from) {
    uint4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// An 8 x 8 matrix, (row g, columns 2t, 2t + 1) in each lane, transposed.
__device__ __forceinline__ u32 turned(u32 v) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Lines 0 … 7 in w[0] (line g, inner 2t..) and w[1] (inner 2t + 8..), lines 8 … 15 in w[2], w[3]: two B
// operands of m16n8k16, or with w[1] and w[2] exchanged its A operand.
template <bool kTransposed> __device__ __forceinline__ void tile_lines(u32 (&w)[4], const uint4 &v) {
    if constexpr (kTransposed) {
        w[0] = turned(v.x), w[1] = turned(v.y), w[2] = turned(v.z), w[3] = turned(v.w);
    } else {
        w[0] = v.x, w[1] = v.z, w[2] = v.y, w[3] = v.w;
    }
}

// Zeroes inner positions from `limit` on: what hangs over the edge of the matrix may hold anything.
__device__ __forceinline__ void tile_cut(u32 (&w)[4], int limit) {
    const int at = 2 * (threadIdx.x % 4);
    auto mask = [&](int k) { return (k < limit ? 0x0000FFFFu : 0u) | (k + 1 < limit ? 0xFFFF0000u : 0u); };
    w[0] &= mask(at), w[2] &= mask(at);
    w[1] &= mask(at + 8), w[3] &= mask(at + 8);
}

// Four 8 x 8 matrices by an address of shared memory; see mma.cuh.
template <bool kTurned> __device__ __forceinline__ void matrices(u32 (&r)[4], u32 address) {
    if constexpr (kTurned)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}
// Two of them, by addresses that lanes 0 … 15 give.
__device__ __forceinline__ void two_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

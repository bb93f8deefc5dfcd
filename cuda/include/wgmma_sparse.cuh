// wgmma.sp: the warpgroup matrix multiply of sm_90a with a sparse left operand, each form wrapped once.
//
// D (64 × N, float32, in registers) += A (64 × K, two of every four neighbours kept) · B (K × N), K = 32
// elements of 16 bits or 16 of TF32 (of which one of every two is kept): 64 bytes of a row either way. D as in
// wgmma.cuh. A is in registers: a lane's four hold the packed row's bytes
//     (g, 4t..), (g + 8, 4t..), (g, 16 + 4t..), (g + 8, 16 + 4t..)      g = lane / 4, t = lane % 4
// and of the metadata words that lanes 2s and 2s + 1 of each quad hold (s: the selector) the low half is row
// g, the high half row g + 8; lane 2s has the first 32 bytes' nibbles, lane 2s + 1 the second's.
// B lies in shared memory in the 128-byte swizzle, as wgmma_descriptor says; TF32 only with K contiguous.
// Registers of A and the metadata must be defined after the products in flight are waited for.
#pragma once

#include "types.cuh"

#if MG_DTYPE == 0
#define MG_SPARSE_FORM "k32.f32.f16.f16"
#elif MG_DTYPE == 1
#define MG_SPARSE_FORM "k32.f32.bf16.bf16"
#else
#define MG_SPARSE_FORM "k16.f32.tf32.tf32"
#endif
#if MG_DTYPE == 2
#define MG_SPARSE_TURN(n)
#else
#define MG_SPARSE_TURN(n) ", %" #n
#endif

template <int kN> struct SparseWgmma;

template <> struct SparseWgmma<8> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[4], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n8" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3"
                     "}, {%4, %5, %6, %7}, %8, %9, %10, 1, 1, 1" MG_SPARSE_TURN(11) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

template <> struct SparseWgmma<16> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[8], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n16" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3, %4, %5, %6, %7"
                     "}, {%8, %9, %10, %11}, %12, %13, %14, 1, 1, 1" MG_SPARSE_TURN(15) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

template <> struct SparseWgmma<32> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[16], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                     "}, {%16, %17, %18, %19}, %20, %21, %22, 1, 1, 1" MG_SPARSE_TURN(23) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                       "+f"(d[14]), "+f"(d[15])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

template <> struct SparseWgmma<64> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[32], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                     "}, {%32, %33, %34, %35}, %36, %37, %38, 1, 1, 1" MG_SPARSE_TURN(39) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                       "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
                       "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
                       "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

template <> struct SparseWgmma<128> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[64], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n128" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                     "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
                     "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                     "}, {%64, %65, %66, %67}, %68, %69, %70, 1, 1, 1" MG_SPARSE_TURN(71) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                       "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
                       "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
                       "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                       "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),
                       "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
                       "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
                       "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                       "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),
                       "+f"(d[62]), "+f"(d[63])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

template <> struct SparseWgmma<256> {
    // kSelect: which lanes' metadata; kTransB: N is the contiguous dimension of B.
    template <int kSelect, int kTransB>
    __device__ __forceinline__ static void rs(float (&d)[128], const u32 (&a)[4], u64 b, u32 metadata) {
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n256" MG_SPARSE_FORM " {"
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                     "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
                     "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
                     "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
                     "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
                     "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
                     "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
                     "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
                     "}, {%128, %129, %130, %131}, %132, %133, %134, 1, 1, 1" MG_SPARSE_TURN(135) ";"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
                       "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
                       "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
                       "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]),
                       "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                       "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]),
                       "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
                       "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
                       "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                       "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]),
                       "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]),
                       "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]),
                       "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
                       "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]),
                       "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]),
                       "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
                       "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
                       "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
                       "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
                       "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
                       "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(kSelect), "n"(kTransB));
    }
};

#pragma once
// Tiles in shared memory and the product of two of them by a warp.
//
// A tile's rows are padded by 16 bytes: the pitch is then an odd number of 16-byte units and eight
// rows of one column chunk lie in eight different bank groups, so ldmatrix, float4 reads and
// cp.async writes are free of conflicts without a swizzle.
//
// Accumulators of a warp tile, kM x kN: acc[i][j][c] is element
//     row 16 i + g + 8 (c / 2),  column 8 j + 2 t + c % 2        g = lane / 4, t = lane % 4
// for every kind of arithmetic, so that whatever comes after knows one layout.
#include "copy.cuh"
#include "mma.cuh"
#include "types.cuh"

#ifdef MG_TF32
[[maybe_unused]] constexpr bool kTf32 = MG_TF32 != 0;
#else
[[maybe_unused]] constexpr bool kTf32 = false;
#endif

constexpr int kThreads = 128;                        // of every CTA built on these tiles
constexpr int kChunk = 16 / int(sizeof(operand_t));  // elements of one 16-byte copy
[[maybe_unused]] constexpr int kPad = kChunk;
[[maybe_unused]] constexpr int kDepth = kDtype == 2 ? 32 : 64;  // elements of the contracted dimension per stage

// Warps of a CTA over a tile of kRows x kColumns.
template <int kRows, int kColumns> struct Warps {
    static constexpr int kDown = kRows >= 64 ? 2 : 1;
    static constexpr int kAcross = kThreads / 32 / kDown;
    static constexpr int kM = kRows / kDown;
    static constexpr int kN = kColumns / kAcross;
    static_assert(kM % 16 == 0 && kN % 16 == 0 && kM <= 32, "a warp tile is made of 16 x 16 pieces");
};

// Rows of a dense matrix, picked by index (negative: zeros), into a tile of kRows x kWidth.
// `from` is the first column, columns at or past `width` are zero; width is a multiple of kChunk.
template <int kRows, int kWidth, int kPitch>
__device__ __forceinline__ void load_rows(operand_t *tile, const int *index, const operand_t *matrix,
                                          i64 stride, int from, int width) {
    constexpr int kPerRow = kWidth / kChunk, kCopies = kRows * kPerRow;
#pragma unroll
    for (int base = 0; base < kCopies; base += kThreads) {
        const int i = base + int(threadIdx.x);
        if (kCopies % kThreads && i >= kCopies) break;
        const int row = i / kPerRow, column = i % kPerRow * kChunk;
        const int source = index[row];
        const bool live = source >= 0 && from + column < width;
        const operand_t *address = live ? matrix + source * stride + from + column : matrix;
        copy_async16(tile + row * kPitch + column, address, live);
    }
}

// A fragment of 16 x 16 at (m, k). Stored [m][k], or [k][m] when kKM.
template <bool kKM>
__device__ __forceinline__ void load_left(u32 (&a)[4], const operand_t *tile, int pitch, int m,
                                          int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (kKM) {
        const int row = k + lane / 16 * 8 + lane % 8, column = m + lane / 8 % 2 * 8;
        load_matrices_transposed(a, tile + row * pitch + column);
    } else {
        load_matrices(a, tile + (m + lane % 16) * pitch + k + lane / 16 * 8);
    }
}
// B fragments of 16 x 16 at (k, n): b[0], b[1] for columns n … n + 7, b[2], b[3] for the next 8.
// Stored [n][k], or [k][n] when kKN.
template <bool kKN>
__device__ __forceinline__ void load_right(u32 (&b)[4], const operand_t *tile, int pitch, int n,
                                           int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (kKN) {
        const int row = k + lane / 8 % 2 * 8 + lane % 8, column = n + lane / 16 * 8;
        load_matrices_transposed(b, tile + row * pitch + column);
    } else {
        const int row = n + lane / 16 * 8 + lane % 8, column = k + lane / 8 % 2 * 8;
        load_matrices(b, tile + row * pitch + column);
    }
}

template <int kM, int kN> __device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[i][j][c] = 0.0f;
}

// One k16 step of 16-bit operands against fragments already in registers.
template <bool kKN, int kI, int kJ>
__device__ __forceinline__ void mma_step(float (&acc)[kI][kJ][4], const u32 (&a)[kI][4],
                                         const operand_t *right, int pitch, int k) {
#pragma unroll
    for (int j = 0; j < kJ; j += 2) {
        u32 b[4];
        load_right<kKN>(b, right, pitch, 8 * j, k);
#pragma unroll
        for (int i = 0; i < kI; ++i) {
            mma_16x8x16<operand_t>(acc[i][j], a[i], b[0], b[1]);
            mma_16x8x16<operand_t>(acc[i][j + 1], a[i], b[2], b[3]);
        }
    }
}

// acc += left right over kK of the contracted dimension, 16-bit operands, tensor cores.
template <bool kKM, bool kKN, int kK, int kI, int kJ>
__device__ __forceinline__ void product_half(float (&acc)[kI][kJ][4], const operand_t *left,
                                             int left_pitch, const operand_t *right,
                                             int right_pitch) {
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
        u32 a[kI][4];
#pragma unroll
        for (int i = 0; i < kI; ++i) load_left<kKM>(a[i], left, left_pitch, 16 * i, k);
        mma_step<kKN>(acc, a, right, right_pitch, k);
    }
}

// The same for float32 rounded to TF32.
template <bool kKM, bool kKN, int kK, int kI, int kJ>
__device__ __forceinline__ void product_tf32(float (&acc)[kI][kJ][4], const float *left,
                                             int left_pitch, const float *right, int right_pitch) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto a_at = [&](int m, int k) {
        return to_tf32(left[kKM ? k * left_pitch + m : m * left_pitch + k]);
    };
    auto b_at = [&](int k, int n) {
        return to_tf32(right[kKN ? k * right_pitch + n : n * right_pitch + k]);
    };
#pragma unroll
    for (int k = 0; k < kK; k += 8) {
        u32 a[kI][4];
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                a[i][c] = a_at(16 * i + g + c % 2 * 8, k + t + c / 2 * 4);
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const u32 b0 = b_at(k + t, 8 * j + g), b1 = b_at(k + t + 4, 8 * j + g);
#pragma unroll
            for (int i = 0; i < kI; ++i) mma_16x8x8_tf32(acc[i][j], a[i], b0, b1);
        }
    }
}

// The same in IEEE float32: each lane multiplies for the accumulators it owns.
template <bool kKM, bool kKN, int kK, int kI, int kJ>
__device__ __forceinline__ void product_float(float (&acc)[kI][kJ][4], const float *left,
                                              int left_pitch, const float *right,
                                              int right_pitch) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 2
    for (int k = 0; k < kK; k += 4) {
        float a[2 * kI][4];
#pragma unroll
        for (int r = 0; r < 2 * kI; ++r) {
            if constexpr (kKM) {
#pragma unroll
                for (int s = 0; s < 4; ++s) a[r][s] = left[(k + s) * left_pitch + g + 8 * r];
            } else {
                const Vec<float> v = load16(left + (g + 8 * r) * left_pitch + k);
#pragma unroll
                for (int s = 0; s < 4; ++s) a[r][s] = v.at[s];
            }
        }
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            float b[2][4];
            if constexpr (kKN) {
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const float *at = right + (k + s) * right_pitch + 8 * j + 2 * t;
                    const float2 pair = *reinterpret_cast<const float2 *>(at);
                    b[0][s] = pair.x;
                    b[1][s] = pair.y;
                }
            } else {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const Vec<float> v = load16(right + (8 * j + 2 * t + c) * right_pitch + k);
#pragma unroll
                    for (int s = 0; s < 4; ++s) b[c][s] = v.at[s];
                }
            }
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int r = 0; r < 2 * kI; ++r)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float &sum = acc[r / 2][j][r % 2 * 2 + c];
                        sum = fmaf(a[r][s], b[c][s], sum);
                    }
        }
    }
}

// acc += left right over kK elements, whatever the operands' dtype. Both point at the warp's origin.
// left: stored [m][k], or [k][m] when kKM; right: stored [n][k], or [k][n] when kKN.
template <bool kKM, bool kKN, int kK, int kI, int kJ>
__device__ __forceinline__ void product(float (&acc)[kI][kJ][4], const operand_t *left,
                                        int left_pitch, const operand_t *right, int right_pitch) {
    if constexpr (kDtype != 2) {
        product_half<kKM, kKN, kK>(acc, left, left_pitch, right, right_pitch);
    } else {
        const float *a = reinterpret_cast<const float *>(left);
        const float *b = reinterpret_cast<const float *>(right);
        if constexpr (kTf32) {
            product_tf32<kKM, kKN, kK>(acc, a, left_pitch, b, right_pitch);
        } else {
            product_float<kKM, kKN, kK>(acc, a, left_pitch, b, right_pitch);
        }
    }
}

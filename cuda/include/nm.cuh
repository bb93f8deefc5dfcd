#pragma once
// N:M pruning of four neighbouring scores in registers, and how the choice is stored.
//
// Four columns keep two values in every encoding here: 2:4 the two largest of four, 1:2 the larger of
// each pair. A choice of four columns is a code:
//     MG_NM 0  2:4            a nibble i0 | i1 << 2: 4 8 9 12 13 14
//     MG_NM 1  1:2, 16 bits   the same nibble, i0 of {0, 1}, i1 of {2, 3}: 8 9 12 13
//     MG_NM 2  1:2, float32   two nibbles, one a pair: 4 keeps its first, 14 its second
// Ties go to the lower index, NaN counts as +inf. Masked columns lose to live ones, and those that
// only a run-time mask drops win over those outside the static pattern (formats/nm.py: choose).
#include "types.cuh"

constexpr int kNm = MG_NM;
static_assert(kNm >= 0 && kNm <= 2, "NM: 0 2:4, 1 1:2 in 16 bits, 2 1:2 in float32");
constexpr int kCodeBits = kNm == 2 ? 8 : 4;          // of four columns
[[maybe_unused]] constexpr int kWordColumns = 16 / kCodeBits * 4;     // columns of one 16-bit word of metadata

// Where word `column` of row `row` of a matrix of `rows` rows lies, in words. Whole 32 × 2 tiles are
// stored for the sparse tensor core (formats/nm_metadata.py: C, R, g, a, d, b), others row by row.
__device__ __forceinline__ i64 word_at(int row, int column, i64 rows, int words, bool tiled) {
    if (!tiled) return i64(row) * words + column;
    return (column / 2) * (2 * rows) + (row / 32) * 64 + row % 8 * 8 + row / 16 % 2 * 4 + column % 2 * 2 +
           row / 8 % 2;
}

// A float as an integer of the same order.
__device__ __forceinline__ int order_of(float x) {
    const int bits = __float_as_int(x + 0.0f);
    return x != x ? 0x7f800000 : bits ^ (bits >> 31 & 0x7fffffff);
}

// The choice among x[0 … 3], scaled scores. Bit i of `live`: column i may be kept; of `inside`: it is
// within the static pattern. Any scores, any masks.
__device__ __forceinline__ u32 choose4(const float (&x)[4], u32 live, u32 inside) {
    int key[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        key[i] = live >> i & 1 ? order_of(x[i]) : int(0x80000000u | (inside >> i & 1));
    const bool second = key[1] > key[0], fourth = key[3] > key[2];
    if constexpr (kNm == 1) return 8u + second + 4u * fourth;
    if constexpr (kNm == 2) return (second ? 14u : 4u) | (fourth ? 14u : 4u) << 4;
    const bool left = min(key[0], key[1]) >= max(key[2], key[3]);
    const bool right = min(key[2], key[3]) > max(key[0], key[1]);
    return left ? 4u : right ? 14u : 8u + second + 4u * fourth;
}

// Indices of the two kept columns.
__device__ __forceinline__ int first_of(u32 code) {
    return kNm == 2 ? int(code >> 3 & 1) : int(code & 3);
}
__device__ __forceinline__ int second_of(u32 code) {
    return kNm == 2 ? 2 + int(code >> 7 & 1) : int(code >> 2 & 3);
}
__device__ __forceinline__ float one_of4(const float (&x)[4], int i) {
    const float low = i & 1 ? x[1] : x[0], high = i & 1 ? x[3] : x[2];
    return i & 2 ? high : low;
}

// The two values that a nibble keeps, scaled; higher bits of `code` do not matter.
__device__ __forceinline__ void take4(float a, float b, float c, float d, float scale, u32 code,
                                      float (&kept)[2]) {
    const bool one = code & 1, two = code & 2, four = code & 4, eight = code & 8;
    float x = a * scale, y = b * scale;
    if (one) x = b * scale;
    if (two) x = c * scale;
    if (eight) y = c * scale;
    if (eight && four) y = d * scale;
    kept[0] = x, kept[1] = y;
}

// Transposes the 4 × 4 nibbles of a quad in both halves of a word: nibble i of lane t becomes nibble t
// of lane i. Lane t holds codes of its four columns in four groups of 16; after it, the metadata word
// of group t for a row (low half) and the row eight below (high half). Its own inverse.
__device__ __forceinline__ u32 quad_nibbles(u32 x, int t) {
    const u32 mine = t & 1 ? 0xF0F0F0F0u : 0x0F0F0F0Fu;
    u32 y = __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    y = __funnelshift_l(y, y, t & 1 ? 28 : 4);
    x = (x & mine) | (y & ~mine);
    y = __shfl_xor_sync(0xFFFFFFFFu, x, 2);
    return __byte_perm(x, y, t & 2 ? 0x3715 : 0x6240);
}

#pragma once
// Values of 2:4 or 1:2 rows of halves as dense columns, in registers, by tables of bytes.
//
// Metadata (formats/nm_metadata.py) are (packed / 16, lines / 32, 8 g, 2 a, 2 d) words: of rows 16 a + g in the low half
// and 16 a + g + 8 in the high half, of each group of 4 columns a nibble that names two of them.
#include "types.cuh"

// Bytes of two words, 0 … 3 and 4 … 7, as the four lowest nibbles say, which are no more than 7: __byte_perm would see to
// that.
__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 which) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(which));
    return r;
}

// A nibble names two columns of four, the first and the second value's: one of 4, 8, 9, 12, 13, 14. Which of those, in
// three bits, of all nibbles of a word.
__device__ __forceinline__ u32 kinds(u32 word) {
    const u32 first = ~word >> 3 & 0x11111111u;
    return (word | first | first << 1) & 0x77777777u;
}

// Eight values as sixteen columns, of which four nibbles' kinds name theirs.
__device__ __forceinline__ void spread(const uint4 &values, u32 kinds, u32 (&w)[8]) {
    // Of each column a byte for each nibble: where its two bytes come from, 0x10 the first value, 0x32 the second, 0x44 zero.
    const u32 column[4] = {permuted(0x44444410u, 0x10444410u, kinds), permuted(0x44441044u, 0x32441044u, kinds),
                           permuted(0x44443232u, 0x44104444u, kinds), permuted(0x44444444u, 0x44323232u, kinds)};
    const u32 v[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            w[2 * n + h] = permuted(v[n], 0u, permuted(column[2 * h], column[2 * h + 1], n | (n + 4) << 4));
}

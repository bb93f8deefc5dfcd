#pragma once
// A patch of an N:M matrix as a dense tile in shared memory, whatever its encoding and dtype.
//
//   ENCODING  0 "2:4", 1 "1:2-half", 2 "1:2-float32": int16 words in hardware order; 3 "bytes": one uint8 a
//             slot (formats/nm_metadata.py); N, M: kept of every how many
//   KEEP      run-time mask: 0 none, 1 over columns of S, 2 over its rows
#include "tiles.cuh"

constexpr int kEncoding = MG_ENCODING, kN = MG_N, kM = MG_M, kKeep = MG_KEEP;
static_assert(kEncoding >= 0 && kEncoding <= 3, "ENCODING must be 0 ... 3");

// One matrix: its values and metadata, stored rows and groups or packed columns of a row.
struct Matrix {
    const value_t *values;
    const void *metadata;
    const u8 *keep;  // of this matrix
    i64 keep_at;
    int rows, columns;  // of the matrix
    int stored, packed;  // rows and values of a row as stored

    __device__ __forceinline__ bool dropped(int row, int column) const {
        return row >= rows || column >= columns || (kKeep == 1 && !keep[column * keep_at]) ||
               (kKeep == 2 && !keep[row * keep_at]);
    }
};

// Index of the word of 16 bits for `row` and word column `w` of a matrix of `stored` rows.
__device__ __forceinline__ i64 word_at(int row, int w, int stored) {
    const i64 block = static_cast<i64>(w / 2) * (stored / 32) + row / 32;
    return ((block * 8 + row % 8) * 2 + row / 16 % 2) * 4 + w % 2 * 2 + row / 8 % 2;
}

// Notes that dense positions are in use, in bits of shared memory.
__device__ __forceinline__ void note_used(u32 *used, int at) {
    const u32 bit = 1u << (at % 32);
    if (!(*const_cast<volatile u32 *>(used + at / 32) & bit)) atomicOr(used + at / 32, bit);
}

// Calls f(row, column, slot, live) for every stored slot of a matrix in rows row0 ... + kDown and columns
// column0 ... + kAcross; what is stored past the last row and column is in the tile that would hold it.
template <int kDown, int kAcross, class F>
__device__ __forceinline__ void each_stored(const Matrix &s, int row0, int column0, const F &f) {
    if constexpr (kEncoding == 3) {
        const int first = column0 / kM, all = s.packed / kN;
        const int groups = min((column0 + kAcross - 1) / kM + 1, all) - first;
        for (int i = threadIdx.x; i < kDown * groups; i += kThreads) {
            const int row = row0 + i / groups, group = first + i % groups;
            if (row >= s.stored) continue;
            const i64 slot = static_cast<i64>(row) * s.packed + group * kN;
            const u8 *chosen = static_cast<const u8 *>(s.metadata) + slot;
            for (int p = 0; p < kN; ++p) {
                const int column = group * kM + chosen[p];
                if (column >= column0 && column < column0 + kAcross) f(row, column, slot + p, !s.dropped(row, column));
            }
        }
    } else {
        constexpr int kPair = kEncoding == 2 ? 2 : 4, kUnits = kAcross / kPair;  // columns of a nibble
        static_assert(kDown * kUnits % kThreads == 0, "every thread takes as many nibbles");
#pragma unroll 4
        for (int i = threadIdx.x; i < kDown * kUnits; i += kThreads) {
            const int row = row0 + i / kUnits, at = column0 + i % kUnits * kPair;
            if (row >= s.stored || at / 2 >= s.packed) continue;
            const u32 word = static_cast<const u16 *>(s.metadata)[word_at(row, at / (4 * kPair), s.stored)];
            const u32 nibble = word >> (at / kPair % 4 * 4) & 15;
            const i64 slot = static_cast<i64>(row) * s.packed + at / 2;
            const int low = at + int(kEncoding == 2 ? nibble >> 3 : nibble & 3), high = at + int(nibble >> 2);
            f(row, low, slot, !s.dropped(row, low));
            if constexpr (kEncoding != 2) f(row, high, slot + 1, !s.dropped(row, high));
        }
    }
}

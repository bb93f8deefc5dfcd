#pragma once
// The sparse left operand of wgmma.sp and mma.sp: from a stage in shared memory to registers.
//
// Everything is counted in bytes, so that halves (2:4, 1:2) and floats (1:2, as TF32) are one case. A stage
// holds kDepth spans of 128 bytes of the dense rows: 64 columns of halves or 32 of floats. Of them
//     values    rows × 64 · kDepth bytes, packed, in TMA's swizzle of rows of that width or, with a pitch (an
//               odd number of 16 bytes: no conflicts), as they are
//     metadata  2 · kDepth lines (64 bytes of dense row each) × rows int32, in the order in which NMLayout
//               stores them: of 32 rows 8 g × 2 a × 2 d words, rows 16 a + g in the low half and 16 a + g + 8
//               in the high half, d = first or second 32 bytes (formats/nm_metadata.py)
#include "types.cuh"

constexpr int kDepth = MG_DEPTH;
static_assert(kDepth == 1 || kDepth == 2, "DEPTH must be 1 or 2");
constexpr int kSteps = 2 * kDepth;                               // products of a stage
constexpr int kColumns = kDepth * 128 / int(sizeof(operand_t));  // dense columns of a stage
constexpr int kPair = int(sizeof(operand_t)) == 2 ? 4 : 2;       // columns of a nibble

struct Left {
    u32 a[kSteps][4], metadata[kDepth];
};

// Where this lane reads, relative to the stage: `row` is the warp's first of the tile's kRows rows.
struct LeftPlaces {
    u32 piece[kSteps], word;

    template <int kRows, int kPitch = 0>
    __device__ __forceinline__ static LeftPlaces of(int row, u32 values, u32 metadata) {
        const int lane = threadIdx.x % 32, mine = row + lane % 16, t = lane % 4;
        LeftPlaces p;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const int chunk = 2 * s + lane / 16;
            p.piece[s] = values + (kPitch ? mine * kPitch + (chunk << 4)
                                   : kDepth == 1 ? mine * 64 + ((chunk ^ (mine >> 1 & 3)) << 4)
                                               : mine * 128 + ((chunk ^ (mine & 7)) << 4));
        }
        p.word = metadata + 4 * (t / 2 * kRows + row / 32 * 32 + lane / 4 * 4 + row / 16 % 2 * 2 + t % 2);
        return p;
    }
};

__device__ __forceinline__ u32 load_word(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

template <int kRows> __device__ __forceinline__ void load_left(Left &left, const LeftPlaces &at, u32 stage) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(left.a[s][0]), "=r"(left.a[s][1]), "=r"(left.a[s][2]), "=r"(left.a[s][3])
                     : "r"(stage + at.piece[s])
                     : "memory");
#pragma unroll
    for (int p = 0; p < kDepth; ++p) left.metadata[p] = load_word(stage + at.word + p * 8 * kRows);
}

// Slots at or past `columns` (counted from the stage's first) hold whatever they do: zero them.
template <int kRows>
__device__ __forceinline__ void cut_left(Left &left, const LeftPlaces &at, u32 stage, int columns) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // The word of line s, columns' half `half`; this lane's registers are of its nibble t.
            const u32 mine = at.word - 4 * (t / 2 * kRows + t % 2);
            const u32 word = load_word(stage + mine + 4 * (s * kRows + half));
            const int first = (8 * s + 4 * half + t) * kPair;
#pragma unroll
            for (int down = 0; down < 2; ++down) {
                const u32 nibble = word >> (16 * down + 4 * t) & 15;
                u32 &a = left.a[s][2 * half + down];
                if constexpr (sizeof(operand_t) == 2) {
                    if (first + int(nibble & 3) >= columns) a &= 0xFFFF0000u;
                    if (first + int(nibble >> 2) >= columns) a &= 0x0000FFFFu;
                } else if (first + int(nibble >> 3) >= columns) {
                    a = 0;
                }
            }
        }
}

#pragma once
// Fused attention without wgmma: its constants, and rows of Q, K and V in shared memory.
#include "copy.cuh"
#include "mma.cuh"

constexpr int kDim = MG_DIM, kUnits = MG_UNITS, kHold = MG_HOLD, kKeys = MG_KEYS, kStages = MG_STAGES;
constexpr bool kFloat = kDtype == 2, kRounded = MG_TF32;
constexpr int kWarps = 4 * kUnits / kHold, kThreads = 32 * kWarps;
static_assert(kDim % 32 == 0 && kDim <= 256, "DIM must be a multiple of 32, at most 256");
static_assert(kUnits <= 2 && kUnits % kHold == 0, "UNITS and HOLD must be 1 or 2");
static_assert(kKeys == 16 || kKeys == 32 || kKeys == 64, "KEYS must be 16, 32 or 64");
static_assert(kStages >= 2 && kStages <= 4, "STAGES must be 2, 3 or 4");
constexpr int kPitch = kDim * int(sizeof(operand_t)), kPieces = kPitch / 16, kDepth = kPitch / 32;
constexpr int kTiles = kKeys / 8, kColumns = kDim / 8;
constexpr u32 kUnit = 64 * kPitch, kStage = kKeys * kPitch;
// Rows of 128 bytes and more: piece c of row r stands at c ^ r % 8; two rows share what others have
// one for where an odd number of half lines makes up a row.
constexpr int kTurned = kPieces % 8 == 0 ? 7 : 3, kSame = kPieces % 8 == 0 ? 1 : 2;
constexpr bool kQHeld = !kFloat && kHold * kDim <= 128;  // Q in registers

__device__ __forceinline__ constexpr int turned(int row) { return row / kSame & kTurned; }

// One lane's pieces of rows in shared memory that start at a multiple of 8 rows.
struct Pieces {
    u32 first;
    __device__ __forceinline__ Pieces(u32 from, int row, int piece)
        : first(from + row * kPitch + ((piece ^ turned(row)) << 4)) {}
    // `row`: a multiple of 8; `piece`: without the bits that the first one has.
    __device__ __forceinline__ u32 at(int row, int piece) const {
        return (first ^ ((piece & kTurned) << 4)) + ((piece & ~kTurned) << 4) + row * kPitch;
    }
};

// Threads copy whole rows, a power of two of them at once; the rest of the threads rest.
__device__ __forceinline__ constexpr int power_below(int most) {
    int n = 1;
    while (2 * n <= most) n *= 2;
    return n;
}
constexpr int kAtOnce = power_below(kThreads / kPieces);
static_assert(kKeys % kAtOnce == 0, "whole rounds of rows");

// What a thread copies: a piece of every kAtOnce-th row.
struct Share {
    int row, piece;
    u32 first;
    __device__ __forceinline__ explicit Share(u32 to) {
        int thread;  // read here, or what follows from it would stay in registers from copy to copy
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        row = thread / kPieces, piece = thread % kPieces;
        first = to + row * kPitch + ((piece ^ turned(row)) << 4);
    }
    __device__ __forceinline__ bool rests() const { return kAtOnce * kPieces < kThreads && row >= kAtOnce; }
    // Its piece of round i.
    __device__ __forceinline__ u32 at(int i) const { return (first ^ (turned(i * kAtOnce) << 4)) + i * kAtOnce * kPitch; }
};

// Rows first … first + kRows − 1 of a matrix to shared memory; zeros from row `rows`, column `bytes` on.
template <int kRows>
__device__ __forceinline__ void copy_rows(u32 to, const char *from, i64 pitch, int first, int rows, int bytes) {
    const Share mine(to);
    if (mine.rests()) return;
    const int left = mine.piece * 16 < bytes ? rows - first - mine.row : 0;
    from += i64(first + mine.row) * pitch + mine.piece * 16;
    const i64 step = kAtOnce * pitch;
#pragma unroll 8
    for (int i = 0; i < kRows / kAtOnce; ++i, from += step) copy_async16(mine.at(i), from, i * kAtOnce < left);
}

// Rounds to TF32 what this thread copied there: each number once, not once a warp that reads it.
template <int kRows> __device__ __forceinline__ void round_rows(u32 at) {
    if constexpr (kFloat && kRounded) {
        const Share mine(at);
        if (mine.rests()) return;
#pragma unroll 4
        for (int i = 0; i < kRows / kAtOnce; ++i) {
            const float4 v = load_shared_floats(mine.at(i));
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(mine.at(i)), "r"(to_tf32(v.x)), "r"(to_tf32(v.y)),
                         "r"(to_tf32(v.z)), "r"(to_tf32(v.w))
                         : "memory");
        }
    }
}

__device__ __forceinline__ float2 shared2(u32 at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ u32 shared1(u32 at) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

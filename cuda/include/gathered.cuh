#pragma once
// 16-byte pieces of gathered rows, spread over the lanes of a warp.
//
// The 32 lanes form 32 / kLanes groups; a group reads one gathered row at a time, lane l of it the pieces
// l, l + kLanes, … of 16 bytes, so that neighbouring lanes read neighbouring addresses.
#include "packed.cuh"
#include "reduce.cuh"

constexpr int kLanes = MG_LANES;           // lanes that share one gathered row
constexpr int kVectors = MG_VECTORS;       // 16-byte pieces of it per lane
constexpr bool kExact = MG_EXACT;          // pieces fill lanes and vectors: nothing overhangs
constexpr int kGroups = 32 / kLanes;       // rows gathered at once
constexpr int kSteps = 8;                  // rows a group gathers per round
constexpr int kTurn = kLanes < kSteps ? kLanes : kSteps;  // lanes of a group that look up indices
constexpr int kRegisters = kSteps / kTurn;  // keys whose index one of them looks up per round
// Rows in flight per group: about eight loads per lane cover the latency of L2.
constexpr int kBatch = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
constexpr int kElements = 16 / int(sizeof(operand_t));
using Piece = Pack<operand_t, kElements>;
constexpr int kWarps = 4;
static_assert(32 % kLanes == 0 && kLanes <= 32, "LANES must be a power of two of at most 32");
static_assert(kSteps % kBatch == 0, "a round must be whole batches");

// What the lane that looked up step s of this group holds for it in register s / kTurn.
template <typename T> __device__ __forceinline__ T of_step(const T (&held)[kRegisters], int s) {
    return __shfl_sync(kAllLanes, held[s / kTurn], s % kTurn, kLanes);
}

// Piece at base + index · stride bytes: one multiply-add of 32 × 32 + 64 bits.
__device__ __forceinline__ const char *row_address(const char *base, int index, u32 stride) {
    return base + u64(u32(index)) * stride;
}

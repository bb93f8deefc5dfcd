#pragma once
// What the row kernels share: work items, and 16-byte pieces of gathered rows spread over lanes.
//
// An item is a run of kept positions of one row. The 32 lanes of a warp form 32 / kLanes groups; a
// group reads one gathered row at a time, lane l of it the pieces l, l + kLanes, … of 16 bytes, so
// that neighbouring lanes read neighbouring addresses. Two ways to share the items:
//
//   OWN 0   a warp works on one item, its groups on every kGroups-th key of it; a CTA takes one item
//           a warp and ends
//   OWN 1   for short items: every group works on an item of its own, so that a warp waits for the
//           chain from item over indices to gathered rows once for several items, and no lane has
//           nothing to do; a warp walks over matrices and items, and looks up the next item and its
//           first indices while the rows of this one are on their way
//
// Which lane adds what depends on the item's length and the position inside it alone, never on
// addresses, batch or heads.
#include "packed.cuh"
#include "reduce.cuh"

constexpr int kLanes = MG_LANES;           // lanes that share one gathered row
constexpr int kVectors = MG_VECTORS;       // 16-byte pieces of it per lane
constexpr bool kExact = MG_EXACT;          // pieces fill lanes and vectors: nothing overhangs
constexpr bool kOwn = MG_OWN;              // every group has an item of its own
constexpr bool kBeside = MG_BESIDE;        // runs beside other kernels: fewer registers
constexpr int kGroups = 32 / kLanes;       // rows gathered at once
constexpr int kAlong = kOwn ? 1 : kGroups; // groups along one item
constexpr int kItems = kGroups / kAlong;   // items of a warp at a time
constexpr int kSteps = 8;                  // rows a group gathers per round
constexpr int kRound = kSteps * kAlong;    // keys of an item per round
constexpr int kTurn = kLanes < kSteps ? kLanes : kSteps;  // lanes of a group that look up indices
constexpr int kRegisters = kSteps / kTurn;  // keys whose index one of them looks up per round
// Rows in flight per group: about eight loads per lane cover the latency of L2.
constexpr int kBatch = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
constexpr int kElements = 16 / int(sizeof(operand_t));
using Piece = Pack<operand_t, kElements>;
constexpr int kWarps = 4;
static_assert(32 % kLanes == 0 && kLanes <= 32, "LANES must be a power of two of at most 32");
static_assert(kSteps % kBatch == 0, "a round must be whole batches");

// One work item; the plan stores row, count + high half of first << 16, partial, low half of first.
struct RowItem {
    int row;      // entry * rows + row
    int count;    // kept positions of this item; 0 for an empty row
    int partial;  // where its partial result goes, or −1: it is all of its row
    i64 first;    // its first position

    // False beyond the last item.
    __device__ __forceinline__ bool there() const { return partial >= -1; }
};

// Which items a warp computes, of which matrix. Warps that walk take the items in turn, matrix after
// matrix: those at work gather from few matrices at a time, which stay in L2.
struct RowWalk {
    int at;      // item of the warp's first group
    int matrix;

    __device__ __forceinline__ static RowWalk start(int count) {
        const u32 warp = blockIdx.x * kWarps + threadIdx.x / 32;
        if (!kOwn) return {int(warp), int(blockIdx.y)};
        const u32 units = (u32(count) + kItems - 1) / kItems;
        return {int(warp % units) * kItems, int(warp / units)};
    }
    __device__ __forceinline__ bool done(int count, int matrices) const {
        return kOwn ? matrix >= matrices : at >= count;
    }
    __device__ __forceinline__ void advance(int count) {
        const u32 units = (u32(count) + kItems - 1) / kItems, stride = gridDim.x * kWarps;
        at += int(stride % units) * kItems;
        matrix += stride / units;
        if (at >= count) at -= int(units) * kItems, ++matrix;
    }
    // The item of this lane's group; one of no positions beyond the last.
    __device__ __forceinline__ RowItem item(const int4 *items, int count, int matrices,
                                            int lane) const {
        const int mine = at + (kOwn ? lane / kLanes : 0);
        int4 raw = make_int4(0, 0, -2, 0);
        if (mine < count && !done(count, matrices)) raw = __ldg(items + mine);
        return {raw.x, raw.y & 0xffff, raw.z, i64(u32(raw.y) >> 16) << 32 | u32(raw.w)};
    }
};

// The largest count of the warp's items, and the smallest.
__device__ __forceinline__ int longest(const RowItem &item) {
    return kItems == 1 ? item.count : __reduce_max_sync(kAllLanes, item.count);
}
__device__ __forceinline__ int shortest(const RowItem &item) {
    return kItems == 1 ? item.count : __reduce_min_sync(kAllLanes, item.count);
}

// The position, counted from the round's start, whose index register m of a lane holds: step
// m · kTurn + lane % kTurn of its group. Lanes kTurn … kLanes − 1 of a group repeat the first ones.
__device__ __forceinline__ int own_key(int lane, int m) {
    return (m * kTurn + lane % kTurn) * kAlong + (kOwn ? 0 : lane / kLanes);
}
// What the lane that looked up step s of this group holds for it in register s / kTurn.
template <typename T> __device__ __forceinline__ T of_step(const T (&held)[kRegisters], int s) {
    return __shfl_sync(kAllLanes, held[s / kTurn], s % kTurn, kLanes);
}

// Piece at base + index · stride bytes: one multiply-add of 32 × 32 + 64 bits.
__device__ __forceinline__ const char *row_address(const char *base, int index, u32 stride) {
    return base + u64(u32(index)) * stride;
}

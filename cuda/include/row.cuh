#pragma once
// Work items of the row kernels: runs of kept positions of one row each. Two ways to share them:
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
#include "gathered.cuh"

constexpr bool kOwn = MG_OWN;              // every group has an item of its own
constexpr bool kBeside = MG_BESIDE;        // runs beside other kernels: fewer registers
constexpr int kAlong = kOwn ? 1 : kGroups; // groups along one item
constexpr int kItems = kGroups / kAlong;   // items of a warp at a time
constexpr int kRound = kSteps * kAlong;    // keys of an item per round

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

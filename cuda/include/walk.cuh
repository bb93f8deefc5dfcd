#pragma once
// The tiles of a CTA, one after the other, from lists made when the plan met this grid.
#include "types.cuh"

// A tile: line, first element in the line's table, elements (−1 = no more tiles), repeat; a repeat is one
// column tile of one matrix. A CTA's tiles lie side by side, so that all but the first few come from L1.
struct Walk {
    const int4 *at, *end;
    int4 soon;

    // tiles (gridDim.x, each).
    __device__ __forceinline__ Walk(const int4 *tiles, int each)
        : at(tiles + static_cast<i64>(blockIdx.x) * each), end(at + each), soon(__ldg(at)) {}
    __device__ __forceinline__ bool next(int4 &tile) {
        if (at == end) return false;
        tile = soon;
        if (tile.z < 0) return false;
        if (++at != end) soon = __ldg(at);
        return true;
    }
};

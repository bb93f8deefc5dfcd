#pragma once
// The tiles of a CTA, one after the other, from lists made when the plan met this grid.
#include "types.cuh"

// A tile: line, first element in the line's table, elements, repeat; a repeat is one column tile of one
// matrix. The tiles of a CTA lie side by side, so that all but the first few come from L1.
struct Walk {
    const int4 *tiles;
    int at, end;

    // starts (gridDim.x + 1): where each CTA's tiles start.
    __device__ __forceinline__ Walk(const int *starts, const int4 *tiles)
        : tiles(tiles), at(starts[blockIdx.x]), end(starts[blockIdx.x + 1]) {}
    __device__ __forceinline__ bool next(int4 &tile) {
        if (at == end) return false;
        tile = __ldg(tiles + at++);
        return true;
    }
};

#pragma once
// The tiles of a CTA, one after the other: from a list made when the plan met this grid, or by strides.
#include "types.cuh"

// Number of a tile = repeat · lines + rank, a repeat being one column tile of one matrix. What describes
// the next two tiles is asked for ahead, so that no tile begins with a wait.
struct Walk {
    const int4 *records;  // of each rank: line, first in the table, elements, entry
    const int *sched;     // null, or where each CTA's tiles start (gridDim.x + 1), then their numbers
    int lines, tiles, turn, count, base;
    int upcoming;  // number of the tile after the next, −1 = none
    int4 record;   // of the next
    int repeat;
    bool more;

    __device__ __forceinline__ Walk(const int4 *records, const int *sched, int lines, int repeats)
        : records(records), sched(sched), lines(lines), tiles(lines * repeats), turn(0) {
        if (sched) {
            const int first = sched[blockIdx.x];
            base = gridDim.x + 1 + first;
            count = sched[blockIdx.x + 1] - first;
        }
        fetch(number(0));
        upcoming = number(1);
    }
    __device__ __forceinline__ int number(int n) const {
        if (sched) return n < count ? sched[base + n] : -1;
        const int t = n * gridDim.x + blockIdx.x;
        if (t >= tiles) return -1;
        // Ranks fall in length: every other round starts from the short end, so that all end together.
        const int first = t / lines * lines, middle = (first + lines / 2) / gridDim.x;
        return middle & 1 ? 2 * first + lines - 1 - t : t;
    }
    __device__ __forceinline__ void fetch(int t) {
        more = t >= 0;
        if (!more) return;
        repeat = t / lines;
        record = records[t - repeat * lines];
    }
    // The next tile, if there is one, and which repeat it belongs to.
    __device__ __forceinline__ bool next(int4 &tile, int &which) {
        if (!more) return false;
        tile = record;
        which = repeat;
        fetch(upcoming);
        upcoming = number(++turn + 1);
        return true;
    }
};

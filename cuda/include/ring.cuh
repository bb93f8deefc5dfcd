// What consumers do with a ring of stages in shared memory that producers fill.
#pragma once

#include "registers.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Where in it somebody is.
struct RingPlace {
    int stage = 0;
    u32 parity = 0;
};

// Multiplies stage after stage, `steps` of them from `at` on, where it leaves what comes next; what the product before
// last read is given back as soon as it is done. `full` and `empty` are the barriers of the stages; every warp gives back.
template <int kStages, class Multiply>
__device__ __forceinline__ void multiply_ring(RingPlace &at, int steps, u32 full, u32 empty, int lane, Multiply multiply) {
    u32 held = 0;  // barrier of the stage that the product in flight reads
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        barrier_wait(full + 8 * at.stage, at.parity);
        wgmma_fence();
        multiply(at.stage);
        wgmma_commit();
        wgmma_wait<1>();
        if (lane == 0 && held) barrier_arrive(held);
        held = empty + 8 * at.stage;
        if (++at.stage == kStages) at.stage = 0, at.parity ^= 1;
    }
    wgmma_wait<0>();
    if (lane == 0 && held) barrier_arrive(held);
}
// All stages of a ring that nobody has read.
template <int kStages, class Multiply>
__device__ __forceinline__ void multiply_ring(int steps, u32 full, u32 empty, int lane, Multiply multiply) {
    RingPlace at;
    multiply_ring<kStages>(at, steps, full, empty, lane, multiply);
}

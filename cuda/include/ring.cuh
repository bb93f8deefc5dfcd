// What consumers do with a ring of stages in shared memory that producers fill.
#pragma once

#include "tma.cuh"
#include "wgmma.cuh"

// Multiplies stage after stage, `steps` of them from the first on; what the product before last read is given back as
// soon as it is done. `full` and `empty` are the barriers of the stages; every warp gives back.
template <int kStages, class Multiply>
__device__ __forceinline__ void multiply_ring(int steps, u32 full, u32 empty, int lane, Multiply multiply) {
    int stage = 0;
    u32 parity = 0, held = 0;  // held: barrier of the stage that the product in flight reads
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
        multiply(stage);
        wgmma_commit();
        wgmma_wait<1>();
        if (lane == 0 && held) barrier_arrive(held);
        held = empty + 8 * stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
}

#pragma once
// What grids of one stream owe each other when the later one may begin before the earlier one has ended
// (programmatic dependent launch, sm_90 and later; before that, and without it, grids follow each other).

// The grid launched behind this one may begin as CTAs of this one have all begun and leave room.
__device__ __forceinline__ void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the grids before this one have ended, and what they wrote can be seen. Every thread that reads it waits.
__device__ __forceinline__ void wait_for_grids_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#pragma once
// mbarriers where there may be no TMA: sm_80 and later. tma.cuh has those of sm_90.
#include "copy.cuh"
#include "types.cuh"

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(barrier) : "memory");
}
// Arrives when all copies that this thread has started are there.
__device__ __forceinline__ void mbarrier_arrive_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase with this parity is complete.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again;\n}\n" ::"r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\n"
        "mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again;\n}\n" ::"r"(barrier), "r"(parity)
        : "memory");
#endif
}
// `bytes` of 16 from global memory, zeros after them.
__device__ __forceinline__ void copy_async_some(u32 to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

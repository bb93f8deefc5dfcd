#pragma once
// Copies from global to shared memory that need no registers (cp.async, sm_80 and later); reads of it by address.
#include "types.cuh"

// Address of shared memory as the instructions want it.
__device__ __forceinline__ u32 shared_address(const void *pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes of shared memory. They pass no barrier and no write, above or below; other reads they may.
__device__ __forceinline__ uint4 load_shared16(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ float4 load_shared_floats(u32 from) {
    const uint4 v = load_shared16(from);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Sixteen bytes, zeros when not live: nothing is read then. Goes past L1: what is staged in shared
// memory is not read again through L1.
__device__ __forceinline__ void copy_async16(u32 to, const void *from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async16(void *to, const void *from, bool live) {
    copy_async16(shared_address(to), from, live);
}
// Close the group of copies issued by this thread since the last one.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most kLeft of this thread's groups are under way. Others see them after a barrier.
template <int kLeft> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#pragma once
// Clusters of CTAs of sm_90: barriers of other CTAs, copies that several CTAs receive, sends to one of them.
#include "tma.cuh"
#include "types.cuh"

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
// All threads of all CTAs of the cluster; what any wrote before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Its halves, where nothing that was written before is read after.
__device__ __forceinline__ void cluster_here() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The address in the cluster's window of what lies at `address` in the CTA of this rank.
__device__ __forceinline__ u32 cluster_address(u32 address, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
__device__ __forceinline__ void cluster_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Unless it is 0; barriers of this CTA have addresses in the cluster's window too.
__device__ __forceinline__ void cluster_arrive_if(u32 barrier) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n"
        "@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n}\n" ::"r"(barrier)
        : "memory");
}
// Bytes that a barrier of the CTA they go to counts: whoever waits for it sees them, and nobody fences what else was
// ever written.
__device__ __forceinline__ void cluster_send(u32 address, u32 barrier, float v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(v),
                 "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void cluster_send(u32 address, u32 barrier, const float4 &v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
                 : "memory");
}
// A box to the same place of every CTA in `mask`, completing on the barrier at the same place there.
__device__ __forceinline__ void tma_multicast(u32 to, const TensorMap &map, u32 barrier, u16 mask, int c0, int c1,
                                              int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to), "l"(&map), "r"(barrier), "h"(mask), "r"(c0),
        "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

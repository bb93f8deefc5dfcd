// Registers that threads of a CTA leave to others of it.
#pragma once

// What one warpgroup gives up and all others of a CTA of kThreads take, of which a multiprocessor has kCtas by
// __launch_bounds__(kThreads, kCtas): together no more than they start with, or the last to take would wait for ever.
template <int kThreads, int kFew, int kMany, int kCtas = 1> struct Registers {
    static_assert(128 * kFew + (kThreads - 128) * kMany <= kThreads * (65536 / (kThreads * kCtas) / 8 * 8),
                  "more registers than there are");

    __device__ __forceinline__ static void give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFew)); }
    __device__ __forceinline__ static void take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMany)); }
};

#pragma once
// What kernels for few columns of x share: loads that go ahead of their use, and the sum over the warps of a line.
#include "activation.cuh"
#include "copy.cuh"
#include "types.cuh"

// Loads that leave garbage where not live; a choice afterwards would wait for them.
__device__ __forceinline__ void load_if(u32 (&v)[4], const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from), "r"(int(live)));
}
__device__ __forceinline__ void load_if(u32 &v, u32 &w, const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2];}"
                 : "=r"(v), "=r"(w)
                 : "l"(from), "r"(int(live)));
}
__device__ __forceinline__ void load_if(u32 (&v)[2], const void *from, bool live) { load_if(v[0], v[1], from, live); }
__device__ __forceinline__ void load_if(u32 &v, const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1];}"
                 : "=r"(v)
                 : "l"(from), "r"(int(live)));
}
__device__ __forceinline__ void load_if(u16 &v, const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}"
                 : "=h"(v)
                 : "l"(from), "r"(int(live)));
}
// The same of weights that nobody reads again soon: they are the first that L1 gives away, and come faster.
__device__ __forceinline__ void load_once_if(u32 (&v)[4], const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from), "r"(int(live)));
}
__device__ __forceinline__ void load_once_if(u32 &v, u32 &w, const void *from, bool live) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.L1::evict_first.v2.u32 {%0, %1}, [%2];}"
                 : "=r"(v), "=r"(w)
                 : "l"(from), "r"(int(live)));
}
__device__ __forceinline__ void load_once_if(u32 (&v)[2], const void *from, bool live) {
    load_once_if(v[0], v[1], from, live);
}
__device__ __forceinline__ void load_if(int2 &v, const int2 *from, bool live) {
    load_if(reinterpret_cast<u32 &>(v.x), reinterpret_cast<u32 &>(v.y), from, live);
}

// Shared memory by address: what is worked out early stays worked out.
__device__ __forceinline__ void shared_put(u32 at, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

// n steps of so many bytes further, in one instruction.
__device__ __forceinline__ const u8 *further(const u8 *from, u32 n, u32 step) {
    const u8 *at;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(n), "r"(step), "l"(from));
    return at;
}

// The sums of kRows × kColumns that the warps of a CTA have of each other's, added up in the order of warps, with
// the bias of each row, activated. A thread has four rows of a column, in each of its rounds.
template <int kRows, int kColumns, int kWarps> struct Sums {
    static constexpr int kPitch = kRows + 4;  // floats of a column: lanes write to all banks
    static constexpr int kPlaces = kRows / 4 * kColumns, kThreads = 32 * kWarps;
    static constexpr int kRounds = (kPlaces + kThreads - 1) / kThreads, kFloats = kWarps * kColumns * kPitch;
    u32 get[kRounds];       // where its sums are, of the first warp
    int writes[kRounds];    // how many of them are written
    u32 added[kRounds][2];  // bias
    out_t *to[kRounds];     // where

    __device__ __forceinline__ static int column(int round) {
        return (threadIdx.x + round * kThreads) % kPlaces / (kRows / 4);
    }
    __device__ __forceinline__ static int row(int round) {
        return (threadIdx.x + round * kThreads) % kPlaces % (kRows / 4) * 4;
    }
    // What nobody needs before the products: to be called while loads are under way. `out` is of the CTA's first row
    // and column.
    __device__ __forceinline__ Sums(const float *sums, const operand_t *bias, int row0, int rows, int columns,
                                    out_t *out, i64 out_row, i64 out_column) {
#pragma unroll
        for (int n = 0; n < kRounds; ++n) {
            const int r = row0 + row(n);
            get[n] = shared_address(sums + column(n) * kPitch + row(n));
            writes[n] = int(threadIdx.x) + n * kThreads < kPlaces && column(n) < columns ? min(rows - r, 4) : 0;
            to[n] = out + column(n) * out_column + row(n) * out_row;
            asm volatile("" : "+r"(get[n]), "+r"(writes[n]), "+l"(to[n]));  // here, not behind the products
            added[n][0] = added[n][1] = 0u;
            if (bias) {
                const u16 *of = reinterpret_cast<const u16 *>(bias + r);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < writes[n]) added[n][i / 2] |= u32(__ldg(of + i)) << i % 2 * 16;
            }
        }
    }
    // quads: four rows lie side by side, at multiples of their size.
    __device__ __forceinline__ void write(float scale, i64 out_row, bool quads) const {
#pragma unroll
        for (int n = 0; n < kRounds; ++n) {
            if (writes[n] <= 0) continue;
            float4 sum = load_shared_floats(get[n]);
#pragma unroll
            for (int w = 1; w < kWarps; ++w) {
                const float4 more = load_shared_floats(get[n] + w * kColumns * kPitch * 4);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            const float v[4] = {sum.x, sum.y, sum.z, sum.w};
            out_t y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u16 bits = added[n][i / 2] >> i % 2 * 16;
                y[i] = from_float<out_t>(activated(fmaf(v[i], scale, to_float(reinterpret_cast<const operand_t &>(bits)))));
            }
            if (quads && writes[n] == 4) {
                struct alignas(4 * sizeof(out_t)) Four { out_t v[4]; };
                *reinterpret_cast<Four *>(to[n]) = {y[0], y[1], y[2], y[3]};
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < writes[n]) to[n][i * out_row] = y[i];
            }
        }
    }
};

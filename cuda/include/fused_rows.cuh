#pragma once
// Fused attention on sm_90a: its constants, and what a consumer warpgroup does with the rows it holds.
#include "exponent.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

constexpr int kDim = MG_DIM, kStages = MG_STAGES, kPair = MG_PAIR;
constexpr bool kPingPong = MG_PINGPONG;
constexpr int kGroups = 2, kConsumers = 128 * kGroups;
static_assert(kDim % 32 == 0 && kDim <= 256, "DIM must be a multiple of 32, at most 256");
static_assert(kPair == 1 || kPair == 2, "PAIR must be 1 or 2");
static_assert(kStages >= 2, "rings of at least two pairs");
constexpr int kPanels = (kDim + 63) / 64, kDepth = kDim / 16;
constexpr u32 kPanel = 64 * 128, kUnit = kPanels * kPanel, kStage = kPair * kUnit;
constexpr bool kHeld = kDim <= 128;  // Q in registers
constexpr int kPacked = 1 << 24;
constexpr float kSlack = 8.f;

struct alignas(16) Info {
    int unit, count, slot, matrix;
    int first, mark[2], spare;
};

__device__ __forceinline__ void ldmatrix4(u32 (&v)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address));
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A ring of stages: the stage that comes next and the parity of its round.
struct Ring {
    u32 stage = 0, parity;
    __device__ __forceinline__ explicit Ring(u32 parity) : parity(parity) {}
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// A value that all lanes of the warp hold, in a uniform register; what follows from it by addition stays
// in those. ptxas would see through a shuffle of a value that it knows to be the same everywhere and then
// move every descriptor from an ordinary register, so that something is added that might differ: 0.
__device__ __forceinline__ u32 uniform(u32 x) {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return __shfl_sync(0xFFFFFFFFu, x + (lane >> 5), 0);
}

// What a consumer warpgroup holds of the rows it works on.
struct Rows {
    float o[kDim / 2], s[kPair][32], m[2], l[2];
    u32 q[kHeld ? kDepth : 1][4], p[4 * kPair][4];
    u32 q_at;

    __device__ __forceinline__ void start(u32 at, int row16) {
        q_at = at;
        int lane;  // read here, or the compiler keeps all that follows from it in registers
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        if constexpr (kHeld)
#pragma unroll
            for (int d = 0; d < kDepth; ++d)
                ldmatrix4(q[d], swizzled(at + d / 4 * kPanel, row16 + lane % 16, d % 4 * 2 + lane / 16));
        m[0] = m[1] = -kInfinity;
        l[0] = l[1] = 0.f;
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;
    }
    // Issues S = Q Kᵀ of one or two units.
    template <int kUnits> __device__ __forceinline__ void scores(u32 from) {
        const u64 first = wgmma_descriptor(uniform(from), 1);
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
                const u32 step = d / 4 * kPanel + d % 4 * 32;
                const u64 right = first + (u * kUnit + step) / 16;
                if constexpr (kHeld)
                    Wgmma<64>::rs<0>(s[u], q[d], right, d > 0);
                else
                    Wgmma<64>::ss<0, 0>(s[u], wgmma_descriptor(q_at, 1) + step / 16, right, d > 0);
            }
    }
    // Issues O += P V of one or two units.
    template <int kUnits> __device__ __forceinline__ void product(u32 from) {
        const u64 first = wgmma_descriptor(uniform(from), kPanel);
#pragma unroll
        for (int d = 0; d < 4 * kUnits; ++d)
            Wgmma<kDim>::template rs<1>(o, p[d], first + (d / 4 * kUnit + d % 4 * 2048) / 16);
    }
    __device__ __forceinline__ static void keep(float (&x)[32], u32 word) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int bit = i / 4 * 2 + i % 2 + i / 2 % 2 * 16;
            x[i] = (word >> bit) & 1 ? x[i] : -kInfinity;
        }
    }
    // Exponentials of scores in place; `grown`: what the accumulators have to be multiplied by, and
    // whether any lane of the warp needs it.
    template <int kUnits> __device__ __forceinline__ bool soften(float (&grown)[2], float log2_scale) {
        // Four maxima a row: a chain of 32 would take longer than the exponentials.
        float top[2][4], base[2];
        bool moved = false;
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float &t = top[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
                t = u == 0 && i < 8 ? s[u][i] : fmaxf(t, s[u][i]);
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float reach = quad_max(fmaxf(fmaxf(top[h][0], top[h][1]), fmaxf(top[h][2], top[h][3]))) * log2_scale;
            const bool far = reach > m[h] + kSlack;
            grown[h] = far ? exp2_fast(m[h] - reach) : 1.f;
            m[h] = far ? reach : m[h];
            moved |= far;
            base[h] = m[h] == -kInfinity ? 0.f : m[h];
            l[h] *= grown[h];
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u)
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                s[u][i] = exp2_fast(fmaf(s[u][i], log2_scale, -base[i / 2 % 2]));
                l[i / 2 % 2] += s[u][i];
            }
        return __any_sync(0xFFFFFFFFu, moved);
    }
    // Holds what follows back until the exponentials are there: ptxas would put the wait for the product
    // that they are to run beside before them, but not before a trap that depends on them. No sum of
    // exponentials is negative.
    __device__ __forceinline__ void settle() const {
        asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p trap;\n}\n" ::"f"(l[0] + l[1]) : "memory");
    }
    template <int kUnits> __device__ __forceinline__ void convert() {
#pragma unroll
        for (int d = 0; d < 4 * kUnits; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[d][i] = pack2<operand_t>(s[d / 4][d % 4 * 8 + 2 * i], s[d / 4][d % 4 * 8 + 2 * i + 1]);
    }
    __device__ __forceinline__ void rescale(const float (&grown)[2]) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= grown[i / 2 % 2];
    }
};

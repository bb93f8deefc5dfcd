#pragma once
// Fused attention on sm_90a: its constants, and what a consumer warpgroup does with the rows it holds.
#include "exponent.cuh"
#include "mma.cuh"
#include "registers.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"
#include "quad.cuh"

constexpr int kDim = MG_DIM, kStages = MG_STAGES, kGroups = MG_GROUPS;
static_assert(kDim % 32 == 0 && kDim <= 256, "DIM must be a multiple of 32, at most 256");
static_assert(kGroups == 2 || kGroups == 3, "GROUPS must be 2 or 3");
static_assert(kStages >= 2, "rings of at least two units");
// Independent streams of items in a CTA: with two of them, of two warpgroups each, the dead time of one
// is the other's, where two CTAs would have too few registers.
constexpr int kStreams = MG_STREAMS, kConsumers = 128 * kGroups * kStreams;
// Registers of consumers, and what is left for the producer's warpgroup.
constexpr int kMany = kStreams == 2 ? 112 : kGroups == 3 ? 160 : 232, kFew = kGroups == 2 && kStreams == 1 ? 40 : 32;
using Pool = Registers<kConsumers + 128, kFew, kMany>;
static_assert(kStreams == 1 || (kStreams == 2 && kGroups == 2), "two streams are of two warpgroups");
constexpr int kPanels = (kDim + 63) / 64, kDepth = kDim / 16;
constexpr int kQueries = MG_QUERIES;  // places of Q
static_assert(kQueries > kGroups && kQueries <= 2 * kGroups, "QUERIES must be more than GROUPS, at most twice as many");
// Barriers that say that a Q is there. Each has one warpgroup that waits for it: two that took turns at one, as they
// take turns at the places of three, could take the phase before the last for theirs.
constexpr int kFulls = kQueries % kGroups ? kQueries * kGroups : kQueries;
constexpr u32 kPanel = 64 * 128, kUnit = kPanels * kPanel, kStream = (kQueries + 2 * kStages) * kUnit;
constexpr bool kMasked = MG_MASKED;      // by keys, at run time
constexpr int kPacked = 1 << 24;
// A tile: its item; from this bit on, the warpgroups that leave it to others.
constexpr int kApart = 28, kItem = (1 << kApart) - 1;
// The reference point of a row's exponentials moves when weights of a unit add up to more than this in a lane;
// in partial units when one is more than 2: few keys may be kept there, and then the largest weight should be
// about 1.
constexpr float kMost = 256.f;

// What a consumer warpgroup is told of an item.
struct Info {
    int unit, count, slot, matrix;
    int own;  // steps up to the last of its own
};

__device__ __forceinline__ int load_shared(u32 address) {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
// Bits of a unit's 64 keys, as the mask words of this lane's columns 8j + 2 (lane % 4) + e: bit 2j + e, for
// both of its rows.
__device__ __forceinline__ u32 mask_word(uint2 keys) {
    const int first = threadIdx.x % 4 * 2;
    u32 word = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 bits = (half ? keys.y : keys.x) >> first & 0x03030303u;
        word |= ((bits | bits >> 6 | bits >> 12 | bits >> 18) & 0xFF) << 8 * half;
    }
    return word | word << 16;
}

// A ring of stages: the stage that comes next and the parity of its round.
template <int kCount> struct Ring {
    u32 stage = 0, parity;
    __device__ __forceinline__ explicit Ring(u32 parity) : parity(parity) {}
    __device__ __forceinline__ void advance() {
        if (++stage == kCount) stage = 0, parity ^= 1;
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
    float o[kDim / 2], s[32], m[2], l[2];
    u32 p[4][4];

    __device__ __forceinline__ void start() {
        m[0] = m[1] = -kInfinity;
        l[0] = l[1] = 0.f;
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;
    }
    // Issues S = Q Kᵀ of a unit; both descriptors in uniform registers.
    __device__ __forceinline__ void scores(u64 left, u64 right) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const u32 step = (d / 4 * kPanel + d % 4 * 32) / 16;
            Wgmma<64>::ss<0, 0>(s, left + step, right + step, d > 0);
        }
        wgmma_commit();
    }
    // Issues O += P V of a unit.
    __device__ __forceinline__ void product(u64 right) {
#pragma unroll
        for (int d = 0; d < 4; ++d) Wgmma<kDim>::template rs<1>(o, p[d], right + d * 2048 / 16);
        wgmma_commit();
    }
    __device__ __forceinline__ void keep(u32 word) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int bit = i / 4 * 2 + i % 2 + i / 2 % 2 * 16;
            s[i] = (word >> bit) & 1 ? s[i] : -kInfinity;
        }
    }
    // Weights, in place of the scores of a unit, and their sums against the references as they are. False, and
    // no sum changed, if some row of the warp may have outgrown its reference: no weight is larger than the
    // sum it is part of, so maxima are not needed, and nothing leaves its lane.
    __device__ __forceinline__ bool follow(float log2_scale) {
        float sum[2][2];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            s[i] = exp2_fast(fmaf(s[i], log2_scale, -m[i / 2 % 2]));
            float &t = sum[i / 2 % 2][i % 2];
            t = i < 4 ? s[i] : t + s[i];
        }
        const float more[2] = {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1]};
        if (__any_sync(0xFFFFFFFFu, fmaxf(more[0], more[1]) > kMost)) return false;
#pragma unroll
        for (int h = 0; h < 2; ++h) l[h] += more[h];
        return true;
    }
    // After a unit that follow gave up: its scores once more, as a warp alone can have them. Q and K of 64
    // columns a panel, the warp's rows of Q from row16.
    __device__ __forceinline__ void again(u32 query_at, u32 key_at, int row16) {
        int lane;
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] = 0.f;
#pragma unroll 1
        for (int d = 0; d < kDepth; ++d) {
            const u32 panel = d / 4 * kPanel;
            u32 a[4];
            load_matrices(a, swizzled(query_at + panel, row16 + lane % 16, d % 4 * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                u32 b[4];  // of keys 16n … 16n + 7, then of the next 8
                load_matrices(b, swizzled(key_at + panel, 16 * n + lane % 8 + lane / 16 * 8, d % 4 * 2 + lane / 8 % 2));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float *to = s + 8 * n + 4 * half, c[4] = {to[0], to[1], to[2], to[3]};
                    mma_16x8x16<operand_t>(c, a, b[2 * half], b[2 * half + 1]);
                    to[0] = c[0], to[1] = c[1], to[2] = c[2], to[3] = c[3];
                }
            }
        }
    }
    // Weights and sums of a unit against references that move to the maxima, and by what O has to be rescaled.
    __device__ __forceinline__ void lead(float log2_scale, float (&grown)[2]) {
        // Four maxima a row: a chain of 16 would take longer than the exponentials.
        float top[2][4], reach[2], base[2], sum[2][2];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float &t = top[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
            t = i < 8 ? s[i] : fmaxf(t, s[i]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            reach[h] = fmaxf(fmaxf(top[h][0], top[h][1]), fmaxf(top[h][2], top[h][3])) * log2_scale, grown[h] = 1.f;
        // No weight above 2: nothing moves.
        if (__any_sync(0xFFFFFFFFu, reach[0] > m[0] + 1.f || reach[1] > m[1] + 1.f))
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reach[h] = quad_max(reach[h]);
                const bool far = reach[h] > m[h];
                grown[h] = far ? exp2_fast(m[h] - reach[h]) : 1.f;
                m[h] = far ? reach[h] : m[h];
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) base[h] = m[h] == -kInfinity ? 0.f : m[h];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            s[i] = exp2_fast(fmaf(s[i], log2_scale, -base[i / 2 % 2]));
            float &t = sum[i / 2 % 2][i % 2];
            t = i < 4 ? s[i] : t + s[i];
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) l[h] = fmaf(l[h], grown[h], sum[h][0] + sum[h][1]);
    }
    // Also where O is 0: with a condition ptxas no longer sees that warps stay together, and leaves uniform
    // registers.
    __device__ __forceinline__ void rescale(const float (&grown)[2]) {
        if (__any_sync(0xFFFFFFFFu, grown[0] != 1.f || grown[1] != 1.f))
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) o[i] *= grown[i / 2 % 2];
    }
    // Rows of which no key was kept so far have no reference to follow.
    __device__ __forceinline__ bool open() const { return __any_sync(0xFFFFFFFFu, fminf(m[0], m[1]) == -kInfinity); }
    // P for a product; no product may be under way that reads it.
    __device__ __forceinline__ void pack() {
#pragma unroll
        for (int d = 0; d < 4; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[d][i] = pack2<operand_t>(s[8 * d + 2 * i], s[8 * d + 2 * i + 1]);
    }
    // To the place of Q in shared memory.
    __device__ __forceinline__ void store(u32 at, int row16) const {
        int lane;  // read here, or the compiler keeps all that follows from it in registers
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
            stmatrix4(swizzled(at + d / 4 * kPanel, row16 + lane % 16, d % 4 * 2 + lane / 16),
                      pack2<operand_t>(o[8 * d], o[8 * d + 1]), pack2<operand_t>(o[8 * d + 2], o[8 * d + 3]),
                      pack2<operand_t>(o[8 * d + 4], o[8 * d + 5]), pack2<operand_t>(o[8 * d + 6], o[8 * d + 7]));
    }
};

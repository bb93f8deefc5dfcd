#pragma once
// Fused attention without wgmma: what a warp does with its rows.
//
// A warp holds 16 rows of each of kHold query units: every piece of K and V that it reads serves all
// of them. Products are m16n8k16 of halves, m16n8k8 of TF32 or, for float32 in full, FMAs that leave
// their sums where those would (g = lane / 4, t = lane % 4):
//
//     s[u][j][2h + e]   score of row g + 8h, key 8j + 2t + e
//     o[u][j][2h + e]   result of row g + 8h, column 8j + 2t + e
#include "exponent.cuh"
#include "fused_stage.cuh"

// What a score is multiplied by for the exponentials: halves take powers of two.
constexpr float kBase = kFloat ? 1.f : kLog2e;
__device__ __forceinline__ float power(float x) { return kFloat ? expf(x) : exp2_fast(x); }

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kFloat)
        mma_16x8x8_tf32(c, a, b0, b1);
    else
        mma_16x8x16<operand_t>(c, a, b0, b1);
}

// Read anew where it is used: what follows from it would stay in registers from use to use.
__device__ __forceinline__ int own_lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// kOwn below: bit u says that the warp's unit u takes the keys.
__device__ __forceinline__ constexpr bool owns(int own, int u) { return own >> u & 1; }

struct Rows {
    float o[kHold][kColumns][4], s[kHold][kTiles][4], m[kHold][2], l[kHold][2];
    u32 q[kHold][kQHeld ? kDepth : 1][4], p[kHold][kTiles / 2][4];

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int u = 0; u < kHold; ++u) {
#pragma unroll
            for (int h = 0; h < 2; ++h) m[u][h] = -kInfinity, l[u][h] = 0.f;
#pragma unroll
            for (int i = 0; i < 4 * kColumns; ++i) o[u][i / 4][i % 4] = 0.f;
        }
    }
    __device__ __forceinline__ void take_queries(u32 q_at, int row16) {
        const int lane = own_lane();
        const Pieces rows(q_at, row16 + lane % 16, lane / 16);
        if constexpr (kQHeld)
#pragma unroll
            for (int u = 0; u < kHold; ++u)
#pragma unroll
                for (int d = 0; d < kDepth; ++d) load_matrices(q[u][d], rows.at(64 * u, 2 * d));
    }

    // S = Q Kᵀ; q_at: the rows of the warp's first unit, k_at: kKeys rows.
    template <int kOwn> __device__ __forceinline__ void scores(u32 q_at, u32 k_at, int row16) {
        const int lane = own_lane();
#pragma unroll
        for (int i = 0; i < kHold * kTiles * 4; ++i) s[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = 0.f;
        if constexpr (kFloat && !kRounded)
            scores_in_full<kOwn>(q_at, k_at, row16, lane);
        else {
            const Pieces rows(q_at, row16 + lane % 16, lane / 16), keys(k_at, lane / 16 * 8 + lane % 8, lane / 8 % 2);
            // The next operands are asked for before the products of these.
            constexpr int kSteps = kDepth * kTiles / 2;
            u32 a[2][kHold][4], b[2][4];
            const auto queries = [&](int d) {
#pragma unroll
                for (int u = 0; u < kHold; ++u)
                    if (!kQHeld && owns(kOwn, u)) load_matrices(a[d % 2][u], rows.at(64 * u, 2 * d));
            };
            queries(0);
            load_matrices(b[0], keys.at(0, 0));
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const int d = i / (kTiles / 2), n = i % (kTiles / 2), next = i + 1;
                if (n == 0 && d + 1 < kDepth) queries(d + 1);
                if (next < kSteps)
                    load_matrices(b[next % 2], keys.at(next % (kTiles / 2) * 16, next / (kTiles / 2) * 2));
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int u = 0; u < kHold; ++u)
                        if (owns(kOwn, u))
                            multiply(s[u][2 * n + e], kQHeld ? q[u][kQHeld ? d : 0] : a[d % 2][u], b[i % 2][2 * e],
                                     b[i % 2][2 * e + 1]);
            }
        }
    }
    template <int kOwn> __device__ __forceinline__ void scores_in_full(u32 q_at, u32 k_at, int row16, int lane) {
        const int g = lane / 4, t = lane % 4;
        const Pieces rows(q_at, row16 + g, 0), even(k_at, 2 * t, 0), odd(k_at, 2 * t + 1, 0);
        // Long sums in pieces of 64 columns: each addition rounds less.
        float before[kHold][kTiles][4];
#pragma unroll 2
        for (int d = 0; d < kPieces; ++d) {
            if (kDim > 128 && d % 16 == 0)
#pragma unroll
                for (int i = 0; i < kHold * kTiles * 4; ++i) {
                    float &x = s[i / (4 * kTiles)][i / 4 % kTiles][i % 4], &y = before[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
                    y = d == 0 ? 0.f : y + x, x = 0.f;
                }
            float4 a[kHold][2];
#pragma unroll
            for (int u = 0; u < kHold; ++u)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (owns(kOwn, u)) a[u][h] = load_shared_floats(rows.at(64 * u + 8 * h, d));
#pragma unroll
            for (int i = 0; i < 2 * kTiles; ++i) {
                const float4 b = load_shared_floats((i % 2 ? odd : even).at(i / 2 * 8, d));
#pragma unroll
                for (int u = 0; u < kHold; ++u)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        if (!owns(kOwn, u)) continue;
                        float &c = s[u][i / 2][2 * h + i % 2];
                        c = fmaf(a[u][h].x, b.x, c), c = fmaf(a[u][h].y, b.y, c);
                        c = fmaf(a[u][h].z, b.z, c), c = fmaf(a[u][h].w, b.w, c);
                    }
            }
        }
        if (kDim > 128)
#pragma unroll
            for (int i = 0; i < kHold * kTiles * 4; ++i)
                s[i / (4 * kTiles)][i / 4 % kTiles][i % 4] += before[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    }

    // Drops scores of a unit: bit 2j + e + 16h of the word says that one is kept.
    __device__ __forceinline__ static void keep(float (&x)[kTiles][4], u32 word) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
            const int bit = i / 4 * 2 + i % 2 + i / 2 % 2 * 16;
            x[i / 4][i % 4] = word >> bit & 1 ? x[i / 4][i % 4] : -kInfinity;
        }
    }
    // Exponentials of the scores in place, as operands where the products want them so.
    template <int kOwn> __device__ __forceinline__ void soften(float scale) {
        float grown[kHold][2], base[kHold][2];
        bool moved = false;
#pragma unroll
        for (int n = 0; n < 2 * kHold; ++n) {
            const int u = n / 2, h = n % 2;
            if (!owns(kOwn, u)) continue;
            float top[2] = {s[u][0][2 * h], s[u][0][2 * h + 1]};
#pragma unroll
            for (int j = 1; j < kTiles; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], s[u][j][2 * h + e]);
            base[u][h] = fmaxf(top[0], top[1]);
        }
#pragma unroll
        for (int n = 0; n < 2 * kHold; ++n) {
            const int u = n / 2, h = n % 2;
            if (!owns(kOwn, u)) continue;
            const float reach = fmaxf(m[u][h], quad_max(base[u][h]) * scale);
            base[u][h] = reach == -kInfinity ? 0.f : reach;
            moved |= reach != m[u][h];
            grown[u][h] = power(m[u][h] - base[u][h]);
            m[u][h] = reach;
            l[u][h] *= grown[u][h];
        }
#pragma unroll
        for (int u = 0; u < kHold; ++u) {
            if (!owns(kOwn, u)) continue;
#pragma unroll
            for (int i = 0; i < 4 * kTiles; ++i) {
                float &x = s[u][i / 4][i % 4];
                x = power(fmaf(x, scale, -base[u][i / 2 % 2]));
                l[u][i / 2 % 2] += x;
            }
            if constexpr (!kFloat)
#pragma unroll
                for (int i = 0; i < 2 * kTiles; ++i)
                    p[u][i / 4][i % 4] = pack2<operand_t>(s[u][i / 2][i % 2 * 2], s[u][i / 2][i % 2 * 2 + 1]);
        }
        // Maxima move rarely after the first keys.
        if (__any_sync(0xFFFFFFFFu, moved))
#pragma unroll
            for (int u = 0; u < kHold; ++u)
#pragma unroll
                for (int i = 0; i < 4 * kColumns; ++i)
                    if (owns(kOwn, u)) o[u][i / 4][i % 4] *= grown[u][i / 2 % 2];
    }

    // O += P V; v_at: kKeys rows.
    template <int kOwn> __device__ __forceinline__ void product(u32 v_at) {
        const int lane = own_lane();
        if constexpr (!kFloat)
            product_of_halves<kOwn>(v_at, lane);
        else if constexpr (kRounded)
            product_rounded<kOwn>(v_at, lane);
        else
            product_in_full<kOwn>(v_at, lane);
    }
    template <int kOwn> __device__ __forceinline__ void product_of_halves(u32 v_at, int lane) {
        const Pieces rows(v_at, lane % 16, lane / 16);
        constexpr int kAcross = kColumns / 2, kSteps = kTiles / 2 * kAcross;
        u32 b[2][4];
        load_matrices_transposed(b[0], rows.at(0, 0));
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const int n = i / kAcross, d = i % kAcross, next = i + 1;
            if (next < kSteps) load_matrices_transposed(b[next % 2], rows.at(next / kAcross * 16, next % kAcross * 2));
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
                for (int u = 0; u < kHold; ++u)
                    if (owns(kOwn, u)) multiply(o[u][2 * d + e], p[u][n], b[i % 2][2 * e], b[i % 2][2 * e + 1]);
        }
    }
    // Keys 2t and 2t + 1 of a tile are rows t and t + 4 of the product, so that scores are its operand.
    template <int kOwn> __device__ __forceinline__ void product_rounded(u32 v_at, int lane) {
        const int g = lane / 4, t = lane % 4;
        const Pieces even(v_at + g % 4 * 4, 2 * t, g / 4), odd(v_at + g % 4 * 4, 2 * t + 1, g / 4);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            u32 a[kHold][4];
#pragma unroll
            for (int u = 0; u < kHold; ++u)
#pragma unroll
                // To nearest, for the product drops what is below: exponentials are finite or NaN, and so is l.
                for (int i = 0; i < 4; ++i) a[u][i] = __float_as_uint(s[u][j][i % 2 * 2 + i / 2]) + 0x1000u;
#pragma unroll
            for (int d = 0; d < kColumns; ++d) {
                const u32 b0 = shared1(even.at(8 * j, 2 * d)), b1 = shared1(odd.at(8 * j, 2 * d));
#pragma unroll
                for (int u = 0; u < kHold; ++u)
                    if (owns(kOwn, u)) multiply(o[u][d], a[u], b0, b1);
            }
        }
    }
    template <int kOwn> __device__ __forceinline__ void product_in_full(u32 v_at, int lane) {
        const int t = lane % 4;
        // Lanes of even t read the first half of a piece, those of odd t the second.
        v_at += t % 2 * 8;
#pragma unroll
        for (int key = 0; key < kKeys; ++key) {
            const Pieces row(v_at, key % 8, t / 2);
            float a[kHold][2];
#pragma unroll
            for (int u = 0; u < kHold; ++u)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (owns(kOwn, u)) a[u][h] = __shfl_sync(0xFFFFFFFFu, s[u][key / 8][2 * h + key % 2], lane / 4 * 4 + key % 8 / 2);
#pragma unroll
            for (int d = 0; d < kColumns; ++d) {
                const float2 b = shared2(row.at(key / 8 * 8, 2 * d));
#pragma unroll
                for (int u = 0; u < kHold; ++u)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (owns(kOwn, u)) o[u][d][i] = fmaf(a[u][i / 2], i % 2 ? b.y : b.x, o[u][d][i]);
            }
        }
    }
};

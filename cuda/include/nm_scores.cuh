#pragma once
// What sddmm_nm_sm90 makes of the accumulators of a wgmma: of every four neighbouring scores two, and codes.
#include "nm.cuh"

constexpr bool kBrain = MG_DTYPE == 1;  // bfloat16
constexpr bool kWithin = MG_WITHIN, kGiven = MG_GIVEN, kKeep = MG_KEEP;
// What `scale` multiplies: 0 what is kept; 1 scores before they are compared, since it is not positive; 2 Q, in
// registers: a power of two, and bfloat16, whose exponents are those of the sums (elements that it takes below
// 2^-126 lose bits, and scores that overflow without it do not).
constexpr int kScale = MG_SCALE;
constexpr bool kHeld = MG_HELD;
constexpr int kGroups = MG_GROUPS, kUnits = MG_UNITS, kDepth = MG_PANELS, kStages = MG_STAGES;
constexpr int kQueries = MG_QUERIES, kResults = MG_RESULTS;
static_assert(kNm < 2, "16-bit values only");
static_assert(kResults == 2 || (kResults == 3 && !kWithin), "results go out alone or by twos");
static_assert(!kWithin || kGroups == 1, "blocks of 64 rows are a warpgroup's");
static_assert(kScale < 2 || (kBrain && kHeld && !kGiven), "only Q in bfloat16 is scaled exactly");
constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + (kHeld ? 128 : 32);
constexpr u32 kPanel = 64 * 128;  // 64 rows of 64 columns
constexpr u32 kBytesQ = kDepth * kGroups * kPanel, kBytesK = kDepth * kUnits * kPanel;
constexpr u32 kPacked = kUnits * 4096, kResult = kPacked + 1024;
constexpr bool kWide = !kWithin && kUnits == 2;  // rows of 128 bytes of results, else of 64

struct Item {
    int entry, row, column, mask;
};

// 64 bools as bits.
__device__ __forceinline__ u64 bits_of(const u8 *bools) {
    u64 bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u64 bytes = __ldg(reinterpret_cast<const u64 *>(bools) + i);
        bits |= (bytes * 0x0102040810204080ull >> 56) << (8 * i);
    }
    return bits;
}

// Where a lane's 16-byte chunk (0 … 1 of the first of two stores) of a row of results lies, in the swizzle
// that the map expects; later chunks and units flip bits of it, as `result_at` says.
__device__ __forceinline__ u32 lane_chunk(int row, int chunk) {
    return kWide ? row * 128 + ((chunk ^ (row & 7)) << 4) : row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}
__device__ __forceinline__ u32 result_at(u32 chunk, int unit, int half) {
    return kWide ? chunk ^ (64 * unit + 32 * half) : (chunk ^ 32 * half) + 4096 * unit;
}

__device__ __forceinline__ void scale_pairs(u32 (&x)[4], u32 by) {
#pragma unroll
    for (u32 &pair : x) asm("mul.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(by));
}
// NaN in a half where one of the values in that half of a or b is: their product in bfloat16, which overflows
// where float32 does, and in float16 their sum.
__device__ __forceinline__ void spoil(u32 &sum, u32 a, u32 b) {
    if constexpr (kBrain)
        asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    else
        asm("add.f16x2 %0, %0, %1;\nadd.f16x2 %0, %0, %2;" : "+r"(sum) : "r"(a), "r"(b));
}
__device__ __forceinline__ bool spoilt(u32 pair) {
    u32 is;
    if constexpr (kBrain)
        asm("{\n.reg .pred p, q;\nsetp.nan.bf16x2 p|q, %1, %1;\nor.pred p, p, q;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is) : "r"(pair));
    else
        asm("{\n.reg .pred p, q;\nsetp.nan.f16x2 p|q, %1, %1;\nor.pred p, p, q;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is) : "r"(pair));
    return is;
}

// Values below 2^-126 are zero, as everywhere here: scores that are scaled already are taken so when they are
// compared, others when they are multiplied.
#if MG_SCALE
#define MG_FTZ ".ftz"
#else
#define MG_FTZ ""
#endif
__device__ __forceinline__ float larger(float a, float b) {
    float x;
    asm("max" MG_FTZ ".NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}
// choose4 for scores that are all live and none of them NaN (else one of `kept` is, and the choice is not to be
// used), on few instructions: values land in `kept`, scaled; the nibble is added to `codes`, a float of
// 2^23 + 8 · unit for every group to come, whose low bits are then the codes. Selections ride on multiplications
// and additions of that pipe, which has twice the rate of the one that compares. `scale` > 0; ignored where the
// scores are scaled already.
__device__ __forceinline__ void choose4_plain(float a, float b, float c, float d, float scale,
                                              float (&kept)[2], float &codes, float unit) {
    const float h1 = larger(a, b), h2 = larger(c, d), by = kScale ? 1.0f : scale;
    kept[0] = kScale ? h1 : h1 * by, kept[1] = kScale ? h2 : h2 * by;
    // With ftz the assembler does not take a multiplication by 1 for a move, which the other pipe does.
    if constexpr (kNm == 0) {
        asm("{\n.reg .pred left, one, p, q;\n.reg .f32 l1, l2;\n"
            "min" MG_FTZ ".f32 l1, %3, %4;\nmin" MG_FTZ ".f32 l2, %5, %6;\n"
            "setp.ge" MG_FTZ ".f32 left, l1, %8;\n"
            "setp.gt.or" MG_FTZ ".f32 one, l2, %7, left;\n"
            "setp.gt.and" MG_FTZ ".f32 p, %4, %3, !one;\n"
            "setp.gt.and" MG_FTZ ".f32 q, %6, %5, !one;\n"
            "@one mul.ftz.f32 %0, %5, %9;\n@one mul.ftz.f32 %1, %6, %9;\n"
            "@left mul.ftz.f32 %0, %3, %9;\n@left mul.ftz.f32 %1, %4, %9;\n"
            "@one add.f32 %2, %2, %12;\n@left add.f32 %2, %2, %13;\n"
            "@p add.f32 %2, %2, %10;\n@q add.f32 %2, %2, %11;\n}"
            : "+f"(kept[0]), "+f"(kept[1]), "+f"(codes)
            : "f"(a), "f"(b), "f"(c), "f"(d), "f"(h1), "f"(h2), "f"(by), "f"(unit), "f"(4 * unit),
              "f"(6 * unit), "f"(-10 * unit));
    } else {
        asm("{\n.reg .pred p, q;\n"
            "setp.gt" MG_FTZ ".f32 p, %2, %1;\nsetp.gt" MG_FTZ ".f32 q, %4, %3;\n"
            "@p add.f32 %0, %0, %5;\n@q add.f32 %0, %0, %6;\n}"
            : "+f"(codes)
            : "f"(a), "f"(b), "f"(c), "f"(d), "f"(unit), "f"(4 * unit));
    }
}

// Packs what is kept of unit `v` of a step: halves h and group of sixteen columns u of this lane's rows g and
// g + 8. Returns the codes, as quad_nibbles takes them; GIVEN: as it has them. `plain`: all of the unit is within
// the pattern and live; else inside_of tells the bits of columns in both rows that are within it, and of those
// columns the ones in `wanted` are live.
template <class F>
__device__ __forceinline__ u32 pack_unit(u32 (&packed)[2][4], const float (&acc)[32 * kUnits], int v, u32 codes,
                                         float scale, bool plain, u64 wanted, int t, const F &inside_of) {
    if (plain) {
        float sum[2] = {8388608.0f + 0x8888, 8388608.0f + 0x8888};
        u32 nans = 0;
#pragma unroll
        for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = 32 * v + 4 * u + 2 * h;
                float a = acc[at], b = acc[at + 1], c = acc[at + 16], d = acc[at + 17], two[2];
                if constexpr (kGiven) {
                    take4(a, b, c, d, scale, codes >> (16 * h + 4 * u), two);
                } else {
                    if (kScale == 1) a *= scale, b *= scale, c *= scale, d *= scale;
                    choose4_plain(a, b, c, d, scale, two, sum[h], float(1 << 4 * u));
                }
                packed[h][u] = pack2<operand_t>(two[0], two[1]);
                if (!kGiven && h) spoil(nans, packed[0][u], packed[1][u]);
            }
        if constexpr (!kGiven) {
            codes = __byte_perm(__float_as_uint(sum[0]), __float_as_uint(sum[1]), 0x5410);
            plain = !spoilt(nans);
        }
    }
    if (!plain) {
        // Bits of the unit's columns in rows g and g + 8: within the pattern, and live.
        u64 inside[2] = {~0ull, ~0ull};
        inside_of(inside);
        u32 made = 0;
#pragma unroll
        for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = 32 * v + 4 * u + 2 * h, shift = 16 * u + 4 * t;
                const float by = kScale == 2 ? 1.0f : scale;
                const float x[4] = {acc[at] * by, acc[at + 1] * by, acc[at + 16] * by, acc[at + 17] * by};
                const u32 alive = u32((inside[h] & wanted) >> shift);
                const u32 code = kGiven ? codes >> (16 * h + 4 * u) & 15u
                                        : choose4(x, alive, u32(inside[h] >> shift));
                const int i0 = first_of(code), i1 = second_of(code);
                packed[h][u] = pack2<operand_t>(alive >> i0 & 1 ? one_of4(x, i0) : 0.0f,
                                                alive >> i1 & 1 ? one_of4(x, i1) : 0.0f);
                made |= code << (16 * h + 4 * u);
            }
        codes = made;
    }
    return codes;
}

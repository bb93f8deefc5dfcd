#pragma once
// The operations that look along rows, in two steps: one number or two of a whole row, then a result
// for every slot. A row's slots are taken in pieces of PIECE neighbours, HOLD pieces per lane at once.
//
//     OP 0 softmax    row: top = max x, sum = Σ exp(x − top)     slot: exp(x − top) / sum
//     OP 1 backward   row: dot = Σ p · g − grad_lse              slot: p · (g − dot)
//     OP 2 sum        row: Σ x                                   (no slots are written)
//     OP 3 expand     (no row statistic)                         slot: the row's number
//
//     PHASE 0   both steps at once: every row lies in this part alone. Rows longer than what is held
//               are read twice
//     PHASE 1   rows: statistics of this part; rowwise_merge joins those of all parts
//     PHASE 2   slots, given the joint numbers of the rows
//     PHASE 3   as PHASE 0, where other parts have left their statistics: the joint numbers go to
//               memory too, for the slots of those parts
//
// Dead slots and those that a run-time mask drops count as absent and get exact zeros.
#include "packed.cuh"
#include "reduce.cuh"

constexpr int kSoftmax = 0, kBackward = 1, kSum = 2, kExpand = 3;
constexpr int kOp = MG_OP;
constexpr int kPhase = MG_PHASE;
constexpr int kKeep = MG_KEEP;    // run-time mask: 0 none, 1 over columns, 2 over rows
constexpr int kPiece = MG_PIECE;  // neighbouring slots that a lane takes together
constexpr int kHold = MG_HOLD;    // pieces that a lane holds in registers
constexpr int kTeam = MG_TEAM;    // warps that share a row; 1: every warp has rows of its own
constexpr bool kExact = MG_EXACT;  // expf, for float32 results; else ex2.approx, 2 ulp and x · 2^-23
constexpr bool kMasked = MG_MASKED || kKeep;  // some slots of present pieces may be dead
constexpr bool kResults = kPhase != 1;
constexpr int kWarps = kTeam > 1 ? kTeam : 4;
// CTAs per multiprocessor that leave room for what a lane holds and for addresses, sums and masks.
constexpr int kHeldBytes =
    kHold * kPiece * int(sizeof(value_t) + (kOp == kBackward ? sizeof(operand_t) : 0));
constexpr int kRoom = 65536 / (32 * kWarps * ((kPiece == 1 ? kHold * 2 : kHeldBytes / 4) + 60));
constexpr int kCtas = kRoom < 1 ? 1 : kRoom;
static_assert(kOp != kSum || kPhase == 1, "row sums have no results per slot");
static_assert(kOp != kExpand || kPhase == 2, "expanding has no statistic");

constexpr u32 kWhole = kPiece == 32 ? 0xffffffffu : (1u << kPiece) - 1u;

// What a lane holds: values (p for the backward), its second operand, and a bit for every live slot.
struct Bundle {
    Pack<value_t, kPiece> x[kHold];
    Pack<operand_t, kPiece> g[kOp == kBackward ? kHold : 1];
    u32 live[(kHold * kPiece + 31) / 32];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int w = 0; w < int(sizeof(live) / 4); ++w) live[w] = 0;
    }
    __device__ __forceinline__ void set_live(int h, u32 bits) {
        live[h * kPiece / 32] |= bits << (h * kPiece % 32);
    }
    __device__ __forceinline__ bool is_live(int h, int i) const {
        return !kMasked || (live[(h * kPiece + i) / 32] >> ((h * kPiece + i) % 32) & 1u);
    }
    // Whether every slot of piece h is live: mostly so, and then none needs a look of its own.
    __device__ __forceinline__ bool is_whole(int h) const {
        return !kMasked || (kPiece > 1 && (live[h * kPiece / 32] >> (h * kPiece % 32) & kWhole) == kWhole);
    }
    __device__ __forceinline__ void load(int h, const value_t *values, const operand_t *grad) {
        if (kOp != kExpand) x[h].load(values);
        if (kOp == kBackward) g[h].load(grad);
    }
};

// The largest element, NaN if there is one: two at a time where two fill a word.
template <typename T, int kCount>
__device__ __forceinline__ float top_of(const Pack<T, kCount> &x) {
    if constexpr (sizeof(T) == 2 && kCount > 1) {
        u32 both = x.word[0];
#pragma unroll
        for (int i = 1; i < kCount / 2; ++i) {
            if constexpr (kValues == 0)
                asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(both) : "r"(x.word[i]));
            else
                asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(both) : "r"(x.word[i]));
        }
        return max_nan(Packed<T>::get(&both, 0), Packed<T>::get(&both, 1));
    } else {
        float most = x[0];
#pragma unroll
        for (int i = 1; i < kCount; ++i) most = max_nan(most, x[i]);
        return most;
    }
}

// exp(x − shift); shift is finite or the row is NaN anyway.
__device__ __forceinline__ float power(float x, float shift) {
    if (kExact) return expf(x - shift);
    constexpr float kLog2e = 1.4426950408889634f;
    float r;
    // The difference first: it is exact near the maximum, however large the scores are.
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"((x - shift) * kLog2e));
    return r;
}
// What exponents are taken relative to: a row without a live slot must not give (−inf) − (−inf).
__device__ __forceinline__ float shift_of(float top) { return top == -kInfinity ? 0.0f : top; }

struct Statistic {
    float top = -kInfinity;  // softmax only
    float sum = 0.0f;
};

// Takes the first `present` pieces of a bundle into a lane's statistic.
__device__ __forceinline__ void absorb(Statistic &s, const Bundle &b, int present) {
    if (kOp != kSoftmax) {
#pragma unroll
        for (int h = 0; h < kHold; ++h)
            if (h < present) {
                const auto add = [&](int i) {
                    s.sum = fmaf(b.x[h][i], kOp == kBackward ? b.g[h][i] : 1.0f, s.sum);
                };
                if (b.is_whole(h)) {
#pragma unroll
                    for (int i = 0; i < kPiece; ++i) add(i);
                    continue;
                }
#pragma unroll
                for (int i = 0; i < kPiece; ++i)
                    if (b.is_live(h, i)) add(i);
            }
        return;
    }
    float top = s.top;
#pragma unroll
    for (int h = 0; h < kHold; ++h)
        if (h < present) {
            if (b.is_whole(h)) {
                top = max_nan(top, top_of(b.x[h]));
                continue;
            }
#pragma unroll
            for (int i = 0; i < kPiece; ++i)
                top = max_nan(top, b.is_live(h, i) ? b.x[h][i] : -kInfinity);
        }
    const float shift = shift_of(top);
    s.sum *= power(s.top, shift);
    s.top = top;
#pragma unroll
    for (int h = 0; h < kHold; ++h)
        if (h < present) {
            if (b.is_whole(h)) {
#pragma unroll
                for (int i = 0; i < kPiece; ++i) s.sum += power(b.x[h][i], shift);
                continue;
            }
#pragma unroll
            for (int i = 0; i < kPiece; ++i)
                s.sum += power(b.is_live(h, i) ? b.x[h][i] : -kInfinity, shift);
        }
}

// Joins the statistics of `lanes` neighbouring lanes; all of them get the same bits.
__device__ __forceinline__ void join_lanes(Statistic &s, int lanes) {
    if (kOp == kSoftmax) {
        float top = s.top;
        for (int w = 1; w < lanes; w *= 2) top = max_nan(top, __shfl_xor_sync(kAllLanes, top, w));
        s.sum *= power(s.top, shift_of(top));
        s.top = top;
    }
    for (int w = 1; w < lanes; w *= 2) s.sum += __shfl_xor_sync(kAllLanes, s.sum, w);
}

// Joins what the warps of a team found, in the order of the warps: `at` numbers the rows of a warp.
template <int kRows>
__device__ __forceinline__ void join_team(Statistic &s, float2 (&shared)[kTeam][kRows], int warp,
                                          int at, bool writes) {
    if (writes) shared[warp][at] = make_float2(s.top, s.sum);
    __syncthreads();
    float top = -kInfinity, sum = 0.0f;
    if (kOp == kSoftmax) {
#pragma unroll
        for (int t = 0; t < kTeam; ++t) top = max_nan(top, shared[t][at].x);
    }
#pragma unroll
    for (int t = 0; t < kTeam; ++t) {
        const float2 one = shared[t][at];
        sum += kOp == kSoftmax ? one.y * power(one.x, shift_of(top)) : one.y;
    }
    s = {top, sum};
}

// The numbers of a row that its slots need.
struct Factors {
    float shift = 0.0f;    // softmax: top; backward: dot; expand: the row's number
    float inverse = 0.0f;  // softmax: 1 / sum
};

__device__ __forceinline__ Factors factors_of(const Statistic &s) {
    if (kOp == kSoftmax) return {shift_of(s.top), s.sum == 0.0f ? 0.0f : 1.0f / s.sum};
    return {s.sum, 0.0f};
}
__device__ __forceinline__ float lse_of(const Statistic &s) {
    return s.top == -kInfinity || s.top == kInfinity ? s.top : s.top + logf(s.sum);
}

// A row's numbers in memory: two floats for softmax, else one.
__device__ __forceinline__ void write_row(float *rows, i64 at, float a, float b) {
    if (kOp == kSoftmax) reinterpret_cast<float2 *>(rows)[at] = make_float2(a, b);
    else rows[at] = a;
}
__device__ __forceinline__ Factors read_row(const float *rows, i64 at) {
    if (kOp != kSoftmax) return {__ldg(rows + at), 0.0f};
    const float2 both = __ldg(reinterpret_cast<const float2 *>(rows) + at);
    return {both.x, both.y};
}

// Joins what a part has left in memory.
__device__ __forceinline__ void join_found(Statistic &s, const float *found, i64 at) {
    if (kOp != kSoftmax) {
        s.sum += found[at];
        return;
    }
    const float2 one = reinterpret_cast<const float2 *>(found)[at];
    const float top = max_nan(s.top, one.x), shift = shift_of(top);
    s.sum = s.sum * power(s.top, shift) + one.y * power(one.x, shift);
    s.top = top;
}

// Writes the results of piece h.
__device__ __forceinline__ void emit(out_t *to, const Bundle &b, int h, const Factors &row) {
    float made[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
        made[i] = row.shift;
        if (kOp == kSoftmax) made[i] = power(b.x[h][i], row.shift) * row.inverse;
        if (kOp == kBackward) made[i] = b.x[h][i] * (b.g[h][i] - row.shift);
    }
    if (!b.is_whole(h)) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i)
            if (!b.is_live(h, i)) made[i] = 0.0f;
    }
    Pack<out_t, kPiece>::store(to, made);
}

// spmm_row_few: rows of tokens = rows of few tokens · Sᵀ, S a RowLayout.
//
// x, turned so that a column's tokens lie side by side, stays in shared memory; a warp has a row of S, lanes eight
// neighbouring entries at a time, of which each gathers its tokens in one load. What a warp needs first of its
// row is on its way while x is laid down.
//
//   out      (F, D, rows), contiguous, plus the bias of each row (nullptr: none), activated
//   x        (F, D, inner) by strides, inner positions contiguous, rows of tokens at 16 bytes, inner % 8 == 0
//   values   (F, slots)
//   columns  (slots / 8, rounded up) of eight u16: place of each entry's tokens in shared memory
//   rows_of  (rounds, CTAs, kWarps) int4: row (−1: none), first group of eight entries, entries of the first
//            group that are another row's, entries
//
//   grid   (CTAs, tiles of kTokens, F)
//   block  kWarps warps
//   smem   (inner + 8) · kTokens elements; the last are zeros
//   floor  values and columns, 4 bytes an entry, and out at the rate of memory, behind the latency of two loads
//   needs  sm_80
//
// Entries of other rows that a group has are no products: weights become 0, and so does x, which may be NaN there.
#include "types.cuh"
#include "activation.cuh"
#include "few.cuh"

constexpr int kTokens = MG_TOKENS_OF_CTA, kWarps = MG_WARPS, kThreads = 32 * kWarps;
static_assert(kTokens == 1 || kTokens == 2 || kTokens == 4 || kTokens == 8, "1, 2, 4 or 8 tokens");
constexpr int kAtOnce = kTokens < 4 ? kTokens : 4;  // tokens that a thread lays down at once

// Eight entries: two a register.
struct Group {
    u32 weights[4], places[4];
};

// Tokens of one column, as they lie.
template <int kCount> struct alignas(kCount * 2) Column {
    operand_t of[kCount];
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    spmm_row_few(const operand_t *__restrict__ x, i64 x_free, i64 x_token, const operand_t *__restrict__ values,
                 i64 slots, const u32 *__restrict__ columns, const int4 *__restrict__ rows_of, int rounds, float scale,
                 const operand_t *__restrict__ bias, operand_t *__restrict__ out, int rows, int inner, int width) {
    extern __shared__ __align__(16) u8 raw[];
    operand_t *const right = reinterpret_cast<operand_t *>(raw);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token0 = blockIdx.y * kTokens, tokens = min(kTokens, width - token0);
    const i64 f = blockIdx.z;
    const u8 *const weights = reinterpret_cast<const u8 *>(values + f * slots);
    const bool aligned = reinterpret_cast<u64>(weights) % 16 == 0;

    auto record = [&](int round) {
        return __ldg(rows_of + (static_cast<i64>(round) * gridDim.x + blockIdx.x) * kWarps + warp);
    };
    auto bring = [&](Group &to, const int4 &row, int step) {
        const int group = step * 32 + lane;
        if (group * 8 >= row.z + row.w) return;
        const i64 at = row.y + static_cast<i64>(group);
        load_if(to.places, columns + 4 * at, true);
        if (aligned && 8 * at + 8 <= slots) {
            load_if(to.weights, weights + 16 * at, true);
        } else {
            const u16 *from = reinterpret_cast<const u16 *>(weights) + 8 * at;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                to.weights[i] = 8 * at + 2 * i < slots ? __ldg(from + 2 * i) : 0;
                to.weights[i] |= 8 * at + 2 * i + 1 < slots ? u32(__ldg(from + 2 * i + 1)) << 16 : 0;
            }
        }
    };
    int4 row = record(0);
    Group has;
    bring(has, row, 0);

    // x: a thread takes eight columns of kAtOnce tokens.
    const operand_t *const from = x + f * x_free + token0 * x_token;
    for (int n = threadIdx.x; n < inner / 8; n += kThreads)
#pragma unroll 1
        for (int first = 0; first < kTokens; first += kAtOnce) {
            Vec<operand_t> theirs[kAtOnce];
#pragma unroll
            for (int t = 0; t < kAtOnce; ++t)
                theirs[t] = first + t < tokens ? global16(from + (first + t) * x_token + 8 * n) : zero16<operand_t>();
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                Column<kAtOnce> column;
#pragma unroll
                for (int t = 0; t < kAtOnce; ++t) column.of[t] = theirs[t].at[i];
                // Neighbouring threads write to other banks; `columns` knows.
                *reinterpret_cast<Column<kAtOnce> *>(right + (8 * n + (i ^ n % 8)) * kTokens + first) = column;
            }
        }
    if (threadIdx.x < kTokens) right[inner * kTokens + threadIdx.x] = from_float<operand_t>(0.f);
    __syncthreads();

    for (int round = 0; row.x >= 0;) {
        const int4 next = round + 1 < rounds ? record(round + 1) : make_int4(-1, 0, 0, 0);
        const float more = bias && lane == 0 ? to_float(bias[row.x]) : 0.f;
        float sum[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) sum[t] = 0.f;
        const int end = row.z + row.w, steps = (end + 255) / 256;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int entry = (step * 32 + lane) * 8;
            const Group now = has;
            const bool more_of_it = step + 1 < steps;
            bring(has, more_of_it ? row : next, more_of_it ? step + 1 : 0);
            if (entry < end) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const bool mine = entry + i >= row.z && entry + i < end;
                    const u16 bits = now.weights[i / 2] >> i % 2 * 16;
                    const u32 place = mine ? now.places[i / 2] >> i % 2 * 16 & 0xFFFF : inner;
                    const float weight = mine ? to_float(reinterpret_cast<const operand_t &>(bits)) : 0.f;
                    const auto column = *reinterpret_cast<const Column<kTokens> *>(right + place * kTokens);
#pragma unroll
                    for (int t = 0; t < kTokens; ++t) sum[t] = fmaf(weight, to_float(column.of[t]), sum[t]);
                }
            }
        }
        if (steps == 0) bring(has, next, 0);
        // A lane that has several tokens' sums gives half of them away, until it has one; then lanes add up.
        int token = 0;
#pragma unroll
        for (int n = kTokens / 2, bit = 16; bit >= 1; n /= 2, bit /= 2) {
            if (n >= 1) {
                const bool upper = lane & bit;
#pragma unroll
                for (int t = 0; t < kTokens / 2; ++t) {
                    if (t >= n) continue;
                    const float gives = upper ? sum[t] : sum[t + n], keeps = upper ? sum[t + n] : sum[t];
                    sum[t] = keeps + __shfl_xor_sync(~0u, gives, bit);
                }
                token += upper ? n : 0;
            } else {
                sum[0] += __shfl_xor_sync(~0u, sum[0], bit);
            }
        }
        const float y = activated(fmaf(sum[0], scale, __shfl_sync(~0u, more, 0)));
        if (lane % (32 / kTokens) == 0 && token < tokens)
            out[(f * width + token0 + token) * rows + row.x] = from_float<operand_t>(y);
        row = next, ++round;
    }
}

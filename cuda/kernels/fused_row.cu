// fused_row: attention of single queries over listed keys, exact per element, on CUDA cores.
//
//     out[b, h, i, :] = Σ softmax_n(scale · q[b, h, i] · k[b, h / ratio, j_n]) v[b, h / ratio, j_n]
//
//   tensors   q (B, H, nq, D), k (B, Hkv, nk, D), v (B, Hkv, nk, Dv), any strides but the last
//             out (B · H, nq, Dv), lse (B · H, nq); partial_out (B · H, P, Dv), partial_lse (B · H, P)
//             ranges int4 (B · H): first item of the matrix's pattern, items, first of its row offsets;
//             with SHORT only items of at most eight keys, without only longer ones
//             items int4, longest first; offsets int64; columns int32             attention/cuda/rows.py
//             keep (B, nk) bool, or null
//   grid      (CTAs, B · H)    each of its warps takes every so many items of a matrix
//   block     128 threads: a warp gathers rows of K, 32 / LANES at a time, and those of V; gathered.cuh has
//             the map. Every lane of a group ends up with the scores of the keys it looked up.
//             SHORT: each group of LANES lanes has an item of its own.
//   smem      none
//   needs     sm_80; rows 16-byte aligned, D and Dv in whole 16-byte pieces
//   floor     a row of K and one of V for every kept key, from L2
//
// While an item is computed, the next one's indices are under way, and the record of the one after it.
#include "gathered.cuh"

constexpr bool kSink = MG_SINK, kKeep = MG_KEEP, kShort = MG_SHORT;
constexpr bool kEarly = MG_EARLY;  // rows of V are under way while scores are computed
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Powers of two that scores may outgrow the reference point of the exponentials before it moves.
constexpr float kSlack = 8.0f;
constexpr int kSpan = kShort ? kLanes : 32;  // lanes that share an item
constexpr int kSide = kSpan / kLanes;        // keys of it gathered at once
constexpr int kKeys = kSteps * kSide;        // keys of it per round
constexpr int kItems = 32 / kSpan;           // items of a warp

__device__ __forceinline__ float power2(float x) {
    if constexpr (kDtype == 2) return exp2f(x);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct Job {
    int row, count, partial;
    i64 first;  // of its columns
};

extern "C" __global__ void __launch_bounds__(32 * kWarps, MG_CTAS)
    fused_row(out_t *__restrict__ out, float *__restrict__ lse, float *__restrict__ partial_out,
              float *__restrict__ partial_lse, i64 partials,                                  //
              const operand_t *__restrict__ q, i64 q_batch, i64 q_head, i64 q_row,            //
              const operand_t *__restrict__ k, i64 k_batch, i64 k_head, u32 k_row,            // bytes
              const operand_t *__restrict__ v, i64 v_batch, i64 v_head, u32 v_row,            // bytes
              const u8 *__restrict__ keep, i64 keep_batch, i64 keep_at,                       //
              const int4 *__restrict__ ranges, const int4 *__restrict__ items,
              const i64 *__restrict__ offsets, const int *__restrict__ columns,
              const float *__restrict__ sink, int heads, int ratio, int nq, int k_pieces, int v_pieces,
              float scale) {
    const int lane = threadIdx.x % 32, matrix = blockIdx.y;
    const int b = matrix / heads, h = matrix - b * heads;
    const int4 range = __ldg(ranges + matrix);
    const int stride = gridDim.x * kWarps * kItems;
    int at = (blockIdx.x * kWarps + threadIdx.x / 32) * kItems;  // the warp's first item
    if (at >= range.y) return;
    items += range.x;
    offsets += range.z;
    const int piece = lane % kLanes, mine_of = lane / kSpan;
    const char *const base_k = reinterpret_cast<const char *>(k + b * k_batch + h / ratio * k_head);
    const char *const base_v = reinterpret_cast<const char *>(v + b * v_batch + h / ratio * v_head);
    const u8 *const kept = keep + (kKeep ? b * keep_batch : 0);
    const float log2_scale = scale * kLog2e;

    const auto open = [&](int4 raw) {
        return Job{raw.x, raw.y, raw.z, __ldg(offsets + max(raw.x, 0)) + raw.w};
    };
    // Row −1: there is no such item.
    const auto record = [&](int n) {
        n += mine_of;
        return n < range.y ? __ldg(items + n) : make_int4(-1, 0, -1, 0);
    };
    int next[kRegisters];
    const auto look_up = [&](const Job &job, int base) {
#pragma unroll
        for (int m = 0; m < kRegisters; ++m) {
            const int key = base + (m * kTurn + lane % kTurn) * kSide + lane % kSpan / kLanes;
            next[m] = -1;
            if (key >= job.count) continue;
            next[m] = __ldg(columns + job.first + key);
            if (kKeep && !kept[next[m] * keep_at]) next[m] = -1;
        }
    };

    Job job = open(record(at)), after = open(record(at + stride));
    look_up(job, 0);
    while (true) {
        const int4 later = record(at + 2 * stride);
        Piece mine[kVectors];
        const operand_t *const own = q + b * q_batch + h * q_head + max(job.row, 0) * q_row;
#pragma unroll
        for (int x = 0; x < kVectors; ++x) {
            mine[x].clear();
            if (kExact || piece + x * kLanes < k_pieces) mine[x].load(own + (piece + x * kLanes) * kElements);
        }
        float sum[kVectors][kElements], top = -kInfinity, mass = 0.0f;
#pragma unroll
        for (int x = 0; x < kVectors; ++x)
#pragma unroll
            for (int i = 0; i < kElements; ++i) sum[x][i] = 0.0f;

        // One round of so many steps; a checked one may hold keys that are not there. Both are
        // constants where this is expanded.
        const auto round = [&](int steps, int base, bool checked) {
            constexpr bool kAhead = kEarly && kBatch == kSteps;
            int index[kRegisters];
            float score[kSteps];
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) index[m] = next[m];
            if (base + kKeys < job.count)
                look_up(job, base + kKeys);
            else
                look_up(after, 0);
            const auto rows = [&](Piece(&theirs)[kBatch][kVectors], int start, const char *from,
                                  u32 row, int pieces) {
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    if (start + s >= steps) continue;
                    const int j = of_step(index, start + s);
                    const char *const line = row_address(from, j, row);
#pragma unroll
                    for (int x = 0; x < kVectors; ++x) {
                        const int p = piece + x * kLanes;
                        if (checked || !kExact) theirs[s][x].clear();
                        if ((!checked || j >= 0) && (kExact || p < pieces)) theirs[s][x].load(line + 16 * p);
                    }
                }
            };
            // 1. Scores: products of pieces, summed over the lanes of a group; the lane that looked a
            //    key up gets its score.
            Piece values[kBatch][kVectors];
#pragma unroll
            for (int start = 0; start < kSteps; start += kBatch) {
                Piece theirs[kBatch][kVectors];
                rows(theirs, start, base_k, k_row, k_pieces);
                if constexpr (kAhead) rows(values, start, base_v, v_row, v_pieces);
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    score[start + s] = 0.0f;
                    if (start + s >= steps) continue;
                    float dot = 0.0f;
#pragma unroll
                    for (int x = 0; x < kVectors; ++x)
#pragma unroll
                        for (int i = 0; i < kElements; ++i) dot = fmaf(mine[x][i], theirs[s][x][i], dot);
                    score[start + s] = dot;
                }
            }
            float weight[kRegisters], reach = -kInfinity;
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) {
                transpose_sum<kTurn>(score + m * kTurn, lane);
                weight[m] = lane_sum<kTurn, kLanes>(score[m * kTurn]) * log2_scale;
                if (checked && index[m] < 0) weight[m] = -kInfinity;
                reach = max_nan(reach, weight[m]);
            }
            // 2. Exponentials, against a point that moves seldom.
#pragma unroll
            for (int step = kSpan / 2; step > 0; step /= 2)
                reach = max_nan(reach, __shfl_xor_sync(kAllLanes, reach, step));
            if (!(reach <= top + kSlack)) {
                const float shrink = reach == -kInfinity ? 1.0f : power2(top - reach);
                top = reach;
                mass *= shrink;
#pragma unroll
                for (int x = 0; x < kVectors; ++x)
#pragma unroll
                    for (int i = 0; i < kElements; ++i) sum[x][i] *= shrink;
            }
            const float point = top == -kInfinity ? 0.0f : top;
#pragma unroll
            for (int m = 0; m < kRegisters; ++m) {
                weight[m] = power2(weight[m] - point);
                mass += weight[m];
            }
            // 3. Rows of V.
#pragma unroll
            for (int start = 0; start < kSteps; start += kBatch) {
                if constexpr (!kAhead) rows(values, start, base_v, v_row, v_pieces);
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    if (start + s >= steps) continue;
                    const float w = of_step(weight, start + s);
#pragma unroll
                    for (int x = 0; x < kVectors; ++x)
#pragma unroll
                        for (int i = 0; i < kElements; ++i)
                            sum[x][i] = fmaf(w, values[s][x][i], sum[x][i]);
                }
            }
        };
        if constexpr (kShort) {
            // The warp's first item is its longest.
            const int most = __shfl_sync(kAllLanes, job.count, 0);
            if (most <= 1)
                round(1, 0, true);
            else if (most <= 2)
                round(2, 0, true);
            else if (most <= 4)
                round(4, 0, true);
            else
                round(kSteps, 0, true);
        } else {
            int base = 0;
            for (; base + kKeys <= job.count; base += kKeys) round(kSteps, base, kKeep);
            // A step without keys costs what others do: half of them if they hold all that is left.
            if (base < job.count) {
                if (job.count - base <= kKeys / 2)
                    round(kSteps / 2, base, true);
                else
                    round(kSteps, base, true);
            }
        }

        // 4. Groups add up. Lanes kTurn … of a group repeat the first ones' keys.
        mass = lane_sum<1, kTurn>(mass);
        mass = lane_sum<kLanes, kSpan>(mass);
#pragma unroll
        for (int x = 0; x < kVectors; ++x)
#pragma unroll
            for (int i = 0; i < kElements; ++i) sum[x][i] = lane_sum<kLanes, kSpan>(sum[x][i]);
        float shrink = 1.0f;
        if (kSink && job.partial < 0) {
            const float logit = sink[h] * kLog2e, reach = max_nan(top, logit);
            if (reach != -kInfinity) {
                shrink = power2(top - reach);
                mass = fmaf(mass, shrink, power2(logit - reach));
                top = reach;
            }
        }
        const float inverse = mass == 0.0f ? 0.0f : shrink / mass;
        const float total = mass == 0.0f ? -kInfinity : (top + log2f(mass)) * kLn2;
        const i64 line = job.partial < 0 ? i64(matrix) * nq + job.row : matrix * partials + job.partial;
        if (job.row >= 0 && lane % kSpan == 0) (job.partial < 0 ? lse : partial_lse)[line] = total;
        if (job.row >= 0 && lane % kSpan < kLanes) {
#pragma unroll
            for (int x = 0; x < kVectors; ++x) {
                const int p = piece + x * kLanes;
                if (!kExact && p >= v_pieces) continue;
                const i64 to = (line * v_pieces + p) * kElements;
#pragma unroll
                for (int i = 0; i < kElements; ++i) sum[x][i] *= inverse;
                if (job.partial < 0)
                    Pack<out_t, kElements>::store(out + to, sum[x]);
                else
                    Pack<float, kElements>::store(partial_out + to, sum[x]);
            }
        }
        at += stride;
        if (at >= range.y) return;
        job = after;
        after = open(later);
    }
}

// fused_mma: attention over the kept 64 × 64 units of a pattern in one pass, on mma.sync and cp.async.
//
//   operands       q, k, v (B, H, N, D) and their gathered rows, any strides but the last
//   starts (ctas + 1), tiles (t) int2: item, matrix = b · heads + h
//   items  (n) 2 × int4          two query units (−1 = none), −1, first step; steps, slot of each unit's
//                                result (−1 = out), −1; units from kPacked on are gathered
//   steps  (s) int4              key unit, its mask for each query unit (−2 = not its, −1 = full), −2
//   masks  (m, 128) u32          bit 2j + e + 16h of thread t: row t / 4 + 8h of its warp's 16,
//                                column 8j + 2 (t % 4) + e
//   keep   (B, units of K, 2) u32 or null, keep_packed (B, H / packed ratio, packed units, 2): bits of
//                                the keys that a mask of the call leaves
//   out    (B · H, nq, width), lse (B · H, nq) float32 or null
//   partial_out (B · H, slots, 64, width), partial_lse (B · H, slots, 64) float32
//
//   grid   persistent CTAs that walk their tiles
//   block  four warps for each query unit, or for both: then a warp holds 16 rows of either
//   smem   Q of the units; a ring of kStages times kKeys rows, K and V by turns
//   floor  4 · 64 · 64 · D FLOP a kept unit and query unit at the rate of mma.sync, of which an H200
//          issues 509 TFLOP/s of halves; FlashAttention-2 reaches 360 with these instructions there
//   needs  sm_80; width % 8 == 0, 16-byte aligned rows
//
// With kUnits = 1 an item is walked twice, once for either query unit.
#include "fused_mma.cuh"
#include "fused_walk.cuh"
#include "result.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, MG_RESIDENT)
    fused_mma(const __grid_constant__ Operands operands, const __grid_constant__ Plan plan,
              const u32 *__restrict__ masks, const u32 *__restrict__ keep, const u32 *__restrict__ keep_packed,
              const float *__restrict__ sink, float scale, operand_t *__restrict__ out,
              float *__restrict__ lse, float *__restrict__ partial_out, float *__restrict__ partial_lse,
              int slots) {
    extern __shared__ u8 raw[];
    const u32 q_at = (shared_address(raw) + 127) & ~127u, ring = q_at + kUnits * kUnit;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row16 = warp % 4 * 16;
    const int group = kHold == 2 ? 0 : warp / 4;  // the warp's first unit among those of a pass
    const u32 mine_at = q_at + group * kUnit;
    const int nq = operands.rows, width = operands.width;
    const float factor = scale * kBase;

    const auto lse_of = [&](int matrix, float m, float sum) {  // and the sink, added where rows are final
        return sum == 0.f ? -kInfinity : kFloat ? m + logf(sum) : (m + log2_fast(sum)) * kLn2;
    };
    // The result of a unit that has no steps.
    const auto blank = [&](const Place &place) {
        for (int g = 0; g < kUnits; ++g) {
            const Result to = result_of(plan, place, g);
            if (to.unit < 0) continue;
            for (int row = threadIdx.x; row < 64; row += kThreads) {
                if (to.slot >= 0) {
                    partial_lse[(i64(place.matrix) * slots + to.slot) * 64 + row] = -kInfinity;
                } else if (to.unit * 64 + row < nq) {
                    const i64 at = i64(place.matrix) * nq + to.unit * 64 + row;
                    if (lse != nullptr) lse[at] = sink == nullptr ? -kInfinity : sink[place.matrix % operands.heads];
                    for (int c = 0; c < width; c += 8)
#pragma unroll
                        for (int i = 0; i < int(sizeof(operand_t)) / 2; ++i)
                            reinterpret_cast<uint4 *>(out + at * width + c)[i] = make_uint4(0u, 0u, 0u, 0u);
                }
            }
        }
    };

    Place now(plan);
    now.advance(plan, blank);
    if (now.over()) return;
    Place next = now;
    next.advance(plan, blank);
    // K of a place goes to stage `at`, its V to the one behind it.
    u32 at = 0;
    const auto stage = [&](u32 n) { return ring + (n >= kStages ? n - kStages : n) * kStage; };
    operands.queries(q_at, plan, now);
    operands.keys(stage(0), now);
    copy_commit();
    if constexpr (kStages > 2) {
        operands.values(stage(1), now);
        copy_commit();
    }
    Rows r;
    r.start();
    bool fresh = true;
    while (true) {
        // 1. K is there, and all have read the V before it. With three stages one copy stays under way,
        // with four V is there, too; at an item's first keys a copy may bring Q.
        if (kStages != 3 || fresh)
            copy_wait<0>();
        else
            copy_wait<1>();
        round_rows<kKeys>(stage(at));
        if constexpr (kStages == 4) round_rows<kKeys>(stage(at + 1));
        if (fresh) round_rows<64 * kUnits>(q_at);
        __syncthreads();
        if (kStages == 2) {
            operands.values(stage(at + 1), now);
        } else if (!next.over()) {
            operands.keys(stage(at + 2), next);
            if (kStages == 4) operands.values(stage(at + 3), next);
        }
        copy_commit();
        if (fresh) r.take_queries(mine_at, row16);
        fresh = false;
        int own = 0;
        bool masked = keep != nullptr;
        u32 word[kHold];
#pragma unroll
        for (int u = 0; u < kHold; ++u) {
            const int mark = now.mark(group + u);
            own |= (mark != -2) << u;
            masked |= mark >= 0;
            word[u] = mark >= 0 ? __ldg(masks + mark * 128 + threadIdx.x % 128) >> now.part * (kKeys / 4) : ~0u;
        }
        if (keep != nullptr) {
            const u32 kept = operands.kept(keep, keep_packed, now, lane % 4) >> now.part * (kKeys / 4);
#pragma unroll
            for (int u = 0; u < kHold; ++u) word[u] &= kept;
        }
        // 2. Scores and their exponentials.
#define MG_FIRST(kOwn)                                                                                   \
    do {                                                                                                  \
        r.scores<kOwn>(mine_at, stage(at), row16);                                                  \
        if (masked)                                                                                       \
            _Pragma("unroll") for (int u = 0; u < kHold; ++u) if (owns(kOwn, u)) r.keep(r.s[u], word[u]);  \
        r.soften<kOwn>(factor);                                                                           \
    } while (false)
        if (own == (1 << kHold) - 1)
            MG_FIRST((1 << kHold) - 1);
        else if (kHold == 2 && own == 1)
            MG_FIRST(1);
        else if (kHold == 2 && own == 2)
            MG_FIRST(2 * (kHold - 1));
        // 3. V is there, and all have read K; Q, too, if this was an item's last.
        const bool last = next.over() || next.tile != now.tile;
        if (kStages < 4 || last) {
            if constexpr (kStages < 4) {
                copy_wait<kStages - 2>();
                round_rows<kKeys>(stage(at + 1));
            }
            __syncthreads();
            if (!next.over()) {
                if (kStages == 2) operands.keys(stage(at + 2), next);
                if (kStages == 3) operands.values(stage(at + 3), next);
                if (last) operands.queries(q_at, plan, next);
            }
            copy_commit();
        }
        if (own == (1 << kHold) - 1)
            r.product<(1 << kHold) - 1>(stage(at + 1));
        else if (kHold == 2 && own == 1)
            r.product<1>(stage(at + 1));
        else if (kHold == 2 && own == 2)
            r.product<2 * (kHold - 1)>(stage(at + 1));
        if constexpr (kStages > 2) at = at + 2 < kStages ? at + 2 : at + 2 - kStages;
        const Place done = now;
        now = next;
        next.advance(plan, blank);

        // 4. The item's results: normalised; a sink is one more term of the sum.
        if (last) {
#pragma unroll
            for (int u = 0; u < kHold; ++u) {
                const Result to = result_of(plan, done, group + u);
                if (to.unit < 0) continue;
                float total[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float sum = quad_sum(r.l[u][h]), shrink = 1.f, m = r.m[u][h];
                    if (sink != nullptr && to.slot < 0) {
                        const float logit = sink[done.matrix % operands.heads] * kBase, reach = fmaxf(m, logit);
                        if (reach != -kInfinity) {
                            shrink = power(m - reach);
                            sum = sum * shrink + power(logit - reach);
                            m = reach;
                        }
                    }
                    const float inverse = sum == 0.f ? 0.f : shrink / sum;
                    total[h] = lse_of(done.matrix, m, sum);
#pragma unroll
                    for (int i = 0; i < 2 * kColumns; ++i) r.o[u][i / 2][2 * h + i % 2] *= inverse;
                }
                const float(&result)[kDim / 2] = reinterpret_cast<const float(&)[kDim / 2]>(r.o[u]);
                const int row = row16 + lane / 4;
                if (to.slot < 0) {
                    const int first = to.unit * 64 + row;
                    const i64 base = i64(done.matrix) * nq;
                    store_result<kDim, kFloat>(result, 1.f, out + base * width, first, nq, 0, width, false);
                    if (lse != nullptr && lane % 4 == 0)
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            if (first + 8 * h < nq) lse[base + first + 8 * h] = total[h];
                } else {
                    const i64 base = (i64(done.matrix) * slots + to.slot) * 64;
                    store_result<kDim, true>(result, 1.f, partial_out + base * width, row, 64, 0, width, false);
                    if (lane % 4 == 0)
#pragma unroll
                        for (int h = 0; h < 2; ++h) partial_lse[base + row + 8 * h] = total[h];
                }
            }
            if (now.over()) return;
            r.start();
            fresh = true;
        }
    }
}

// fused_sm90: attention over the kept 64 × 64 units of a pattern in one pass, on wgmma and TMA.
//
//   q, k, v        (B, H, N, D)  by 4-D tensor maps, any strides; units of 64 rows, panels of 64 columns
//   packed_q/k/v                 gathered rows, likewise; units from kPacked on
//   starts (ctas + 1), tiles (t) int2: item, matrix = b · heads + h
//   items  (n) 2 × int4          query unit of each warpgroup (−1 = none), first step, steps;
//                                layout entry, slot of each warpgroup's result (−1 = out), 0
//   steps  (s) int4              key unit, its mask for each warpgroup (−2 = not its, −1 = full), 0
//   masks  (m, 128) u32          bit 2j + e + 16h of thread t: row t / 4 + 8h of its warp's 16,
//                                column 8j + 2 (t % 4) + e
//   out    (B · H, nq, width), lse (B · H, nq) float32 or null
//   partial_out (B · H, slots, 64, width), partial_lse (B · H, slots, 64) float32
//
//   grid   persistent CTAs that walk their tiles
//   block  128 consumers for each of two query units + a producer warpgroup, which gives its registers
//          away
//   smem   Q of both units; rings of kStages pairs of units of K and of V
//   floor  4 · 64 · 64 · D FLOP a kept unit and warpgroup at 800 TFLOP/s
//   needs  sm_90a, width % 8 == 0, 16-byte aligned rows
//
// Steps 2i and 2i + 1 of an item go together: a warpgroup multiplies S = Q Kᵀ of those that are its
// while P V of the two before them and then its softmax run. The reference point of the exponentials
// moves only when a row's maximum has outgrown it by kSlack powers of two, so that the accumulators are
// hardly ever rescaled.
#include "fused_rows.cuh"
#include "result.cuh"

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    fused_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
               const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap packed_q_map,
               const __grid_constant__ TensorMap packed_k_map,
               const __grid_constant__ TensorMap packed_v_map, const int *__restrict__ starts,
               const int2 *__restrict__ tiles, const int4 *__restrict__ items,
               const int4 *__restrict__ steps, const u32 *__restrict__ masks,
               const float *__restrict__ sink, float scale, int heads, int ratio, int packed_ratio,
               operand_t *__restrict__ out, float *__restrict__ lse, int rows, int width,
               float *__restrict__ partial_out, float *__restrict__ partial_lse, int slots) {
    extern __shared__ u8 raw[];
    const u32 q_at = (shared_address(raw) + 1023) & ~1023u;
    const u32 ring_k = q_at + kGroups * kUnit, ring_v = ring_k + kStages * kStage;
    __shared__ alignas(8) u64 barriers[4 * kStages + 2 * kGroups];
    // By turns: an item's stands until its results are written.
    __shared__ Info infos[2][kGroups];
    const u32 full_k = shared_address(barriers), empty_k = full_k + 8 * kStages;
    const u32 full_v = empty_k + 8 * kStages, empty_v = full_v + 8 * kStages;
    const u32 full_q = empty_v + 8 * kStages, empty_q = full_q + 8 * kGroups;
    const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full_k + 8 * s, 1), barrier_init(empty_k + 8 * s, kConsumers / 32);
            barrier_init(full_v + 8 * s, 1), barrier_init(empty_v + 8 * s, kConsumers / 32);
        }
        for (int g = 0; g < kGroups; ++g) barrier_init(full_q + 8 * g, 1), barrier_init(empty_q + 8 * g, 4);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != kConsumers) return;
        tma_prefetch(q_map);
        tma_prefetch(k_map);
        tma_prefetch(v_map);
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        Ring k(1), v(1);
        u32 parity_q = 1;
        // V follows K a pair behind, across items too.
        int late[kPair], late_units = 0, late_h = 0, late_b = 0;
        const auto follow = [&] {
            if (late_units == 0) return;
            barrier_wait(empty_v + 8 * v.stage, v.parity);
            barrier_expect(full_v + 8 * v.stage, late_units * kUnit);
#pragma unroll
            for (int u = 0; u < kPair; ++u)
                if (u < late_units) {
                    const bool packed = late[u] >= kPacked;
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(ring_v + v.stage * kStage + u * kUnit + p * kPanel, packed ? packed_v_map : v_map,
                                 full_v + 8 * v.stage, 64 * p, (late[u] & (kPacked - 1)) * 64,
                                 packed ? late_h / packed_ratio : late_h / ratio, late_b);
                }
            v.advance();
        };
        for (int t = starts[blockIdx.x], end = starts[blockIdx.x + 1]; t < end; ++t) {
            const int2 tile = tiles[t];
            const int4 head = items[2 * tile.x], tail = items[2 * tile.x + 1];
            // What consumers wait for before they let go of Q, or come to an item without steps.
            if (!kHeld || head.w == 0) follow(), late_units = 0;
            const int b = tile.y / heads, h = tile.y % heads;
            int unit[kPair], at = head.z;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const int rows_at = g ? head.y : head.x, *marks = reinterpret_cast<const int *>(steps + at) + 1 + g;
                barrier_wait(empty_q + 8 * g, parity_q);
                infos[parity_q][g] = Info{rows_at, head.w, g ? tail.z : tail.y, tile.y, at,
                                          {head.w > 0 ? marks[0] : -2, kPair == 2 && head.w > 1 ? marks[4] : -2}};
                if (rows_at < 0) {
                    barrier_arrive(full_q + 8 * g);
                    continue;
                }
                barrier_expect(full_q + 8 * g, kUnit);
#pragma unroll
                for (int p = 0; p < kPanels; ++p)
                    tma_load(q_at + g * kUnit + p * kPanel, rows_at >= kPacked ? packed_q_map : q_map,
                             full_q + 8 * g, 64 * p, (rows_at & (kPacked - 1)) * 64, h, b);
            }
            parity_q ^= 1;
#pragma unroll
            for (int u = 0; u < kPair; ++u)
                if (u < head.w) unit[u] = steps[at + u].x;
            for (int left = head.w; left > 0;) {
                const int units = min(kPair, left);
                at += units, left -= units;
                barrier_wait(empty_k + 8 * k.stage, k.parity);
                barrier_expect(full_k + 8 * k.stage, units * kUnit);
#pragma unroll
                for (int u = 0; u < kPair; ++u)
                    if (u < units) {
                        const bool packed = unit[u] >= kPacked;
#pragma unroll
                        for (int p = 0; p < kPanels; ++p)
                            tma_load(ring_k + k.stage * kStage + u * kUnit + p * kPanel, packed ? packed_k_map : k_map,
                                     full_k + 8 * k.stage, 64 * p, (unit[u] & (kPacked - 1)) * 64,
                                     packed ? h / packed_ratio : h / ratio, b);
                    }
                k.advance();
                follow();
#pragma unroll
                for (int u = 0; u < kPair; ++u) {
                    late[u] = unit[u];
                    if (u < left) unit[u] = steps[at + u].x;
                }
                late_units = units, late_h = h, late_b = b;
            }
        }
        follow();
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int group = warp / 4, row16 = warp % 4 * 16;
    const float log2_scale = scale * kLog2e;
    Ring ring(0);  // of K; V's goes the same way, a pair behind
    u32 parity_q = 0;
    Rows r;
    // Whether the P of a pair stands in r.p, and the stage and parity of its V.
    bool held = false;
    u32 held_stage = 0, held_parity = 0;
    if (kPingPong && group == 1) named_arrive(1, kConsumers);

    // P V of kUnits units with nothing beside it.
#define MG_PRODUCT(kUnits, from, at, turn)                                                               \
    do {                                                                                                  \
        barrier_wait(full_v + 8 * (at), turn);                                                            \
        wgmma_fence();                                                                                    \
        r.product<kUnits>(from);                                                                          \
        wgmma_commit();                                                                                   \
        wgmma_wait<0>();                                                                                  \
        if (lane == 0) barrier_arrive(empty_v + 8 * (at));                                                \
    } while (false)
    const auto flush = [&] {
        if (held) MG_PRODUCT(kPair, ring_v + held_stage * kStage, held_stage, held_parity);
        held = false;
    };

    for (int t = starts[blockIdx.x], end = starts[blockIdx.x + 1]; t < end; ++t) {
        barrier_wait(full_q + 8 * group, parity_q);
        const Info &info = infos[parity_q ^ 1][group];
        parity_q ^= 1;
        r.start(q_at + group * kUnit, row16);
        const int *at = reinterpret_cast<const int *>(steps + info.first) + 1 + group;
        int mark[2] = {info.mark[0], info.mark[1]};
        int left = info.count;
        if constexpr (kHeld) {
            __syncwarp();
            if (lane == 0) barrier_arrive(empty_q + 8 * group);
        }
        while (left > 0) {
            left -= kPair;
            at += 4 * kPair;
            const int mine = (mark[0] != -2) + (mark[1] != -2 ? 2 : 0);
            const u32 stage = ring.stage, parity = ring.parity;
            ring.advance();
            // The next pair's marks, asked for a pair ahead: their latency would stand between products.
            int coming[2] = {-2, -2};
#pragma unroll
            for (int u = 0; u < kPair; ++u)
                if (u < left) coming[u] = __ldg(at + 4 * u);
            const u32 keys = ring_k + stage * kStage, values = ring_v + held_stage * kStage;
            barrier_wait(full_k + 8 * stage, parity);
            if (kPingPong) named_barrier(1 + group, kConsumers);
            if (!mine) {
                if (lane == 0) barrier_arrive(empty_k + 8 * stage);
                flush();
                if (kPingPong) named_arrive(2 - group, kConsumers);
                barrier_wait(full_v + 8 * stage, parity);
                if (lane == 0) barrier_arrive(empty_v + 8 * stage);
                mark[0] = coming[0], mark[1] = coming[1];
                continue;
            }
#define MG_STEP(kNew, kOld)                                                                              \
    do {                                                                                                  \
        float grown[2];                                                                                   \
        u32 word[2] = {~0u, ~0u};                                                                         \
        const u32 from = keys + (kNew < kPair && mine == 2 ? kUnit : 0);                                  \
        wgmma_fence();                                                                                    \
        r.scores<kNew>(from);                                                                             \
        wgmma_commit();                                                                                   \
        if constexpr (kOld > 0) {                                                                         \
            barrier_wait(full_v + 8 * held_stage, held_parity);                                           \
            wgmma_fence();                                                                                \
            r.product<kOld>(values);                                                                      \
            wgmma_commit();                                                                               \
        }                                                                                                 \
        if (kPingPong) named_arrive(2 - group, kConsumers);                                               \
        const int first = kNew < kPair && mine == 2 ? mark[1] : mark[0], second = kNew == 1 ? -1 : mark[1];  \
        const bool masked = max(first, second) >= 0;                                                      \
        if (masked) {                                                                                     \
            if (first >= 0) word[0] = __ldg(masks + first * 128 + threadIdx.x % 128);                     \
            if (second >= 0) word[1] = __ldg(masks + second * 128 + threadIdx.x % 128);                   \
        }                                                                                                 \
        wgmma_wait<(kOld > 0)>();                                                                         \
        if (lane == 0) barrier_arrive(empty_k + 8 * stage);                                               \
        if (masked) _Pragma("unroll") for (int u = 0; u < kNew; ++u) r.keep(r.s[u], word[u]);             \
        const bool moved = r.soften<kNew>(grown, log2_scale);                                             \
        if constexpr (kOld > 0) {                                                                         \
            r.settle();                                                                                   \
            wgmma_wait<0>();                                                                              \
            if (lane == 0) barrier_arrive(empty_v + 8 * held_stage);                                      \
        }                                                                                                 \
        r.convert<kNew>();                                                                                \
        if (moved) r.rescale(grown);                                                                      \
    } while (false)
            if (mine == (1 << kPair) - 1) {
                if (held)
                    MG_STEP(kPair, kPair);
                else
                    MG_STEP(kPair, 0);
                held = true, held_stage = stage, held_parity = parity;
            } else if constexpr (kPair == 2) {
                if (held)
                    MG_STEP(1, kPair);
                else
                    MG_STEP(1, 0);
                MG_PRODUCT(1, ring_v + stage * kStage + (mine == 2 ? kUnit : 0), stage, parity);
                held = false;
            }
            mark[0] = coming[0], mark[1] = coming[1];
        }
        flush();
        if constexpr (!kHeld) {
            __syncwarp();
            if (lane == 0) barrier_arrive(empty_q + 8 * group);
        }
        const Info done = info;
        if (done.unit < 0) continue;

        // Normalise; a sink is one more term of the sum, added where the result is final.
        float total[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = quad_sum(r.l[h]), shrink = 1.f;
            if (sink != nullptr && done.slot < 0) {
                const float logit = sink[done.matrix % heads] * kLog2e, reach = fmaxf(r.m[h], logit);
                if (reach != -kInfinity) {
                    shrink = exp2_fast(r.m[h] - reach);
                    sum = sum * shrink + exp2_fast(logit - reach);
                    r.m[h] = reach;
                }
            }
            const float inverse = sum == 0.f ? 0.f : shrink / sum;
            total[h] = sum == 0.f ? -kInfinity : (r.m[h] + log2_fast(sum)) * kLn2;
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i)
                if (i / 2 % 2 == h) r.o[i] *= inverse;
        }
        const int row = row16 + lane / 4;
        if (done.slot < 0) {
            const int first = done.unit * 64 + row;
            const i64 base = static_cast<i64>(done.matrix) * rows;
            store_result<kDim, false>(r.o, 1.f, out + base * width, first, rows, 0, width, false);
            if (lse != nullptr && lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (first + 8 * h < rows) lse[base + first + 8 * h] = total[h];
        } else {
            const i64 base = (static_cast<i64>(done.matrix) * slots + done.slot) * 64;
            store_result<kDim, true>(r.o, 1.f, partial_out + base * width, row, 64, 0, width, false);
            if (lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; ++h) partial_lse[base + row + 8 * h] = total[h];
        }
    }
}

// fused_sm90: attention over the kept 64 × 64 units of a pattern in one pass, on wgmma and TMA.
//
//   q, k, v        (B, H, N, D)  by 4-D tensor maps, any strides; units of 64 rows, panels of 64 columns
//   packed_q/k/v                 gathered rows, likewise; units from kPacked on
//   starts (walks + 1), tiles (t) int2: item, from bit 28 on which warpgroups leave it to others; matrix = b · heads + h
//   items  (n) 2 × int4          query unit of each of three warpgroups (−1 = none), first step;
//                                steps, slot of each warpgroup's result (−1 = out)
//   steps  (s) int4              key unit, its mask for each warpgroup (−2 = not its, −1 = full)
//   masks  (m, 128) u32          bit 2j + e + 16h of thread t: row t / 4 + 8h of its warp's 16,
//                                column 8j + 2 (t % 4) + e
//   keep   (B, units), packed_keep (B, H / packed_ratio, packed_units): bits of the keys that a run-time
//          mask keeps, if kMasked
//   out    (B, H, nq, width)  by a tensor map; lse (B · H, nq) float32 or null
//   partial_out (B · H, slots, 64, width), partial_lse (B · H, slots, 64) float32
//
//   grid   persistent CTAs, each with one or two streams that walk their tiles
//   block  128 consumers for each of two or three query units of a stream + two warps: one brings K and V, one
//          carries Q in and results out
//   smem   a ring of Q with places to spare, which take the results too; rings of kStages units
//          of K and of V
//   floor  4 · 64 · 64 · D FLOP a kept unit and warpgroup at 800 TFLOP/s
//   needs  sm_90a, width % 8 == 0, 16-byte aligned rows
//
// A warpgroup issues S = Q Kᵀ of its next unit behind P V of the last one, then works out the softmax
// while the tensor cores serve the other warpgroups: with three of them there is always one that has
// products in flight, also while another ends its rows and begins new ones. A result takes the place of its
// Q in shared memory and goes out from there.
#include "fused_carrier.cuh"
#include "fused_rows.cuh"
#include "grids.cuh"
#include "result.cuh"

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    fused_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
               const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap packed_q_map,
               const __grid_constant__ TensorMap packed_k_map,
               const __grid_constant__ TensorMap packed_v_map, const __grid_constant__ TensorMap out_map, const int *__restrict__ starts, int walks,
               const int2 *__restrict__ tiles, const int4 *__restrict__ items,
               const int4 *__restrict__ steps, const u32 *__restrict__ masks,
               const uint2 *__restrict__ keep, const uint2 *__restrict__ packed_keep, int units, int packed_units,
               const float *__restrict__ sink, float scale, int heads, int ratio, int packed_ratio,
               float *__restrict__ lse, int rows, int width,
               float *__restrict__ partial_out, float *__restrict__ partial_lse, int slots) {
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 barriers[kStreams][2 * kStages + kFulls + kQueries];
    // One stands until the place of its Q is free again.
    __shared__ Info all_infos[kStreams][kQueries];
    // What each warpgroup has to do with a stage's unit.
    __shared__ int4 marks[kStreams][kStages];
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const bool consumes = warp < kConsumers / 32;
    const int stream = consumes ? warp / (4 * kGroups) : warp % kStreams;
    const u32 q_at = ((shared_address(raw) + 1023) & ~1023u) + stream * kStream;
    const u32 ring_k = q_at + kQueries * kUnit, ring_v = ring_k + kStages * kUnit;
    const u32 full = shared_address(barriers[stream]), empty = full + 8 * kStages;
    const u32 full_q = empty + 8 * kStages, done_q = full_q + 8 * kFulls;
    Info (&infos)[kQueries] = all_infos[stream];
    if (threadIdx.x % (128 * kGroups) == 0 && consumes) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4 * kGroups);
        for (int n = 0; n < kFulls; ++n) barrier_init(full_q + 8 * n, 1);
        for (int n = 0; n < kQueries; ++n) barrier_init(done_q + 8 * n, 4);
        barrier_init_fence();
    }
    __syncthreads();

    const int walk = blockIdx.x * kStreams + stream;
    const int begin = walk < walks ? starts[walk] : 0, end = walk < walks ? starts[walk + 1] : 0;
    if (!consumes) {
        Pool::give();
        const int role = (warp - kConsumers / 32) / kStreams;
        // Gathered rows come from the grid before; partial results go to the one behind.
        wait_for_grids_before();
        let_next_grid_begin();
        if (role > 1 || begin == end) return;
        const auto ready = [&](int t) { return t < end ? tiles[t] : make_int2(0, 0); };
        const int4 none = make_int4(0, -2, -2, -2);
        if (role == 1)
            return carry(q_map, packed_q_map, out_map, infos, q_at, full_q, done_q, tiles, items, steps, begin, end,
                         heads);
        // The producer of keys and values: its lanes look at 32 steps at a time.
        // Barriers of an empty ring let the first round pass: the parity of the round before it.
        Ring<kStages> ring(1);
        int2 tile = ready(begin), coming = ready(begin + 1);
        const auto span_of = [&](int x) { return make_int2(items[2 * (x & kItem)].w, items[2 * (x & kItem) + 1].x); };
        int2 span = span_of(tile.x);  // of steps
        int4 chunk = lane < span.y ? steps[span.x + lane] : none;
        for (int t = begin; t < end; ++t) {
            // The next tile's item is asked for now, its first steps a step later.
            const int2 next = span_of(coming.x), later = ready(t + 2);
            const int b = tile.y / heads, h = tile.y % heads, count = span.y;
            int4 next_chunk = none;
            for (int i = 0; i < count; ++i) {
                if (i > 0 && i % 32 == 0) chunk = i + lane < count ? steps[span.x + i + lane] : none;
                const int key = __shfl_sync(0xFFFFFFFFu, chunk.x, i % 32);
                barrier_wait(empty + 8 * ring.stage, ring.parity);
                if (lane == i % 32) marks[stream][ring.stage] = chunk;
                __syncwarp();
                if (lane == 0) {
                    const bool packed = key >= kPacked;
                    const int row = (key & (kPacked - 1)) * 64, from = packed ? h / packed_ratio : h / ratio;
                    const u32 filled = full + 8 * ring.stage, at = ring_k + ring.stage * kUnit;
                    barrier_expect(filled, 2 * kUnit);
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(at + p * kPanel, packed ? packed_k_map : k_map, filled, 64 * p, row, from, b);
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(at + ring_v - ring_k + p * kPanel, packed ? packed_v_map : v_map, filled, 64 * p, row, from, b);
                }
                ring.advance();
                if (i == 0 && lane < next.y) next_chunk = steps[next.x + lane];
            }
            if (count == 0 && lane < next.y) next_chunk = steps[next.x + lane];
            tile = coming, coming = later, span = next, chunk = next_chunk;
        }
        return;
    }

    Pool::take();
    const int group = warp / 4 % kGroups, row16 = warp % 4 * 16;
    const float log2_scale = scale * kLog2e;
    Ring<kStages> ring(0);
    // Each warpgroup takes every kGroups-th of the ring of Q.
    u32 turn = group, parity_q = 0;
    Rows r;
    const u32 marks_at = shared_address(marks[stream]);
    // The stage whose V the P in r.p waits for; kStages: there is none.
    u32 held = kStages;
    const auto value_descriptor = [&](u32 stage) { return wgmma_descriptor(uniform(ring_v + stage * kUnit), kPanel); };
    const auto release = [&](u32 stage) {
        if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    const auto flush = [&] {
        if (held == kStages) return;
        const u64 values = value_descriptor(held);
        wgmma_fence();
        r.product(values);
        wgmma_wait<0>();
        release(held);
        held = kStages;
    };

    for (int t = begin; t < end; ++t) {
        barrier_wait(full_q + 8 * turn, parity_q);
        const u32 place = turn % kQueries;
        const Info &info = infos[place];
        const u32 query_at = q_at + place * kUnit, done_at = done_q + 8 * place;
        turn += kGroups;
        if (turn >= kFulls) turn -= kFulls, parity_q ^= 1;
        r.start();
        const u64 queries = wgmma_descriptor(uniform(query_at), 1);
        const auto let_go = [&] {
            __syncwarp();
            if (lane == 0) barrier_arrive(done_at);
        };
        bool fresh = true;
        int i = 0;
        for (const int own = info.own; i < own; ++i) {
            const u32 stage = ring.stage, parity = ring.parity;
            ring.advance();
            const u64 keys = wgmma_descriptor(uniform(ring_k + stage * kUnit), 1), values = value_descriptor(held);
            barrier_wait(full + 8 * stage, parity);
            const int mark = load_shared(marks_at + 16 * stage + 4 * (1 + group));
            if (mark == -2) {
                flush();
                release(stage);
                continue;
            }
            u32 word = ~0u;
            if (mark >= 0) word = __ldg(masks + mark * 128 + threadIdx.x % 128);
            if constexpr (kMasked) {
                const int key = load_shared(marks_at + 16 * stage), b = info.matrix / heads, h = info.matrix % heads;
                const int packed_at = (b * (heads / packed_ratio) + h / packed_ratio) * packed_units;
                word &= mask_word(key >= kPacked ? packed_keep[packed_at + key - kPacked] : keep[b * units + key]);
            }
            wgmma_fence();
            r.scores(queries, keys);
            if (held < kStages) {
                wgmma_fence();
                r.product(values);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            const bool partial = kMasked || mark >= 0;
            if (partial) r.keep(word);
            // The product goes on meanwhile, until it has read P.
            float grown[2] = {1.f, 1.f};
            const bool leads = partial || fresh;
            bool follows = false;
            if (leads)
                r.lead(log2_scale, grown);
            else
                follows = r.follow(log2_scale);
            wgmma_wait<0>();
            if (held < kStages) release(held);
            if (!leads && !follows) r.again(query_at, ring_k + stage * kUnit, row16), r.lead(log2_scale, grown);
            if (!follows) r.rescale(grown), fresh = r.open();
            r.pack();
            held = stage;
        }
        const Info done = info;
        const bool whole = done.unit >= 0 && done.slot < 0;
        if (!whole) let_go();  // nothing goes out from there
        if (held < kStages) {
            const u64 values = value_descriptor(held);
            wgmma_fence();
            r.product(values);
            if constexpr (kMasked) wgmma_wait<0>();  // or ptxas makes every product wait
        }
        // Behind the last product: what to divide by. A sink is one more term of the sum, added where the
        // result is final.
        float total[2], inverse[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = quad_sum(r.l[h]), shrink = 1.f;
            if (sink != nullptr && whole) {
                const float logit = sink[done.matrix % heads] * kLog2e, reach = fmaxf(r.m[h], logit);
                if (reach != -kInfinity) {
                    shrink = exp2_fast(r.m[h] - reach);
                    sum = sum * shrink + exp2_fast(logit - reach);
                    r.m[h] = reach;
                }
            }
            inverse[h] = sum == 0.f ? 0.f : __fdividef(shrink, sum);
            total[h] = sum == 0.f ? -kInfinity : (r.m[h] + log2_fast(sum)) * kLn2;
        }
        wgmma_wait<0>();
        if (held < kStages) release(held);
        held = kStages;
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) r.o[i] *= inverse[i / 2 % 2];
        const int row = row16 + lane / 4;
        if (whole) {
            const int first = done.unit * 64 + row;
            const i64 base = static_cast<i64>(done.matrix) * rows;
            named_barrier(1 + warp / 4, 128);  // all have read Q
            r.store(query_at, row16);
            proxy_fence();
            let_go();
            if (lse != nullptr && lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (first + 8 * h < rows) lse[base + first + 8 * h] = total[h];
        } else if (done.unit >= 0) {
            const i64 base = (static_cast<i64>(done.matrix) * slots + done.slot) * 64;
            store_result<kDim, true>(r.o, 1.f, partial_out + base * width, row, 64, 0, width, false);
            if (lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; ++h) partial_lse[base + row + 8 * h] = total[h];
        }
        // Steps that are only the others': every warpgroup goes round the ring with the producer.
#pragma unroll 1
        for (; i < done.count; ++i, ring.advance()) {
            barrier_wait(full + 8 * ring.stage, ring.parity);
            release(ring.stage);
        }
    }
}

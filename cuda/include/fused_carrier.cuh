#pragma once
// The carrier of fused_sm90: a warp that brings Q and takes results out.
#include "fused_rows.cuh"

// As a place of Q is left, the result there goes out and the next Q comes in. Each of the first lanes keeps
// what concerns its warpgroup; what the next item needs is asked for an item ahead, one step of the way at a
// time. Tiles, items and steps as of the kernel; barriers of the places' being full and done.
__device__ __forceinline__ void carry(const TensorMap &q_map, const TensorMap &packed_q_map, const TensorMap &out_map,
                                      Info (&infos)[kQueries], u32 q_at, u32 full_q, u32 done_q,
                                      const int2 *__restrict__ tiles, const int4 *__restrict__ items,
                                      const int4 *__restrict__ steps, int begin, int end, int heads) {
    const int lane = threadIdx.x % 32;
    const auto ready = [&](int t) { return t < end ? tiles[t] : make_int2(0, 0); };
    const int4 none = make_int4(0, -2, -2, -2);
    const int *numbers = reinterpret_cast<const int *>(items);
    const int mine = min(lane, kGroups - 1), all = (end - begin) * kGroups;
    int2 tile = ready(begin), coming = ready(begin + 1);
    const auto unit_of = [&](int x) { return x >> (kApart + mine) & 1 ? -1 : numbers[8 * (x & kItem) + mine]; };
    int item = 8 * (tile.x & kItem), unit = unit_of(tile.x), slot = numbers[item + 5 + mine];
    int first = numbers[item + 3], count = numbers[item + 4];
    int4 chunk = lane < count ? steps[first + lane] : none;
    int next_unit = 0, next_slot = 0, next_first = 0, next_count = 0, own = 0, group = 0;
    int4 next_chunk = none;
    Ring<kQueries> ring(1);
    Ring<kFulls> fills(1);
    for (int n = 0, t = begin; n < all + kQueries; ++n) {
        const u32 at = q_at + ring.stage * kUnit, filled = full_q + 8 * fills.stage;
        if (n >= kQueries) {
            barrier_wait(done_q + 8 * ring.stage, ring.parity);
            const Info &info = infos[ring.stage];
            if (lane == 0 && info.unit >= 0 && info.slot < 0) {
#pragma unroll
                for (int p = 0; p < kPanels; ++p)
                    tma_store(out_map, at + p * kPanel, 64 * p, info.unit * 64, info.matrix % heads,
                              info.matrix / heads);
                tma_store_commit();
                tma_store_wait_read<0>();
            }
            __syncwarp();
        }
        if (n < all) {
            if (group == 0) {
                const int by[3] = {chunk.y, chunk.z, chunk.w};
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const u32 its = __ballot_sync(0xFFFFFFFFu, by[g] != -2);
                    own = lane == g ? 32 - __clz(its) : own;
                }
                if (count > 32) own = count;
                if (unit < 0) own = 0;
                item = 8 * (coming.x & kItem);
                next_unit = unit_of(coming.x), next_slot = numbers[item + 5 + mine];
                next_first = numbers[item + 3], next_count = numbers[item + 4];
            } else if (group == 1) {
                next_chunk = lane < next_count ? steps[next_first + lane] : none;
            }
            if (lane == group) {
                infos[ring.stage] = Info{unit, count, slot, tile.y, own};
                if (unit < 0) {
                    barrier_arrive(filled);
                } else {
                    barrier_expect(filled, kUnit);
                    const int b = tile.y / heads, h = tile.y % heads;
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(at + p * kPanel, unit >= kPacked ? packed_q_map : q_map, filled, 64 * p,
                                 (unit & (kPacked - 1)) * 64, h, b);
                }
            }
            __syncwarp();
            if (++group == kGroups) {
                group = 0, ++t;
                tile = coming, coming = ready(t + 1);
                unit = next_unit, slot = next_slot, first = next_first, count = next_count, chunk = next_chunk;
            }
        }
        ring.advance();
        fills.advance();
    }
}

// sddmm_nm_sm90: scale · Q Kᵀ, of every four neighbouring keys two values and where they are from, on
// wgmma and TMA. GIVEN 0 keeps the largest and writes the metadata, 1 reads the metadata.
//
//   q         (F, E, nq, D)   by a 4-D tensor map, any strides
//   k_0, k_2  (F, E, nk, D)   keys 4x, 4x + 1 and 4x + 2, 4x + 3 by 5-D maps (D, 2, nk / 4, E, F), so
//             that a thread's accumulators are whole groups of four neighbours: lane t of a quad holds
//             keys 16u + 4t … 16u + 4t + 3 of 64 in tiles u and u + 4
//   values    WITHIN 0: (F · E, rows, columns / 2) by a 3-D map; 1: (F · reps, blocks · 64, 32)
//   metadata  int16 in the order of nm.cuh, of whole matrices (E) or of blocks (reps · blocks); written
//             by a map of 32-bit words: (E, planes of 32 columns, rows) or (reps, blocks, 128)
//   items, chunks, masks      WITHIN 1: as in sddmm_block_sm90, of `own` entries; reps repeat them
//   keep      bool (F, E, nk rounded up to 128), KEEP 1
//
//   grid   WITHIN 0: CTAs take turns at `pieces` row tiles of each matrix, `turns` whole ones each, so that those
//          at work share their keys in L2; then each `share` key units of what is left, in a row
//          1: any; CTAs take turns at `total` = matrices · pieces, chunks of items
//   block  128 · GROUPS consumers, a warpgroup has 64 rows, + 32 (a producer warp), or 128 if HELD: Q is in
//          registers, which the producer's leave
//   smem   QUERIES of GROUPS · 8 KiB · P; STAGES of UNITS · 8 KiB · P; RESULTS of UNITS · 5 KiB a warpgroup
//   floor  (Q + K + values + metadata) bytes at copy bandwidth
//   needs  sm_90a, D % 8 == 0, nk even, 16-byte aligned rows, values of the operands' dtype
//
// Selection takes about as long as the stores do: several warpgroups share a multiprocessor, so that
// some select and store while others multiply. All at once it draws more power than an H200 may (700 W), so
// that energy is time here: keys come in once for all warpgroups, Q stays in registers, and where there is room
// for three results two go out together, 256 bytes of a row, which device memory takes up more cheaply.
#include "mma.cuh"
#include "nm_scores.cuh"
#include "registers.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

using Pool = Registers<kThreads, 24, 112, MG_CTAS>;  // if HELD

// What a CTA works on at a time: key units of one row tile, and where the next begins.
struct Piece {
    int matrix, f, rep, first, count, tile, entry, next;
};

extern "C" __global__ void __launch_bounds__(kThreads, MG_CTAS)
    sddmm_nm_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_0,
                  const __grid_constant__ TensorMap k_2, const __grid_constant__ TensorMap values_map,
                  const __grid_constant__ TensorMap meta_map, const u32 *__restrict__ metadata,
                  const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry,
                  const Item *__restrict__ items, const int2 *__restrict__ chunks,
                  const u8 *__restrict__ masks, int total, int pieces, int reps, int own, int blocks, int turns, int share,
                  int nq, int nk, float scale) {
    extern __shared__ u8 raw[];
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    const u32 q_at = base, k_at = base + kQueries * kBytesQ, out_at = k_at + kStages * kBytesK;
    __shared__ alignas(8) u64 barriers[2 * (kStages + kQueries)];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const u32 q_full = empty + 8 * kStages, q_empty = q_full + 8 * kQueries;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const int units = (nk + 63) / 64, line = (units + kUnits - 1) / kUnits * kUnits;
    // Where the left row tiles' key units begin that are this CTA's, and how many they are.
    const int left = blockIdx.x * share, mine_left = max(0, min(share, (total - turns * int(gridDim.x)) * line - left));
    const int begin = kWithin ? blockIdx.x : 0, end = kWithin ? total : turns + mine_left;
    const auto piece_at = [&](int at) {
        Piece p;
        int each = at;  // of all pieces of all matrices
        p.first = 0, p.count = units, p.next = at + (kWithin ? gridDim.x : 1);
        if (!kWithin && at < turns) {
            each = at * gridDim.x + blockIdx.x;
        } else if (!kWithin) {
            const int unit = left + at - turns;
            each = turns * gridDim.x + unit / line;
            p.first = unit % line, p.next = min(end, at - p.first + line);
            p.count = min(units - p.first, p.next - at);
        }
        const int piece = each % pieces;
        p.matrix = each / pieces, p.tile = piece;
        p.f = p.matrix / reps, p.rep = p.matrix % reps, p.entry = p.rep;
        if constexpr (kWithin) {
            p.first = chunks[piece].x, p.count = chunks[piece].y;
            p.tile = items[p.first].row, p.entry = p.rep * own + items[p.first].entry;
        }
        return p;
    };

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, kConsumers / 32);
        }
        for (int s = 0; s < kQueries; ++s) {
            barrier_init(q_full + 8 * s, 1);
            barrier_init(q_empty + 8 * s, kConsumers / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producer
        if constexpr (kHeld) Pool::give();
        if (threadIdx.x == kConsumers) {
            int slot = 0, stage = 0;
            u32 q_parity = 1, parity = 1;  // places are free at first
            Piece piece;
            for (int at = begin; at < end; at = piece.next) {
                piece = piece_at(at);
                barrier_wait(q_empty + 8 * slot, q_parity);
                barrier_expect(q_full + 8 * slot, kBytesQ);
                for (int p = 0; p < kDepth; ++p)
                    tma_load(q_at + slot * kBytesQ + p * kGroups * kPanel, q_map, q_full + 8 * slot, 64 * p,
                             piece.tile * kGroups * 64, piece.entry, piece.f);
                if (++slot == kQueries) slot = 0, q_parity ^= 1;
                for (int i = 0; i < piece.count; i += kUnits) {
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(full + 8 * stage, kBytesK);
#pragma unroll
                    for (int v = 0; v < kUnits; ++v) {
                        const int n = piece.first + min(i + v, piece.count - 1);  // beyond the end: the last again
                        const int key = 16 * (kWithin ? items[n].column : n);
                        for (int p = 0; p < kDepth; ++p) {
                            const u32 to = k_at + stage * kBytesK + (p * kUnits + v) * kPanel;
                            tma_load(to, k_0, full + 8 * stage, 64 * p, 0, key, piece.entry, piece.f);
                            tma_load(to + kPanel / 2, k_2, full + 8 * stage, 64 * p, 0, key, piece.entry, piece.f);
                        }
                    }
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        }
        return;
    }

    if constexpr (kHeld) Pool::take();
    const int group = warp / 4, g = lane / 4, t = lane % 4, row16 = warp % 4 * 16;
    const int rows = (nq + 31) / 32 * 32;
    // This lane's word of metadata in a unit: rows g and g + 8 of the warp, 16 columns.
    const int word = t / 2 * 64 + row16 / 32 * 32 + g * 4 + row16 / 16 % 2 * 2 + t % 2;
    const u32 spot = lane_chunk(row16 + lane / 8 % 2 * 8 + lane % 8, lane / 16);
    const bool stores = threadIdx.x % 128 == group % 4 * 32;  // the copies of a warpgroup
    const u64 right = wgmma_descriptor(k_at, 1);
    const u32 results = out_at + group * kResults * kResult;
    u32 mine = results, previous = results;
    int stage = 0, slot = 0;
    u32 parity = 0, q_parity = 0;

    Piece piece;
#pragma unroll 1
    for (int at = begin; at < end; at = piece.next) {
        piece = piece_at(at);
        const int matrix = piece.matrix, rep = piece.rep, first = piece.first, count = piece.count;
        const int steps = (count + kUnits - 1) / kUnits, row0 = (piece.tile * kGroups + group) * 64;
        const u8 *const kept = keep + piece.f * keep_free + piece.entry * keep_entry;
        const u32 *from = metadata;  // GIVEN: this lane's word of the first unit
        if constexpr (kGiven && kWithin) from += (i64(rep) * blocks + first) * 128 + word;
        if constexpr (kGiven && !kWithin)
            from += (i64(rep) * units + first) * 2 * rows + i64(t / 2) * rows + row0 + word % 64;
        const bool stored = kWithin || row0 + row16 < rows;
        const bool whole_rows = kWithin || row0 + 64 <= nq;
        const u32 queries = q_at + slot * kBytesQ + group * kPanel;
        const u64 rows_at = wgmma_descriptor(queries, 1);
        barrier_wait(q_full + 8 * slot, q_parity);
        u32 held[kHeld ? 4 * kDepth : 1][4];
        if constexpr (kHeld) {
#pragma unroll
            for (int d = 0; d < 4 * kDepth; ++d) {
                const u32 panel = queries + d / 4 * kGroups * kPanel;
                load_matrices(held[d], swizzled(panel, row16 + lane % 16, d % 4 * 2 + lane / 16));
                if constexpr (kScale == 2) scale_pairs(held[d], pack2<operand_t>(scale, scale));
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(q_empty + 8 * slot);
        }

#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
            u32 words[kUnits];
            int mask[kUnits], column[kUnits];
#pragma unroll
            for (int v = 0; v < kUnits; ++v) {
                const int at = min(i * kUnits + v, count - 1);
                column[v] = first + i * kUnits + v;
                if constexpr (kWithin) mask[v] = items[first + at].mask, column[v] = items[first + at].column;
                if constexpr (kGiven) words[v] = stored ? __ldg(from + i64(at) * (kWithin ? 128 : 2 * rows)) : 0u;
            }
            barrier_wait(full + 8 * stage, parity);
            float acc[32 * kUnits];
            wgmma_fence();
#pragma unroll
            for (int p = 0; p < kDepth; ++p)
#pragma unroll
                for (int kk = 0; kk < 4; ++kk) {
                    const u64 keys = right + ((stage * kBytesK + p * kUnits * kPanel + kk * 32) >> 4);
                    if constexpr (kHeld)
                        Wgmma<64 * kUnits>::template rs<0>(acc, held[4 * p + kk], keys, p + kk > 0);
                    else
                        Wgmma<64 * kUnits>::template ss<0, 0>(
                            acc, rows_at + ((p * kGroups * kPanel + kk * 32) >> 4), keys, p + kk > 0);
                }
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0) {
                barrier_arrive(empty + 8 * stage);
                if (!kHeld && i + 1 == steps) barrier_arrive(q_empty + 8 * slot);
            }
            if (++stage == kStages) stage = 0, parity ^= 1;

#pragma unroll
            for (int v = 0; v < kUnits; ++v) {
                // Columns of the unit that exist; the same for all rows that do.
                const int there = nk - column[v] * 64;
                bool plain = whole_rows && (kWithin ? mask[v] < 0 : there >= 64);
                u64 wanted = ~0ull;
                if constexpr (kKeep) {
                    wanted = bits_of(kept + column[v] * 64);
                    plain = plain && wanted == ~0ull;
                }
                u32 packed[2][4], codes = 0;
                if constexpr (kGiven) codes = quad_nibbles(words[v], t);
                codes = pack_unit(packed, acc, v, codes, scale, plain, wanted, t, [&](u64(&inside)[2]) {
                    if constexpr (kWithin) {
                        if (mask[v] >= 0) {
                            const u64 *bits = reinterpret_cast<const u64 *>(masks) + i64(mask[v]) * 64 + row16 + g;
                            inside[0] = __ldg(bits), inside[1] = __ldg(bits + 8);
                        }
                    } else {
                        const u64 columns = there >= 64 ? ~0ull : there > 0 ? (1ull << there) - 1 : 0;
                        inside[0] = row0 + row16 + g < nq ? columns : 0;
                        inside[1] = row0 + row16 + g + 8 < nq ? columns : 0;
                    }
                });
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    stmatrix4(result_at(mine + spot, v, j), packed[0][2 * j], packed[1][2 * j],
                              packed[0][2 * j + 1], packed[1][2 * j + 1]);
                if constexpr (!kGiven) {
                    codes = quad_nibbles(codes, t);
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(mine + kPacked + 512 * v + 4 * word), "r"(codes)
                                 : "memory");
                }
            }
            proxy_fence();
            // The last store has read the results that are the next to be overwritten.
            if (stores) tma_store_wait_read<0>();
            named_barrier(1 + group, 128);
            if (stores && (kResults == 2 || i % 2 || i + 1 == steps)) {
                const int n = first + i * kUnits;
                if constexpr (kWithin) {
#pragma unroll
                    for (int v = 0; v < kUnits; ++v) {
                        if (i * kUnits + v >= count) break;
                        tma_store(values_map, mine + 4096 * v, 0, (n + v) * 64, matrix);
                        if constexpr (!kGiven) tma_store(meta_map, mine + kPacked + 512 * v, 0, n + v, rep);
                    }
                } else {
                    const auto store = [&](u32 from, int unit) {
                        tma_store(values_map, from, 32 * unit, row0, matrix);
                        if constexpr (!kGiven) tma_store(meta_map, from + kPacked, row0, 2 * unit, rep);
                    };
                    if (kResults == 3 && i % 2) store(previous, n - kUnits);
                    store(mine, n);
                }
                tma_store_commit();
            }
            previous = mine;
            mine = mine == results + (kResults - 1) * kResult ? results : mine + kResult;
        }
        if (++slot == kQueries) slot = 0, q_parity ^= 1;
    }
    if (stores) tma_store_wait_read<0>();
}

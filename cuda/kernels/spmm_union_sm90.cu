// spmm_union_sm90: out = scale · S x or scale · Sᵀ x, S in blocks of 16 or 32, on wgmma.
//
// A CTA takes 256 rows: 16 or 8 lines of blocks. It walks the union of their inner blocks: the rows of x
// come once for all of them, and a warpgroup multiplies its 64 rows by those that it has blocks for.
// Blocks go from global memory to the warps that multiply them: a line's blocks lie in the order of the
// walk, so every warp has a queue of its own in shared memory and takes the next when the union says so.
//
//   out     (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x       (F, E, inner, D)  by a 4-D tensor map, any strides, boxes of 64 columns × S
//   values  (F, slots)        blocks of S × S elements from `shift` on
//   unions  (n) int4          inner block, bits: lines with a block there, bits: rows of x in use, 0
//   records (E · groups) int4 group of lines, first in unions, unions, entry; the long ones first
//   bounds  (E · lines + 1)   where each line's blocks start
//   list    (blocks) or null  transposed: items in column-major order
//   items   (blocks) int4     entry, block row, block column, mask (−1 = full)
//   masks   (M, S, S / 8)     bits of partial blocks, of their transposes when transposed
//   sched   or null           see walk.cuh
//
//   grid   CTAs that walk their tiles of 256 rows × kWide columns
//   block  512 consumers + a warpgroup of which one thread produces and which gives its registers away
//   smem   kStages of 32 rows of x, and 16 queues of kAhead blocks (16 rows or columns of a block of 32)
//   floor  L2: (kWide · 128 B for every 64 positions of the union + blocks) at 8.9 TB/s
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows of x and blocks, no run-time mask
#include "types.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "mma.cuh"
#include "result.cuh"
#include "walk.cuh"

constexpr int kSize = MG_SIZE, kWide = MG_WIDE, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kSize == 16 || kSize == 32, "SIZE must be 16 or 32");
static_assert(kWide == 64 || kWide == 128, "WIDE must be 64 or 128");
constexpr int kRows = 256, kLines = kRows / kSize, kEach = 64 / kSize;  // kEach: lines of a warpgroup
constexpr int kSlots = 32 / kSize;                                      // unions of a stage
constexpr int kConsumers = 512, kPanels = kWide / 64, kSteps = kSize / 16;
constexpr u32 kPanel = 32 * 128, kStage = kPanels * kPanel, kSlotBytes = kWide * kSize * 2;
constexpr int kAhead = kSize == 16 ? 8 : 4, kPiece = 16 * kSize * 2;  // bytes of a warp's part of a block
constexpr u32 kAll = kSize == 32 ? ~0u : (1u << kSize) - 1;

// A 16-byte chunk of a warp's piece: rows of `pitch` chunks, so turned that eight rows of one chunk lie
// in different banks. Transposed pieces of blocks of 32 are 32 rows of 2 chunks.
constexpr int kPitch = kTransposed || kSize == 16 ? 2 : 4;
__device__ __forceinline__ u32 chunk_at(int row, int chunk) {
    const int turned = kPitch == 2 ? chunk ^ (row >> 2 & 1) : chunk ^ (row >> 1 & 3);
    return (row * kPitch + turned) * 16;
}
__device__ __forceinline__ u32 both(u32 bits) {
    return (bits & 1 ? 0x0000FFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
}
__device__ __forceinline__ void zero16(u32 address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    spmm_union_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values, i64 slots,
                    const int4 *__restrict__ unions, const int4 *__restrict__ records,
                    const int *__restrict__ sched, const int *__restrict__ bounds,
                    const int *__restrict__ list, const int4 *__restrict__ items,
                    const u8 *__restrict__ masks, int groups, int all_groups, int lines, int across,
                    int matrices, float scale, void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u, queues = ring + kStages * kStage;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    __shared__ uint2 notes[kStages][kSlots];  // lines with a block, rows of x in use
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;
    int repeat, stage = 0;  // repeat: matrix · across + column tile
    Walk walk(records, sched, all_groups, across * matrices);

    if (warp >= kConsumers / 32) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (warp > kConsumers / 32) return;
        if (lane == 0) tma_prefetch(x_map);
        u32 parity = 1;
        while (walk.next(tile, repeat)) {
            const int column0 = repeat % across * kWide, matrix = repeat / across;
            // A lane looks after one union of each stage.
            auto mine = [&](int n) { return lane < kSlots && n < tile.z ? unions[tile.y + n] : make_int4(0, 0, kAll, 0); };
            int4 ahead = mine(lane);
            for (int i = 0; i < tile.z; i += kSlots) {
                const int4 now = ahead;
                ahead = mine(i + kSlots + lane);
                barrier_wait(empty + 8 * stage, parity);
                if (lane < kSlots) notes[stage][lane] = make_uint2(now.y, now.z);
                __syncwarp();
                if (lane == 0) barrier_expect(full + 8 * stage, kSlotBytes * min(kSlots, tile.z - i));
                __syncwarp();
                if (lane < kSlots && i + lane < tile.z)
#pragma unroll
                    for (int p = 0; p < kPanels; ++p)
                        tma_load(ring + stage * kStage + p * kPanel + lane * kSize * 128, x_map, full + 8 * stage,
                                 column0 + 64 * p, now.x * kSize, tile.w, matrix);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const int group = warp / 4, line16 = group * kEach + warp % 4 / kSteps;  // this warp's line of the 256 rows
    const int half = kSize == 32 ? warp % 2 : 0;                            // its 16 rows of the block
    const u32 queue = queues + warp * kAhead * kPiece;
    u32 parity = 0;

    while (walk.next(tile, repeat)) {
        const int matrix = repeat / across, line = (tile.x % groups) * kLines + line16;
        const int first = line < lines ? bounds[tile.w * lines + line] : 0;
        const int count = line < lines ? bounds[tile.w * lines + line + 1] - first : 0;
        const operand_t *from = values + matrix * slots + half * (kTransposed ? 16 : 16 * kSize);
        int sent = 0, taken = 0, position = 0;  // position: of the oldest block in the queue

        // Of the next block to send: its item, asked for one ahead.
        auto item_at = [&](int i) { return i < count ? (kTransposed ? list[first + i] : first + i) : 0; };
        int coming = item_at(0);
        auto send = [&](int place) {
            if (sent < count) {
                const operand_t *block = from + static_cast<i64>(coming) * (kSize * kSize);
#pragma unroll
                for (int i = 0; i < kPiece / 512; ++i) {
                    const int n = 32 * i + lane, row = n / kPitch, chunk = n % kPitch;
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(queue + place * kPiece + chunk_at(row, chunk)),
                                 "l"(block + row * kSize + chunk * 8)
                                 : "memory");
                }
            }
            copy_commit();
            coming = item_at(++sent);
        };
        auto mask_at = [&](int i) {
            return i < count ? items[kTransposed ? list[first + i] : first + i].w : -1;
        };
#pragma unroll
        for (int i = 0; i < kAhead; ++i) send(i);
        int mask = mask_at(0);
        // The oldest block of the queue as the left operand; its place is sent the next block.
        auto take = [&](u32(&to)[kSteps][4]) {
                                copy_wait<kAhead - 1>();
                                __syncwarp();
                                const u32 piece = queue + position * kPiece;
            #pragma unroll
                                for (int k = 0; k < kSteps; ++k) {
                                    // Matrix l / 8 of the four: rows + 8 (l / 8 % 2) and k + 8 (l / 16), or turned.
                                    const int m = lane / 8, r = lane % 8;
                                    const u32 at = kTransposed ? chunk_at(16 * k + 8 * (m / 2) + r, m % 2)
                                                               : chunk_at(8 * (m % 2) + r, 2 * k + m / 2);
                                    if constexpr (kTransposed)
                                        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                                                     : "=r"(to[k][0]), "=r"(to[k][1]), "=r"(to[k][2]), "=r"(to[k][3])
                                                     : "r"(piece + at)
                                                     : "memory");
                                    else
                                        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                                     : "=r"(to[k][0]), "=r"(to[k][1]), "=r"(to[k][2]), "=r"(to[k][3])
                                                     : "r"(piece + at)
                                                     : "memory");
                                }
                                if (mask >= 0) {
                                    const u8 *bits = masks + (static_cast<i64>(mask) * kSize + 16 * half + lane / 4) * (kSize / 8);
                                    u32 low, high;
                                    if constexpr (kSize == 32) {
                                        low = *reinterpret_cast<const u32 *>(bits), high = *reinterpret_cast<const u32 *>(bits + 32);
                                    } else {
                                        low = *reinterpret_cast<const u16 *>(bits), high = *reinterpret_cast<const u16 *>(bits + 16);
                                    }
            #pragma unroll
                                    for (int k = 0; k < kSteps; ++k) {
                                        const int shift = 16 * k + 2 * (lane % 4);
                                        to[k][0] &= both(low >> shift);
                                        to[k][1] &= both(high >> shift);
                                        to[k][2] &= both(low >> (shift + 8));
                                        to[k][3] &= both(high >> (shift + 8));
                                    }
                                }
                                mask = mask_at(++taken);
                                __syncwarp();  // all have read the piece before it is sent over
                                send(position);
                                if (++position == kAhead) position = 0;
        };

        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;

        int held = -1;  // stage that the product in flight reads
#pragma unroll 1
        for (int i = 0; i < tile.z; i += kSlots) {
            barrier_wait(full + 8 * stage, parity);
            u32 present[kSlots], used = ~0u;
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const uint2 note = notes[stage][u];
                present[u] = note.x;
                used &= note.y | ~kAll;
            }
            if (used != ~0u) {
                // Rows of x that nothing here keeps are zeroed: 0 · NaN is NaN.
#pragma unroll 1
                for (int n = threadIdx.x; n < 32 * kPanels * 8; n += kConsumers) {
                    const int row = n / 8 % 32;
                    if (!((notes[stage][row / kSize].y >> (row % kSize)) & 1))
                        zero16(ring + stage * kStage + n / 256 * kPanel + row * 128 + n % 8 * 16);
                }
                proxy_fence();
                named_barrier(1, kConsumers);
            }
            u32 any = 0;
#pragma unroll
            for (int u = 0; u < kSlots; ++u) any |= present[u];
            if (!((any >> (group * kEach)) & ((1 << kEach) - 1))) {  // nothing for this warpgroup
                if (held >= 0) {
                    wgmma_wait<0>();
                    if (lane == 0) barrier_arrive(empty + 8 * held);
                    held = -1;
                }
                if (lane == 0) barrier_arrive(empty + 8 * stage);
                if (++stage == kStages) stage = 0, parity ^= 1;
                continue;
            }
            u32 next[kSlots][kSteps][4];
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                if ((present[u] >> line16) & 1) {
                    take(next[u]);
                } else {
#pragma unroll
                    for (int k = 0; k < kSteps; ++k)
#pragma unroll
                        for (int w = 0; w < 4; ++w) next[u][k][w] = 0;
                }
            }
            wgmma_wait<0>();
            if (held >= 0 && lane == 0) barrier_arrive(empty + 8 * held);
            // What a product reads must be written after the one before it is done (C7513).
            u32 a[kSlots][kSteps][4];
#pragma unroll
            for (int u = 0; u < kSlots; ++u)
#pragma unroll
                for (int k = 0; k < kSteps; ++k)
#pragma unroll
                    for (int w = 0; w < 4; ++w) asm volatile("mov.b32 %0, %1;" : "=r"(a[u][k][w]) : "r"(next[u][k][w]));
#pragma unroll
            for (int u = 0; u < kSlots; ++u)
                if (kSlots == 1 || ((present[u] >> (group * kEach)) & ((1 << kEach) - 1))) {
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < kSteps; ++k)
                        Wgmma<kWide>::template rs<1>(
                            acc, a[u][k], wgmma_descriptor(ring + stage * kStage + (u * kSize + 16 * k) * 128, kPanel));
                    wgmma_commit();
                }
            held = stage;
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (held >= 0 && lane == 0) barrier_arrive(empty + 8 * held);
        copy_wait<0>();

        const int row = (tile.x % groups) * kRows + 64 * group + warp % 4 * 16 + lane / 4;
        const i64 plane = (static_cast<i64>(matrix) * (all_groups / groups) + tile.w) * rows * width;
        void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                            : static_cast<void *>(static_cast<operand_t *>(out) + plane);
        store_result<kWide, kPartial>(acc, scale, to, row, rows, repeat % across * kWide, width, add);
    }
}

// spmm_union_sm90: out = scale · S x or scale · Sᵀ x, S in blocks of 16 or 32, on wgmma.
//
// A CTA takes 256 rows: 16 or 8 lines of blocks. It walks the union of their inner blocks: the rows of x
// come once for all of them, with the blocks that are there, and a warpgroup multiplies its 64 rows by
// those that it has blocks for, from registers: a warp without a block puts zeros.
//
//   out     (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x       (F, E, inner, D)  by a 4-D tensor map, any strides, boxes of 64 columns × S
//   values  (F, slots)        blocks by a 3-D tensor map (S, items · S, F), boxes of S × S
//   unions  (n) int4          inner block; bits: lines with a block there; bits: rows of x in use; first
//   blocks  (items) int2      of each union, line by line: item, mask (−1 = full)
//   records (E · groups) int4 group of lines, first in unions, unions, entry; the long ones first
//   masks   (M, S, S / 8)     bits of partial blocks, of their transposes when transposed
//   sched   or null           see walk.cuh
//
//   grid   CTAs that walk their tiles of 256 rows × kWide columns
//   block  512 consumers + a warpgroup whose first warps produce and which gives its registers away
//   smem   kStages of 64 rows of x and the blocks of 64 × 256
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
constexpr int kSlots = 64 / kSize, kSteps = kSize / 16;                 // unions of a stage
constexpr int kConsumers = 512, kPanels = kWide / 64;
constexpr int kProducers = kLines * kSlots / 32 > 1 ? kLines * kSlots / 32 : 1;  // warps
constexpr int kTurns = 32 / kLines < kSlots ? 32 / kLines : kSlots;              // unions of a warp
constexpr u32 kPanel = 64 * 128, kBlock = kSize * kSize * 2, kRight = kPanels * kPanel;
constexpr u32 kStage = kRight + kSlots * kLines * kBlock;
constexpr u32 kAll = kSize == 32 ? ~0u : (1u << kSize) - 1;
static_assert(kTurns * kProducers == kSlots, "every union has a warp");

// A 16-byte chunk of a block as TMA's swizzle of a row's bytes puts it.
__device__ __forceinline__ u32 chunk_at(int row, int chunk) {
    return kSize == 16 ? row * 32 + ((chunk ^ (row >> 2 & 1)) << 4) : row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}
__device__ __forceinline__ u32 both(u32 bits) {
    return (bits & 1 ? 0x0000FFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    spmm_union_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                    const int4 *__restrict__ unions, const int2 *__restrict__ blocks,
                    const int4 *__restrict__ records, const int *__restrict__ sched,
                    const u8 *__restrict__ masks, int groups, int all_groups, int across, int matrices,
                    float scale, void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    __shared__ uint2 notes[kStages][kSlots];         // lines with a block, rows of x in use
    __shared__ int mask_of[kStages][kSlots][kLines];  // −1 = full or absent
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, kProducers), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;
    int repeat, stage = 0;  // repeat: matrix · across + column tile
    Walk walk(records, sched, all_groups, across * matrices);

    if (warp >= kConsumers / 32) {  // producers: a lane looks after one line of one union of each stage
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (warp >= kConsumers / 32 + kProducers) return;
        const int slot = (warp - kConsumers / 32) * kTurns + lane / kLines, line = lane % kLines;
        const bool here = lane < kTurns * kLines;
        if (lane == 0) tma_prefetch(values_map), tma_prefetch(x_map);
        u32 parity = 1;
        while (walk.next(tile, repeat)) {
            const int column0 = repeat % across * kWide, matrix = repeat / across;
            auto entry_at = [&](int n) { return here && n < tile.z ? unions[tile.y + n] : make_int4(-1, 0, kAll, 0); };
            auto block_at = [&](int4 e) {
                return e.y >> line & 1 ? blocks[e.w + __popc(e.y & ((1 << line) - 1))] : make_int2(0, -1);
            };
            // What describes a stage is asked for one and two stages ahead.
            int4 soon = entry_at(slot), later = entry_at(kSlots + slot);
            int2 block_soon = block_at(soon);
            for (int i = 0; i < tile.z; i += kSlots) {
                const int4 now = soon;
                const int2 block = block_soon;
                soon = later;
                block_soon = block_at(soon);
                later = entry_at(i + 2 * kSlots + slot);
                barrier_wait(empty + 8 * stage, parity);
                const bool present = now.y >> line & 1, panel = line < kPanels && now.x >= 0;
                if (here) {
                    if (line == 0) notes[stage][slot] = make_uint2(now.y, now.z);
                    mask_of[stage][slot][line] = block.y;
                }
                const u32 bytes = __reduce_add_sync(0xFFFFFFFFu, (present ? kBlock : 0) + (panel ? kSize * 128 : 0));
                if (lane == 0) barrier_expect(full + 8 * stage, bytes);
                __syncwarp();
                const u32 at = ring + stage * kStage;
                if (panel)
                    tma_load(at + line * kPanel + slot * kSize * 128, x_map, full + 8 * stage, column0 + 64 * line,
                             now.x * kSize, tile.w, matrix);
                if (present)
                    tma_load(at + kRight + (slot * kLines + line) * kBlock, values_map, full + 8 * stage, 0,
                             block.x * kSize, matrix);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const int group = warp / 4, line = group * kEach + warp % 4 / kSteps;  // this warp's line of the 256 rows
    const int half = kSize == 32 ? warp % 2 : 0;                          // its 16 rows of the block
    // Of ldmatrix: lane l gives row l % 8 of matrix l / 8: rows + 8 (m % 2) and k + 8 (m / 2), or turned.
    const int m = lane / 8;
    u32 piece[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
        piece[k] = kRight + line * kBlock +
                   (kTransposed ? chunk_at(16 * k + 8 * (m / 2) + lane % 8, 2 * half + m % 2)
                                : chunk_at(16 * half + 8 * (m % 2) + lane % 8, 2 * k + m / 2));
    u32 parity = 0;

    while (walk.next(tile, repeat)) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
        for (int i = 0; i < tile.z; i += kSlots) {
            const u32 at = ring + stage * kStage;
            barrier_wait(full + 8 * stage, parity);
            u32 present[kSlots], used = ~0u, any = 0;
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const uint2 note = notes[stage][u];
                present[u] = note.x;
                used &= note.y | ~kAll;
                any |= note.x;
            }
            if (used != ~0u) {
                // Rows of x that nothing here keeps are zeroed: 0 · NaN is NaN.
#pragma unroll 1
                for (int n = threadIdx.x; n < 64 * kPanels * 8; n += kConsumers) {
                    const int row = n / 8 % 64;
                    if (!((notes[stage][row / kSize].y >> (row % kSize)) & 1))
                        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                                         at + n / 512 * kPanel + row * 128 + n % 8 * 16),
                                     "r"(0)
                                     : "memory");
                }
                proxy_fence();
                named_barrier(1, kConsumers);
            }
            if ((any >> (group * kEach)) & ((1 << kEach) - 1)) {
                u32 a[kSlots][kSteps][4];
#pragma unroll
                for (int u = 0; u < kSlots; ++u)
                    if ((present[u] >> line) & 1) {
#pragma unroll
                        for (int k = 0; k < kSteps; ++k) {
                            const u32 from = at + u * kLines * kBlock + piece[k];
                            if constexpr (kTransposed)
                                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                                             : "=r"(a[u][k][0]), "=r"(a[u][k][1]), "=r"(a[u][k][2]), "=r"(a[u][k][3])
                                             : "r"(from)
                                             : "memory");
                            else
                                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                             : "=r"(a[u][k][0]), "=r"(a[u][k][1]), "=r"(a[u][k][2]), "=r"(a[u][k][3])
                                             : "r"(from)
                                             : "memory");
                        }
                        const int mask = mask_of[stage][u][line];
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
                                a[u][k][0] &= both(low >> shift);
                                a[u][k][1] &= both(high >> shift);
                                a[u][k][2] &= both(low >> (shift + 8));
                                a[u][k][3] &= both(high >> (shift + 8));
                            }
                        }
                    } else {
#pragma unroll
                        for (int k = 0; k < kSteps; ++k)
#pragma unroll
                            for (int w = 0; w < 4; ++w) a[u][k][w] = 0;
                    }
#pragma unroll
                for (int u = 0; u < kSlots; ++u)
                    if ((present[u] >> (group * kEach)) & ((1 << kEach) - 1)) {
                        wgmma_fence();
#pragma unroll
                        for (int k = 0; k < kSteps; ++k)
                            Wgmma<kWide>::template rs<1>(acc, a[u][k],
                                                         wgmma_descriptor(at + (u * kSize + 16 * k) * 128, kPanel));
                        wgmma_commit();
                    }
                wgmma_wait<0>();
            }
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }

        const int row = (tile.x % groups) * kRows + 64 * group + warp % 4 * 16 + lane / 4;
        const i64 plane = (static_cast<i64>(repeat / across) * (all_groups / groups) + tile.w) * rows * width;
        void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                            : static_cast<void *>(static_cast<operand_t *>(out) + plane);
        store_result<kWide, kPartial>(acc, scale, to, row, rows, repeat % across * kWide, width, add);
    }
}

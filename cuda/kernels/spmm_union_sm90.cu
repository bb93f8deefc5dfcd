// spmm_union_sm90: out = scale · S x or scale · Sᵀ x, S in blocks of 16 or 32, on wgmma.
//
// A CTA takes 128 rows: 8 or 4 lines of blocks. It walks the union of their inner blocks: the rows of x
// come once for all of them, with the blocks that are there, and a warpgroup multiplies its 64 rows by
// those that it has blocks for, from registers: a warp without a block puts zeros.
//
//   out     (F, E, rows, D)   F free indices, E entries; rows = nq, or nk when transposed; contiguous
//   x       (F, E, inner, D)  by a 4-D tensor map, any strides, boxes of 64 columns × S; kTokens: (F, E, D, inner), and
//                             so is out, boxes of S × kWide
//   values  (F, slots)        blocks by a 3-D tensor map (S, items · S, F), boxes of S × S
//   unions  (n) int4          inner block; bits: lines with a block there; bits: rows of x in use; 0
//   blocks  (n, kLines) int2  the block of each line: item, mask (−1 = full); −1, −1 = none
//   masks   (M, S, S / 8)     bits of partial blocks, of their transposes when transposed
//   tiles   (n) int4          see walk.cuh; line = entry · groups + group of lines
//
//   grid   CTAs that walk their tiles of 128 rows × kWide columns
//   block  256 consumers + a warpgroup whose first two warps produce
//   smem   kStages of 64 rows of x and the blocks of 128 × 64; kTokens: 1 KiB a warp
//   floor  L2: (kWide · 128 B for every 64 positions of the union + blocks) at 8.9 TB/s
//   needs  sm_90a, D % 8 == 0, 16-byte aligned rows of x and blocks, no run-time mask
#include "types.cuh"
#include "copy.cuh"
#include "registers.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "mma.cuh"
#include "result.cuh"
#include "token_rows.cuh"
#include "walk.cuh"

constexpr int kSize = MG_SIZE, kWide = MG_WIDE, kStages = MG_STAGES;
constexpr bool kTransposed = MG_TRANSPOSED, kPartial = MG_PARTIAL;
static_assert(kSize == 16 || kSize == 32, "SIZE must be 16 or 32");
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
constexpr int kRows = 128, kLines = kRows / kSize, kEach = 64 / kSize;  // kEach: lines of a warpgroup
constexpr int kSlots = 64 / kSize, kSteps = kSize / 16;                 // unions of a stage
constexpr int kConsumers = 256, kPanels = kWide / 64;
using Pool = Registers<kConsumers + 128, 48, 224>;                   // if kWide == 256
constexpr int kProducers = 2;                                           // warps: for x and for blocks
static_assert(kLines * kSlots <= 32 && kPanels * kSlots <= 32, "a lane for each copy of a stage");
constexpr u32 kPanel = 64 * 128, kBlock = kSize * kSize * 2, kRight = kPanels * kPanel;
constexpr u32 kStage = kRight + kSlots * kLines * kBlock;
constexpr int kAhead = 8;
constexpr u32 kAll = kSize == 32 ? ~0u : (1u << kSize) - 1;

// A 16-byte chunk of a block as TMA's swizzle of a row's bytes puts it.
__device__ __forceinline__ u32 chunk_at(int row, int chunk) {
    return kSize == 16 ? row * 32 + ((chunk ^ (row >> 2 & 1)) << 4) : row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}
__device__ __forceinline__ u32 both(u32 bits) {
    return (bits & 1 ? 0x0000FFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, kWide == 64 ? 2 : 1)
    spmm_union_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                    const int4 *__restrict__ unions, const int2 *__restrict__ blocks,
                    const int4 *__restrict__ tiles, int each,
                    const u8 *__restrict__ masks, int groups, int entries, int across, float scale, const operand_t *__restrict__ bias, void *__restrict__ out, int rows, int width, int add) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    __shared__ uint2 notes[kStages][kSlots];         // lines with a block, rows of x in use
    __shared__ alignas(16) int4 union_ahead[kAhead][kSlots];
    __shared__ alignas(8) int2 block_ahead[kAhead][32];
    __shared__ int mask_of[kStages][kSlots][kLines];  // −1 = full or absent
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;

    // The first tile is asked for while the barriers are made.
    Walk walk(tiles, each);
    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, kProducers), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    int4 tile;
    int stage = 0;

    if (warp >= kConsumers / 32) {  // producers
        if constexpr (kWide == 256) Pool::give();
        const int role = warp - kConsumers / 32;
        u32 parity = 1;
        // What describes a stage is asked for kAhead stages ahead, into shared memory.
        if (role == 0) {  // x: a lane looks after one panel of one union of each stage
            const int slot = lane / kPanels, panel = lane % kPanels;
            while (walk.next(tile)) {
                const int column = tile.w % across * kWide + 64 * panel, matrix = tile.w / across, entry = tile.x / groups;
                auto there = [&](int n) { return slot < kSlots && n * kSlots + slot < tile.z; };
                auto ask = [&](int n) {
                    if (there(n) && panel == 0)
                        copy_async16(&union_ahead[n % kAhead][slot], unions + tile.y + n * kSlots + slot, true);
                    copy_commit();
                };
                __syncwarp();
                for (int n = 0; n < kAhead - 1; ++n) ask(n);
                for (int n = 0; n * kSlots < tile.z; ++n) {
                    ask(n + kAhead - 1);
                    copy_wait<kAhead - 1>();
                    __syncwarp();
                    int4 now = make_int4(0, 0, kAll, 0);
                    if (there(n)) now = union_ahead[n % kAhead][slot];
                    barrier_wait(empty + 8 * stage, parity);
                    if (slot < kSlots) notes[stage][slot] = make_uint2(now.y, now.z);
                    __syncwarp();
                    if (lane == 0) barrier_expect(full + 8 * stage, kPanels * kSize * 128 * min(kSlots, tile.z - n * kSlots));
                    __syncwarp();
                    if constexpr (kTokens) {
                        if (there(n) && panel == 0)
                            tma_load(ring + stage * kStage + slot * kSize * kWide * 2, x_map, full + 8 * stage, now.x * kSize,
                                     column, entry, matrix);
                    } else if (there(n))
                        tma_load(ring + stage * kStage + panel * kPanel + slot * kSize * 128, x_map, full + 8 * stage,
                                 column, now.x * kSize, entry, matrix);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        } else if (role == 1) {  // blocks: a lane looks after one line of one union
            const int slot = lane / kLines, line = lane % kLines;
                        while (walk.next(tile)) {
                const int matrix = tile.w / across;
                auto ask = [&](int n) {
                    if (lane < kSlots * kLines && n * kSlots + slot < tile.z)
                        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(&block_ahead[n % kAhead][lane])),
                                     "l"(blocks + static_cast<i64>(tile.y + n * kSlots + slot) * kLines + line)
                                     : "memory");
                    else
                        block_ahead[n % kAhead][lane] = make_int2(-1, -1);
                    copy_commit();
                };
                for (int n = 0; n < kAhead - 1; ++n) ask(n);
                for (int n = 0; n * kSlots < tile.z; ++n) {
                    ask(n + kAhead - 1);
                    copy_wait<kAhead - 1>();
                    const int2 block = block_ahead[n % kAhead][lane];
                    barrier_wait(empty + 8 * stage, parity);
                    if (lane < kSlots * kLines) mask_of[stage][slot][line] = block.y;
                    const u32 count = __popc(__ballot_sync(0xFFFFFFFFu, block.x >= 0));
                    if (lane == 0) barrier_expect(full + 8 * stage, kBlock * count);
                    __syncwarp();
                    if (block.x >= 0)
                        tma_load(ring + stage * kStage + kRight + (slot * kLines + line) * kBlock, values_map,
                                 full + 8 * stage, 0, block.x * kSize, matrix);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        }
        return;
    }

    if constexpr (kWide == 256) Pool::take();
    const int group = warp / 4, line = group * kEach + warp % 4 / kSteps;  // this warp's line of the 128 rows
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

    while (walk.next(tile)) {
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
                if constexpr (kTokens) {
#pragma unroll 1
                    for (int n = threadIdx.x; n < 8 * kWide; n += kConsumers) {
                        const int slot = n / (kSize / 8 * kWide), chunk = n % (kSize / 8);
                        const u32 bits = notes[stage][slot].y >> (8 * chunk) & 255;
                        if (bits == 255) continue;
                        const u32 to = chunk_of_row<kSize * 2>(at + slot * kSize * kWide * 2, n / (kSize / 8) % kWide, chunk);
                        const uint4 eight = load_shared16(to);
                        u32 v[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                        for (int i = 0; i < 4; ++i) v[i] &= both(bits >> (2 * i));
                        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                                     "r"(v[3])
                                     : "memory");
                    }
                } else
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
                            Wgmma<kWide>::template rs<!kTokens>(
                                acc, a[u][k],
                                kTokens ? wgmma_rows<kSize * 2>(at + u * kSize * kWide * 2 + 32 * k)
                                        : wgmma_descriptor(at + (u * kSize + 16 * k) * 128, kPanel));
                        wgmma_commit();
                    }
                wgmma_wait<0>();
            }
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }

        const int row = (tile.x % groups) * kRows + 64 * group + warp % 4 * 16 + lane / 4;
        const i64 plane = (static_cast<i64>(tile.w / across) * entries + tile.x / groups) * rows * width;
        if constexpr (kTokens) {
            const u32 staging = ring + kStages * kStage + group * 4096;
            store_turned<kWide>(acc, scale, bias, staging, static_cast<operand_t *>(out) + plane,
                                tile.x % groups * kRows + 64 * group, rows, tile.w % across * kWide, width);
            continue;
        }
        void *to = kPartial ? static_cast<void *>(static_cast<float *>(out) + plane)
                            : static_cast<void *>(static_cast<operand_t *>(out) + plane);
        store_result<kWide, kPartial>(acc, scale, to, row, rows, tile.w % across * kWide, width, add);
    }
}

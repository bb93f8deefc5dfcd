// sddmm_tokens_sm90: values of kept blocks, scale · Σ yᵀ x over rows of tokens: the gradient of a layer's weight.
//
// A CTA takes a strip of 64 rows, of one line of blocks or of several, times up to kMost panels of columns, as wide as
// a block, at which any line of the strip keeps one.
//
//   y       (F, T, rows)     by a 4-D tensor map (rows, T, 1, F), boxes of 64 × 64 tokens
//   x       (F, T, columns)  alike; boxes of kWide × 64 tokens, in the swizzle of as many bytes
//   values  (F, slots)       blocks of S × S elements, by rows
//   table   (CTAs, kInts) int: first row, number of panels, which 64 rows of their blocks the strip is, 0; first
//           column of each panel; of each panel and line of blocks two: first slot / 64 (−1 = no block), mask (−1 = full)
//   masks   (M, S, S / 8)    bits of partial blocks
//
//   grid   (CTAs, F)
//   block  2 warpgroups of consumers, 256 columns each, and one that produces
//   smem   kStages of 64 tokens of y and of every panel; kStaging bytes a warp
//   floor  2 · nnz · T FLOP at 800 TFLOP/s; L2: 8 KiB for y and 128 · kWide bytes for each panel of a CTA's 64
//          tokens, 8.6 TB/s
//   needs  sm_90a, rows of tokens at multiples of 16 bytes
#include "types.cuh"
#include "ring.cuh"
#include "staged.cuh"

constexpr int kSize = MG_SIZE, kStages = MG_STAGES;
static_assert(kSize == 16 || kSize == 32 || kSize == 64 || kSize == 128, "SIZE must be 16, 32, 64 or 128");
constexpr int kWide = kSize < 64 ? kSize : 64, kLines = 64 / kWide;  // columns of a panel, lines of blocks of a strip
constexpr int kMost = 512 / kWide, kEach = kMost / 2;
constexpr int kInts = 4 + kMost + 2 * kMost * kLines;
constexpr int kConsumers = 2 * 128, kBringers = kSize < 64 ? 4 : 1;  // warps that ask for panels
using Pool = Registers<kConsumers + 128, 40, 232>;
constexpr u32 kLeft = 64 * 128, kPanel = kWide * 128, kStage = kLeft + kMost * kPanel;
template <int kBits> struct Bits { using type = u64; };
template <> struct Bits<32> { using type = u32; };
template <> struct Bits<16> { using type = u16; };
using bits_t = Bits<kWide>::type;  // of a row of a panel

// A warp's sums of a panel; `out` is where the first of its rows that the strip has begins.
template <int kWide>
__device__ __forceinline__ void store_panel(const float (&sums)[kWide / 2], float scale, u32 stage, operand_t *out, int row16) {
    if constexpr (kWide < 64)
        store_rows<kWide>(sums, scale, stage, out + row16 % kWide * kWide);
    else
        store_staged<64>(sums, scale, stage, out, row16, 64, 0, kSize);
}

extern "C" __global__ void __launch_bounds__(kConsumers + 128, 1)
    sddmm_tokens_sm90(const __grid_constant__ TensorMap y_map, const __grid_constant__ TensorMap x_map,
                      const int *__restrict__ table, const u8 *__restrict__ masks, operand_t *__restrict__ values,
                      i64 slots, float scale, int tokens) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u, staging = ring + kStages * kStage;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    __shared__ int columns[kMost];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32, matrix = blockIdx.y;
    const int *const mine = table + static_cast<i64>(blockIdx.x) * kInts;
    const int4 head = __ldg(reinterpret_cast<const int4 *>(mine));
    const int steps = (tokens + 63) / 64;

    if (threadIdx.x < kMost) columns[threadIdx.x] = __ldg(mine + 4 + threadIdx.x);
    if (threadIdx.x == kConsumers) tma_prefetch(y_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        // Those of a warpgroup that has no panel leave at once.
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, kBringers), barrier_init(empty + 8 * s, head.y > kEach ? 8 : 4);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producers
        Pool::give();
        const int mine = warp - kConsumers / 32;
        if (mine >= kBringers || lane) return;
        int stage = 0;
        u32 parity = 1;
        for (int i = 0; i < steps; ++i) {
            const u32 to = ring + stage * kStage, done = full + 8 * stage;
            barrier_wait(empty + 8 * stage, parity);
            if (mine == 0) {
                barrier_expect(done, kLeft + head.y * kPanel);
                tma_load(to, y_map, done, head.x, 64 * i, 0, matrix);
            }
#pragma unroll 2
            for (int p = mine; p < head.y; p += kBringers)
                tma_load(to + kLeft + p * kPanel, x_map, done, columns[p], 64 * i, 0, matrix);
            if (mine) barrier_arrive(done);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
        return;
    }

    Pool::take();
    const int first = warp / 4 * kEach, count = min(head.y - first, kEach), row16 = warp % 4 * 16;
    if (count <= 0) return;
    // Lane p: where the values of panel p in this warp's rows go, and which of them are kept.
    int2 place{-1, -1};
    if (lane < count) place = __ldg(reinterpret_cast<const int2 *>(mine + 4 + kMost) + (first + lane) * kLines + row16 / kWide);
    float acc[kEach * kWide / 2];
#pragma unroll
    for (int i = 0; i < kEach * kWide / 2; ++i) acc[i] = 0.f;
    const u64 left = wgmma_descriptor(ring, kLeft), right = wgmma_columns<2 * kWide>(ring + kLeft + first * kPanel, kPanel);
    // Of panels that are not there nobody looks at the sums.
    multiply_ring<kStages>(steps, full, empty, lane, [&](int stage) {
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
            Wgmma<kEach * kWide>::template ss<1, 1>(acc, left + ((stage * kStage + kk * 2048) >> 4),
                                                    right + ((stage * kStage + kk * 32 * kWide) >> 4), 1);
    });

    const u32 stage = staging + warp * kStaging;
    const int row = kSize < 64 ? row16 % kSize : 64 * head.z + row16;  // of a block
#pragma unroll
    for (int p = 0; p < kEach; ++p) {
        if (p >= count) break;
        const int to = __shfl_sync(~0u, place.x, p), mask = __shfl_sync(~0u, place.y, p);
        if (to < 0) continue;
        float (&sums)[kWide / 2] = reinterpret_cast<float(&)[kWide / 2]>(acc[kWide / 2 * p]);
        if (mask >= 0) {
            const int half = kSize > 64 ? columns[first + p] / 64 % (kSize / 64) : 0;
            const u8 *bits = masks + (static_cast<i64>(mask) * kSize + row + lane / 4) * (kSize / 8) + 8 * half;
            const bits_t low = *reinterpret_cast<const bits_t *>(bits), high = *reinterpret_cast<const bits_t *>(bits + kSize);
#pragma unroll
            for (int at = 0; at < kWide / 2; ++at) {
                const u32 live = static_cast<u32>((at & 2 ? high : low) >> (at / 4 * 8 + 2 * (lane % 4)));
                sums[at] = live >> (at % 2) & 1 ? sums[at] : 0.f;
            }
        }
        operand_t *out = values + matrix * slots + static_cast<i64>(to) * 64;
        store_panel<kWide>(sums, scale, stage, out, row16);
    }
}

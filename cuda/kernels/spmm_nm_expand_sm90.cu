// spmm_nm_expand_sm90: out = x S for rows of tokens x, S 2:4 or 1:2 of halves: the gradient of a layer's input.
//
// Not sparse along what is summed, so sparse tensor cores cannot take it. A CTA takes 128 columns of S and kWide tokens.
// Teams of warps write S as dense tiles into shared memory, 64 rows at a time, which no global memory ever holds.
//
//   x         (1, T, rows)      by a 4-D tensor map (rows, T, 1, 1) in boxes of 64 × kWide
//   values    (lines, packed)   one matrix; what lies beyond rows may hold anything
//   metadata  (packed / 16, lines / 32, 8 g, 2 a, 2 d) words: of rows 16 a + g in the low half and 16 a + g + 8 in the
//             high half, of each group of 4 columns a nibble: two columns (formats/nm_metadata.py)
//   out       (T, columns)      columns % 8 == 0
//
//   grid   (tiles of 128 columns, tiles of kWide tokens)
//   block  2 warpgroups of consumers, 64 columns each, and kTeams teams of kMembers warps that produce
//   smem   kStages of 64 rows of S and of x; results leave through them
//   floor  2 · rows · columns · T FLOP at 800 TFLOP/s; shared memory: 32 KiB + 384 · kWide bytes a stage, of 128 a clock
//   needs  sm_90a, rows of tokens at multiples of 16 bytes
#include "types.cuh"
#include "nm_spread.cuh"
#include "ring.cuh"
#include "token_rows.cuh"

constexpr int kWide = MG_WIDE, kStages = MG_STAGES, kTeams = 4;
static_assert(kWide == 64 || kWide == 128 || kWide == 256, "WIDE must be 64, 128 or 256");
static_assert(kStages >= kTeams, "a team waits for no round but its own");
constexpr int kMembers = kWide == 256 ? 1 : 2;  // for 256 tokens consumers need the registers
constexpr int kConsumers = 256, kItems = 16 / kMembers;  // rows of a thread of a team, in a stage
using Pool = Registers<384, 136, 184>;
constexpr u32 kPanel = 64 * 128, kLeft = 2 * kPanel, kStage = kLeft + kWide * 128;

extern "C" __global__ void __launch_bounds__(kConsumers + 32 * kTeams * kMembers, 1)
    spmm_nm_expand_sm90(const __grid_constant__ TensorMap x_map, const operand_t *__restrict__ values,
                        const u32 *__restrict__ metadata, operand_t *__restrict__ out, int tokens, int rows, int columns,
                        int lines, int packed) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const int column0 = blockIdx.x * 128, token = blockIdx.y * kWide, steps = (rows + 63) / 64;

    if (threadIdx.x == kConsumers) tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, 1 + kMembers), barrier_init(empty + 8 * s, kConsumers / 32);
        barrier_init_fence();
    }
    __syncthreads();

    if (warp >= kConsumers / 32) {  // producers
        if constexpr (kWide == 256) Pool::give();
        const int team = (warp - kConsumers / 32) / kMembers, member = warp % kMembers;
        // A row's 128 columns are 128 bytes of values, a line that eight lanes share. Eight lanes that store together have
        // four sixteenths of two rows: all chunks of the swizzle.
        const int part = lane % 4 + lane / 8 % 2 * 4, below = lane / 4 % 2 + lane / 16 * 2;
        auto row_of = [&](int i) { return member * 32 + 4 * i + below; };
        u32 words[kItems / 2];
        uint4 held[kItems];
        const bool live = part / 2 < (2 * packed - column0) / 32;
        const u32 *const lowest = metadata + (column0 / 32 + part / 2) * static_cast<i64>(lines) + member * 32 + 4 * below + part % 2;
        const operand_t *const first = values + static_cast<i64>(row_of(0)) * packed + column0 / 2 + 8 * part;
        auto ask = [&](int n) {  // for a stage
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int line = 64 * n + row_of(i);
                const bool there = live && line < lines;
                // One word is of this row and of that 8 below, which is the item after the next.
                if (i / 2 % 2 == 0) {
                    const u32 *const from = lowest + 64 * n + i / 8 * 32 + i % 2 * 16 + i / 4 % 2 * 2;
                    words[i / 4 * 2 + i % 2] = there ? __ldg(from) : 0u;
                }
                held[i] = uint4{0u, 0u, 0u, 0u};  // dead rows become zeros
                if (there && line < rows)
                    held[i] = __ldg(reinterpret_cast<const uint4 *>(first + (64 * n + 4 * i) * static_cast<i64>(packed)));
            }
        };
        if (team < steps) ask(team);
        for (int n = team; n < steps; n += kTeams) {
            const int stage = n % kStages;
            const u32 to = ring + stage * kStage, done = full + 8 * stage;
            barrier_wait(empty + 8 * stage, n / kStages % 2 ^ 1);
            if (member == 0 && lane == 0) {
                barrier_expect(done, kWide * 128);
                tma_load(to + kLeft, x_map, done, 64 * n, token, 0, 0);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                u32 w[8];
                spread(held[i], kinds(words[i / 4 * 2 + i % 2]) >> (i / 2 % 2 * 16), w);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const u32 at = swizzled(to + part / 4 * kPanel, row_of(i), part % 4 * 2 + h);
                    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[4 * h]), "r"(w[4 * h + 1]),
                                 "r"(w[4 * h + 2]), "r"(w[4 * h + 3])
                                 : "memory");
                }
            }
            proxy_fence();
            __syncwarp();
            if (lane == 0) barrier_arrive(done);
            if (n + kTeams < steps) ask(n + kTeams);
        }
        return;
    }

    if constexpr (kWide == 256) Pool::take();
    float acc[kWide / 2];
#pragma unroll
    for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
    const int group = warp / 4;
    const u64 left = wgmma_descriptor(ring + group * kPanel, kPanel), right = wgmma_rows<128>(ring + kLeft);
    multiply_ring<kStages>(steps, full, empty, lane, [&](int stage) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            Wgmma<kWide>::template ss<1, 0>(acc, left + ((stage * kStage + k * 2048) >> 4),
                                            right + ((stage * kStage + k * 32) >> 4), 1);
    });
    // Through what a warpgroup alone has read of S.
    store_turned<kWide>(acc, 1.f, nullptr, ring + group * kPanel, out, column0 + 64 * group, columns, token, tokens);
}

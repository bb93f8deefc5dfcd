// spmm_nm_thin_sm90: a few columns of x times an N:M matrix of 2:4 or 1:2, as fast as its bytes come.
//
//   out       (M, N, pitch), pitch >= rows; M = F · E matrices
//   values    (M, padded rows, packed columns) by a 3-D map, boxes of kRows × 64 · kDepth bytes
//   metadata  (E, lines, stored) int32: hardware order as it lies (include/nm_left.cuh)
//   x         (inner, N, E, F) by a 4-D map, inner contiguous, boxes of 128 bytes × WIDE
//   bias      (rows) or none
//
//   grid   (SPLIT · row tiles, column tiles · matrices) in clusters of SPLIT, which cut the inner dimension between them
//   block  128 · GROUPS consumers, 64 rows each, and a producer warp
//   smem   kStages of x, values and metadata of 128 columns (64 floats); then the sums
//   floor  values and metadata once, at 4.24 TB/s. They are marked to leave L2 first: what else is there, dirty
//          perhaps, would have to be written back to make room for bytes that nobody reads twice
//   needs  sm_90a, rows of x at 16-byte multiples, no run-time mask
//
// The sums of a cluster's CTAs are added in the order of the inner dimension: the same bits every time.
#include "types.cuh"
#include "activation.cuh"
#include "cluster.cuh"
#include "nm_words.cuh"
#include "wgmma.cuh"
#include "wgmma_sparse.cuh"

constexpr int kGroups = MG_GROUPS, kWide = MG_WIDE, kStages = MG_STAGES, kSplit = MG_SPLIT;
static_assert(kWide == 8 || kWide == 16 || kWide == 32 || kWide == 64 || kWide == 128, "WIDE must be 8, 16, 32, 64 or 128");
static_assert(kSplit == 1 || kSplit == 2 || kSplit == 4, "SPLIT must be 1, 2 or 4");
constexpr int kRows = 64 * kGroups, kConsumers = 128 * kGroups, kSums = kWide / 2, kShare = kSums / kSplit;
constexpr u32 kSpan = kWide * 128, kRight = kDepth * kSpan, kValueBytes = kRows * 64 * kDepth;
constexpr u32 kWords = kRows * 8 * kDepth, kStage = (kRight + kValueBytes + kWords + 1023) / 1024 * 1024;
static_assert(kSums * kConsumers * 4 <= kStages * kStage, "STAGES: the sums take the ring's place");

extern "C" __global__ void
#if MG_SPLIT > 1
__cluster_dims__(MG_SPLIT, 1, 1)
#endif
__launch_bounds__(kConsumers + 32)
    spmm_nm_thin_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                      const u32 *__restrict__ metadata, int stored, int lines, operand_t *__restrict__ out,
                      const operand_t *__restrict__ bias, int across, int entries, int rows,
                      int pitch, int inner, int width, float scale) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages + 1];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages, sent = empty + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const int rank = blockIdx.x % kSplit, row = blockIdx.x / kSplit * kRows;
    const int matrix = blockIdx.y / across, column = blockIdx.y % across * kWide;
    const int steps = (inner + kColumns - 1) / kColumns;
    const int first = steps * rank / kSplit, last = steps * (rank + 1) / kSplit;

    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kConsumers / 32);
        if (kSplit > 1) barrier_init(sent, 1);
        barrier_init_fence();
        if (kSplit > 1) barrier_expect(sent, 4 * kSums * kConsumers);
    }
    __syncthreads();

    float acc[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = 0.f;
    int stage = 0;
    if (warp == kConsumers / 32) {  // producer
        if (lane == 0) {
            u32 parity = 1;
            const u64 policy = across == 1 ? evict_first() : evict_normal();
            const Words words{metadata + static_cast<i64>(matrix % entries) * lines * stored, stored, lines};
            for (int i = first; i < last; ++i) {
                const u32 to = ring + stage * kStage, done = full + 8 * stage;
                barrier_wait(empty + 8 * stage, parity);
                barrier_expect(done, kRight + kValueBytes + words.bytes<kRows>(row, i * kSteps));
                tma_stream(to + kRight, values_map, done, i * kColumns / 2, row, matrix, policy);
                words.bring<kRows>(to + kRight + kValueBytes, done, row, i * kSteps, policy);
#pragma unroll
                for (int p = 0; p < kDepth; ++p)
                    tma_load(to + p * kSpan, x_map, done, i * kColumns + p * (kColumns / kDepth), column, matrix % entries,
                             matrix / entries);
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
        __syncwarp();
    } else {
        const LeftPlaces places = LeftPlaces::of<kRows>(16 * warp, kRight, kRight + kValueBytes);
        u32 parity = 0;
#pragma unroll 1
        for (int i = first; i < last; ++i) {
            const u32 at = ring + stage * kStage;
            Left left;
            barrier_wait(full + 8 * stage, parity);
            load_left<kRows>(left, places, at);
            if ((i + 1) * kColumns > inner) cut_left<kRows>(left, places, at, inner - i * kColumns);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < kSteps; s += 2) {
                const u32 from = at + s / 2 * kSpan;
                SparseWgmma<kWide>::template rs<0, 0>(acc, left.a[s], wgmma_descriptor(from, kSpan), left.metadata[s / 2]);
                SparseWgmma<kWide>::template rs<1, 0>(acc, left.a[s + 1], wgmma_descriptor(from + 64, kSpan),
                                                      left.metadata[s / 2]);
            }
            wgmma_commit();
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
    }

    if constexpr (kSplit > 1) {
        // Each CTA adds its share of the registers of all; what they send takes the ring's place.
        cluster_here();
        cluster_wait();  // nobody reads a ring any more
        if (warp < kConsumers / 32) {
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                cluster_send(cluster_address(ring + 4 * ((rank * kShare + i % kShare) * kConsumers + threadIdx.x), i / kShare),
                             cluster_address(sent, i / kShare), acc[i]);
            barrier_wait(sent, 0);
            const float *sums = reinterpret_cast<const float *>(raw + (ring - shared_address(raw))) + threadIdx.x;
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                if (i / kShare != rank) continue;
                acc[i] = 0.f;
#pragma unroll
                for (int r = 0; r < kSplit; ++r) acc[i] += sums[(r * kShare + i % kShare) * kConsumers];
            }
        }
    }
    if (warp == kConsumers / 32) return;
    operand_t *to = out + static_cast<i64>(matrix) * pitch * width;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        const int token = column + i / 4 * 8 + lane % 4 * 2 + i % 2, r = row + 16 * warp + lane / 4 + i / 2 % 2 * 8;
        if (i / kShare == rank && token < width && r < rows)
            to[static_cast<i64>(token) * pitch + r] =
                from_float<operand_t>(activated(fmaf(acc[i], scale, bias ? to_float(bias[r]) : 0.f)));
    }
}

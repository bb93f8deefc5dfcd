// spmm_nm_sm90: out = scale · S x, S of 2:4 or 1:2, on wgmma.sp and TMA; linear as act(x Sᵀ + bias).
//
//   out       (M, rows, N), N % 8 == 0, or, TURNED, (M, N, pitch), pitch % 8 == 0; M = F · E matrices
//   values    (M, padded rows, packed columns) by a 3-D map, boxes of kRows × 64 · kDepth bytes
//   metadata  (E, lines, stored) int32: hardware order as it lies (include/nm_left.cuh)
//   x         by a 4-D map (.., .., E, F): MAJOR 0: (inner, N) with inner contiguous, boxes of 128 bytes ×
//             kWide / kCluster; MAJOR 1 (halves only): (N, inner), boxes of 64 columns × kColumns
//   bias      (rows) or none; TURNED only
//
//   grid   CTAs in clusters that walk tiles of kCluster · kRows × kWide; a cluster shares x by multicast
//   block  128 · GROUPS consumers, 64 rows each, and a producer warpgroup
//   smem   kStages of x, values and metadata of 64 columns (32 floats); TURNED: results on their way out
//   floor  2 · rows · inner · N FLOP at 1720 TFLOP/s; by shared memory 1.75 times that at 128 × 256: products
//          at full rate read x at 128 B/clk, and what TMA writes and ldmatrix reads comes on top
//   needs  sm_90a, rows of x at 16-byte multiples, no run-time mask
//
// Unchosen elements of x are never multiplied; slots past the last column are zeroed whatever they hold.
#include "types.cuh"
#include "activation.cuh"
#include "cluster.cuh"
#include "nm_words.cuh"
#include "registers.cuh"
#include "wgmma.cuh"
#include "wgmma_sparse.cuh"
#include "result.cuh"

constexpr int kGroups = MG_GROUPS, kWide = MG_WIDE, kStages = MG_STAGES, kCluster = MG_CLUSTER;
constexpr bool kMajor = MG_MAJOR, kTurned = MG_TURNED, kPartial = MG_PARTIAL;
static_assert(kTurned || !kActivation, "ACTIVATION: TURNED only");
static_assert(kWide == 64 || kWide == 128 || (kWide == 256 && kGroups == 2), "WIDE: 64, 128, or 256 of 2 groups");
static_assert(kCluster == 1 || (kCluster == 2 && kWide >= 128), "CLUSTER must be 1, or 2 with WIDE >= 128");
static_assert(!kMajor || sizeof(operand_t) == 2, "MAJOR 1 is for 16-bit operands");
constexpr int kRows = 64 * kGroups, kConsumers = 128 * kGroups;
constexpr u32 kSpan = kMajor ? kColumns * 128 : kWide * 128;  // a panel: 64 columns of N, or 128 bytes of inner
constexpr int kPanels = kMajor ? kWide / 64 : kDepth;
constexpr u32 kRight = kPanels * kSpan, kValueBytes = kRows * 64 * kDepth, kWords = kRows * 8 * kDepth;
constexpr u32 kStage = (kRight + kValueBytes + kWords + 1023) / 1024 * 1024;
constexpr int kPass = 64;                                     // of N, that a staged store takes
constexpr u32 kStaged = kPass * 128;                          // of a warpgroup
constexpr bool kUneven = kWide == 256;
using Pool = Registers<kConsumers + 128, 56, 224>;         // if kUneven
constexpr bool kFloat = kPartial || sizeof(operand_t) == 4;

// Which tile is the n-th: bands of `band` row tiles go through all columns, so that L2 holds what they share.
struct Tiles {
    int down, across, band;

    __device__ __forceinline__ void at(int n, int &matrix, int &row, int &column) const {
        matrix = n / (down * across);
        n -= matrix * down * across;
        const int first = n / (band * across) * band, high = min(band, down - first);
        n -= first * across;
        column = n / high;
        row = first + n - column * high;
    }
};

__device__ __forceinline__ void stmatrix4_turned(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

extern "C" __global__ void
#if MG_CLUSTER > 1
__cluster_dims__(MG_CLUSTER, 1, 1)
#endif
__launch_bounds__(kConsumers + 128, 1)
    spmm_nm_sm90(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap x_map,
                 const __grid_constant__ TensorMap out_map, const u32 *__restrict__ metadata, int stored, int lines,
                 void *__restrict__ out, const operand_t *__restrict__ bias, int count, int down, int across, int band,
                 int entries, int rows, int pitch, int inner, int width, float scale) {
    extern __shared__ u8 raw[];
    const u32 ring = (shared_address(raw) + 1023) & ~1023u;
    __shared__ alignas(8) u64 barriers[2 * kStages];
    const u32 full = shared_address(barriers), empty = full + 8 * kStages;
    const int warp = uniform_warp(), lane = threadIdx.x % 32;
    const u32 rank = kCluster > 1 ? cluster_rank() : 0;
    const Tiles tiles{down, across, band};
    const int steps = (inner + kColumns - 1) / kColumns;

    if (threadIdx.x == kConsumers) tma_prefetch(values_map), tma_prefetch(x_map);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s)
            barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kCluster * kConsumers / 32);
        barrier_init_fence();
    }
    if constexpr (kCluster > 1) cluster_sync();
    else __syncthreads();

    int matrix, row_tile, column_tile, stage = 0;

    if (warp >= kConsumers / 32) {  // producer
        if constexpr (kUneven) Pool::give();
        if (threadIdx.x == kConsumers) {
            u32 parity = 1;
            for (int n = blockIdx.x / kCluster; n < count; n += gridDim.x / kCluster) {
                tiles.at(n, matrix, row_tile, column_tile);
                const int row = (row_tile * kCluster + int(rank)) * kRows, column = column_tile * kWide;
                const int free = matrix / entries, entry = matrix % entries;
                const Words words{metadata + static_cast<i64>(entry) * lines * stored, stored, lines};
                for (int i = 0; i < steps; ++i) {
                    const u32 to = ring + stage * kStage, done = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(done, kRight + kValueBytes + words.bytes<kRows>(row, i * kSteps));
                    tma_load(to + kRight, values_map, done, i * kColumns / 2, row, matrix);
                    words.bring<kRows>(to + kRight + kValueBytes, done, row, i * kSteps, evict_normal());
                    constexpr int kShare = kWide / kCluster;  // this CTA brings its share to all
#pragma unroll
                    for (int p = 0; p < kPanels / (kMajor ? kCluster : 1); ++p) {
                        if constexpr (kMajor) {
                            const int panel = int(rank) * (kShare / 64) + p;
                            if constexpr (kCluster > 1)
                                tma_multicast(to + panel * kSpan, x_map, done, 3, column + 64 * panel, i * kColumns,
                                              entry, free);
                            else
                                tma_load(to + panel * kSpan, x_map, done, column + 64 * panel, i * kColumns, entry, free);
                        } else {
                            const int first = int(rank) * kShare, at = i * kColumns + p * (kColumns / kDepth);
                            if constexpr (kCluster > 1)
                                tma_multicast(to + p * kSpan + first * 128, x_map, done, 3, at, column + first, entry, free);
                            else
                                tma_load(to + p * kSpan, x_map, done, at, column, entry, free);
                        }
                    }
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        }
        // Its shared memory is written by the other CTA as long as that one works.
        if constexpr (kCluster > 1) {
            __syncwarp();
            cluster_sync();
        }
        return;
    }

    if constexpr (kUneven) Pool::take();
    const int group = warp / 4;
    const LeftPlaces places = LeftPlaces::of<kRows>(16 * warp, kRight, kRight + kValueBytes);
    u32 parity = 0;

    for (int n = blockIdx.x / kCluster; n < count; n += gridDim.x / kCluster) {
        float acc[kWide / 2];
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) acc[i] = 0.f;
#pragma unroll 1
        for (int i = 0; i < steps; ++i) {
            const u32 at = ring + stage * kStage, held = empty + 8 * stage;
            // Not ahead of the product in flight: the compiler takes its operands' registers for free. The
            // other warpgroup's product fills the gap.
            Left left;
            barrier_wait(full + 8 * stage, parity);
            load_left<kRows>(left, places, at);
            if ((i + 1) * kColumns > inner) cut_left<kRows>(left, places, at, inner - i * kColumns);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < kSteps; s += 2) {
                // 64 bytes of the contiguous inner dimension, or 32 rows.
                const u32 from = kMajor ? at + s * 4096 : at + s / 2 * kSpan;
                SparseWgmma<kWide>::template rs<0, kMajor>(acc, left.a[s], wgmma_descriptor(from, kSpan),
                                                           left.metadata[s / 2]);
                SparseWgmma<kWide>::template rs<1, kMajor>(acc, left.a[s + 1],
                                                           wgmma_descriptor(from + (kMajor ? 4096 : 64), kSpan),
                                                           left.metadata[s / 2]);
            }
            wgmma_commit();
            wgmma_wait<0>();
            if constexpr (kCluster > 1) {
                if (lane < kCluster) cluster_arrive(cluster_address(held, lane));
            } else if (lane == 0) {
                barrier_arrive(held);
            }
            if (++stage == kStages) stage = 0, parity ^= 1;
        }

        tiles.at(n, matrix, row_tile, column_tile);
        const int row = (row_tile * kCluster + int(rank)) * kRows + 64 * group, column = column_tile * kWide;
        if constexpr (!kTurned) {
            const i64 plane = static_cast<i64>(matrix) * rows * width;
            void *to = kFloat ? static_cast<void *>(static_cast<float *>(out) + plane)
                              : static_cast<void *>(static_cast<operand_t *>(out) + plane);
            store_result<kWide, kFloat>(acc, scale, to, row + warp % 4 * 16 + lane / 4, rows, column, width, false);
        } else {
            const int mine = row + warp % 4 * 16 + lane / 4;
            const float low = bias && mine < rows ? to_float(bias[mine]) : 0.f;
            const float high = bias && mine + 8 < rows ? to_float(bias[mine + 8]) : 0.f;
            if constexpr (kFloat) {
                float *to = static_cast<float *>(out) + static_cast<i64>(matrix) * pitch * width;
#pragma unroll
                for (int k = 0; k < kWide / 2; ++k) {
                    const int token = column + k / 4 * 8 + lane % 4 * 2 + k % 2, r = mine + k / 2 % 2 * 8;
                    if (token < width && r < rows)
                        to[static_cast<i64>(token) * pitch + r] = activated(fmaf(acc[k], scale, k / 2 % 2 ? high : low));
                }
            } else {
                const u32 staged = ring + kStages * kStage + group * kStaged;
                const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
                for (int pass = 0; pass < kWide / kPass; ++pass) {
                    if (leader) tma_store_wait_read<0>();
                    named_barrier(1 + group, 128);
#pragma unroll
                    for (int j = pass * 8; j < pass * 8 + 8; j += 2) {
                        u32 v[4];
#pragma unroll
                        for (int h = 0; h < 4; ++h) {  // columns 8 (j + h / 2), rows + 8 (h % 2)
                            const float *d = acc + 4 * (j + h / 2) + 2 * (h % 2);
                            const float plus = h % 2 ? high : low;
                            v[h] = pack2<operand_t>(activated(fmaf(d[0], scale, plus)), activated(fmaf(d[1], scale, plus)));
                        }
                        // Eight rows of the result, one column of ours each, to 16 bytes side by side.
                        const int token = 8 * (j - pass * 8 + lane / 16) + lane % 8;
                        stmatrix4_turned(swizzled(staged, token, warp % 4 * 2 + lane / 8 % 2), v[0], v[1], v[2], v[3]);
                    }
                    proxy_fence();
                    named_barrier(1 + group, 128);
                    if (leader && row < rows && column + pass * kPass < width) {
                        tma_store(out_map, staged, row, column + pass * kPass, matrix);
                        tma_store_commit();
                    }
                }
            }
        }
    }
    if constexpr (kTurned && !kFloat)
        if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
    if constexpr (kCluster > 1) cluster_sync();
}

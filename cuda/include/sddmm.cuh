#pragma once
// The body of sddmm kernels: scale * Q K^T of kRows rows and up to 256 columns, in groups of 64.
//
// What the rows and columns are, which elements live and where they are stored is the kernel's
// affair: it hands over two lists of row numbers (negative: dead) and a Place:
//     u32 live<kWidth>(int row, int column)   bits of elements column … column + kWidth - 1
//     out_t *at(int row, int column)          where 16 bytes of results go, or nullptr
// and a Store, by default one that writes every element.
//
// 16-bit operands of D <= 128 (kHold): Q's fragments stay in registers, K comes through a ring of
// stages of 64 rows x D. Otherwise both come in steps of kDepth columns of D.
#include "tiles.cuh"

constexpr int kColumns = 256, kGroup = 64;

#ifdef MG_DIM
constexpr int kDim = MG_DIM;  // D rounded up to 16, or 0: not held, any D
#else
constexpr int kDim = 0;
#endif
static_assert(kDim % 16 == 0 && kDim <= 128, "DIM: a multiple of 16 up to 128, or 0");
static_assert(kDim == 0 || kDtype != 2, "DIM: float32 operands are not held");

// Shared memory, in bytes. primitives/cuda/parts.py computes the same sums.
template <int kRows> struct SddmmShared {
    static constexpr bool kHold = kDim > 0;
    static constexpr int kWidth = kHold ? kDim : kDepth;  // columns of D in one stage
    static constexpr int kPitch = kWidth + kPad;
    static constexpr int kStages = kHold && kDim > 64 ? 2 : 3;
    static constexpr int kRight = kGroup * kPitch;
    static constexpr int kLeft = kRows * kPitch;
    static constexpr int kStage = kRight + (kHold ? 0 : kLeft);  // elements

    using Split = Warps<kRows, kGroup>;
    static constexpr int kOutPitch = Split::kN + 16 / int(sizeof(out_t));
    static constexpr int kOutWarp = Split::kM * kOutPitch * int(sizeof(out_t));

    static constexpr int kListBytes = (kRows + kColumns) * 4;
    static constexpr int kStageBytes = kStages * kStage * int(sizeof(operand_t));
    static constexpr int kOutBytes = kThreads / 32 * kOutWarp;
    static constexpr int kQBytes = kHold ? kLeft * int(sizeof(operand_t)) : 0;
    // Q is in registers before the first result is staged, so both take the same place.
    static constexpr int kLastBytes = kOutBytes > kQBytes ? kOutBytes : kQBytes;
    static constexpr int kBytes = kListBytes + kStageBytes + kLastBytes;
#ifdef MG_SHARED
    static_assert(kBytes == MG_SHARED, "SHARED: what the host reserves is not what is laid out");
#endif
};

// Results of one warp's tile: scaled, dead ones zero, through shared memory to 16-byte stores.
struct StoreAll {
    template <int kRows, class Place>
    __device__ __forceinline__ static void store(
        const float (&acc)[Warps<kRows, kGroup>::kM / 16][Warps<kRows, kGroup>::kN / 8][4], u8 *raw,
        const int *rows, const int *columns, int row0, int column0, float scale, const Place &place) {
        using Shared = SddmmShared<kRows>;
        using Split = Warps<kRows, kGroup>;
        constexpr int kPitch = Shared::kOutPitch, kVec = 16 / int(sizeof(out_t));
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        out_t *stage = reinterpret_cast<out_t *>(raw);
        const u32 live_columns =
            __ballot_sync(~0u, lane < Split::kN && columns[column0 + lane % Split::kN] >= 0);
#pragma unroll
        for (int i = 0; i < Split::kM / 16; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * i + 8 * h + g;
                u32 live = rows[row0 + row] < 0 ? 0u : live_columns;
                if (live) live &= place.template live<Split::kN>(row0 + row, column0);
#pragma unroll
                for (int j = 0; j < Split::kN / 8; ++j) {
                    const u32 bits = live >> (8 * j + 2 * t);
                    const float low = bits & 1 ? acc[i][j][2 * h] * scale : 0.0f;
                    const float high = bits & 2 ? acc[i][j][2 * h + 1] * scale : 0.0f;
                    store_pair(stage + row * kPitch + 8 * j + 2 * t, low, high);
                }
            }
        __syncwarp();
        constexpr int kPerRow = Split::kN / kVec, kStores = Split::kM * kPerRow;
#pragma unroll
        for (int base = 0; base < kStores; base += 32) {
            const int row = (base + lane) / kPerRow, column = (base + lane) % kPerRow * kVec;
            out_t *to = place.at(row0 + row, column0 + column);
            if (to) store16(to, load16(stage + row * kPitch + column));
        }
        __syncwarp();
    }
};

template <int kRows, class Store = StoreAll, class Place>
__device__ __forceinline__ void sddmm_tiles(u8 *shared, int groups, const operand_t *q, i64 q_row,
                                            const operand_t *k, i64 k_row, int width, float scale,
                                            const Place &place) {
    using Shared = SddmmShared<kRows>;
    using Split = typename Shared::Split;
    constexpr int kStages = Shared::kStages, kPitch = Shared::kPitch, kI = Split::kM / 16;
    constexpr bool kHold = Shared::kHold;
    const int *rows = reinterpret_cast<const int *>(shared), *columns = rows + kRows;
    operand_t *stages = reinterpret_cast<operand_t *>(shared + Shared::kListBytes);
    u8 *last = shared + Shared::kListBytes + Shared::kStageBytes;
    const int warp = threadIdx.x / 32;
    const int row0 = warp / Split::kAcross * Split::kM, n0 = warp % Split::kAcross * Split::kN;
    u8 *staging = last + warp * Shared::kOutWarp;

    const int depth = kHold ? 1 : (width + kDepth - 1) / kDepth;  // steps for one group
    const int steps = groups * depth;
    auto issue = [&](int step) {
        if (step < steps) {
            const int group = kHold ? step : step / depth;
            const int from = kHold ? 0 : step % depth * kDepth;
            operand_t *stage = stages + step % kStages * Shared::kStage;
            load_rows<kGroup, Shared::kWidth, kPitch>(stage, columns + group * kGroup, k, k_row,
                                                      from, width);
            if constexpr (!kHold)
                load_rows<kRows, Shared::kWidth, kPitch>(stage + Shared::kRight, rows, q, q_row,
                                                         from, width);
        }
        copy_commit();
    };

    u32 held[kI][kHold ? kDim / 16 : 1][4];
    if constexpr (kHold) {
        load_rows<kRows, kDim, kPitch>(reinterpret_cast<operand_t *>(last), rows, q, q_row, 0,
                                       width);
        copy_commit();
    }
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) issue(s);
    if constexpr (kHold) {
        copy_wait<kStages - 1>();
        __syncthreads();
        const operand_t *left = reinterpret_cast<const operand_t *>(last) + row0 * kPitch;
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int k16 = 0; k16 < kDim / 16; ++k16)
                load_left<false>(held[i][k16], left, kPitch, 16 * i, 16 * k16);
    }

    float acc[kI][Split::kN / 8][4];
    clear(acc);
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();
        issue(step + kStages - 1);
        const operand_t *stage = stages + step % kStages * Shared::kStage;
        const operand_t *right = stage + n0 * kPitch;
        if constexpr (kHold) {
#pragma unroll
            for (int k16 = 0; k16 < kDim / 16; ++k16) {
                u32 a[kI][4];
#pragma unroll
                for (int i = 0; i < kI; ++i)
#pragma unroll
                    for (int c = 0; c < 4; ++c) a[i][c] = held[i][k16][c];
                mma_step<false>(acc, a, right, kPitch, 16 * k16);
            }
        } else {
            product<false, false, kDepth>(acc, stage + Shared::kRight + row0 * kPitch, kPitch,
                                          right, kPitch);
        }
        if (kHold || step % depth == depth - 1) {
            const int column0 = (kHold ? step : step / depth) * kGroup + n0;
            Store::template store<kRows>(acc, staging, rows, columns, row0, column0, scale, place);
            clear(acc);
        }
    }
}

// spmm_nm.cu: an N:M matrix of 2:4 or 1:2 times a dense one on mma.sp; linear as act(x Sᵀ + bias).
//
//   tensors   values (F, E · stored · packed); metadata (E, lines, stored) int32, hardware order (nm_left.cuh)
//             x (F, E, inner, N) with N contiguous (MAJOR 1) or inner (MAJOR 0)
//             out (F, E, rows, N), N % 8 == 0, or, TURNED, (F, E, N, pitch); bias (rows) or none, TURNED only
//   grid      (row tiles, column tiles, matrices); a CTA: ROWS x WIDE of the result
//   block     a warp for every 32 x 64 (WIDE 128) or 16 x WIDE of it
//   smem      3 stages of 128 bytes of dense rows: values, metadata and x, at most 90 KiB
//   registers accumulators at most 64
//   floor     nnz · 2 · N FLOP at the rate of mma.sp (763 TFLOP/s of both halves' worth on an H200)
//   needs     sm_80; values' rows, metadata and lines of x 16-byte aligned; no run-time mask
//
// Halves, or float32 as TF32. Unchosen elements of x are never multiplied; slots past the last column are
// zeroed whatever they hold.
#include "types.cuh"
#include "activation.cuh"
#include "copy.cuh"
#include "mma_sparse.cuh"
#define MG_DEPTH 1
#include "nm_left.cuh"

constexpr bool kMajor = MG_MAJOR, kTurned = MG_TURNED;
static_assert(kTurned || !kActivation, "ACTIVATION: TURNED only");
constexpr int kRows = MG_ROWS, kWide = MG_WIDE, kStages = 3;
static_assert(kRows == 64 || kRows == 128, "ROWS must be 64 or 128");
static_assert(kWide == 16 || kWide == 64 || kWide == 128, "WIDE must be 16, 64 or 128");
constexpr int kTall = kWide == 128 ? 32 : 16, kBroad = kWide == 128 ? 64 : kWide;  // of a warp
constexpr int kWarpsAcross = kWide / kBroad, kThreads = 32 * (kRows / kTall) * kWarpsAcross;
constexpr int kI = kTall / 16, kJ = kBroad / 8;
constexpr int kSize = int(sizeof(operand_t)), kChunk = 16 / kSize;
constexpr int kLeftPitch = 80;                                          // bytes of a row of 64
constexpr int kRightPitch = (kMajor ? kWide * kSize : 128) + 16;        // bytes
constexpr int kRightLines = kMajor ? kColumns : kWide;
constexpr u32 kLeftBytes = kRows * kLeftPitch, kWordBytes = 2 * kRows * 4;
constexpr u32 kStage = kLeftBytes + kWordBytes + kRightLines * kRightPitch;

extern "C" __global__ void __launch_bounds__(kThreads)
    spmm_nm(out_t *__restrict__ out, const operand_t *__restrict__ values, const u32 *__restrict__ metadata,
            const operand_t *__restrict__ x, i64 x_free, i64 x_entry, i64 x_line, const operand_t *__restrict__ bias,
            int entries, int rows, int pitch, int inner, int width, int stored, int packed, int lines, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    const u32 ring = shared_address(shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int m0 = warp / kWarpsAcross * kTall, n0 = warp % kWarpsAcross * kBroad;
    const int first = blockIdx.x * kRows, from = blockIdx.y * kWide;
    const i64 matrix = blockIdx.z, f = matrix / entries, e = matrix % entries;
    const operand_t *left = values + matrix * stored * packed, *right = x + f * x_free + e * x_entry;
    const u32 *words = metadata + e * lines * stored;
    const int steps = (inner + kColumns - 1) / kColumns;

    auto copy = [&](int step) {
        if (step < steps) {
            u8 *at = shared + step % kStages * kStage;
            for (int i = tid; i < kRows * 4; i += kThreads) {  // values: 64 bytes a row
                const int row = first + i / 4, column = step * (kColumns / 2) + i % 4 * kChunk;
                const bool live = row < stored && column < packed;
                copy_async16(at + i / 4 * kLeftPitch + i % 4 * 16, live ? left + static_cast<i64>(row) * packed + column : left, live);
            }
            for (int i = tid; i < kRows / 2; i += kThreads) {  // metadata: 4 words at a time of 2 lines
                const int line = step * 2 + i / (kRows / 4), row = first + i % (kRows / 4) * 4;
                const bool live = line < lines && row < stored;
                copy_async16(at + kLeftBytes + i * 16, live ? words + static_cast<i64>(line) * stored + row : words, live);
            }
            constexpr int kPer = kMajor ? kWide / kChunk : 8;
            for (int i = tid; i < kRightLines * kPer; i += kThreads) {
                const int line = i / kPer, along = i % kPer * kChunk;
                const int k = step * kColumns + (kMajor ? line : along), n = from + (kMajor ? along : line);
                const bool live = k < inner && n < width;
                const i64 place = kMajor ? k * x_line + n : n * x_line + k;
                copy_async16(at + kLeftBytes + kWordBytes + line * kRightPitch + i % kPer * 16, live ? right + place : right, live);
            }
        }
        copy_commit();
    };

    float acc[kI][kJ][4];
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[i][j][c] = 0.f;
    LeftPlaces places[kI];
#pragma unroll
    for (int i = 0; i < kI; ++i) places[i] = LeftPlaces::of<kRows, kLeftPitch>(m0 + 16 * i, 0, kLeftBytes);

#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) copy(s);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();
        copy(step + kStages - 1);
        const u32 at = ring + step % kStages * kStage, b_at = at + kLeftBytes + kWordBytes;
        // What stands behind the last element of a line of x is not x's: 0 · NaN is NaN.
        const int over = inner - step * kColumns;
        if (!kMajor && over < kColumns && over % kChunk) {
            for (int n = tid; n < kWide; n += kThreads)
                for (int k = over; k % kChunk; ++k)
                    *reinterpret_cast<operand_t *>(shared + (b_at - ring) + n * kRightPitch + k * kSize) = from_float<operand_t>(0.f);
            __syncthreads();
        }
        Left a[kI];
#pragma unroll
        for (int i = 0; i < kI; ++i) {
            load_left<kRows>(a[i], places[i], at);
            if ((step + 1) * kColumns > inner) cut_left<kRows>(a[i], places[i], at, inner - step * kColumns);
            if constexpr (kSize == 4)
#pragma unroll
                for (int s = 0; s < kSteps; ++s)
#pragma unroll
                    for (int c = 0; c < 4; ++c) a[i].a[s][c] = to_tf32(__uint_as_float(a[i].a[s][c]));
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                u32 b[4];
                if constexpr (!kMajor) {  // four chunks of 16 bytes of eight lines
                    load_matrices(b, shared + (b_at - ring) + (n0 + 8 * j + lane % 8) * kRightPitch + s * 64 + lane / 8 * 16);
                } else if constexpr (kSize == 2) {
                    load_matrices_transposed(b, shared + (b_at - ring) + (32 * s + lane) * kRightPitch + (n0 + 8 * j) * 2);
                } else {
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        b[c] = load_word(b_at + (16 * s + 4 * c + t) * kRightPitch + (n0 + 8 * j + g) * 4);
                }
                if constexpr (kSize == 4)
#pragma unroll
                    for (int c = 0; c < 4; ++c) b[c] = to_tf32(__uint_as_float(b[c]));
#pragma unroll
                for (int i = 0; i < kI; ++i) {
                    if (s == 0) mma_sparse<0>(acc[i][j], a[i].a[s], b, a[i].metadata[0]);
                    else mma_sparse<1>(acc[i][j], a[i].a[s], b, a[i].metadata[0]);
                }
            }
    }

    out_t *to = out + matrix * (kTurned ? static_cast<i64>(width) * pitch : static_cast<i64>(rows) * width);
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + m0 + 16 * i + 8 * h + g;
            if (row >= rows) continue;
            const float plus = kTurned && bias ? to_float(bias[row]) : 0.f;
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const int column = from + n0 + 8 * j + 2 * t;
                const float low = fmaf(acc[i][j][2 * h], scale, plus), high = fmaf(acc[i][j][2 * h + 1], scale, plus);
                if constexpr (kTurned) {
                    if (column < width) to[static_cast<i64>(column) * pitch + row] = from_float<out_t>(activated(low));
                    if (column + 1 < width) to[static_cast<i64>(column + 1) * pitch + row] = from_float<out_t>(activated(high));
                } else if (column < width) {
                    store_pair(to + static_cast<i64>(row) * width + column, low, high);
                }
            }
        }
}

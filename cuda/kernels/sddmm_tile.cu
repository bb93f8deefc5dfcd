// sddmm_tile: values of the kept 16 × 16 tiles of scale · Q Kᵀ, in fragment order.
//
// A CTA takes tiles of one region of kSide × kSide of them. Rows of Q and K that the region meets come once,
// kSpan of their D columns at a time; every tile is a warp's, whose accumulators are the tile's values in the
// order they are stored in.
//
//   out     (F, slots)
//   q, k    (F, nq, D), (F, nk, D), columns contiguous; kDeep: rows contiguous instead (a gradient of linear)
//   chunks  (n) int4: first in cells, number of them, region, tile rows in use + 65536 · tile columns in use
//   cells   (tiles) int2: 256 · row + column of the tile inside its region, number of the tile in memory
//
//   grid   (chunks, F)
//   block  kWarps warps of up to kEach tiles
//   smem   kStages of kSpan columns of 32 kSide rows
//   floor  x from shared memory: 1 KB for each tile and 16 columns; L2: 1 KB · kSide for each region and column
//   needs  sm_80, 16-byte aligned rows
#include "types.cuh"
#include "barrier.cuh"
#include "tile.cuh"

constexpr int kSide = MG_SIDE, kWarps = MG_WARPS, kEach = MG_EACH, kSpan = MG_SPAN, kStages = 3;
constexpr bool kDeep = MG_DEEP;
constexpr int kLines = kSide * 16, kWidth = kDeep ? kLines : kSpan, kPitch = kWidth + 8;
constexpr int kOperand = (kDeep ? kSpan : kLines) * kPitch;  // elements of one operand in a stage
static_assert(kSpan % 16 == 0 && kSide <= 16, "SPAN: whole steps of 16; SIDE: at most 16");

extern "C" __global__ void __launch_bounds__(kWarps * 32, 1)
    sddmm_tile(out_t *__restrict__ out, i64 slots, const operand_t *__restrict__ q, i64 q_free, i64 q_line,
               const operand_t *__restrict__ k, i64 k_free, i64 k_line, const int4 *__restrict__ chunks,
               const int2 *__restrict__ cells, int across, int nq, int nk, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    operand_t *stages = reinterpret_cast<operand_t *>(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int4 chunk = __ldg(chunks + blockIdx.x);
    const i64 f = blockIdx.y;
    const int row0 = chunk.z / across * kLines, column0 = chunk.z % across * kLines;
    q += f * q_free, k += f * k_free;

    int2 mine[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e)
        mine[e] = e * kWarps + warp < chunk.y ? __ldg(cells + chunk.x + e * kWarps + warp) : make_int2(-1, 0);

    const int steps = (width + kSpan - 1) / kSpan;
    auto issue = [&](int step) {
        if (step < steps) {
            constexpr int kPerRow = kWidth / 8, kCopies = kOperand / kPitch * kPerRow;
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const operand_t *from = side ? k : q;
                const i64 stride = side ? k_line : q_line;
                const int line0 = side ? column0 : row0, lines = side ? nk : nq, used = chunk.w >> (16 * side);
                const u32 to = shared_address(stages + step % kStages * 2 * kOperand + side * kOperand);
#pragma unroll 4
                for (int i = threadIdx.x; i < kCopies; i += kWarps * 32) {
                    const int row = i / kPerRow, at = i % kPerRow * 8;
                    const int line = kDeep ? at : row, deep = step * kSpan + (kDeep ? row : at);
                    if (!(used >> (line / 16) & 1)) continue;
                    const int left = kDeep ? lines - line0 - line : width - deep;
                    const bool live = left > 0 && (kDeep ? deep < width : line0 + line < lines);
                    const i64 place = kDeep ? deep * stride + line0 + line : (line0 + line) * stride + deep;
                    copy_async_some(to + (row * kPitch + at) * 2, live ? from + place : from, live ? min(16, 2 * left) : 0);
                }
            }
        }
        copy_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) issue(s);

    float acc[kEach][8];
#pragma unroll
    for (int e = 0; e < kEach; ++e)
#pragma unroll
        for (int c = 0; c < 8; ++c) acc[e][c] = 0.f;

    // Where this lane's row of each 8 × 8 matrix of an operand lies.
    const int upper = lane / 16 * 8, middle = lane / 8 % 2 * 8, eighth = lane % 8;
    const int a_lane = kDeep ? (upper + eighth) * kPitch + middle : (middle + eighth) * kPitch + upper;
    const int b_lane = kDeep ? (middle + eighth) * kPitch + upper : (upper + eighth) * kPitch + middle;
    for (int step = 0; step < steps; ++step) {
        copy_wait<kStages - 2>();
        __syncthreads();
        issue(step + kStages - 1);
        const u32 left = shared_address(stages + step % kStages * 2 * kOperand), right = left + 2 * kOperand;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            if (mine[e].x < 0) break;
            const int m = mine[e].x / 256 * 16, n = mine[e].x % 256 * 16;
            const u32 a_at = left + 2 * (m * (kDeep ? 1 : kPitch) + a_lane), b_at = right + 2 * (n * (kDeep ? 1 : kPitch) + b_lane);
#pragma unroll 2
            for (int d = 0; d < kSpan; d += 16) {
                u32 a[4], b[4];
                matrices<kDeep>(a, a_at + 2 * d * (kDeep ? kPitch : 1));
                matrices<kDeep>(b, b_at + 2 * d * (kDeep ? kPitch : 1));
                mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc[e]), a, b[0], b[1]);
                mma_16x8x16<operand_t>(*reinterpret_cast<float(*)[4]>(acc[e] + 4), a, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        if (mine[e].x < 0) break;
        const int row = row0 + mine[e].x / 256 * 16 + g, column = column0 + mine[e].x % 256 * 16 + 2 * t;
        out_t *to = out + f * slots + static_cast<i64>(mine[e].y) * 256 + lane * 8;
        Vec<out_t> v[8 / Vec<out_t>::kCount];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const bool live = row + c / 2 % 2 * 8 < nq && column + c / 4 * 8 + c % 2 < nk;
            v[c / Vec<out_t>::kCount].at[c % Vec<out_t>::kCount] = from_float<out_t>(live ? acc[e][c] * scale : 0.f);
        }
#pragma unroll
        for (int c = 0; c < 8 / Vec<out_t>::kCount; ++c) store16(to + c * Vec<out_t>::kCount, v[c]);
    }
}

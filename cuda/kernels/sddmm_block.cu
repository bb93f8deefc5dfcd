// sddmm_block.cu: values of the kept blocks of a BlockLayout, scale * Q K^T at every slot.
//
//   tensors   q (F, E, nq, D), k (F, E, nk, D), any strides but the last; out (F, slots)
//             items (NBE) int4: entry, block row, block column, mask      plans/cuda_block.py
//             chunks (C) int2: first item and items, at most 256 columns of one block row
//             masks (M, S, S / 8); keep bool (F, E, nk) or (F, E, nq), any strides
//   grid      (C * max(S / 64, 1), F)      a CTA: min(S, 64) rows of one chunk
//   block     128 threads: 2 x 2 warps of 32 x 32 (S >= 64), 1 x 4 of S x 16 below
//   smem      SddmmShared::kBytes: 2 or 3 stages of 64 rows of K, and Q, whose place results take
//   registers accumulators 32, Q fragments D / 2 (S >= 64; less below); at S 64: 72 (D 16), 124
//             (64), 167 (128), 110 (more), 121 (float32), 132 (TF32)
//   needs     sm_80; rows of q, k and of every block of out 16-byte aligned, D % 8 == 0, D <= 256
//
// Reads K once per chunk through L2 and writes each value once: the floor is the bytes of Q, K and
// values at copy bandwidth. Masks are words tested on the accumulators' registers; a dead element is
// selected away, so that NaN in q or k cannot reach it.
#include "sddmm.cuh"

constexpr int kSize = MG_SIZE;
constexpr int kKeep = MG_KEEP;  // run-time mask: 0 none, 1 over columns (keys), 2 over rows
static_assert(kSize == 16 || kSize == 32 || kSize == 64 || kSize == 128, "SIZE: 16, 32, 64, 128");
constexpr int kRows = kSize < 64 ? kSize : 64;
constexpr int kHalves = kSize / kRows;

struct BlockPlace {
    out_t *out;         // first slot of the chunk
    const int4 *items;  // of the chunk
    const u8 *masks;
    int count;  // items
    int down;   // first row inside the block

    template <int kWidth> __device__ __forceinline__ u32 live(int row, int column) const {
        const int mask = __ldg(&items[column / kSize].w);
        if (mask < 0) return ~0u;
        const i64 bit = (i64(mask) * kSize + down + row) * kSize + column % kSize;
        // A word never straddles: columns of a warp start at a multiple of its width.
        if constexpr (kWidth == 32) return __ldg(reinterpret_cast<const u32 *>(masks + bit / 8));
        return __ldg(reinterpret_cast<const u16 *>(masks + bit / 8));
    }
    __device__ __forceinline__ out_t *at(int row, int column) const {
        if (column / kSize >= count) return nullptr;
        const i64 block = i64(column / kSize) * (kSize * kSize);
        return out + block + (down + row) * kSize + column % kSize;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 3)
    sddmm_block(out_t *__restrict__ out, i64 slots, i64 shift,                             //
                const operand_t *__restrict__ q, i64 q_free, i64 q_entry, i64 q_row,       //
                const operand_t *__restrict__ k, i64 k_free, i64 k_entry, i64 k_row,       //
                const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,   //
                const int4 *__restrict__ items, const int2 *__restrict__ chunks,
                const u8 *__restrict__ masks, int nq, int nk, int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    int *rows = reinterpret_cast<int *>(shared), *columns = rows + kRows;
    const int2 chunk = chunks[blockIdx.x / kHalves];
    const int half = blockIdx.x % kHalves;
    const i64 f = blockIdx.y;
    items += chunk.x;
    const int4 first = items[0];
    const i64 e = first.x;
    const u8 *kept = keep + f * keep_free + e * keep_entry;

    for (int i = threadIdx.x; i < kRows; i += kThreads) {
        const int row = first.y * kSize + half * kRows + i;
        const bool live = row < nq && (kKeep != 2 || kept[row * keep_at]);
        rows[i] = live ? row : -1;
    }
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
        int column = -1;
        if (i / kSize < chunk.y) {
            column = items[i / kSize].z * kSize + i % kSize;
            if (column >= nk || (kKeep == 1 && !kept[column * keep_at])) column = -1;
        }
        columns[i] = column;
    }
    __syncthreads();

    const BlockPlace place{out + f * slots + shift + i64(chunk.x) * (kSize * kSize), items, masks,
                           chunk.y, half * kRows};
    const int groups = (chunk.y * kSize + kGroup - 1) / kGroup;
    sddmm_tiles<kRows>(shared, groups, q + f * q_free + e * q_entry, q_row,
                       k + f * k_free + e * k_entry, k_row, width, scale, place);
}

#pragma once
// The body of spmm kernels: kRows rows of the result x kWide columns, summed over a walk of steps of
// kDepth contracted elements. Left operand A: sparse values, masked; right operand B: rows of x.
//
// What is walked is the kernel's affair, a Walk:
//     int steps
//     Note note(int step, int k)              what has to be read first to place element k
//     int source(Note, int step, int k)       row of x, or negative when nothing live meets it
//     int2 tag(Note)                          what locate needs of the 16 elements from k on
//     bool locate(int2 tag, int step, int m, int k, i64 &slot, u32 &bits)
//         first slot and mask bits of the chunk of A at (m, k); false when nothing is stored there
// Notes are read two steps ahead and sources one step ahead of the copies that need them.
//
// A is stored [m][k], or [k][m] when the product is with the transpose (kKM); copies are 16 bytes.
// Elements of A that are dead, by mask or because nothing live meets them, are zeroed by the thread
// that copied them, between the wait for its copies and the barrier; rows of x that nothing live
// meets are never read. So NaN in either reaches no sum.
#include "tiles.cuh"

#ifdef MG_WIDE
constexpr int kWide = MG_WIDE;
#else
constexpr int kWide = 64;
#endif
static_assert(kWide == 64 || kWide == 128, "WIDE: columns of the result per CTA, 64 or 128");
static_assert(kWide == 64 || kDtype != 2, "WIDE: 64 for float32 operands");

constexpr int kStages = 3, kRing = 4;
constexpr u32 kFull = (1u << kChunk) - 1u;  // mask bits of a whole chunk

// What is known of one step before its copies start.
struct StepNotes {
    int rows[kDepth];        // of x, negative: dead
    u32 alive[kDepth / 32];  // rows[k] >= 0
    int2 tags[kDepth / 16];
};

// Shared memory; primitives/cuda/parts.py computes the same sums.
template <bool kKM, int kRows> struct SpmmShared {
    using Split = Warps<kRows, kWide>;
    static constexpr int kLeftPitch = (kKM ? kRows : kDepth) + kPad;
    static constexpr int kLeft = (kKM ? kDepth : kRows) * kLeftPitch;
    static constexpr int kRightPitch = kWide + kPad;
    static constexpr int kStage = kLeft + kDepth * kRightPitch;  // elements
    static constexpr int kNoteBytes = (kRing * int(sizeof(StepNotes)) + 15) / 16 * 16;
    static constexpr int kBytes = kNoteBytes + kStages * kStage * int(sizeof(operand_t));
#ifdef MG_SHARED
    static_assert(kBytes == MG_SHARED, "SHARED: what the host reserves is not what is laid out");
#endif
    static constexpr int kCopies = kLeft / kLeftPitch * (kLeftPitch - kPad) / kChunk;  // of A
    static constexpr int kEach = (kCopies + kThreads - 1) / kThreads;                  // a thread's
};

// The elements of a chunk whose bit is set, zeros elsewhere.
__device__ __forceinline__ uint4 keep_bits(uint4 v, u32 bits) {
    u32 *word = reinterpret_cast<u32 *>(&v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kDtype == 2) {
            word[i] = bits >> i & 1 ? word[i] : 0u;
        } else {
            const u32 pair = bits >> (2 * i);
            word[i] &= (pair & 1 ? 0x0000ffffu : 0u) | (pair & 2 ? 0xffff0000u : 0u);
        }
    }
    return v;
}

// A chunk of values of another dtype than x, converted; whole vectors where their size allows.
__device__ __forceinline__ uint4 load_converted(const value_t *from) {
    constexpr int kBytes = kChunk * int(sizeof(value_t));
    alignas(16) value_t raw[kChunk];
    if constexpr (kBytes >= 16) {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
            reinterpret_cast<uint4 *>(raw)[i] = __ldg(reinterpret_cast<const uint4 *>(from) + i);
    } else {
        *reinterpret_cast<uint2 *>(raw) = __ldg(reinterpret_cast<const uint2 *>(from));
    }
    Vec<operand_t> v;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v.at[i] = from_float<operand_t>(to_float(raw[i]));
    return *reinterpret_cast<uint4 *>(&v);
}

// Start the copies of A's part of a step. Returns the mask bits of this thread's chunks, 8 bits
// each: what is left for mask_left to do when they have arrived.
template <bool kKM, int kRows, class Walk>
__device__ __forceinline__ u32 copy_left(operand_t *tile, const StepNotes &notes, int step,
                                         const value_t *values, const Walk &walk) {
    using Shared = SpmmShared<kKM, kRows>;
    constexpr int kPerLine = (kKM ? kRows : kDepth) / kChunk;
    u32 pending = 0;
#pragma unroll
    for (int j = 0; j < Shared::kEach; ++j) {
        const int i = j * kThreads + int(threadIdx.x);
        if (Shared::kCopies % kThreads && i >= Shared::kCopies) break;
        const int line = i / kPerLine, along = i % kPerLine * kChunk;
        const int m = kKM ? along : line, k = kKM ? line : along;
        i64 slot = 0;
        u32 bits = 0;
        if (!walk.locate(notes.tags[k / 16], step, m, k, slot, bits)) bits = 0;
        const u32 alive = notes.alive[k / 32] >> (k % 32);
        bits &= kKM ? (alive & 1 ? kFull : 0u) : alive & kFull;
        operand_t *to = tile + line * Shared::kLeftPitch + along;
        if constexpr (kValues == kDtype) {
            const void *from = bits ? values + slot : values;
            copy_async16(to, from, bits != 0);
        } else {
            uint4 v = make_uint4(0u, 0u, 0u, 0u);
            if (bits) v = keep_bits(load_converted(values + slot), bits);
            *reinterpret_cast<uint4 *>(to) = v;
            bits = 0;
        }
        pending |= bits << (8 * j);
    }
    return pending;
}

// Zero the dead elements of the chunks this thread copied.
template <bool kKM, int kRows>
__device__ __forceinline__ void mask_left(operand_t *tile, u32 pending) {
    using Shared = SpmmShared<kKM, kRows>;
    constexpr int kPerLine = (kKM ? kRows : kDepth) / kChunk;
#pragma unroll
    for (int j = 0; j < (kValues == kDtype ? Shared::kEach : 0); ++j) {
        const u32 bits = pending >> (8 * j) & kFull;
        if (bits == 0 || bits == kFull) continue;  // zeros already, or nothing dead
        const int i = j * kThreads + int(threadIdx.x);
        uint4 *at = reinterpret_cast<uint4 *>(tile + i / kPerLine * Shared::kLeftPitch +
                                              i % kPerLine * kChunk);
        *at = keep_bits(*at, bits);
    }
}

// acc = A B of the walk. x points at (f, e); `from` is the CTA's first column, `width` those of x.
template <bool kKM, int kRows, class Walk>
__device__ __forceinline__ void spmm_tiles(
    float (&acc)[Warps<kRows, kWide>::kM / 16][Warps<kRows, kWide>::kN / 8][4], u8 *shared,
    const value_t *values, const operand_t *x, i64 x_row, int from, int width, const Walk &walk) {
    using Shared = SpmmShared<kKM, kRows>;
    using Split = typename Shared::Split;
    StepNotes *ring = reinterpret_cast<StepNotes *>(shared);
    operand_t *stages = reinterpret_cast<operand_t *>(shared + Shared::kNoteBytes);
    const int tid = threadIdx.x, warp = tid / 32;
    const int m0 = warp / Split::kAcross * Split::kM, n0 = warp % Split::kAcross * Split::kN;
    const bool noting = tid < kDepth;  // whole warps: they look after one element k each

    auto write_notes = [&](int step, int row, int2 tag) {
        StepNotes &notes = ring[step % kRing];
        notes.rows[tid] = row;
        const u32 alive = __ballot_sync(~0u, row >= 0);
        if (tid % 32 == 0) notes.alive[tid / 32] = alive;
        if (tid % 16 == 0) notes.tags[tid / 16] = tag;
    };
    auto issue = [&](int step) {
        u32 pending = 0;
        if (step < walk.steps) {
            const StepNotes &notes = ring[step % kRing];
            operand_t *stage = stages + step % kStages * Shared::kStage;
            pending = copy_left<kKM, kRows>(stage, notes, step, values, walk);
            load_rows<kDepth, kWide, Shared::kRightPitch>(stage + Shared::kLeft, notes.rows, x,
                                                          x_row, from, width);
        }
        copy_commit();
        return pending;
    };

    typename Walk::Note next{};
    if (noting) {
#pragma unroll
        for (int s = 0; s < kStages; ++s) {
            const typename Walk::Note note = walk.note(s, tid);
            write_notes(s, walk.source(note, s, tid), walk.tag(note));
        }
        next = walk.note(kStages, tid);
    }
    __syncthreads();
    u32 pending[kStages - 1];
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) pending[s] = issue(s);

    clear(acc);
    for (int step = 0; step < walk.steps; ++step) {
        operand_t *stage = stages + step % kStages * Shared::kStage;
        copy_wait<kStages - 2>();
        mask_left<kKM, kRows>(stage, pending[0]);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < kStages - 2; ++s) pending[s] = pending[s + 1];
        pending[kStages - 2] = issue(step + kStages - 1);

        int row = -1;
        int2 tag = make_int2(-1, -1);
        if (noting) {
            row = walk.source(next, step + kStages, tid);
            tag = walk.tag(next);
            next = walk.note(step + kStages + 1, tid);
        }
        const operand_t *left = stage + m0 * (kKM ? 1 : Shared::kLeftPitch);
        product<kKM, true, kDepth>(acc, left, Shared::kLeftPitch, stage + Shared::kLeft + n0,
                                   Shared::kRightPitch);
        if (noting) write_notes(step + kStages, row, tag);
    }
}

// Write the accumulators: where(m) is the address of column 0 of result row m, nullptr to skip it;
// dead(m) rows are zero whatever was summed. kAdd adds to what is there.
template <int kRows, bool kAdd, class Where, class Dead>
__device__ __forceinline__ void spmm_store(
    const float (&acc)[Warps<kRows, kWide>::kM / 16][Warps<kRows, kWide>::kN / 8][4], float scale,
    int from, int width, const Where &where, const Dead &dead) {
    using Split = Warps<kRows, kWide>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int m0 = warp / Split::kAcross * Split::kM;
    const int n0 = from + warp % Split::kAcross * Split::kN + 2 * t;
#pragma unroll
    for (int i = 0; i < Split::kM / 16; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int m = m0 + 16 * i + 8 * h + g;
            auto *row = where(m);
            if (!row) continue;
            const bool zero = dead(m);
#pragma unroll
            for (int j = 0; j < Split::kN / 8; ++j) {
                const int column = n0 + 8 * j;
                if (column >= width) continue;
                float low = zero ? 0.0f : acc[i][j][2 * h] * scale;
                float high = zero ? 0.0f : acc[i][j][2 * h + 1] * scale;
                if constexpr (kAdd) {
                    const float2 old = *reinterpret_cast<const float2 *>(row + column);
                    low += old.x;
                    high += old.y;
                }
                store_pair(row + column, low, high);
            }
        }
}

// nm_blocks: packed N:M values of blocks as dense blocks, zeros where nothing is kept.
//
//   values    (matrices, blocks, S, S / 2), 16-byte aligned
//   metadata  int16 of `listed` = reps · blocks blocks, which the matrices take in turn; nm.cuh
//   out       (matrices, blocks, S, S), of the values' dtype
//
//   grid   ceil(matrices · blocks · S · S / 16 / 256)      block  256: a thread has 16 columns of a row
//   floor  bytes read and written at copy bandwidth
//   needs  sm_80
#include "nm.cuh"
#include "packed.cuh"

constexpr int kSize = MG_SIZE, kWords = kSize / kWordColumns;
static_assert(kSize == 16 || kSize == 32 || kSize == 64, "SIZE: 16, 32, 64");

extern "C" __global__ void __launch_bounds__(256)
    nm_blocks(const value_t *__restrict__ values, const u16 *__restrict__ metadata,
              value_t *__restrict__ out, i64 pieces, i64 listed) {
    const i64 piece = i64(blockIdx.x) * 256 + threadIdx.x;
    if (piece >= pieces) return;
    constexpr int kAcross = kSize / 16;
    const i64 line = piece / kAcross, block = line / kSize % listed;
    const int row = int(line % kSize), column = int(piece % kAcross) * 16;
    Pack<value_t, 8> held;
    held.load(values + piece * 8);
    float made[16];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int at = column + 4 * j;
        const u16 word =
            __ldg(metadata + block * (kSize * kWords) + word_at(row, at / kWordColumns, kSize, kWords, kSize > 16));
        const u32 code = u32(word) >> (at % kWordColumns / 4 * kCodeBits);
        const int i0 = first_of(code), i1 = second_of(code);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            made[4 * j + i] = i == i0 ? held[2 * j] : i == i1 ? held[2 * j + 1] : 0.0f;
    }
    Pack<value_t, 16>::store(out + piece * 16, made);
}

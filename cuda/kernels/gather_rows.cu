// gather_rows: packs listed rows of up to three operands, so that TMA can read them as whole units.
//
//     to[b, h, n, :] = from[b, h / ratio, list[pattern(b, h), n], :]      zeros where the list says −1
//
//   tensors   from (B, H, N, D), any strides but the last; to (B, Hp, n, D), contiguous
//             lists int32 (U, n); patterns int32 (B, Hp): the distinct pattern of each matrix
//   grid      (ceil(n / 8), B · Hp, operands)     a warp copies one row
//   block     256 threads
//   smem      none
//   needs     sm_80; rows 16-byte aligned
//   floor     every row is read and written once: bytes / 4.2 TB/s
#include "types.cuh"

struct Operand {
    const char *from;
    char *to;
    i64 batch, head, row;  // strides of `from`, bytes
    i64 bytes;             // of a row, a multiple of 16
    i64 ratio;             // packed heads to one head
};
struct Operands {
    Operand at[3];
};

extern "C" __global__ void __launch_bounds__(256)
    gather_rows(const __grid_constant__ Operands operands, const int *__restrict__ lists,
                const int *__restrict__ patterns, int count, int heads) {
    const int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (n >= count) return;
    const Operand &mine = operands.at[blockIdx.z];
    const int matrix = blockIdx.y, b = matrix / heads, h = matrix - b * heads;
    const int row = __ldg(lists + i64(__ldg(patterns + matrix)) * count + n);
    const char *from = mine.from + b * mine.batch + h / mine.ratio * mine.head + i64(row) * mine.row;
    char *to = mine.to + (i64(matrix) * count + n) * mine.bytes;
    for (i64 at = 16 * lane; at < mine.bytes; at += 512) {
        uint4 piece = make_uint4(0u, 0u, 0u, 0u);
        if (row >= 0) piece = __ldg(reinterpret_cast<const uint4 *>(from + at));
        *reinterpret_cast<uint4 *>(to + at) = piece;
    }
}

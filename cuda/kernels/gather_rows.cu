// gather_rows: packs listed rows of up to three operands, so that TMA can read them as whole units.
//
//     to[b, h, n, :] = from[b, h / ratio, list[pattern(b, h), n], :]      zeros where the list says −1
//
//   tensors   from (B, H, N, D), any strides but the last; to (B, Hp, n, D), contiguous
//             list int32 (U, n), patterns int32 (B, Hp): the distinct pattern of each matrix; each operand's own
//   grid      (ceil(most n / 8), B · most Hp, operands)     a warp copies one row
//   block     256 threads
//   smem      none
//   needs     sm_80; rows 16-byte aligned
//   floor     every row is read and written once: bytes / 4.2 TB/s
#include "grids.cuh"
#include "types.cuh"

struct Operand {
    const char *from;
    char *to;
    const int *list, *patterns;
    i64 batch, head, row;     // strides of `from`, bytes
    i64 bytes;                // of a row, a multiple of 16
    int ratio, heads, count;  // packed heads to one head, Hp, n
    int matrices;             // B · Hp
};
struct Operands {
    Operand at[3];
};

extern "C" __global__ void __launch_bounds__(256)
    gather_rows(const __grid_constant__ Operands operands) {
    let_next_grid_begin();
    const int n = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, matrix = blockIdx.y;
    const Operand &mine = operands.at[blockIdx.z];
    const int count = mine.count;
    if (n >= count || matrix >= mine.matrices) return;
    const int b = matrix / mine.heads, h = matrix - b * mine.heads;
    const int row = __ldg(mine.list + i64(__ldg(mine.patterns + matrix)) * count + n);
    const char *from = mine.from + b * mine.batch + h / mine.ratio * mine.head + i64(row) * mine.row;
    char *to = mine.to + (i64(matrix) * count + n) * mine.bytes;
    for (i64 at = 16 * lane; at < mine.bytes; at += 512) {
        uint4 piece = make_uint4(0u, 0u, 0u, 0u);
        if (row >= 0) piece = __ldg(reinterpret_cast<const uint4 *>(from + at));
        *reinterpret_cast<uint4 *>(to + at) = piece;
    }
}

// prune_nm: scale · Q Kᵀ, of every four neighbouring keys two values and where they are from. GIVEN 0
// keeps the largest and writes the metadata, 1 reads the metadata. Any dtype, any architecture.
//
//   q (F, E, nq, D), k (F, E, nk, D), any strides but the last; keep bool (F, E, nk) or (F, E, nq)
//   SIZE 0        out (F · E, rows, columns / 2), metadata (E, rows, words) in the order of nm.cuh;
//                 rows and columns are nq and nk rounded up to 32 and 64
//   SIZE 16 … 64  out (F · reps, blocks, S, S / 2), metadata (reps · blocks, S, words);
//                 items, chunks, masks as in sddmm_block, of `own` entries
//
//   grid      matrices · pieces: up to 256 columns of a row tile of 64 rows, or of a block row
//   block     128 threads: 2 x 2 warps of 32 x 32 (64 rows), 1 x 4 of S x 16 below
//   smem      SddmmShared::kBytes
//   floor     (Q + K + values + metadata) bytes at copy bandwidth
//   needs     sm_80; rows of q and k 16-byte aligned, D % 8 == 0
//
// Rows of K are staged in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15: lane t of a quad then holds
// keys 4t … 4t + 3 of every 16 and chooses without asking its neighbours.
#include "nm.cuh"
#include "sddmm.cuh"

constexpr int kSize = MG_SIZE;
constexpr bool kGiven = MG_GIVEN;
constexpr int kKeep = MG_KEEP;  // run-time mask: 0 none, 1 over columns (keys), 2 over rows
static_assert(kSize == 0 || kSize == 16 || kSize == 32 || kSize == 64, "SIZE: 0, 16, 32, 64");
constexpr int kRows = kSize == 16 || kSize == 32 ? kSize : 64;
constexpr int kBlock = kSize ? kSize : 64;  // columns that lie together
constexpr int kWords = kBlock / kWordColumns;

// Row of K, within 16, that stands at place p.
__device__ __forceinline__ int key_at(int p) { return p / 2 % 4 * 4 + p / 8 * 2 + p % 2; }

struct NmPlace {
    out_t *out;         // slots of the chunk's first block; SIZE 0: of the tile's first row and column
    u16 *metadata;      // words of the block; SIZE 0: of the matrix
    const int4 *items;  // of the chunk
    const u8 *masks;
    i64 rows;           // stored rows of a matrix
    int count;          // blocks of columns
    int row0, column0;  // SIZE 0: of the tile
    int columns;        // stored columns of a matrix
    int nq, nk;

    // Bits of 32 or 16 columns of the static pattern.
    template <int kWidth> __device__ __forceinline__ u32 inside(int row, int column) const {
        if (column / kBlock >= count) return 0u;
        if constexpr (kSize == 0) {
            const int left = nk - column0 - column;
            if (row0 + row >= nq || left <= 0) return 0u;
            return left >= 32 ? ~0u : (1u << left) - 1;
        }
        const int mask = __ldg(&items[column / kBlock].w);
        if (mask < 0) return ~0u;
        const i64 bit = (i64(mask) * kBlock + row) * kBlock + column % kBlock;
        if constexpr (kWidth == 32) return __ldg(reinterpret_cast<const u32 *>(masks + bit / 8));
        return __ldg(reinterpret_cast<const u16 *>(masks + bit / 8));
    }
    __device__ __forceinline__ bool stored(int row, int column) const {
        return column / kBlock < count && (kSize || row0 + row < rows);
    }
    __device__ __forceinline__ out_t *at(int row, int column) const {
        if (!stored(row, column)) return nullptr;
        if constexpr (kSize == 0) return out + i64(row) * (columns / 2) + column / 2;
        return out + (i64(column / kBlock) * kBlock + row) * (kBlock / 2) + column % kBlock / 2;
    }
    // The word of metadata that begins at a column.
    __device__ __forceinline__ u16 *word(int row, int column) const {
        if constexpr (kSize == 0) {
            const int words = columns / kWordColumns;
            return metadata + word_at(row0 + row, (column0 + column) / kWordColumns, rows, words, true);
        }
        return metadata + i64(column / kBlock) * (kBlock * kWords) +
               word_at(row, column % kBlock / kWordColumns, kBlock, kWords, kSize > 16);
    }
};

struct StoreKept {
    template <int kRows, class Place>
    __device__ __forceinline__ static void store(
        const float (&acc)[Warps<kRows, kGroup>::kM / 16][Warps<kRows, kGroup>::kN / 8][4], u8 *raw,
        const int *rows, const int *columns, int row0, int column0, float scale, const Place &place) {
        using Split = Warps<kRows, kGroup>;
        constexpr int kPitch = SddmmShared<kRows>::kOutPitch, kVec = 16 / int(sizeof(out_t));
        constexpr int kShare = 16 / kCodeBits;  // lanes whose codes make a word
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        out_t *stage = reinterpret_cast<out_t *>(raw);
        // Column `lane` of the tile, in the order of keys.
        const int mine = column0 + lane / 16 * 16 + lane / 2 % 2 * 8 + lane % 16 / 4 * 2 + lane % 2;
        const u32 wanted = __ballot_sync(~0u, lane < Split::kN && columns[mine] >= 0);
#pragma unroll
        for (int i = 0; i < Split::kM / 16; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * i + 8 * h + g;
                const u32 inside = place.template inside<Split::kN>(row0 + row, column0);
                const u32 live = rows[row0 + row] < 0 ? 0u : inside & wanted;
#pragma unroll
                for (int u = 0; u < Split::kN / 16; ++u) {
                    const float x[4] = {acc[i][2 * u][2 * h] * scale, acc[i][2 * u][2 * h + 1] * scale,
                                        acc[i][2 * u + 1][2 * h] * scale, acc[i][2 * u + 1][2 * h + 1] * scale};
                    const int shift = 16 * u + 4 * t, first = column0 + 16 * u + t / kShare * kWordColumns;
                    const u32 alive = live >> shift;
                    const bool stored = place.stored(row0 + row, first);
                    u32 code;
                    if constexpr (kGiven) {
                        code = stored ? u32(*place.word(row0 + row, first)) >> (kCodeBits * (t % kShare)) : 0u;
                    } else {
                        code = choose4(x, alive, inside >> shift);
                        u32 word = code << (kCodeBits * (t % kShare));
#pragma unroll
                        for (int w = 1; w < kShare; w *= 2) word |= __shfl_xor_sync(~0u, word, w);
                        if (stored && t % kShare == 0) *place.word(row0 + row, first) = u16(word);
                    }
                    const int i0 = first_of(code), i1 = second_of(code);
                    store_pair(stage + row * kPitch + 8 * u + 2 * t, alive >> i0 & 1 ? one_of4(x, i0) : 0.0f,
                               alive >> i1 & 1 ? one_of4(x, i1) : 0.0f);
                }
            }
        __syncwarp();
        constexpr int kPerRow = Split::kN / 2 / kVec, kStores = Split::kM * kPerRow;
#pragma unroll
        for (int base = 0; base < kStores; base += 32) {
            if (kStores % 32 && base + lane >= kStores) break;
            const int row = (base + lane) / kPerRow, slot = (base + lane) % kPerRow * kVec;
            out_t *to = place.at(row0 + row, column0 + 2 * slot);
            if (to) store16(to, load16(stage + row * kPitch + slot));
        }
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    prune_nm(out_t *__restrict__ out, u16 *metadata,                                          //
             const operand_t *__restrict__ q, i64 q_free, i64 q_entry, i64 q_row,             //
             const operand_t *__restrict__ k, i64 k_free, i64 k_entry, i64 k_row,             //
             const u8 *__restrict__ keep, i64 keep_free, i64 keep_entry, i64 keep_at,         //
             const int4 *__restrict__ items, const int2 *__restrict__ chunks,
             const u8 *__restrict__ masks, int pieces, int reps, int own, int blocks, int nq, int nk,
             int width, float scale) {
    extern __shared__ __align__(128) u8 shared[];
    int *rows = reinterpret_cast<int *>(shared), *columns = rows + kRows;
    const int matrix = blockIdx.x / pieces, piece = blockIdx.x % pieces;
    const i64 f = matrix / reps, rep = matrix % reps;
    const int row_end = (nq + 31) / 32 * 32, column_end = (nk + 63) / 64 * 64;
    NmPlace place{out, metadata, items, masks, row_end, 0, 0, 0, column_end, nq, nk};
    i64 e = rep;
    if constexpr (kSize == 0) {
        const int across = (column_end + kColumns - 1) / kColumns;
        place.row0 = piece / across * 64, place.column0 = piece % across * kColumns;
        place.count = min(kColumns, column_end - place.column0) / 64;
        place.out += (i64(matrix) * row_end + place.row0) * (column_end / 2) + place.column0 / 2;
        place.metadata += rep * row_end * (column_end / kWordColumns);
    } else {
        const int2 chunk = chunks[piece];
        place.items += chunk.x, place.count = chunk.y;
        e = rep * own + place.items[0].x;
        place.row0 = place.items[0].y * kBlock;
        place.out += (i64(matrix) * blocks + chunk.x) * (kBlock * kBlock / 2);
        place.metadata += (rep * blocks + chunk.x) * (kBlock * kWords);
    }
    const u8 *kept = keep + f * keep_free + e * keep_entry;
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
        const int row = place.row0 + i;
        const bool live = row < nq && (kKeep != 2 || kept[row * keep_at]);
        rows[i] = live ? row : -1;
    }
    for (int i = threadIdx.x; i < kColumns; i += kThreads) {
        int column = -1;
        const int n = i / kBlock, inner = i % kBlock / 16 * 16 + key_at(i % 16);
        if (n < place.count) {
            column = (kSize ? place.items[n].z * kBlock : place.column0 + n * kBlock) + inner;
            if (column >= nk || (kKeep == 1 && !kept[column * keep_at])) column = -1;
        }
        columns[i] = column;
    }
    __syncthreads();
    const int groups = (place.count * kBlock + kGroup - 1) / kGroup;
    sddmm_tiles<kRows, StoreKept>(shared, groups, q + f * q_free + e * q_entry, q_row,
                                  k + f * k_free + e * k_entry, k_row, width, scale, place);
}

#pragma once
// Fused attention without TMA: which keys a CTA takes one after the other, and their copies.
#include "fused_stage.cuh"

constexpr int kPacked = 1 << 24;
constexpr int kParts = 64 / kKeys;    // of a key unit
constexpr int kPasses = 2 / kUnits;  // over an item

struct Plan {
    const int *starts;
    const int2 *tiles;
    const int4 *items, *steps;
};

// What a warp reads and computes between two barriers: kKeys keys for an item of a matrix.
struct Place {
    int tile;          // of the CTA's walk, times kPasses
    int item, matrix;  // a matrix of −1: over
    int step, last;    // and the end of the item's steps
    int part, unit, marks[2];

    __device__ __forceinline__ explicit Place(const Plan &plan)
        : tile(__ldg(plan.starts + blockIdx.x) * kPasses - 1), item(0), matrix(0), step(0), last(0), part(kParts - 1),
          unit(0), marks{-2, -2} {}
    __device__ __forceinline__ bool over() const { return matrix < 0; }
    // The mask of the pass's unit g.
    __device__ __forceinline__ int mark(int g) const { return g == 0 ? marks[0] : marks[1]; }
    // To the next keys; `blank` is called with items of which this pass has nothing to read.
    template <typename Blank> __device__ __forceinline__ void advance(const Plan &plan, const Blank &blank) {
        if (over() || ++part < kParts) return;
        part = 0;
        if (take(plan, step + 1)) return;
        while (++tile < __ldg(plan.starts + blockIdx.x + 1) * kPasses) {
            const int2 wanted = __ldg(plan.tiles + tile / kPasses);
            const int4 head = __ldg(plan.items + 2 * wanted.x);
            const int steps = __ldg(reinterpret_cast<const int *>(plan.items + 2 * wanted.x + 1));
            item = wanted.x, matrix = wanted.y, last = head.w + steps;
            if (take(plan, head.w)) return;
            blank(*this);
        }
        matrix = -1;
    }

private:
    // The first step from `at` on that is the pass's.
    __device__ __forceinline__ bool take(const Plan &plan, int at) {
        for (step = at; step < last; ++step) {
            const int4 v = __ldg(plan.steps + step);
            unit = v.x;
            marks[0] = kPasses == 2 && tile % 2 ? v.z : v.y;
            marks[1] = v.z;
            if (kPasses == 1 || marks[0] != -2) return true;
        }
        return false;
    }
};

// Where the pass's unit g of an item goes.
struct Result {
    int unit, slot;
};
__device__ __forceinline__ Result result_of(const Plan &plan, const Place &place, int g) {
    const int *item = reinterpret_cast<const int *>(plan.items + 2 * place.item);
    const int which = kPasses == 2 ? place.tile % 2 : g;
    return {__ldg(item + which), __ldg(item + 5 + which)};
}

// x / n for x < 2²¹, given 1 / n: integer division takes ten times as many instructions.
__device__ __forceinline__ int quotient(int x, float inverse) { return int((x + 0.5f) * inverse); }

struct Operand {
    const char *from;
    i64 batch, head, row;  // strides, bytes
};
struct Operands {
    Operand q, k, v, packed_q, packed_k, packed_v;
    int heads, packed_heads;
    int rows, keys_there, packed_units, width;
    float per_heads, per_ratio, per_packed_ratio;  // 1 / heads, 1 / query heads of a key head, …

    __device__ __forceinline__ void queries(u32 to, const Plan &plan, const Place &place) const {
        const int b = quotient(place.matrix, per_heads), h = place.matrix - b * heads;
#pragma unroll
        for (int g = 0; g < kUnits; ++g) {
            const int unit = result_of(plan, place, g).unit;
            const bool packed = unit >= kPacked;
            const Operand &from = packed ? packed_q : q;
            // Without a unit: zeros.
            copy_rows<64>(to + g * kUnit, from.from + b * from.batch + h * from.head, from.row, (unit & (kPacked - 1)) * 64,
                          unit < 0 ? 0 : packed ? 0x7fffffff : rows, width * int(sizeof(operand_t)));
        }
    }
    __device__ __forceinline__ void keys(u32 to, const Place &place) const { copy(to, place, k, packed_k); }
    __device__ __forceinline__ void values(u32 to, const Place &place) const { copy(to, place, v, packed_v); }
    // Bits of the keys that the call's mask leaves, as a mask's word; t: lane % 4.
    __device__ __forceinline__ u32 kept(const u32 *keep, const u32 *keep_packed, const Place &place, int t) const {
        const int b = quotient(place.matrix, per_heads), h = place.matrix - b * heads;
        const i64 at = place.unit >= kPacked
                           ? (i64(b) * packed_heads + quotient(h, per_packed_ratio)) * packed_units + place.unit - kPacked
                           : i64(b) * ((keys_there + 63) / 64) + place.unit;
        const u32 *from = (place.unit >= kPacked ? keep_packed : keep) + 2 * at;
        u32 word = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 x = __ldg(from + half) >> 2 * t & 0x03030303u;
            x |= x >> 6;
            word |= ((x | x >> 12) & 0xFFu) << 8 * half;
        }
        return word * 0x10001u;
    }

private:
    __device__ __forceinline__ void copy(u32 to, const Place &place, const Operand &there, const Operand &gathered) const {
        const int b = quotient(place.matrix, per_heads), h = place.matrix - b * heads;
        const bool packed = place.unit >= kPacked;
        const Operand &from = packed ? gathered : there;
        copy_rows<kKeys>(to, from.from + b * from.batch + quotient(h, packed ? per_packed_ratio : per_ratio) * from.head, from.row,
                         (place.unit & (kPacked - 1)) * 64 + place.part * kKeys, packed ? 0x7fffffff : keys_there,
                         width * int(sizeof(operand_t)));
    }
};

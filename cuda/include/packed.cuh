#pragma once
// Elements inside 32-bit words. Arrays of 16-bit types fall apart into one register per element;
// kept as words they stay packed until an element is used.
#include "types.cuh"

// Element i of packed words as float.
template <typename T> struct Packed;
template <> struct Packed<float> {
    __device__ __forceinline__ static float get(const u32 *words, int i) {
        return __uint_as_float(words[i]);
    }
};
template <> struct Packed<__half> {
    __device__ __forceinline__ static float get(const u32 *words, int i) {
        const __half2 both = *reinterpret_cast<const __half2 *>(&words[i / 2]);
        return i % 2 ? __high2float(both) : __low2float(both);
    }
};
template <> struct Packed<__nv_bfloat16> {
    __device__ __forceinline__ static float get(const u32 *words, int i) {
        return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    }
};

// kCount neighbouring elements of T, as they lie in memory.
template <typename T, int kCount> struct Pack {
    static constexpr int kBytes = kCount * int(sizeof(T));
    static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
    u32 word[kWords];

    __device__ __forceinline__ float operator[](int i) const { return Packed<T>::get(word, i); }

    __device__ __forceinline__ void load(const void *from) {
        if constexpr (kBytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < kWords; i += 4) {
                const uint4 v = __ldg(static_cast<const uint4 *>(from) + i / 4);
                word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
            }
        } else if constexpr (kBytes == 8) {
            const uint2 v = __ldg(static_cast<const uint2 *>(from));
            word[0] = v.x, word[1] = v.y;
        } else if constexpr (kBytes == 4) {
            word[0] = __ldg(static_cast<const u32 *>(from));
        } else {
            word[0] = __ldg(static_cast<const u16 *>(from));
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = 0;
    }
    // Rounds the floats x[0 … kCount − 1] to T and stores them.
    __device__ __forceinline__ static void store(T *to, const float *x) {
        u32 made[kWords];
        if constexpr (kCount == 1) {
            *to = from_float<T>(x[0]);
            return;
        } else if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) made[i] = __float_as_uint(x[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kWords; ++i) made[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
        }
        if constexpr (kBytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < kWords; i += 4)
                reinterpret_cast<uint4 *>(to)[i / 4] =
                    make_uint4(made[i], made[i + 1], made[i + 2], made[i + 3]);
        } else if constexpr (kBytes == 8) {
            *reinterpret_cast<uint2 *>(to) = make_uint2(made[0], made[1]);
        } else {
            *reinterpret_cast<u32 *>(to) = made[0];
        }
    }
};

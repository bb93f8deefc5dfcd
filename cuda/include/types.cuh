#pragma once
// Types: what MG_DTYPE, MG_OUT and MG_VALUES select, conversion to and from float, 16-byte vectors.
//
// Codes: 0 = float16, 1 = bfloat16, 2 = float32.
//     MG_DTYPE    of the dense operands (q, k, x)             operand_t
//     MG_OUT      of what the kernel writes; default MG_DTYPE out_t
//     MG_VALUES   of the sparse values it reads; default MG_DTYPE  value_t
#include <cuda_fp16.h>
#include <cuda_bf16.h>

// NVRTC brings no <cstdint>.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

template <int Code> struct DtypeOf;
template <> struct DtypeOf<0> { using type = __half; };
template <> struct DtypeOf<1> { using type = __nv_bfloat16; };
template <> struct DtypeOf<2> { using type = float; };

#ifdef MG_DTYPE
constexpr int kDtype = MG_DTYPE;
#else
constexpr int kDtype = 2;
#endif
#ifdef MG_OUT
constexpr int kOut = MG_OUT;
#else
constexpr int kOut = kDtype;
#endif
#ifdef MG_VALUES
constexpr int kValues = MG_VALUES;
#else
constexpr int kValues = kDtype;
#endif
static_assert(kDtype >= 0 && kDtype <= 2, "MG_DTYPE: 0 float16, 1 bfloat16, 2 float32");
static_assert(kOut >= 0 && kOut <= 2, "MG_OUT: 0 float16, 1 bfloat16, 2 float32");
static_assert(kValues >= 0 && kValues <= 2, "MG_VALUES: 0 float16, 1 bfloat16, 2 float32");

using operand_t = DtypeOf<kDtype>::type;
using out_t = DtypeOf<kOut>::type;
using value_t = DtypeOf<kValues>::type;

[[maybe_unused]] constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// from_float<T>(x): rounds to nearest even; overflow to infinity, as torch's own casts.
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two neighbours in one 32-bit register, the first in the low half: an mma fragment's unit.
template <typename T> __device__ __forceinline__ u32 pack2(float low, float high);
template <> __device__ __forceinline__ u32 pack2<__half>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<u32 *>(&both);
}
template <> __device__ __forceinline__ u32 pack2<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<u32 *>(&both);
}

// Floats are not packed; here so that code for both compiles.
template <> __device__ __forceinline__ u32 pack2<float>(float, float) { return 0; }

// Two neighbours to memory; aligned to the pair.
__device__ __forceinline__ void store_pair(float *to, float low, float high) {
    *reinterpret_cast<float2 *>(to) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(__half *to, float low, float high) {
    *reinterpret_cast<u32 *>(to) = pack2<__half>(low, high);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16 *to, float low, float high) {
    *reinterpret_cast<u32 *>(to) = pack2<__nv_bfloat16>(low, high);
}

// Sixteen bytes of T: the widest load and store of a thread. kCount elements, at[] by index.
template <typename T> struct alignas(16) Vec {
    static constexpr int kCount = 16 / int(sizeof(T));
    T at[kCount];
};

// A 16-byte aligned address; the three differ in what the caches are told.
template <typename T> __device__ __forceinline__ Vec<T> load16(const T *from) {
    Vec<T> v;
    *reinterpret_cast<uint4 *>(&v) = *reinterpret_cast<const uint4 *>(from);
    return v;
}
// Read once by this grid and never written by it: leaves L1 to what is read again.
template <typename T> __device__ __forceinline__ Vec<T> stream16(const T *from) {
    Vec<T> v;
    *reinterpret_cast<uint4 *>(&v) = __ldcs(reinterpret_cast<const uint4 *>(from));
    return v;
}
// Read-only data of the whole grid (K, V, x): through the non-coherent path.
template <typename T> __device__ __forceinline__ Vec<T> global16(const T *from) {
    Vec<T> v;
    *reinterpret_cast<uint4 *>(&v) = __ldg(reinterpret_cast<const uint4 *>(from));
    return v;
}
template <typename T> __device__ __forceinline__ void store16(T *to, const Vec<T> &v) {
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(&v);
}
// Zero vector.
template <typename T> __device__ __forceinline__ Vec<T> zero16() {
    Vec<T> v;
    *reinterpret_cast<uint4 *>(&v) = make_uint4(0u, 0u, 0u, 0u);
    return v;
}

// Storage types and the type that sums are kept in, for CPU and CUDA kernels alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTCONV_HOST_DEVICE __host__ __device__
#else
#define FASTCONV_HOST_DEVICE
#endif

namespace fastconv {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Two values that a processor multiplies in one step.
struct BFloat16Pair {
  BFloat16 low, high;
};

// macro(T) for every type that kernels take.
#define FASTCONV_EACH_TYPE(macro) macro(float) macro(double) macro(BFloat16) macro(Float16)

// float16 and bfloat16 are multiplied and added in float32.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename AccumulateType<T>::type;

inline FASTCONV_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline FASTCONV_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The IEEE half formats, bit by bit: what a compiler without a half type, and the emulator, use.
inline FASTCONV_HOST_DEVICE float half_bits_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00)  // infinity, NaN
    return bits_to_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  if (magnitude >= 0x400)  // normal: move the exponent's bias from 15 to 127
    return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

inline FASTCONV_HOST_DEVICE uint16_t float_to_half_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                 // subnormal: let the adder round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | (rounded >> 13));
}

inline FASTCONV_HOST_DEVICE uint16_t float_to_bfloat_bits(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // keep a NaN a NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline FASTCONV_HOST_DEVICE float load(float value) { return value; }
inline FASTCONV_HOST_DEVICE double load(double value) { return value; }
inline FASTCONV_HOST_DEVICE float load(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
inline FASTCONV_HOST_DEVICE float load(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return half_bits_to_float(value.bits);
#endif
}

inline FASTCONV_HOST_DEVICE void store(float* target, float value) { *target = value; }
inline FASTCONV_HOST_DEVICE void store(double* target, double value) { *target = value; }
inline FASTCONV_HOST_DEVICE void store(BFloat16* target, float value) {
#if defined(__CUDA_ARCH__)
  target->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  target->bits = float_to_bfloat_bits(value);
#endif
}
inline FASTCONV_HOST_DEVICE void store(Float16* target, float value) {
#if defined(__CUDA_ARCH__)
  target->bits = __half_as_ushort(__float2half_rn(value));
#else
  target->bits = float_to_half_bits(value);
#endif
}

}  // namespace fastconv

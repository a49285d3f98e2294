// What conv2d_direct_pass_cpu.h multiplies, as it lies in a tile, and parts of vectors.
#pragma once

#include "conv2d_direct_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// How values are multiplied: each on its own, in the type of the sums, or bfloat16 two by two.
template <typename E>
constexpr int64_t values_in = std::is_same_v<E, BFloat16Pair> ? 2 : 1;
template <typename E>
using stored = std::conditional_t<std::is_same_v<E, BFloat16Pair>, BFloat16, E>;

template <typename T, typename A>
void load_operands(const Image<const T>& image, int64_t channel, int64_t channels, int64_t first,
                   int64_t pixels, A* tile) {
  load_pixels(image, channel, channels, first, pixels, tile);
}

// An odd channel is followed by a zero.
inline void load_operands(const Image<const BFloat16>& image, int64_t channel, int64_t channels,
                          int64_t first, int64_t pixels, BFloat16Pair* tile) {
  const Scratch<float> values(pixels * channels);
  load_pixels(image, channel, channels, first, pixels, values.data());
  for (int64_t k = 0; k < pixels; ++k)
    for (int64_t c = 0; c < channels; c += 2, ++tile) {
      store(&tile->low, values.data()[k * channels + c]);
      store(&tile->high, c + 1 < channels ? values.data()[k * channels + c + 1] : 0.0f);
    }
}

// The first `count` lanes alone; the others are zero, or stay as they are.
template <typename A>
inline Vector<A> load_lanes(const A* source, int64_t count) {
  Vector<A> value = {};
  __builtin_memcpy(&value, source, count * sizeof(A));
  return value;
}
template <typename A>
inline void store_lanes(A* target, Vector<A> value, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), (__m512)value);
#endif
  __builtin_memcpy(target, &value, count * sizeof(A));
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

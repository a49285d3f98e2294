// One vector type for every instruction set, on the compiler's vector extension: a + b, a * b work on it, and
// a * b + c becomes a fused multiply-add. Loads and stores convert from and to the storage types.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <concepts>

#include "activation.h"
#include "types.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <std::floating_point A>
struct VectorType {
  typedef A type __attribute__((vector_size(vector_bytes)));
};
template <typename A>
using Vector = typename VectorType<A>::type;
template <typename A>
constexpr int lanes_of = vector_bytes / int(sizeof(A));

template <typename A>
inline Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // x - 0 is x, also for -0: one instruction
}

inline Vector<float> load_vector(const float* source) {
  Vector<float> value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

inline Vector<double> load_vector(const double* source) {
  Vector<double> value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}

inline Vector<float> load_vector(const BFloat16* source) {
  constexpr int lanes = lanes_of<float>;
  typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
  typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
  Halves halves;
  __builtin_memcpy(&halves, source, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  static_assert(sizeof(Halves) == lanes * sizeof(BFloat16));
  return (Vector<float>)words;
}

inline Vector<float> load_vector(const Float16* source) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Vector<float> value;
  for (int lane = 0; lane < lanes_of<float>; ++lane) value[lane] = load(source[lane]);
  return value;
#endif
}

inline void store_vector(float* target, Vector<float> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}
inline void store_vector(double* target, Vector<double> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

inline void store_vector(BFloat16* target, Vector<float> value) {
  typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
  typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
  const Words words = (Words)value;
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  const Words quiet = (words >> 16) | 0x40;
  const Words is_nan = (Words)((words & 0x7fffffff) > 0x7f800000);
  const Halves halves = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Halves);
  __builtin_memcpy(target, &halves, sizeof(halves));
}

inline void store_vector(Float16* target, Vector<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < lanes_of<float>; ++lane) store(&target[lane], value[lane]);
#endif
}

// Asks for a cache line that will be written.
inline void prefetch_for_write(const void* address) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1, 3);
#endif
}

// Stores past the caches, at an aligned address, a vector that is a whole cache line: parts of lines would
// travel one by one. stream_fence() ends a thread's streaming.
template <typename T, typename V>
void stream_vector(T* target, V value) {
  store_vector(target, value);
}
#if defined(__AVX512F__)
inline void stream_vector(float* target, Vector<float> value) { _mm512_stream_ps(target, (__m512)value); }
#endif

// body(store) with the store of either kind, for loops that should not ask at each vector.
template <typename A, typename Body>
inline __attribute__((always_inline)) void with_store(bool past_caches, const Body& body) {
  if (past_caches)
    body([](A* target, Vector<A> value) { stream_vector(target, value); });
  else
    body([](A* target, Vector<A> value) { store_vector(target, value); });
}

inline void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Makes the compiler load a value once and keep it, where it would fold the load into every use.
template <typename V>
inline __attribute__((always_inline)) void keep_in_register(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#endif
}

// A lane number for each lane.
template <typename A>
struct LaneIndexType {
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> type
      __attribute__((vector_size(vector_bytes)));
};
template <typename A>
using LaneIndex = typename LaneIndexType<A>::type;

// Swaps lanes and vectors: rows[i][k] <-> rows[k][i]; log2(lanes) rounds of two-source shuffles.
template <typename A>
inline void transpose(Vector<A> (&rows)[lanes_of<A>]) {
  constexpr int lanes = lanes_of<A>;
#pragma GCC unroll 8
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    LaneIndex<A> low, high;  // index lanes + k means lane k of the second vector
#pragma GCC unroll 16
    for (int k = 0; k < lanes; ++k) {
      low[k] = (k & distance) ? lanes + k - distance : k;
      high[k] = (k & distance) ? lanes + k : k + distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & distance) continue;
      const Vector<A> first = rows[i], second = rows[i + distance];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + distance] = __builtin_shuffle(first, second, high);
    }
  }
}

// Reads L values from each of L rows, and writes L values to each of L columns: column(k)[i] = row(i)[k].
template <typename A, typename Row, typename Column>
inline __attribute__((always_inline)) void transpose_square(const Row& row, const Column& column) {
  constexpr int lanes = lanes_of<A>;
#if defined(__AVX512F__)
  using From = std::remove_cvref_t<decltype(*row(0))>;
  using To = std::remove_cvref_t<decltype(*column(0))>;
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
    // Quarters of rows i, i + 4, i + 8, i + 12 meet in one register while they are loaded: two rounds of
    // shuffles are left of four.
#pragma GCC unroll 4
    for (int k = 0; k < 16; k += 4) {
      __m512 quarter[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        quarter[i] = _mm512_castps128_ps512(_mm_loadu_ps(row(i) + k));
        quarter[i] = _mm512_insertf32x4(quarter[i], _mm_loadu_ps(row(i + 4) + k), 1);
        quarter[i] = _mm512_insertf32x4(quarter[i], _mm_loadu_ps(row(i + 8) + k), 2);
        quarter[i] = _mm512_insertf32x4(quarter[i], _mm_loadu_ps(row(i + 12) + k), 3);
      }
      const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(quarter[0], quarter[1]));
      const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(quarter[0], quarter[1]));
      const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(quarter[2], quarter[3]));
      const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(quarter[2], quarter[3]));
      _mm512_storeu_ps(column(k), _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)));
      _mm512_storeu_ps(column(k + 1), _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)));
      _mm512_storeu_ps(column(k + 2), _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)));
      _mm512_storeu_ps(column(k + 3), _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23)));
    }
    return;
  }
#endif
  Vector<A> square[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) square[i] = load_vector(row(i));
  transpose<A>(square);
#pragma GCC unroll 16
  for (int k = 0; k < lanes; ++k) store_vector(column(k), square[k]);
}

// e^x to 2 units in the last place: 2^n * p(r), r = x - n ln 2, p a Taylor polynomial of degree 6 on |r| <
// 0.35.
inline Vector<float> exponential(Vector<float> x) {
  typedef int32_t Words __attribute__((vector_size(vector_bytes)));
  const Vector<float> low = broadcast(-87.0f), high = broadcast(88.0f);
  const auto overflows = x > high;
  x = x < low ? low : x;
  x = overflows ? high : x;
  const Vector<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = x * 1.44269504f + magic;
  const Vector<float> n = shifted - magic;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = broadcast(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words exponent = ((Words)shifted - (Words)magic) << 23;
  return overflows ? broadcast(bits_to_float(0x7f800000)) : (Vector<float>)((Words)p + exponent);
}

// e^(-x^2 / 2), the normal distribution's density times the square root of 2 pi.
inline Vector<float> bell(Vector<float> x) {
  const Vector<float> square = x * x;
  return square > 174.0f ? Vector<float>{} : exponential(-0.5f * square);
}

// The normal distribution's share below x, to 4 units in the last place for x > -2, and to 2e-7 anywhere:
// below -|x| lies bell(x) * p(t), t = 1 / (1 + 0.3 |x|), of which p has degree 9, fitted to |x| < 13.5.
inline Vector<float> normal_share(Vector<float> x, Vector<float> bell_of_x) {
  const auto negative = x < Vector<float>{};
  const Vector<float> t = 1.0f / (1.0f + 0.3f * (negative ? -x : x));
  Vector<float> p = broadcast(3.930163e-3f);
  p = p * t + 1.8106904e-2f;
  p = p * t - 1.24118620e-1f;
  p = p * t + 1.72188706e-1f;
  p = p * t - 3.26001805e-2f;
  p = p * t + 1.20627255e-1f;
  p = p * t + 1.01686361e-1f;
  p = p * t + 1.20539397e-1f;
  p = p * t + 1.19640055e-1f;
  const Vector<float> beyond = bell_of_x * (p * t);
  return negative ? beyond : 1.0f - beyond;
}

template <typename A>
inline Vector<A> activate_vector(Vector<A> x, Activation activation) {
  const Vector<A> zero = broadcast(A(0));
  if (activation == Activation::none) return x;
  if (activation == Activation::relu) return x < zero ? zero : x;
  if (activation == Activation::relu6) {
    const Vector<A> six = broadcast(A(6));
    x = x < zero ? zero : x;
    return x > six ? six : x;
  }
  if constexpr (std::is_same_v<A, float>) {
    if (activation == Activation::silu) return x / (1.0f + exponential(-x));
    if (activation == Activation::gelu_tanh)  // 0.5 (1 + tanh(u)) = sigmoid(2u)
      return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    if (activation == Activation::gelu) return x * normal_share(x, bell(x));
  }
  for (int lane = 0; lane < lanes_of<A>; ++lane) x[lane] = activate(A(x[lane]), activation);
  return x;
}

template <typename A>
inline Vector<A> activation_gradient_vector(Vector<A> grad, Vector<A> x, Activation activation) {
  const Vector<A> zero = broadcast(A(0));
  if (activation == Activation::none) return grad;
  if (activation == Activation::relu) return x <= zero ? zero : grad;
  if (activation == Activation::relu6) return (x <= zero) | (x >= broadcast(A(6))) ? zero : grad;
  if constexpr (std::is_same_v<A, float>) {
    if (activation == Activation::silu) {
      const Vector<float> gate = 1.0f / (1.0f + exponential(-x));
      return grad * gate * (1.0f + x * (1.0f - gate));
    }
    if (activation == Activation::gelu_tanh) {  // x * gate, whose argument is 1.5957691216 (x + 0.044715 x^3)
      const Vector<float> slope = 1.5957691216f * (1.0f + 0.134145f * x * x);
      const Vector<float> gate = 1.0f / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
      return grad * gate * (1.0f + x * (1.0f - gate) * slope);
    }
    if (activation == Activation::gelu) {
      const Vector<float> density = bell(x);
      return grad * (normal_share(x, density) + x * (0.39894228f * density));
    }
  }
  for (int lane = 0; lane < lanes_of<A>; ++lane)
    grad[lane] = activation_gradient(A(grad[lane]), A(x[lane]), activation);
  return grad;
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

#include "peak.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void multiply_add(int64_t steps, int64_t& operations) {
#if defined(__AVX512F__)
  constexpr int bytes = 64;
#elif defined(__AVX__)
  constexpr int bytes = 32;
#else
  constexpr int bytes = 16;
#endif
  using Vector __attribute__((vector_size(bytes))) = T;
  // Twelve chains: more than any processor's latency times its multiply-adds a cycle (4 x 2, 5 x 2), and few
  // enough to stay in sixteen registers beside the two factors.
  constexpr int chains = 12;
  // The compiler cannot know these, nor drop what becomes of them. The sums tend to shift / (1 - scale) = 1.
  volatile T scale = T(0.75), shift = T(0.25);
  const Vector a = Vector{} + scale, b = Vector{} + shift;
  Vector sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = a + T(i);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * a + b;
  }
  for (int i = 1; i < chains; ++i) sum[0] += sum[i];
  volatile T sink = sum[0][0];
  (void)sink;
  operations = steps * chains * 2 * int64_t(bytes / sizeof(T));
}

template void multiply_add<float>(int64_t, int64_t&);
template void multiply_add<double>(int64_t, int64_t&);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

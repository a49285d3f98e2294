// The inner step of every dense kernel: a block of a matrix product, kept in registers.
//
//   sum[r][v] += sum over k of row r's value k (one value for all lanes) * the panel's vectors v of line k
//
// V vectors of R rows fill the registers: 24 sums of 32 registers with AVX-512, 12 of 16 else. A step loads V
// vectors and R single values for R * V multiply-adds, so that the multipliers are the limit, not the loads.
#pragma once

#include "cpu.h"
#include "simd.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int most_vectors = 4, accumulators = 24;
#else
constexpr int most_vectors = 2, accumulators = 12;
#endif
template <int V>
constexpr int rows_of = accumulators / V;  // rows of a block V vectors wide

// rows[r][k * row_step]: row r's values. panel[k * panel_step ...]: V vectors, line k.
template <int R, int V, typename T, typename A>
inline __attribute__((always_inline)) void multiply_add(Vector<A> (&sum)[R][V], const T* const (&rows)[R],
                                                        int64_t row_step, const A* panel, int64_t panel_step,
                                                        int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    Vector<A> line[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) line[v] = load_vector(panel + k * panel_step + v * lanes_of<A>);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      Vector<A> value = broadcast(A(load(rows[r][k * row_step])));
      keep_in_register(value);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += value * line[v];
    }
  }
}

#if defined(__AVX512BF16__)
// The same for pairs: the products of both values are added to the lane's sum.
template <int R, int V>
inline __attribute__((always_inline)) void multiply_add(Vector<float> (&sum)[R][V],
                                                        const BFloat16Pair* const (&rows)[R],
                                                        int64_t row_step, const BFloat16Pair* panel,
                                                        int64_t panel_step, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    __m512bh line[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      line[v] = (__m512bh)_mm512_loadu_si512(panel + k * panel_step + v * lanes_of<float>);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      int bits;
      __builtin_memcpy(&bits, rows[r] + k * row_step, sizeof(bits));
      __m512i value = _mm512_set1_epi32(bits);
      keep_in_register(value);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[r][v] = (Vector<float>)_mm512_dpbf16_ps((__m512)sum[r][v], (__m512bh)value, line[v]);
    }
  }
}
#endif

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// One pass of convolution, shared by forward and the transposed convolution.
#pragma once

#include <limits>
#include <vector>

#include "../common/geometry.h"
#include "../common/image.h"
#include "../common/matrix_kernel.h"
#include "conv2d.h"

namespace fastconv::avx512_bf16 {

// Direct for processors that multiply pairs of bfloat16 values; `packed`: as direct_pack wrote it.
void direct_convolve_pairs(const BFloat16* input, const BFloat16Pair* packed,
                           const Conv2dEpilogue<BFloat16>& epilogue, BFloat16* output,
                           const Conv2dShape& shape, bool transposed, const RowSource& source,
                           ParallelFor threads);

}  // namespace fastconv::avx512_bf16

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// The filters of a group, cut into panels of as many vectors as the registers take; the last one is narrower.
template <typename A>
struct Panels {
  static constexpr int64_t width = most_vectors * lanes_of<A>;
  int64_t filters;

  int64_t count() const { return ceil_div(filters, width); }
  int64_t vectors(int64_t panel) const {
    return ceil_div(std::min(width, filters - panel * width), lanes_of<A>);
  }
  int64_t padded() const { return ceil_div(filters, lanes_of<A>) * lanes_of<A>; }
};

// Images as a pass sees them: forward reads the input and writes the output, the transposed convolution the
// other way round.
struct DirectPass {
  Conv2dShape shape;
  bool transposed;
  Geometry geometry;

  int64_t from_group, to_group;  // channels of a group: read, written
  RowSource source = {};         // of the input, where it is not read as it lies

  int64_t rows(const Phase& phase) const {
    return std::max<int64_t>(ceil_div(geometry.out_height - phase.first_row, phase.row_step), 0);
  }
  int64_t columns(const Phase& phase) const { return std::max<int64_t>(phase_columns(geometry, phase), 0); }
  int64_t pixels(const Phase& phase) const { return shape.batch * rows(phase) * columns(phase); }

  // Packed weights: (groups, panels, taps in the order of the geometry, from_group, lanes of the panel).
  // Where multiplies_bfloat16(), those of BFloat16 are pairs: (..., from_group / 2, lanes of the panel, 2).
  template <typename A>
  int64_t packed_size() const {
    return shape.groups * Panels<A>{to_group}.padded() * shape.taps() * from_group;
  }
};

inline DirectPass direct_forward(const Conv2dShape& s) {
  return {s, false, forward_geometry(s), s.in_group(), s.out_group()};
}
inline DirectPass direct_transposed(const Conv2dShape& s) {
  return {s, true, transposed_geometry(s), s.out_group(), s.in_group()};
}

// Activations that are a lower bound: none, and relu.
inline bool is_floor(Activation activation) {
  return activation == Activation::none || activation == Activation::relu;
}
template <typename A>
A floor_of(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6
             ? A(0)
             : -std::numeric_limits<A>::infinity();
}

// The same and an upper bound: relu6 too.
inline bool is_clamp(Activation activation) {
  return is_floor(activation) || activation == Activation::relu6;
}
template <typename A>
A ceiling_of(Activation activation) {
  return activation == Activation::relu6 ? A(6) : std::numeric_limits<A>::infinity();
}

// Stores sums of one channel, of pixels `step` apart; `at`: the index of the first in the output.
template <typename T, typename A>
void store_run(const A* sums, const Conv2dEpilogue<T>& epilogue, T* output, int64_t at, int64_t step,
               int64_t count) {
  constexpr int64_t L = lanes_of<A>;
  int64_t k = 0;
  if (step == 1)
    for (; k + L <= count; k += L) {
      Vector<A> total = load_vector(sums + k);
      if (epilogue.residual) total += load_vector(epilogue.residual + at + k);
      store_vector(output + at + k, activate_vector<A>(total, epilogue.activation));
    }
  for (; k < count; ++k) {
    const A residual = epilogue.residual ? A(load(epilogue.residual[at + k * step])) : A(0);
    store(output + at + k * step, activate(A(sums[k] + residual), epilogue.activation));
  }
}

template <typename T>
void direct_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads);

template <typename T>
void direct_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const DirectPass& pass, ParallelFor threads);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

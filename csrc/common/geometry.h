// A pass of a convolution as convolutions without waste: one for forward, one for each residue modulo the
// stride for grad_input, which is the transposed convolution.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

inline int64_t ceil_div(int64_t a, int64_t b) {
  if (b == 1) return a;  // dividing is slow
  return a >= 0 ? (a + b - 1) / b : -(-a / b);
}

// Outputs [begin, end) whose tap at `offset` (tap * dilation - padding) falls inside an axis of `size`
// pixels.
struct Range {
  int64_t begin, end;
};
inline Range outputs_inside(int64_t offset, int64_t stride, int64_t size, int64_t outputs) {
  const int64_t begin = std::clamp<int64_t>(ceil_div(-offset, stride), 0, outputs);
  return {begin, std::clamp<int64_t>(ceil_div(size - offset, stride), begin, outputs)};
}

// One convolution, onto every `step`-th output row and column. Forward has one phase; grad_input
// has stride_height * stride_width.
struct Phase {
  int64_t first_row, row_step, first_column, column_step;  // of the output
  int64_t taps_high, taps_wide, dilation_height, dilation_width;
  int64_t top, left;      // output row r of the phase reads input rows r * stride + i * dilation - top
  int64_t weight_offset;  // of its packed taps, in vectors
};

// A pass as a set of convolutions. The pass reads `in` and writes `out`: forward the input and the output,
// grad_input grad_output and grad_input.
struct Geometry {
  int64_t in_height, in_width, out_height, out_width;
  int64_t stride_height, stride_width;  // pixels of the input between two outputs of a phase
  std::vector<Phase> phases;
  std::vector<int64_t> taps;  // packed order: tap number (i * kernel_width + j) in the weight
};

template <typename Shape>  // DepthwiseConv2dShape, Conv2dShape
Geometry forward_geometry(const Shape& s) {
  Geometry g{s.in_height, s.in_width, s.out_height, s.out_width, s.stride_height, s.stride_width, {}, {}};
  g.phases.push_back({0, 1, 0, 1, s.kernel_height, s.kernel_width, s.dilation_height, s.dilation_width,
                      s.padding_top, s.padding_left, 0});
  g.taps.resize(s.kernel_height * s.kernel_width);
  std::iota(g.taps.begin(), g.taps.end(), 0);
  return g;
}

// The taps that reach residue `phase` modulo stride: first, first + step, ... and where they read
// grad_output.
struct PhaseTaps {
  int64_t first, step, count, dilation, offset;  // offset: `top` or `left` of the phase
};

inline PhaseTaps phase_taps(int64_t phase, int64_t stride, int64_t dilation, int64_t padding,
                            int64_t kernel) {
  const int64_t divisor = std::gcd(stride, dilation);
  PhaseTaps taps{0, stride / divisor, 0, dilation / divisor, 0};
  const auto reaches = [&](int64_t i) { return (phase + padding - i * dilation) % stride == 0; };
  while (taps.first < std::min(kernel, taps.step) && !reaches(taps.first)) ++taps.first;
  if (taps.first >= std::min(kernel, taps.step)) return taps;  // no tap reaches this residue
  taps.count = (kernel - 1 - taps.first) / taps.step + 1;
  // Reversed: tap number t of the phase is i = first + (count - 1 - t) * step.
  const int64_t base = (phase + padding - taps.first * dilation) / stride;
  taps.offset = (taps.count - 1) * taps.dilation - base;
  return taps;
}

template <typename Shape>  // DepthwiseConv2dShape, Conv2dShape
Geometry grad_input_geometry(const Shape& s) {
  Geometry g{s.out_height, s.out_width, s.in_height, s.in_width, 1, 1, {}, {}};
  for (int64_t a = 0; a < std::min(s.stride_height, s.in_height); ++a) {
    const PhaseTaps high = phase_taps(a, s.stride_height, s.dilation_height, s.padding_top, s.kernel_height);
    for (int64_t b = 0; b < std::min(s.stride_width, s.in_width); ++b) {
      const PhaseTaps wide = phase_taps(b, s.stride_width, s.dilation_width, s.padding_left, s.kernel_width);
      g.phases.push_back({a, s.stride_height, b, s.stride_width, high.count, wide.count, high.dilation,
                          wide.dilation, high.offset, wide.offset, int64_t(g.taps.size())});
      for (int64_t i = high.count - 1; i >= 0; --i)
        for (int64_t j = wide.count - 1; j >= 0; --j)
          g.taps.push_back((high.first + i * high.step) * s.kernel_width + wide.first + j * wide.step);
    }
  }
  return g;
}

// The same with every phase of the stride, also those that an image smaller than it has no pixel of: packed
// weights serve every image.
template <typename Shape>
Geometry transposed_geometry(Shape s) {
  const int64_t height = s.in_height, width = s.in_width;
  s.in_height = std::max(height, s.stride_height);
  s.in_width = std::max(width, s.stride_width);
  Geometry g = grad_input_geometry(s);
  g.out_height = height, g.out_width = width;
  return g;
}

// Outputs of a phase in a row.
inline int64_t phase_columns(const Geometry& g, const Phase& phase) {
  return ceil_div(g.out_width - phase.first_column, phase.column_step);
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// The inner loops of the grouped convolution, forward and transposed: a few columns of one or two rows of
// outputs.
//
// One step: an input row meets one channel of every group. Each of its pixels is spread over the lanes of
//   its groups (a permute) or of its group (a broadcast) once, and added into every output it reaches: for
//   8 columns of 2 rows and 3x3 taps 10 spreads, 6 loads of taps and 48 multiply-adds.
#pragma once

#include "conv2d_grouped_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Rows of an image that one block of output channels is computed from, and where it goes.
template <typename A>
struct GroupedStrip {
  Block<const A> input;
  int64_t vector_stride;       // to the input's next L channels
  int64_t terms;               // channels of a group
  const LaneIndex<A>* spread;  // (terms): which lane each lane reads, if the groups are narrower than vectors
  Block<A> output;
  Block<const A> residual;  // as the output; data may be null
  const Geometry* geometry;
  const Phase* phase;
  const A* taps;  // (phases, taps_high, terms, taps_wide, L)
  Vector<A> bias;
  bool streams;  // store past the caches
  Activation activation;
  PrefetchRuns* next;  // memory to ask for meanwhile
};

// Computes columns [column, column_end) of one row, or two rows, of a phase.
template <typename A>
struct GroupedKernel {
  void (*one_row)(const GroupedStrip<A>&, int64_t row, int64_t column, int64_t column_end);
  void (*two_rows)(const GroupedStrip<A>&, int64_t row, int64_t column, int64_t column_end);  // or null
};

// Channel c of the groups of a pixel, in every lane of its group.
template <bool Permutes, typename A>
struct Spread {
  LaneIndex<A> index;
  int64_t offset;

  Spread(const GroupedStrip<A>& strip, int64_t c) {
    if constexpr (Permutes)
      index = strip.spread[c];
    else
      offset = c / lanes_of<A> * strip.vector_stride + c % lanes_of<A>;
  }
  Vector<A> operator()(const A* pixel) const {
    if constexpr (Permutes)
      return __builtin_shuffle(load_vector(pixel), index);
    else
      return broadcast(pixel[offset]);
  }
};

// Adds a row of the input to P outputs, S pixels apart, in each of R output rows: row q meets J taps, one
// pixel apart, at taps[q]. `first` is the column of input[0]; only if Edge may columns lie outside the row.
template <bool Permutes, int J, int S, int P, int R, bool Edge, typename A>
inline __attribute__((always_inline)) void add_row(Vector<A> (*sum)[P], const GroupedStrip<A>& strip,
                                                   const A* input, const A* const (&taps)[R], int64_t first) {
  constexpr int L = lanes_of<A>;
  const int64_t width = strip.geometry->in_width, pixel_stride = strip.input.pixel_stride;
  for (int64_t c = 0; c < strip.terms; ++c) {
    const Spread<Permutes, A> spread(strip, c);
    Vector<A> tap[R][J];
#pragma GCC unroll 2
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        tap[q][j] = load_vector(taps[q] + (c * J + j) * L);
        keep_in_register(tap[q][j]);
      }
#pragma GCC unroll 32
    for (int p = 0; p < (P - 1) * S + J; ++p) {
      if (S > J && p % S >= J) continue;  // no tap reaches it
      if (Edge && uint64_t(first + p) >= uint64_t(width)) continue;
      Vector<A> x = spread(input + p * pixel_stride);
      keep_in_register(x);
#pragma GCC unroll 2
      for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j)
          if (p >= j && (p - j) % S == 0 && (p - j) / S < P) sum[q][(p - j) / S] += x * tap[q][j];
    }
  }
}

// The same for any stride and dilation, a tap at a time.
template <bool Permutes, int P, bool Edge, typename A>
inline __attribute__((always_inline)) void add_row_of_any(Vector<A> (*sum)[P], const GroupedStrip<A>& strip,
                                                          const A* input, const A* taps, int64_t first) {
  const int64_t wide = strip.phase->taps_wide, dilation = strip.phase->dilation_width;
  const int64_t stride = strip.geometry->stride_width, width = strip.geometry->in_width;
  const int64_t pixel_stride = strip.input.pixel_stride;
  for (int64_t j = 0; j < wide; ++j) {
    const int64_t low = first + j * dilation;
    if (Edge && (low >= width || low + (P - 1) * stride < 0)) continue;
    for (int64_t c = 0; c < strip.terms; ++c) {
      const Spread<Permutes, A> spread(strip, c);
      const Vector<A> tap = load_vector(taps + (c * wide + j) * lanes_of<A>);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        if (Edge && uint64_t(low + p * stride) >= uint64_t(width)) continue;
        sum[0][p] += spread(input + (j * dilation + p * stride) * pixel_stride) * tap;
      }
    }
  }
}

// P outputs from `column` in R rows from `row`. J: taps in a row, S: their stride if it is 1 or 2; or both 0
// for any. Two rows share the input rows between them.
template <bool Permutes, int J, int S, int P, int R, bool Edge, typename A>
void compute_outputs(const GroupedStrip<A>& strip, int64_t row, int64_t column) {
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  const int64_t dilation = phase.dilation_height, tap_row = phase.taps_wide * strip.terms * lanes_of<A>;
  const int64_t top = row * g.stride_height - phase.top, first = column * g.stride_width - phase.left;
  // Taps (R = 2: input rows) that lie inside the image.
  const int64_t begin = top < 0 ? ceil_div(-top, dilation) : 0;
  const int64_t end = phase.taps_high == 0 || top >= g.in_height
                          ? 0
                          : std::min(phase.taps_high + (R - 1) * S, ceil_div(g.in_height - top, dilation));
  const int64_t row_step = dilation * strip.input.row_stride;
  const A* input = strip.input.data + top * strip.input.row_stride + first * strip.input.pixel_stride;
  input += begin * row_step;
  const A* taps = strip.taps + phase.weight_offset * strip.terms * lanes_of<A> + begin * tap_row;

  Vector<A> sum[R][P];
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[q][p] = strip.bias;
  for (int64_t i = begin; i < end; ++i, input += row_step, taps += tap_row) {
    strip.next->ask();
    if constexpr (J == 0) {
      add_row_of_any<Permutes, P, Edge, A>(sum, strip, input, taps, first);
    } else if constexpr (R == 1) {
      add_row<Permutes, J, S, P, 1, Edge, A>(sum, strip, input, {taps}, first);
    } else {
      // The second row meets an input row S taps later than the first.
      if (i < S)
        add_row<Permutes, J, S, P, 1, Edge, A>(sum, strip, input, {taps}, first);
      else if (i >= phase.taps_high)
        add_row<Permutes, J, S, P, 1, Edge, A>(sum + 1, strip, input, {taps - S * tap_row}, first);
      else
        add_row<Permutes, J, S, P, 2, Edge, A>(sum, strip, input, {taps, taps - S * tap_row}, first);
    }
  }

  const int64_t out_row = phase.first_row + row * phase.row_step;
  const int64_t out_column = phase.first_column + column * phase.column_step;
  const auto place = [&](const auto& block, int q, int p) {
    return block.data + (out_row + q * phase.row_step) * block.row_stride +
           (out_column + p * phase.column_step) * block.pixel_stride;
  };
  const auto store_all = [&](const auto& store_one) {
#pragma GCC unroll 2
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) store_one(place(strip.output, q, p), sum[q][p]);
  };
  if (!strip.residual.data && strip.activation == Activation::none)
    return with_store<A>(strip.streams, store_all);
  Vector<A> total[R][P];  // a copy: an array that a loop runs over lies in memory
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) total[q][p] = sum[q][p];
  for (int q = 0; q < R; ++q)
    for (int p = 0; p < P; ++p) {
      if (strip.residual.data) total[q][p] += load_vector(place(strip.residual, q, p));
      const Vector<A> value = activate_vector<A>(total[q][p], strip.activation);
      strip.streams ? stream_vector(place(strip.output, q, p), value)
                    : store_vector(place(strip.output, q, p), value);
    }
}

// Columns [column, column_end) of R rows from `row` of the phase.
template <bool Permutes, int J, int S, int P, int R, typename A>
void compute_columns(const GroupedStrip<A>& strip, int64_t row, int64_t column, int64_t column_end) {
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  // Outputs [inner_begin, inner_end) read inside the row only: the first tap, and the last.
  const int64_t reach = (phase.taps_wide - 1) * phase.dilation_width - phase.left;
  const int64_t inner_begin = outputs_inside(-phase.left, g.stride_width, g.in_width, column_end).begin;
  const int64_t inner_end = outputs_inside(reach, g.stride_width, g.in_width, column_end).end;
  for (; column + P <= column_end; column += P) {
    if (column >= inner_begin && column + P <= inner_end)
      compute_outputs<Permutes, J, S, P, R, false, A>(strip, row, column);
    else
      compute_outputs<Permutes, J, S, P, R, true, A>(strip, row, column);
  }
  if (column == column_end) return;
  if (column_end >= P)  // the last tile overlaps the one before
    return compute_outputs<Permutes, J, S, P, R, true, A>(strip, row, column_end - P);
  for (int q = 0; q < R; ++q)
    for (int64_t k = column; k < column_end; ++k)
      compute_outputs<Permutes, 0, 0, 1, 1, true, A>(strip, row + q, k);
}

// J taps, S pixels between two outputs.
template <bool Permutes, int J, int S, int P, typename A>
GroupedKernel<A> grouped_kernel(const Geometry& g, const Phase& phase) {
  GroupedKernel<A> kernel{compute_columns<Permutes, J, S, P, 1, A>, nullptr};
  if constexpr (vector_bytes == 64)  // two rows of sums need 32 registers
    if (g.stride_height == S && phase.dilation_height == 1 && phase.taps_high >= S)
      kernel.two_rows = compute_columns<Permutes, J, S, P, 2, A>;
  return kernel;
}

// Compile-time widths for float32 sums; float64 is for checking, and takes the general kernel.
template <bool Permutes, int P, typename A>
GroupedKernel<A> choose_grouped_kernel(const Geometry& g, const Phase& phase) {
  if constexpr (std::is_same_v<A, float>) {
    if (phase.dilation_width == 1 || phase.taps_wide == 1) {
      const int64_t wide = phase.taps_wide, stride = g.stride_width;
      if (wide == 1 && stride == 1) return grouped_kernel<Permutes, 1, 1, P, A>(g, phase);
      if (wide == 2 && stride == 1) return grouped_kernel<Permutes, 2, 1, P, A>(g, phase);
      if (wide == 3 && stride == 1) return grouped_kernel<Permutes, 3, 1, P, A>(g, phase);
      if (wide == 3 && stride == 2) return grouped_kernel<Permutes, 3, 2, P, A>(g, phase);
    }
  }
  return {compute_columns<Permutes, 0, 0, P, 1, A>, nullptr};
}

}  // namespace
}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

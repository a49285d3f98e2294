// The vectorized inner loops of forward and grad_input: a few columns of one or two rows of outputs.
//
// One step: 8 (or 7) pixels of one or two output rows in registers. Each input pixel is loaded once for a
//   row of taps and added into every output it reaches: K + 7 loads for 8 K or 16 K multiply-adds.
#pragma once

#include "depthwise_conv2d_vectorized_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Some blocks of channels of an image, and what is computed from them: a phase, or a term of its sum.
template <typename A>
struct Strip {
  Block<const A> input;  // of the first block of channels
  Block<A> output;
  int64_t blocks, last_lane;  // the last block starts last_lane channels after the first: it may overlap the
                              // one before, also that of another group (then last_lane is negative)
  const Geometry* geometry;
  const Phase* phase;
  const A* taps;        // (blocks, ..., taps_high, taps_wide, L)
  int64_t taps_stride;  // between two blocks
  const A* bias;        // (blocks, L), or null
  bool accumulate;      // add to what the output holds, instead of starting from the bias
  bool streams;         // store past the caches
  Activation activation;
  Prefetch* next;  // memory to ask for meanwhile, or null
};

// Computes columns [column, column_end) of one row, or two rows, of a phase.
template <typename A>
struct ColumnsKernel {
  void (*one_row)(const Strip<A>&, int64_t row, int64_t column, int64_t column_end);
  void (*two_rows)(const Strip<A>&, int64_t row, int64_t column, int64_t column_end);  // or null
};

// Adds a row of the input to P outputs, S pixels apart, in each of R output rows: row q meets the J taps at
// taps[q], one pixel apart. `first` is the column of input[0]; only if Edge may columns lie outside the row.
template <int J, int S, int P, int R, bool Edge, typename A>
inline __attribute__((always_inline)) void add_taps(Vector<A> (*sum)[P], const A* input, int64_t pixel_stride,
                                                    const A* const (&taps)[R], int64_t first, int64_t width) {
  constexpr int L = lanes_of<A>;
  Vector<A> tap[R][J];
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) tap[q][j] = load_vector(taps[q] + j * L);
#pragma GCC unroll 32
  for (int p = 0; p < (P - 1) * S + J; ++p) {
    if (S > J && p % S >= J) continue;  // no tap reaches it
    if (Edge && uint64_t(first + p) >= uint64_t(width)) continue;
    Vector<A> x = load_vector(input + p * pixel_stride);
    keep_in_register(x);
#pragma GCC unroll 2
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
        if (p >= j && (p - j) % S == 0 && (p - j) / S < P) sum[q][(p - j) / S] += x * tap[q][j];
  }
}

// A row (or two) of a strip: what its tiles of outputs have in common.
template <typename A>
struct RowView {
  const A* input;                                // the first tap's row, column 0 of the image
  A* output;                                     // the phase's column 0
  int64_t input_row_stride, input_pixel_stride;  // input_row_stride: between two taps
  int64_t output_row_stride, output_pixel_stride;
  int64_t begin, end;  // taps (R = 2: input rows) that lie inside the image
  int64_t taps_high, taps_wide, stride, dilation, left, in_width;
};

// P outputs from `column`, in R rows, of one block of channels. K: taps in a row if known at compile time,
// else 0; S: their stride if it is 1 or 2 and taps are one pixel apart, else 0. Two rows share the input rows
// between them.
template <int K, int S, int P, int R, bool Edge, typename A>
inline __attribute__((always_inline)) void compute_outputs(const Strip<A>& strip, const RowView<A>& row,
                                                           int64_t column, int64_t block) {
  static_assert(R == 1 || K > 0);
  constexpr int L = lanes_of<A>;
  const int64_t lane = std::min(block * L, strip.last_lane);
  const int64_t pixel_stride = row.input_pixel_stride, tap_row = row.taps_wide * L;
  const int64_t first = column * row.stride - row.left;
  const A* input = row.input + lane + first * pixel_stride + row.begin * row.input_row_stride;
  const A* taps = strip.taps + block * strip.taps_stride + row.begin * tap_row;

  Vector<A> sum[R][P];
  const Vector<A> start = strip.bias ? load_vector(strip.bias + block * L) : Vector<A>{};
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[q][p] = start;

  for (int64_t i = row.begin; i < row.end; ++i, input += row.input_row_stride, taps += tap_row) {
    if constexpr (R == 2) {
      if (i == 0)
        add_taps<K, S, P, 1, Edge, A>(sum, input, pixel_stride, {taps}, first, row.in_width);
      else if (i == row.taps_high)
        add_taps<K, S, P, 1, Edge, A>(sum + 1, input, pixel_stride, {taps - tap_row}, first, row.in_width);
      else
        add_taps<K, S, P, 2, Edge, A>(sum, input, pixel_stride, {taps, taps - tap_row}, first, row.in_width);
    } else if constexpr (K > 0) {
      add_taps<K, S, P, 1, Edge, A>(sum, input, pixel_stride, {taps}, first, row.in_width);
    } else if constexpr (S > 0) {
      for (int64_t j = 0; j < row.taps_wide;) {
        const int64_t left = row.taps_wide - j;
        const A* x = input + j * pixel_stride;
        const A* w = taps + j * L;
        if (Edge) {  // skip taps that meet nothing but padding
          if (left >= 7 && first + j + 7 + (P - 1) * S <= 0) {
            j += 7;
            continue;
          }
          if (first + j >= row.in_width) break;
        }
        if (left >= 7) {
          add_taps<7, S, P, 1, Edge, A>(sum, x, pixel_stride, {w}, first + j, row.in_width), j += 7;
        } else if (left >= 3) {
          add_taps<3, S, P, 1, Edge, A>(sum, x, pixel_stride, {w}, first + j, row.in_width), j += 3;
        } else {
          add_taps<1, S, P, 1, Edge, A>(sum, x, pixel_stride, {w}, first + j, row.in_width), j += 1;
        }
      }
    } else {
      for (int64_t j = 0; j < row.taps_wide; ++j) {
        const Vector<A> tap = load_vector(taps + j * L);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int64_t offset = p * row.stride + j * row.dilation;
          if (Edge && uint64_t(first + offset) >= uint64_t(row.in_width)) continue;
          sum[0][p] += load_vector(input + offset * pixel_stride) * tap;
        }
      }
    }
  }

  A* output = row.output + lane + column * row.output_pixel_stride;
  const auto store_all = [&](const auto& store_one) {
#pragma GCC unroll 2
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
        store_one(output + q * row.output_row_stride + p * row.output_pixel_stride, sum[q][p]);
  };
  if (!strip.accumulate && strip.activation == Activation::none)
    return with_store<A>(strip.streams, store_all);
  Vector<A> total[R][P];  // a copy: an array that a loop runs over lies in memory
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) total[q][p] = sum[q][p];
  for (int q = 0; q < R; ++q)
    for (int p = 0; p < P; ++p) {
      A* target = output + q * row.output_row_stride + p * row.output_pixel_stride;
      if (strip.accumulate) total[q][p] += load_vector(target);
      const Vector<A> value = activate_vector<A>(total[q][p], strip.activation);
      strip.streams ? stream_vector(target, value) : store_vector(target, value);
    }
}

// P outputs from `column`, in R rows, of every block of channels.
template <int K, int S, int P, int R, bool Edge, typename A>
void compute_blocks(const Strip<A>& strip, const RowView<A>& row, int64_t column) {
  for (int64_t block = 0; block < strip.blocks; ++block) {
    if (strip.next) strip.next->ask();
    compute_outputs<K, S, P, R, Edge, A>(strip, row, column, block);
  }
}

// Columns [column, column_end) of R rows from `row` of the phase.
template <int K, int S, int P, int R, typename A>
void compute_columns(const Strip<A>& strip, int64_t row, int64_t column, int64_t column_end) {
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  const int64_t top = row * g.stride_height - phase.top, dilation = phase.dilation_height;
  const int64_t stride = S > 0 ? S : g.stride_width;  // a constant divides in a cycle
  RowView<A> view;
  view.input = strip.input.data + top * strip.input.row_stride;
  view.output = strip.output.data + (phase.first_row + row * phase.row_step) * strip.output.row_stride +
                phase.first_column * strip.output.pixel_stride;
  view.input_row_stride = dilation * strip.input.row_stride;
  view.input_pixel_stride = strip.input.pixel_stride;
  view.output_row_stride = phase.row_step * strip.output.row_stride;
  view.output_pixel_stride = phase.column_step * strip.output.pixel_stride;
  view.taps_high = phase.taps_high;
  view.taps_wide = phase.taps_wide;
  view.begin = top < 0 ? ceil_div(-top, dilation) : 0;  // past `end` if all taps are above the image
  view.end = 0;
  if (phase.taps_high > 0 && top < g.in_height)
    view.end = std::min(phase.taps_high + R - 1, ceil_div(g.in_height - top, dilation));
  view.stride = stride;
  view.dilation = phase.dilation_width;
  view.left = phase.left;
  view.in_width = g.in_width;

  // Outputs [inner_begin, inner_end) read inside the row only: the first tap, and the last.
  const int64_t reach = (phase.taps_wide - 1) * phase.dilation_width - phase.left;
  const int64_t inner_begin = outputs_inside(-phase.left, stride, g.in_width, column_end).begin;
  const int64_t inner_end = outputs_inside(reach, stride, g.in_width, column_end).end;
  for (; column + P <= column_end; column += P) {
    if (column >= inner_begin && column + P <= inner_end)
      compute_blocks<K, S, P, R, false, A>(strip, view, column);
    else
      compute_blocks<K, S, P, R, true, A>(strip, view, column);
  }
  if (column == column_end) return;
  if (column_end >= P && !strip.accumulate) {  // the last tile overlaps the one before
    compute_blocks<K, S, P, R, true, A>(strip, view, column_end - P);
    return;
  }
  if constexpr (R == 1) {
    for (; column < column_end; ++column) compute_blocks<0, S, 1, 1, true, A>(strip, view, column);
  } else {
    for (int q = 0; q < R; ++q) compute_columns<K, S, P, 1, A>(strip, row + q, column, column_end);
  }
}

template <int K, int S, int P, typename A>
ColumnsKernel<A> columns_kernel(bool rows_share_input) {
  ColumnsKernel<A> kernel{compute_columns<K, S, P, 1, A>, nullptr};
  if constexpr (K > 0 && S == 1 && vector_bytes == 64)  // two rows of sums need 32 registers
    if (rows_share_input) kernel.two_rows = compute_columns<K, S, P, 2, A>;
  return kernel;
}

// Compile-time widths for float32 sums; float64 is for checking, and takes the general kernel.
template <int P, typename A>
ColumnsKernel<A> choose_columns_kernel(const Geometry& g, const Phase& phase) {
  const bool share = g.stride_height == 1 && phase.dilation_height == 1;
  if (phase.dilation_width == 1 || phase.taps_wide == 1) {
    if (g.stride_width == 1) {
      if constexpr (std::is_same_v<A, float>) switch (phase.taps_wide) {
          case 1:
            return columns_kernel<1, 1, P, A>(share);
          case 2:
            return columns_kernel<2, 1, P, A>(share);
          case 3:
            return columns_kernel<3, 1, P, A>(share);
          case 5:
            return columns_kernel<5, 1, P, A>(share);
          case 7:
            return columns_kernel<7, 1, P, A>(share);
        }
      return columns_kernel<0, 1, P, A>(share);
    }
    if (g.stride_width == 2) {
      if constexpr (std::is_same_v<A, float>) switch (phase.taps_wide) {
          case 3:
            return columns_kernel<3, 2, P, A>(share);
          case 5:
            return columns_kernel<5, 2, P, A>(share);
        }
      return columns_kernel<0, 2, P, A>(share);
    }
  }
  return columns_kernel<0, 0, P, A>(share);
}

}  // namespace
}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

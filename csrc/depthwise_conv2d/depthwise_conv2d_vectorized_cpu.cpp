// Depthwise convolution, C++, vectorized: forward and grad_input.
//
// Computes  out[e, f] = act(b + sum_ij in[e*s + i*d - p, f*s + j*d - p] * w[i, j]), a channel in each vector lane.
// One inner step: 8 (or 7) output pixels of a row in registers; a row of taps in registers; each input pixel is
//   loaded once and added into every output that it reaches: K loads and 8 K multiply-adds for 8 outputs a tap row.
// Bytes: input + output once, while a strip of rows stays in the L2 cache.
// Against row_blocked: sums stay in registers over all taps, so the output is written once, not once a tap.
// grad_input is the same loop: for stride s, the input rows and columns of each residue modulo s (a phase) are a
//   stride-1 convolution of grad_output with every s-th tap, reversed; no product with a zero, no atomics.
// Limits: a channel multiplier, and images in float16 or bfloat16, go through a transposing copy of a strip.
#include <numeric>
#include <vector>

#include "depthwise_conv2d_vectorized_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// One convolution of a block, onto every `step`-th output row and column. Forward has one phase; grad_input
// has stride_height * stride_width.
struct Phase {
  int64_t first_row, row_step, first_column, column_step;  // of the output
  int64_t taps_high, taps_wide, dilation_height, dilation_width;
  int64_t top, left;      // output row r of the phase reads input rows r * stride + i * dilation - top
  int64_t weight_offset;  // of its packed taps, in vectors
};

struct Geometry {
  int64_t in_height, in_width, out_height, out_width;
  int64_t stride_height, stride_width;  // pixels of the input between two outputs of a phase
  std::vector<Phase> phases;
  std::vector<int64_t> taps;  // packed order: tap number (i * kernel_width + j) in the weight
};

Geometry forward_geometry(const DepthwiseConv2dShape& s) {
  Geometry g{s.in_height, s.in_width, s.out_height, s.out_width, s.stride_height, s.stride_width, {}, {}};
  g.phases.push_back({0, 1, 0, 1, s.kernel_height, s.kernel_width, s.dilation_height, s.dilation_width,
                      s.padding_top, s.padding_left, 0});
  g.taps.resize(s.kernel_height * s.kernel_width);
  std::iota(g.taps.begin(), g.taps.end(), 0);
  return g;
}

// The taps that reach residue `phase` modulo stride: first, first + step, ... and where they read grad_output.
struct PhaseTaps {
  int64_t first, step, count, dilation, offset;  // offset: `top` or `left` of the phase
};

PhaseTaps phase_taps(int64_t phase, int64_t stride, int64_t dilation, int64_t padding, int64_t kernel) {
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

Geometry grad_input_geometry(const DepthwiseConv2dShape& s) {
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

// Adds a row of J taps, one pixel apart, to P outputs, S pixels apart. `first` is the column of input[0]; columns
// outside [0, width) are zero and are looked for only where Edge.
template <int J, int S, int P, bool Edge, typename A>
inline __attribute__((always_inline)) void add_taps(Vector<A> (&sum)[P], const A* input, int64_t pixel_stride,
                                                    const A* taps, int64_t first, int64_t width) {
  constexpr int L = lanes_of<A>;
  Vector<A> tap[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) tap[j] = load_vector(taps + j * L);
#pragma GCC unroll 32
  for (int p = 0; p < (P - 1) * S + J; ++p) {
    if (S > J && p % S >= J) continue;  // no tap reaches it
    if (Edge && uint64_t(first + p) >= uint64_t(width)) continue;
    const Vector<A> x = load_vector(input + p * pixel_stride);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j)
      if (p >= j && (p - j) % S == 0 && (p - j) / S < P) sum[(p - j) / S] += x * tap[j];
  }
}

// One convolution of a block of channels over output rows [row_begin, row_end) of a phase.
template <typename A>
struct Strip {
  Block<const A> input;
  Block<A> output;
  const Geometry* geometry;
  const Phase* phase;
  const A* taps;  // (taps_high, taps_wide, L)
  const A* bias;  // (L), or null
  bool accumulate;  // add to what the output holds, instead of starting from the bias
  Activation activation;
};

// P outputs of row `row` from column `column` of the phase. K: taps in a row if known at compile time, else 0;
// S: their stride if it is 1 or 2 and taps are one pixel apart, else 0.
template <int K, int S, int P, bool Edge, typename A>
void compute_outputs(const Strip<A>& strip, int64_t row, int64_t column) {
  constexpr int L = lanes_of<A>;
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  const int64_t out_row = phase.first_row + row * phase.row_step;
  const int64_t out_column = phase.first_column + column * phase.column_step;
  A* output = strip.output.data + out_row * strip.output.row_stride + out_column * strip.output.pixel_stride;
  const int64_t output_step = phase.column_step * strip.output.pixel_stride;

  Vector<A> sum[P];
  const Vector<A> start = strip.bias ? load_vector(strip.bias) : Vector<A>{};
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sum[p] = strip.accumulate ? load_vector(output + p * output_step) : start;

  const int64_t pixel_stride = strip.input.pixel_stride;
  const int64_t first = column * g.stride_width - phase.left;
  for (int64_t i = 0; i < phase.taps_high; ++i) {
    const int64_t in_row = row * g.stride_height + i * phase.dilation_height - phase.top;
    if (in_row < 0 || in_row >= g.in_height) continue;
    const A* input = strip.input.data + in_row * strip.input.row_stride + first * pixel_stride;
    const A* taps = strip.taps + i * phase.taps_wide * L;
    if constexpr (K > 0) {
      add_taps<K, S, P, Edge, A>(sum, input, pixel_stride, taps, first, g.in_width);
    } else if constexpr (S > 0) {
      for (int64_t j = 0; j < phase.taps_wide;) {
        const A* x = input + j * pixel_stride;
        const A* w = taps + j * L;
        const int64_t left = phase.taps_wide - j;
        if (Edge) {  // skip taps that meet nothing but padding
          if (first + j + 7 + (P - 1) * S <= 0 && left >= 7) {
            j += 7;
            continue;
          }
          if (first + j >= g.in_width) break;
        }
        if (left >= 7) {
          add_taps<7, S, P, Edge, A>(sum, x, pixel_stride, w, first + j, g.in_width), j += 7;
        } else if (left >= 4) {
          add_taps<4, S, P, Edge, A>(sum, x, pixel_stride, w, first + j, g.in_width), j += 4;
        } else if (left >= 2) {
          add_taps<2, S, P, Edge, A>(sum, x, pixel_stride, w, first + j, g.in_width), j += 2;
        } else {
          add_taps<1, S, P, Edge, A>(sum, x, pixel_stride, w, first + j, g.in_width), j += 1;
        }
      }
    } else {
      for (int64_t j = 0; j < phase.taps_wide; ++j) {
        const Vector<A> tap = load_vector(taps + j * L);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const int64_t offset = p * g.stride_width + j * phase.dilation_width;
          if (Edge && uint64_t(first + offset) >= uint64_t(g.in_width)) continue;
          sum[p] += load_vector(input + offset * pixel_stride) * tap;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    store_vector(output + p * output_step, activate_vector<A>(sum[p], strip.activation));
}

template <int K, int S, int P, typename A>
void compute_row(const Strip<A>& strip, int64_t row) {
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  const int64_t columns = (g.out_width - phase.first_column + phase.column_step - 1) / phase.column_step;
  // Outputs [inner_begin, inner_end) read inside the row only.
  const int64_t reach = (phase.taps_wide - 1) * phase.dilation_width - phase.left;
  const int64_t inner_begin = phase.left > 0 ? (phase.left + g.stride_width - 1) / g.stride_width : 0;
  const int64_t last = g.in_width - 1 - reach;
  const int64_t inner_end = last < 0 ? 0 : last / g.stride_width + 1;
  int64_t column = 0;
  const auto blocks_of = [&](auto width) {
    constexpr int B = decltype(width)::value;
    for (; column + B <= columns; column += B) {
      if (column >= inner_begin && column + B <= inner_end)
        compute_outputs<K, S, B, false, A>(strip, row, column);
      else
        compute_outputs<K, S, B, true, A>(strip, row, column);
    }
  };
  blocks_of(std::integral_constant<int, P>{});
  if (column < columns && columns >= P && !strip.accumulate) {  // the last block overlaps the one before
    compute_outputs<K, S, P, true, A>(strip, row, columns - P);
    return;
  }
  for (; column < columns; ++column) compute_outputs<0, (S > 0 ? S : 0), 1, true, A>(strip, row, column);
}

template <typename A>
using RowKernel = void (*)(const Strip<A>&, int64_t row);

template <int P, typename A>
RowKernel<A> choose_row_kernel(const Geometry& g, const Phase& phase) {
  const int64_t taps = phase.taps_wide;
  if (phase.dilation_width == 1 || taps == 1) {
    if (g.stride_width == 1)
      return taps == 3   ? compute_row<3, 1, P, A>
             : taps == 5 ? compute_row<5, 1, P, A>
             : taps == 7 ? compute_row<7, 1, P, A>
                         : compute_row<0, 1, P, A>;
    if (g.stride_width == 2)
      return taps == 3   ? compute_row<3, 2, P, A>
             : taps == 5 ? compute_row<5, 2, P, A>
                         : compute_row<0, 2, P, A>;
  }
  return compute_row<0, 0, P, A>;
}

// Rows of the input that output rows [begin, end) of any phase read.
std::pair<int64_t, int64_t> input_rows(const Geometry& g, int64_t begin, int64_t end) {
  int64_t low = g.in_height, high = 0;
  for (const Phase& phase : g.phases) {
    if (phase.taps_high == 0 || phase.taps_wide == 0) continue;
    const int64_t first = (std::max<int64_t>(begin - phase.first_row, 0) + phase.row_step - 1) / phase.row_step;
    const int64_t last = (end - 1 - phase.first_row) / phase.row_step;
    low = std::min(low, first * g.stride_height - phase.top);
    high = std::max(high, last * g.stride_height + (phase.taps_high - 1) * phase.dilation_height - phase.top + 1);
  }
  return {std::clamp<int64_t>(low, 0, g.in_height), std::clamp<int64_t>(high, 0, g.in_height)};
}

// The convolution that both passes are. `in_lanes(first, m)`: the input channels of output channels first, ...,
// in the m-th of `terms` terms; `weight_channel(channel, m)`: the filter that meets them.
template <typename T, typename InLanes, typename WeightChannel>
void convolve(const T* input, int64_t in_channels, T* output, int64_t out_channels, int64_t batch, bool channels_last,
              const Geometry& g, const T* weight, int64_t weight_taps, const T* bias, Activation activation,
              int64_t terms, const InLanes& in_lanes, const WeightChannel& weight_channel, ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const Image<const T> in{nullptr, in_channels, g.in_height, g.in_width, channels_last};
  const Image<T> out{nullptr, out_channels, g.out_height, g.out_width, channels_last};
  const bool in_place = std::is_same_v<T, A> && channels_last && out_channels >= L && in_lanes(0, 0).is_identity();
  const int64_t blocks = (out_channels + L - 1) / L;

  // Strips of rows: as many as the L2 cache holds, but enough strips for every thread.
  const int64_t channels_at_once = in_place ? out_channels : L;
  const int64_t row_bytes = int64_t(sizeof(A)) * channels_at_once *
                            (g.out_width + g.in_width * std::max<int64_t>(g.in_height / g.out_height, 1));
  const int64_t row_step = g.phases[0].row_step;
  int64_t strip_rows = std::clamp<int64_t>((384 << 10) / row_bytes, 1, g.out_height);
  const int64_t parallel_items = batch * (in_place ? 1 : blocks);
  if (parallel_items < 64)
    strip_rows = std::min(strip_rows, std::max<int64_t>(g.out_height * parallel_items / 64, 4));
  strip_rows = std::min((strip_rows + row_step - 1) / row_step * row_step, g.out_height);
  const int64_t strips = (g.out_height + strip_rows - 1) / strip_rows;

  // In place, an item is a strip of a group of blocks whose packed taps fit the cache; else of one block.
  const int64_t packed = int64_t(g.taps.size()) * L;  // values of one block
  const int64_t group = in_place ? std::clamp<int64_t>((192 << 10) / (packed * int64_t(sizeof(A))), 1, blocks) : 1;
  const int64_t groups = (blocks + group - 1) / group;
  const auto kernel_of = [&](const Phase& phase) {
    const int64_t columns = (g.out_width - phase.first_column + phase.column_step - 1) / phase.column_step;
    return columns % 8 != 0 && columns % 7 == 0 ? choose_row_kernel<7, A>(g, phase) : choose_row_kernel<8, A>(g, phase);
  };
  std::vector<RowKernel<A>> kernels;
  int64_t tile_rows = 0;
  for (const Phase& phase : g.phases) kernels.push_back(kernel_of(phase));
  for (int64_t strip = 0; strip < strips; ++strip) {
    const auto [low, high] = input_rows(g, strip * strip_rows, std::min((strip + 1) * strip_rows, g.out_height));
    tile_rows = std::max(tile_rows, high - low);
  }

  parallel_for(threads, groups * batch * strips, [&](int64_t begin, int64_t end) {
    Scratch<A> taps(group * terms * packed), biases(group * L);
    Scratch<A> in_tile(in_place ? 0 : tile_rows * g.in_width * L);
    Scratch<A> out_tile(in_place ? 0 : strip_rows * g.out_width * L);
    int64_t packed_group = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item % strips, image = item / strips % batch, group_index = item / strips / batch;
      const int64_t first_block = group_index * group, last_block = std::min(first_block + group, blocks);
      if (group_index != packed_group) {
        packed_group = group_index;
        for (int64_t block = first_block; block < last_block; ++block) {
          const int64_t start = in_place ? block_start(block, out_channels, L) : block * L;
          A* to = taps.data() + (block - first_block) * terms * packed;
          A* bias_to = biases.data() + (block - first_block) * L;
          for (int64_t lane = 0; lane < L; ++lane) {
            const bool valid = start + lane < out_channels;
            bias_to[lane] = valid && bias ? load(bias[start + lane]) : A(0);
            for (int64_t m = 0; m < terms; ++m) {
              const T* filter = valid ? weight + weight_channel(start + lane, m) * weight_taps : nullptr;
              for (size_t t = 0; t < g.taps.size(); ++t)
                to[m * packed + int64_t(t) * L + lane] = valid ? load(filter[g.taps[t]]) : A(0);
            }
          }
        }
      }
      const int64_t row_begin = strip * strip_rows, row_end = std::min(row_begin + strip_rows, g.out_height);
      const auto [low, high] = input_rows(g, row_begin, row_end);
      Image<const T> source = in;
      source.data = input + image * in_channels * g.in_height * g.in_width;
      Image<T> target = out;
      target.data = output + image * out_channels * g.out_height * g.out_width;
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t start = in_place ? block_start(block, out_channels, L) : block * L;
        const int64_t count = std::min(L, out_channels - start);
        Strip<A> strip_of_block{};
        strip_of_block.geometry = &g;
        if constexpr (std::is_same_v<T, A>)
          if (in_place) strip_of_block.output = {target.data + start, target.row_stride(), target.pixel_stride()};
        if (!in_place)
          strip_of_block.output = {out_tile.data() - row_begin * g.out_width * L, g.out_width * L, L};
        for (int64_t m = 0; m < terms; ++m) {
          strip_of_block.input = read_block<T, A>(source, in_lanes(start, m), count, low, high, in_tile.data());
          strip_of_block.accumulate = m > 0;
          strip_of_block.bias = bias ? biases.data() + (block - first_block) * L : nullptr;
          strip_of_block.activation = m == terms - 1 ? activation : Activation::none;
          for (size_t k = 0; k < g.phases.size(); ++k) {
            const Phase& phase = g.phases[k];
            strip_of_block.phase = &phase;
            strip_of_block.taps = taps.data() + ((block - first_block) * terms + m) * packed + phase.weight_offset * L;
            for (int64_t row = std::max<int64_t>(row_begin - phase.first_row + phase.row_step - 1, 0) / phase.row_step;
                 phase.first_row + row * phase.row_step < row_end; ++row)
              kernels[k](strip_of_block, row);
          }
        }
        if (!in_place) store_tile<T, A>(target, {start}, count, row_begin, row_end, out_tile.data());
      }
    }
  });
}

}  // namespace

template <typename T>
void depthwise_conv2d_vectorized_forward_cpu(const T* input, const T* weight, const T* bias, T* output,
                                             const DepthwiseConv2dShape& shape, Activation activation,
                                             ParallelFor threads) {
  const int64_t multiplier = shape.multiplier();
  convolve<T>(
      input, shape.in_channels, output, shape.out_channels, shape.batch, shape.channels_last,
      forward_geometry(shape), weight, shape.kernel_height * shape.kernel_width, bias, activation, 1,
      [&](int64_t first, int64_t) { return Lanes{first, 1, multiplier, 0}; },
      [](int64_t channel, int64_t) { return channel; }, threads);
}

template <typename T>
void depthwise_conv2d_vectorized_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,
                                                const DepthwiseConv2dShape& shape, ParallelFor threads) {
  const int64_t multiplier = shape.multiplier();
  convolve<T>(
      grad_output, shape.out_channels, grad_input, shape.in_channels, shape.batch, shape.channels_last,
      grad_input_geometry(shape), weight, shape.kernel_height * shape.kernel_width, nullptr, Activation::none,
      multiplier, [&](int64_t first, int64_t m) { return Lanes{first, multiplier, 1, m}; },
      [&](int64_t channel, int64_t m) { return channel * multiplier + m; }, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                                \
  template void depthwise_conv2d_vectorized_forward_cpu<T>(const T*, const T*, const T*, T*,                   \
                                                           const DepthwiseConv2dShape&, Activation, ParallelFor); \
  template void depthwise_conv2d_vectorized_grad_input_cpu<T>(const T*, const T*, T*,                          \
                                                              const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_INSTANTIATE(float)
FASTCONV_INSTANTIATE(double)
FASTCONV_INSTANTIATE(BFloat16)
FASTCONV_INSTANTIATE(Float16)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

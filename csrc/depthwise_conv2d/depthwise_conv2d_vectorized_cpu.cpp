// Depthwise convolution, C++, vectorized: forward and grad_input, a channel in each vector lane.
//
// Computes  out[e, f] = act(b + sum_ij in[e*s + i*d - p, f*s + j*d - p] * w[i, j]).
// One inner step: 8 (or 7) pixels of one or two output rows in registers. Each input pixel is loaded once for
//   a row of taps and added into every output it reaches: K + 7 loads for 8 K or 16 K multiply-adds.
// Bytes: input + output once, while a strip of rows stays in the L2 cache.
// Against row_blocked: sums stay in registers over all taps; the output is written once, not once a tap.
// grad_input is the same loop over its phases: no product with a zero, no atomics.
// Limits: images that are not channels_last go through a tile, transposed a few rows at a time.
#include "depthwise_conv2d_vectorized_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Adds a row of the input to P outputs, S pixels apart, in each of R output rows: row q meets the J taps at
// taps[q], one pixel apart. `first` is the column of input[0]; only if Edge may columns lie outside the row,
// where they count as zeros.
template <int J, int S, int P, int R, bool Edge, typename A>
inline __attribute__((always_inline)) void add_taps(Vector<A> (*sum)[P], const A* input, int64_t pixel_stride,
                                                    const A* const (&taps)[R], int64_t first, int64_t width) {
  constexpr int L = lanes_of<A>;
  alignas(64) static const A zeros[L] = {};
  Vector<A> tap[R][J];
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) tap[q][j] = load_vector(taps[q] + j * L);
#pragma GCC unroll 32
  for (int p = 0; p < (P - 1) * S + J; ++p) {
    if (S > J && p % S >= J) continue;  // no tap reaches it
    const A* pixel = input + p * pixel_stride;
    if constexpr (Edge) {
      const bool inside = uint64_t(first + p) < uint64_t(width);
      if (J * R >= 5 && !inside) continue;  // many products saved for one jump
      pixel = inside ? pixel : zeros;
    }
    Vector<A> x = load_vector(pixel);
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
  const A* taps;                                 // (blocks, ..., taps_high, taps_wide, L)
  A* output;                                     // the phase's column 0
  const A* bias;                                 // (blocks, L), or null
  int64_t taps_stride, last_lane;                // as in Strip
  int64_t input_row_stride, input_pixel_stride;  // input_row_stride: between two taps
  int64_t output_row_stride, output_pixel_stride;
  int64_t begin, end;  // taps (R = 2: input rows) that lie inside the image
  int64_t taps_high, taps_wide, stride, dilation, left, in_width;
  bool accumulate, streams;
  Activation activation;
};

// P outputs from `column`, in R rows, of one block of channels. K: taps in a row if known at compile time,
// else 0; S: their stride if it is 1 or 2 and taps are one pixel apart, else 0. Two rows share the input rows
// between them.
template <int K, int S, int P, int R, bool Edge, typename A>
inline __attribute__((always_inline)) void compute_outputs(const RowView<A>& row, int64_t column,
                                                           int64_t block) {
  static_assert(R == 1 || K > 0);
  constexpr int L = lanes_of<A>;
  const int64_t lane = std::min(block * L, row.last_lane);
  const int64_t pixel_stride = row.input_pixel_stride, tap_row = row.taps_wide * L;
  const int64_t first = column * row.stride - row.left;
  const A* input = row.input + lane + first * pixel_stride + row.begin * row.input_row_stride;
  const A* taps = row.taps + block * row.taps_stride + row.begin * tap_row;

  Vector<A> sum[R][P];
  const Vector<A> start = row.bias ? load_vector(row.bias + block * L) : Vector<A>{};
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
  if (!row.accumulate && row.activation == Activation::none) {
    if (row.streams) return store_all([](A* target, Vector<A> value) { stream_vector(target, value); });
    return store_all([](A* target, Vector<A> value) { store_vector(target, value); });
  }
  Vector<A> total[R][P];  // a copy: an array that a loop runs over lies in memory
#pragma GCC unroll 2
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) total[q][p] = sum[q][p];
  for (int q = 0; q < R; ++q)
    for (int p = 0; p < P; ++p) {
      A* target = output + q * row.output_row_stride + p * row.output_pixel_stride;
      if (row.accumulate) total[q][p] += load_vector(target);
      store_vector(target, activate_vector<A>(total[q][p], row.activation));
    }
}

// Some blocks of channels of an image, and what is computed from them: a phase, or a term of its sum.
template <typename A>
struct Strip {
  Block<const A> input;  // of the first block of channels
  Block<A> output;
  int64_t blocks, last_lane;  // the last block starts at channel last_lane, which may overlap the one before
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

// P outputs from `column`, in R rows, of every block of channels.
template <int K, int S, int P, int R, bool Edge, typename A>
void compute_blocks(const Strip<A>& strip, const RowView<A>& row, int64_t column) {
  for (int64_t block = 0; block < strip.blocks; ++block) {
    if (strip.next) strip.next->ask();
    compute_outputs<K, S, P, R, Edge, A>(row, column, block);
  }
}

// Columns [column, column_end) of R rows from `row` of the phase.
template <int K, int S, int P, int R, typename A>
void compute_columns(const Strip<A>& strip, int64_t row, int64_t column, int64_t column_end) {
  const Geometry& g = *strip.geometry;
  const Phase& phase = *strip.phase;
  const int64_t top = row * g.stride_height - phase.top, dilation = phase.dilation_height;
  RowView<A> view;
  view.input = strip.input.data + top * strip.input.row_stride;
  view.taps = strip.taps;
  view.output = strip.output.data + (phase.first_row + row * phase.row_step) * strip.output.row_stride +
                phase.first_column * strip.output.pixel_stride;
  view.bias = strip.bias;
  view.taps_stride = strip.taps_stride;
  view.last_lane = strip.last_lane;
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
  view.stride = S > 0 ? S : g.stride_width;
  view.dilation = phase.dilation_width;
  view.left = phase.left;
  view.in_width = g.in_width;
  view.accumulate = strip.accumulate;
  view.streams = strip.streams;
  view.activation = strip.activation;

  // Outputs [inner_begin, inner_end) read inside the row only.
  const int64_t stride = S > 0 ? S : g.stride_width;  // a constant divides in a cycle
  const int64_t reach = (phase.taps_wide - 1) * phase.dilation_width - phase.left;
  const int64_t inner_begin = phase.left > 0 ? (phase.left + stride - 1) / stride : 0;
  const int64_t last = g.in_width - 1 - reach;
  const int64_t inner_end = last < 0 ? 0 : last / stride + 1;
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

template <typename A>
struct ColumnsKernel {
  void (*one_row)(const Strip<A>&, int64_t row, int64_t column, int64_t column_end);
  void (*two_rows)(const Strip<A>&, int64_t row, int64_t column, int64_t column_end);  // or null
};

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

// Rows of the input that output rows [begin, end) of any phase read.
std::pair<int64_t, int64_t> input_rows(const Geometry& g, int64_t begin, int64_t end) {
  int64_t low = g.in_height, high = 0;
  for (const Phase& phase : g.phases) {
    if (phase.taps_high == 0 || phase.taps_wide == 0) continue;
    const int64_t first =
        (std::max<int64_t>(begin - phase.first_row, 0) + phase.row_step - 1) / phase.row_step;
    const int64_t last = (end - 1 - phase.first_row) / phase.row_step;
    low = std::min(low, first * g.stride_height - phase.top);
    high = std::max(high,
                    last * g.stride_height + (phase.taps_high - 1) * phase.dilation_height - phase.top + 1);
  }
  return {std::clamp<int64_t>(low, 0, g.in_height), std::clamp<int64_t>(high, 0, g.in_height)};
}

// Adds the pixels that columns [begin, end) of two rows of every phase are the first to read, and these
// outputs if they are to be in the cache.
template <typename T>
void add_columns(Prefetch& next, const Geometry& g, const Image<const T>& input, const Image<T>* output,
                 int64_t row, int64_t begin, int64_t end) {
  const Phase& phase = g.phases[0];
  const int64_t reach = (phase.taps_high - 1) * phase.dilation_height - phase.top;
  const int64_t top = (row - 1) * g.stride_height + 1 + reach;
  next.add_pixels(input, top, top + 2 * g.stride_height, begin * g.stride_width, end * g.stride_width);
  if (output)
    next.add_pixels(*output, row * phase.row_step, (row + 2) * phase.row_step, begin * phase.column_step,
                    end * phase.column_step);
}

// The convolution that both passes are. `in_lanes(first, m)`: the input channels of output channels first,
// ..., in the m-th of `terms` terms; `weight_channel(channel, m)`: the filter that meets them.
template <typename T, typename InLanes, typename WeightChannel>
void convolve(const T* input, int64_t in_channels, T* output, int64_t out_channels, int64_t batch,
              bool channels_last, const Geometry& g, const T* weight, int64_t weight_taps, const T* bias,
              Activation activation, int64_t terms, const InLanes& in_lanes,
              const WeightChannel& weight_channel, ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const Image<const T> in{nullptr, in_channels, g.in_height, g.in_width, channels_last};
  const Image<T> out{nullptr, out_channels, g.out_height, g.out_width, channels_last};
  const bool in_place =
      std::is_same_v<T, A> && channels_last && out_channels >= L && in_lanes(0, 0).is_identity();
  const int64_t blocks = ceil_div(out_channels, L);

  // Strips of rows: as many as the L2 cache holds, but enough strips for every thread.
  const int64_t channels_at_once = in_place ? out_channels : L;
  const int64_t row_bytes = int64_t(sizeof(A)) * channels_at_once *
                            (g.out_width + g.in_width * std::max<int64_t>(g.in_height / g.out_height, 1));
  const int64_t row_step = g.phases[0].row_step;
  int64_t strip_rows = std::clamp<int64_t>((in_place ? 384 << 10 : 192 << 10) / row_bytes, 1, g.out_height);
  const int64_t parallel_items = batch * (in_place ? 1 : blocks);
  if (parallel_items < 64)
    strip_rows = std::min(strip_rows, std::max<int64_t>(g.out_height * parallel_items / 64, 4));
  strip_rows = std::min(ceil_div(strip_rows, row_step) * row_step, g.out_height);
  const int64_t strips = ceil_div(g.out_height, strip_rows);

  // A tile is loaded, computed and stored a few rows at a time, while they are in the L1 cache.
  const int64_t few = (16 << 10) / (g.out_width * L * int64_t(sizeof(A))) / (2 * row_step) * (2 * row_step);
  const int64_t part_rows = in_place ? strip_rows : std::min(std::max(few, 2 * row_step), strip_rows);

  // In place, an item is a strip of a group of blocks whose packed taps fit the cache; else of one block.
  // Values of one block; none where padding and stride keep every tap from the image.
  const int64_t packed = int64_t(g.taps.size()) * L;
  const int64_t group =
      in_place ? std::clamp<int64_t>((192 << 10) / (std::max(packed, L) * int64_t(sizeof(A))), 1, blocks) : 1;
  const int64_t groups = ceil_div(blocks, group);
  const int64_t columns = phase_columns(g, g.phases[0]);  // no phase has more
  const bool by_seven = columns % 8 != 0 && columns % 7 == 0;
  // In place, all blocks take turns on a few columns, so that memory is read in the order in which it lies;
  // meanwhile the next few are asked for.
  const int64_t columns_at_once = in_place ? (by_seven ? 7 : 8) * ceil_div(4, group) : columns;
  std::vector<ColumnsKernel<A>> kernels;
  for (const Phase& phase : g.phases)
    kernels.push_back(by_seven ? choose_columns_kernel<7, A>(g, phase)
                               : choose_columns_kernel<8, A>(g, phase));
  const bool prefetched = in_place && group == blocks;  // else a pixel's channels do not follow each other
  const int64_t asks = group * ceil_div(4, group) * (kernels[0].two_rows ? 1 : 2);
  // An output that fills a large share of the L3 cache would not be there when it is read next, and reading
  // its lines before they are written would only cost time.
  const int64_t output_bytes = batch * out_channels * g.out_height * g.out_width * int64_t(sizeof(A));
  const bool streams = in_place && output_bytes > (16 << 20) && out_channels % L == 0 &&
                       reinterpret_cast<uintptr_t>(output) % vector_bytes == 0;
  int64_t tile_rows = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const auto [low, high] =
        input_rows(g, strip * strip_rows, std::min((strip + 1) * strip_rows, g.out_height));
    tile_rows = std::max(tile_rows, high - low);
  }

  parallel_for(threads, groups * batch * strips, [&](int64_t begin, int64_t end) {
    Scratch<A> taps(group * terms * packed), biases(group * L);
    Scratch<A> in_tile(in_place ? 0 : tile_rows * g.in_width * L);
    Scratch<A> out_tile(in_place ? 0 : part_rows * g.out_width * L);
    Prefetch next;
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
      const int64_t low = input_rows(g, row_begin, row_end).first;
      int64_t loaded = low;  // rows of the image that the tile holds
      Image<const T> source = in;
      source.data = input + image * in_channels * g.in_height * g.in_width;
      Image<T> target = out;
      target.data = output + image * out_channels * g.out_height * g.out_width;
      for (int64_t top = row_begin; top < row_end; top += part_rows) {
        const int64_t bottom = std::min(top + part_rows, row_end);
        for (int64_t m = 0; m < terms; ++m) {
          if (!in_place) {
            const auto [first, last] = input_rows(g, top, bottom);
            const int64_t from = terms > 1 ? first : std::max(first, loaded);
            const int64_t start = first_block * L;
            if (from < last)
              load_tile(source, in_lanes(start, m), std::min(L, out_channels - start), from, last,
                        in_tile.data() + (from - low) * g.in_width * L);
            loaded = std::max(loaded, last);
          }
          Strip<A> part{};
          part.input = {in_tile.data() - low * g.in_width * L, g.in_width * L, L};
          part.output = {out_tile.data() - top * g.out_width * L, g.out_width * L, L};
          if constexpr (std::is_same_v<T, A>)
            if (in_place) {
              part.input = {source.data + first_block * L, source.row_stride(), source.pixel_stride()};
              part.output = {target.data + first_block * L, target.row_stride(), target.pixel_stride()};
            }
          part.blocks = last_block - first_block;
          part.last_lane = in_place ? block_start(last_block - 1, out_channels, L) - first_block * L : 0;
          part.geometry = &g;
          part.taps_stride = terms * packed;
          part.accumulate = m > 0;
          part.streams = streams;
          part.bias = bias ? biases.data() : nullptr;
          part.activation = m == terms - 1 ? activation : Activation::none;
          part.next = prefetched ? &next : nullptr;
          for (int64_t row = top / row_step; row * row_step < bottom; row += 2)
            for (int64_t column = 0; column < columns; column += columns_at_once) {
              if (prefetched) {
                const bool row_ends = column + columns_at_once >= columns;
                const int64_t begin = row_ends ? 0 : column + columns_at_once;
                next.clear(asks);
                add_columns(next, g, source, streams ? nullptr : &target, row_ends ? row + 2 : row, begin,
                            begin + columns_at_once);
              }
              for (size_t k = 0; k < g.phases.size(); ++k) {
                const Phase& phase = g.phases[k];
                const int64_t column_end = std::min(column + columns_at_once, phase_columns(g, phase));
                const int64_t rows_left = (bottom - phase.first_row + row_step - 1) / row_step - row;
                part.phase = &phase;
                part.taps = taps.data() + m * packed + phase.weight_offset * L;
                if (rows_left >= 2 && kernels[k].two_rows) {
                  kernels[k].two_rows(part, row, column, column_end);
                } else {
                  for (int64_t q = 0; q < std::min<int64_t>(rows_left, 2); ++q)
                    kernels[k].one_row(part, row + q, column, column_end);
                }
              }
            }
        }
        if (!in_place) {
          const int64_t start = first_block * L;
          store_tile<T, A>(target, {start}, std::min(L, out_channels - start), top, bottom, out_tile.data());
        }
      }
    }
    if (streams) stream_fence();
  });
}

}  // namespace

template <typename T>
void depthwise_conv2d_vectorized_forward_cpu(const T* input, const T* weight, const T* bias, T* output,
                                             const DepthwiseConv2dShape& shape, Activation activation,
                                             ParallelFor threads) {
  const int64_t multiplier = shape.multiplier();
  const Geometry geometry = forward_geometry(shape);
  convolve<T>(
      input, shape.in_channels, output, shape.out_channels, shape.batch, shape.channels_last, geometry,
      weight, shape.kernel_height * shape.kernel_width, bias, activation, 1,
      [&](int64_t first, int64_t) { return Lanes{first, 1, multiplier, 0}; },
      [](int64_t channel, int64_t) { return channel; }, threads);
}

template <typename T>
void depthwise_conv2d_vectorized_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,
                                                const DepthwiseConv2dShape& shape, ParallelFor threads) {
  const int64_t multiplier = shape.multiplier();
  const Geometry geometry = grad_input_geometry(shape);
  convolve<T>(
      grad_output, shape.out_channels, grad_input, shape.in_channels, shape.batch, shape.channels_last,
      geometry, weight, shape.kernel_height * shape.kernel_width, nullptr, Activation::none, multiplier,
      [&](int64_t first, int64_t m) { return Lanes{first, multiplier, 1, m}; },
      [&](int64_t channel, int64_t m) { return channel * multiplier + m; }, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                \
  template void depthwise_conv2d_vectorized_forward_cpu<T>(                                    \
      const T*, const T*, const T*, T*, const DepthwiseConv2dShape&, Activation, ParallelFor); \
  template void depthwise_conv2d_vectorized_grad_input_cpu<T>(const T*, const T*, T*,          \
                                                              const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

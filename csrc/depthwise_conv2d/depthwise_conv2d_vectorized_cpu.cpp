// Depthwise convolution, C++, vectorized: forward and grad_input, a channel in each vector lane.
//
// Computes  out[e, f] = act(b + sum_ij in[e*s + i*d - p, f*s + j*d - p] * w[i, j]).
// One inner step: depthwise_conv2d_vectorized_columns_cpu.h.
// Bytes: input + output once, while a strip of rows stays in the L2 cache.
// Against row_blocked: sums stay in registers over all taps; the output is written once, not once a tap.
// grad_input is the same loop over its phases: no product with a zero, no atomics.
// Limits: images that are not channels_last go through a tile, transposed a strip of rows at a time.
#include <memory>
#include <optional>

#include "../common/moments.h"
#include "depthwise_conv2d_rows_cpu.h"
#include "depthwise_conv2d_vectorized_columns_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

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

// A pass that convolves: forward, or grad_input over its phases.
template <typename T>
class Convolution {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>;

  // Output channel c is the sum of `step` terms: term m is input channel c * step / divide + m, convolved
  // with filter c * step + m. `output` may be null where rows_into alone is called.
  Convolution(const T* input, int64_t in_channels, T* output, int64_t out_channels, int64_t batch,
              bool channels_last, Geometry geometry, const T* weight, int64_t weight_taps, const T* bias,
              Activation activation, int64_t step, int64_t divide);

  void run(ParallelFor threads) const;
  // The same, of a channels_last output whose mean and variance are gathered.
  void run(accumulate_t<T>* mean, accumulate_t<T>* variance, ParallelFor threads);

  // The taps and biases of some blocks of channels as vectors, zero in lanes that are no channel.
  struct Packed {
    Packed(const Convolution& of, int64_t first, int64_t last);
    Scratch<A> taps, biases;
  };
  std::shared_ptr<const Packed> pack_all() const { return std::make_shared<const Packed>(*this, 0, blocks_); }
  // Rows [row_begin, row_end) of an image into a channels_last image of all the channels.
  void rows_into(const Packed& all, int64_t image, int64_t row_begin, int64_t row_end,
                 const Image<T>& target) const;

 private:
  struct Tiles {  // of at most `most_rows` rows of the output at once
    Tiles(const Convolution& of, int64_t most_rows);
    Scratch<A> in, out;
  };

  int64_t first_block(int64_t group) const { return group * group_; }
  int64_t last_block(int64_t group) const { return std::min((group + 1) * group_, blocks_); }
  // Rows [row_begin, row_end) of a group of blocks of channels; row_begin is a multiple of the phases' step.
  void compute(const A* taps, const A* biases, const Tiles& tiles, int64_t group, int64_t image,
               const Image<T>& target, int64_t row_begin, int64_t row_end) const;
  int64_t strip_rows() const;
  void compute_strip(Strip<A>& strip, const Image<const T>& source, const Image<T>& target, const A* taps,
                     int64_t row_begin, int64_t row_end) const;

  Geometry geometry_;
  Image<const T> input_;
  Image<T> output_;
  const T* weight_;
  const T* bias_;
  int64_t batch_, weight_taps_, step_, divide_;
  Activation activation_;
  bool in_place_, streams_;
  int64_t blocks_, group_, packed_, columns_, pixels_;
  std::vector<ColumnsKernel<A>> kernels_;
  PartMoments* moments_ = nullptr;  // of what is stored, each strip of an image a part; or null
};

template <typename T>
Convolution<T>::Convolution(const T* input, int64_t in_channels, T* output, int64_t out_channels,
                            int64_t batch, bool channels_last, Geometry geometry, const T* weight,
                            int64_t weight_taps, const T* bias, Activation activation, int64_t step,
                            int64_t divide)
    : geometry_(std::move(geometry)),
      input_{input, in_channels, geometry_.in_height, geometry_.in_width, channels_last},
      output_{output, out_channels, geometry_.out_height, geometry_.out_width, channels_last},
      weight_(weight),
      bias_(bias),
      batch_(batch),
      weight_taps_(weight_taps),
      step_(step),
      divide_(divide),
      activation_(activation) {
  const Geometry& g = geometry_;
  in_place_ = std::is_same_v<T, A> && channels_last && out_channels >= L && step == 1 && divide == 1;
  blocks_ = ceil_div(out_channels, L);
  // Values of one block; none where padding and stride keep every tap from the image.
  packed_ = int64_t(g.taps.size()) * L;
  // In place, blocks whose packed taps fit the cache take turns; else a block is done by itself.
  const int64_t cached = (192 << 10) / (std::max(packed_, L) * int64_t(sizeof(A)));
  group_ = in_place_ ? std::clamp<int64_t>(cached, 1, blocks_) : 1;
  // An output that the L3 cache may hold stays there: what reads it next is limited by memory, too.
  streams_ = in_place_ && output && stores_past_caches(output_, batch, out_channels, 16 << 20);
  columns_ = phase_columns(g, g.phases[0]);  // no phase has more
  pixels_ = pixels_at_once(columns_);
  for (const Phase& phase : g.phases)
    kernels_.push_back(pixels_ == 7 ? choose_columns_kernel<7, A>(g, phase)
                                    : choose_columns_kernel<8, A>(g, phase));
}

template <typename T>
Convolution<T>::Tiles::Tiles(const Convolution& of, int64_t most_rows)
    : in(of.in_place_ ? 0 : most_input_rows(of.geometry_, most_rows) * of.geometry_.in_width * L),
      out(of.in_place_ ? 0 : most_rows * of.geometry_.out_width * L) {}

template <typename T>
Convolution<T>::Packed::Packed(const Convolution& of, int64_t first, int64_t last)
    : taps((last - first) * of.step_ * of.packed_), biases((last - first) * L) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = of.in_place_ ? block_start(block, of.output_.channels, L) : block * L;
    A* const at = taps.data() + (block - first) * of.step_ * of.packed_;
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t channel = start + lane;
      const bool valid = channel < of.output_.channels;
      biases.data()[(block - first) * L + lane] = valid && of.bias_ ? load(of.bias_[channel]) : A(0);
      for (int64_t m = 0; m < of.step_; ++m) {
        const T* filter = valid ? of.weight_ + (channel * of.step_ + m) * of.weight_taps_ : nullptr;
        for (size_t t = 0; t < of.geometry_.taps.size(); ++t)
          at[m * of.packed_ + int64_t(t) * L + lane] = valid ? load(filter[of.geometry_.taps[t]]) : A(0);
      }
    }
  }
}

template <typename T>
void Convolution<T>::rows_into(const Packed& all, int64_t image, int64_t row_begin, int64_t row_end,
                               const Image<T>& target) const {
  const Tiles tiles(*this, row_end - row_begin);
  for (int64_t group = 0; group < ceil_div(blocks_, group_); ++group)
    compute(all.taps.data() + first_block(group) * step_ * packed_,
            all.biases.data() + first_block(group) * L, tiles, group, image, target, row_begin, row_end);
}

template <typename T>
void Convolution<T>::compute(const A* taps, const A* biases, const Tiles& tiles, int64_t group, int64_t image,
                             const Image<T>& target, int64_t row_begin, int64_t row_end) const {
  const Geometry& g = geometry_;
  const int64_t start = first_block(group) * L, lanes = std::min(L, output_.channels - start);
  const Image<const T> source = input_.next(image);
  const auto [low, high] = input_rows(g, row_begin, row_end);

  Strip<A> strip{};
  strip.input = tile_block<const A>(tiles.in.data(), low, g.in_width);
  strip.output = tile_block(tiles.out.data(), row_begin, g.out_width);
  if constexpr (std::is_same_v<T, A>)
    if (in_place_) strip.input = source.block(start), strip.output = target.block(start);
  strip.blocks = last_block(group) - first_block(group);
  strip.last_lane = in_place_ ? block_start(last_block(group) - 1, output_.channels, L) - start : 0;
  strip.geometry = &g;
  strip.taps_stride = step_ * packed_;
  strip.bias = bias_ ? biases : nullptr;
  strip.streams = streams_;
  for (int64_t m = 0; m < step_; ++m) {
    if (!in_place_) load_tile(source, Lanes{start, step_, divide_, m}, lanes, low, high, tiles.in.data());
    strip.accumulate = m > 0;
    strip.activation = m == step_ - 1 ? activation_ : Activation::none;
    compute_strip(strip, source, target, taps + m * packed_, row_begin, row_end);
  }
  if (!in_place_) store_tile<T, A>(target, Lanes{start}, lanes, row_begin, row_end, tiles.out.data());
  if (streams_) stream_fence();
  if (!moments_) return;
  const int64_t end = std::min(last_block(group) * L, output_.channels);
  PartMoments::Part(*moments_, image * ceil_div(g.out_height, strip_rows()) + row_begin / strip_rows(), start,
                    end - start)
      .add(PixelRows<T>{target.data + row_begin * target.row_stride() + start, row_end - row_begin,
                        target.row_stride(), target.width, target.channels});
}

template <typename T>
void Convolution<T>::compute_strip(Strip<A>& strip, const Image<const T>& source, const Image<T>& target,
                                   const A* taps, int64_t row_begin, int64_t row_end) const {
  const Geometry& g = geometry_;
  // In place, all blocks take turns on a few columns, so that memory is read in the order in which it lies;
  // meanwhile the next few are asked for.
  const int64_t tiles = ceil_div(4, group_);
  const int64_t columns_at_once = in_place_ ? pixels_ * tiles : columns_;
  const bool prefetched = in_place_ && group_ == blocks_;  // else a pixel's channels do not follow each other
  Prefetch next;
  strip.next = prefetched ? &next : nullptr;
  const int64_t row_step = g.phases[0].row_step;
  for (int64_t row = row_begin / row_step; row * row_step < row_end; row += 2)
    for (int64_t column = 0; column < columns_; column += columns_at_once) {
      if (prefetched) {
        const bool row_ends = column + columns_at_once >= columns_;
        const int64_t begin = row_ends ? 0 : column + columns_at_once;
        next.clear(group_ * tiles * (kernels_[0].two_rows ? 1 : 2));
        add_columns(next, g, source, streams_ ? nullptr : &target, row_ends ? row + 2 : row, begin,
                    begin + columns_at_once);
      }
      for (size_t k = 0; k < g.phases.size(); ++k) {
        const Phase& phase = g.phases[k];
        const int64_t column_end = std::min(column + columns_at_once, phase_columns(g, phase));
        const int64_t rows_left = ceil_div(row_end - phase.first_row, row_step) - row;
        strip.phase = &phase;
        strip.taps = taps + phase.weight_offset * L;
        if (rows_left >= 2 && kernels_[k].two_rows) {
          kernels_[k].two_rows(strip, row, column, column_end);
        } else {
          for (int64_t q = 0; q < std::min<int64_t>(rows_left, 2); ++q)
            kernels_[k].one_row(strip, row + q, column, column_end);
        }
      }
    }
}

// Strips of rows: as many as the L2 cache holds, but enough strips for every thread.
template <typename T>
int64_t Convolution<T>::strip_rows() const {
  const Geometry& g = geometry_;
  const int64_t row_step = g.phases[0].row_step, groups = ceil_div(blocks_, group_);
  const int64_t row_bytes = int64_t(sizeof(A)) * (in_place_ ? output_.channels : L) *
                            (g.out_width + g.in_width * std::max<int64_t>(g.in_height / g.out_height, 1));
  int64_t rows = std::clamp<int64_t>((in_place_ ? 384 << 10 : 192 << 10) / row_bytes, 1, g.out_height);
  const int64_t items = batch_ * groups;
  if (items < 64) rows = std::min(rows, std::max<int64_t>(g.out_height * items / 64, 4));
  return std::min(ceil_div(rows, 2 * row_step) * 2 * row_step, g.out_height);
}

template <typename T>
void Convolution<T>::run(ParallelFor threads) const {
  const int64_t rows = strip_rows(), strips = ceil_div(geometry_.out_height, rows);
  parallel_for(threads, batch_ * ceil_div(blocks_, group_) * strips, [&](int64_t begin, int64_t end) {
    const Tiles tiles(*this, rows);
    std::optional<Packed> packed;
    int64_t packed_group = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item % strips * rows, group = item / strips / batch_;
      const int64_t image = item / strips % batch_;
      if (packed_group != group) packed.emplace(*this, first_block(group), last_block(group));
      packed_group = group;
      compute(packed->taps.data(), packed->biases.data(), tiles, group, image, output_.next(image), row,
              std::min(row + rows, geometry_.out_height));
    }
  });
}

template <typename T>
void Convolution<T>::run(accumulate_t<T>* mean, accumulate_t<T>* variance, ParallelFor threads) {
  const int64_t rows = strip_rows(), strips = ceil_div(geometry_.out_height, rows);
  std::vector<int64_t> counts(batch_ * strips);
  for (int64_t k = 0; k < batch_ * strips; ++k)
    counts[k] = std::min(rows, geometry_.out_height - k % strips * rows) * geometry_.out_width;
  PartMoments moments(std::move(counts), output_.channels);
  moments_ = &moments, streams_ = false;
  std::as_const(*this).run(threads);
  moments.merge(mean, variance);
}

}  // namespace

template <typename T>
void depthwise_conv2d_vectorized_forward_cpu(const T* input, const T* weight, const T* bias, T* output,
                                             const DepthwiseConv2dShape& s, Activation activation,
                                             ParallelFor threads) {
  Convolution<T>(input, s.in_channels, output, s.out_channels, s.batch, s.channels_last, forward_geometry(s),
                 weight, s.kernel_height * s.kernel_width, bias, activation, 1, s.multiplier())
      .run(threads);
}

template <typename T>
void depthwise_conv2d_vectorized_forward_moments_cpu(const T* input, const T* weight, const T* bias,
                                                     T* output, T* mean, T* variance,
                                                     const DepthwiseConv2dShape& s, ParallelFor threads) {
  Convolution<T>(input, s.in_channels, output, s.out_channels, s.batch, s.channels_last, forward_geometry(s),
                 weight, s.kernel_height * s.kernel_width, bias, Activation::none, 1, s.multiplier())
      .run(mean, variance, threads);
}

template <typename T>
void depthwise_conv2d_vectorized_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,
                                                const DepthwiseConv2dShape& s, ParallelFor threads) {
  Convolution<T>(grad_output, s.out_channels, grad_input, s.in_channels, s.batch, s.channels_last,
                 grad_input_geometry(s), weight, s.kernel_height * s.kernel_width, nullptr, Activation::none,
                 s.multiplier(), 1)
      .run(threads);
}

template <typename T>
RowSource depthwise_rows(const T* input, const T* weight, const T* bias, const DepthwiseConv2dShape& s,
                         Activation activation) {
  const auto convolution = std::make_shared<const Convolution<T>>(
      input, s.in_channels, nullptr, s.out_channels, s.batch, s.channels_last, forward_geometry(s), weight,
      s.kernel_height * s.kernel_width, bias, activation, 1, s.multiplier());
  const auto packed = convolution->pack_all();
  return {[=, channels = s.out_channels, height = s.out_height, width = s.out_width](
              int64_t image, int64_t begin, int64_t end, void* target) {
    T* const first = static_cast<T*>(target) - begin * width * channels;  // where row 0 would be
    convolution->rows_into(*packed, image, begin, end, {first, channels, height, width, true});
  }};
}

#define FASTCONV_INSTANTIATE(T)                                                                          \
  template void depthwise_conv2d_vectorized_forward_cpu<T>(                                              \
      const T*, const T*, const T*, T*, const DepthwiseConv2dShape&, Activation, ParallelFor);           \
  template void depthwise_conv2d_vectorized_grad_input_cpu<T>(const T*, const T*, T*,                    \
                                                              const DepthwiseConv2dShape&, ParallelFor); \
  template RowSource depthwise_rows<T>(const T*, const T*, const T*, const DepthwiseConv2dShape&, Activation);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)
#define FASTCONV_INSTANTIATE_MOMENTS(T)                             \
  template void depthwise_conv2d_vectorized_forward_moments_cpu<T>( \
      const T*, const T*, const T*, T*, T*, T*, const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_INSTANTIATE_MOMENTS(float)
FASTCONV_INSTANTIATE_MOMENTS(double)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Depthwise convolution, C++, vectorized: grad_weight and grad_bias.
//
// Computes  gw[i, j] = sum over n, e, f of gy[n, e, f] * x[n, e*s + i*d - p, f*s + j*d - p], a channel
//   in each vector lane.
// One inner step: 8 (or 7) pixels of gy and up to three rows of sums in registers. Each pixel of x is loaded
//   once and multiplied with every gy that it meets: K + 15 loads for 8 K multiply-adds in a row of taps.
// Bytes: x + gy once for every block of channels, where they lie (channels_last) or through a tile.
// Threads share no sums: an item is a group of channels and a slice of the rows of the batch. Their sums
//   are added in a fixed order, so the result has the same bits for any number of threads.
// Limits: the number of slices, and with it the order of additions, depends on the shape.
#include "depthwise_conv2d_vectorized_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Some rows of a block of channels of gy, and the rows of x that a row of taps meets there.
template <typename A>
struct Rows {
  const A* grad;   // the first row of gy, pixel 0
  const A* input;  // the row of x that meets it, pixel 0
  int64_t count, columns;
  int64_t grad_row_stride, grad_pixel_stride;
  int64_t input_row_step, input_tap_stride, input_pixel_stride;  // to the next row of gy, of taps, of pixels
  int64_t in_width, stride, dilation, left;
};

// sum[i][j] += gy[f] * x[i][f*S + j] for P outputs f from `column`, J taps from `first_tap`, and I rows of
// taps. A chain of additions into one register takes 4 cycles a link, so one row of few taps keeps two
// chains.
template <int J, int S, int P, int I, bool Edge, typename A>
inline __attribute__((always_inline)) void add_products(Vector<A> (&sum)[I == 1 ? 2 : I][J],
                                                        const Rows<A>& rows, const A* grad_row,
                                                        const A* input_row, int64_t column,
                                                        int64_t first_tap) {
  Vector<A> grad[P];
#pragma GCC unroll 8
  for (int f = 0; f < P; ++f) {
    grad[f] = load_vector(grad_row + (column + f) * rows.grad_pixel_stride);
    keep_in_register(grad[f]);
  }
  constexpr int step = S > 0 ? S : 1;
  const int64_t stride = S > 0 ? S : rows.stride;
  const int64_t first = column * stride + first_tap * rows.dilation - rows.left;
  const A* input = input_row + first * rows.input_pixel_stride;
  if constexpr (S == 0) {  // any stride or dilation, one tap
    static_assert(J == 1 && I == 1);
#pragma GCC unroll 8
    for (int f = 0; f < P; ++f) {
      const int64_t offset = f * stride;
      if (Edge && uint64_t(first + offset) >= uint64_t(rows.in_width)) continue;
      sum[f % 2][0] += grad[f] * load_vector(input + offset * rows.input_pixel_stride);
    }
    return;
  }
#pragma GCC unroll 3
  for (int i = 0; i < I; ++i, input += rows.input_tap_stride) {
#pragma GCC unroll 32
    for (int p = 0; p < (P - 1) * step + J; ++p) {
      if (step > J && p % step >= J) continue;
      if (Edge && uint64_t(first + p) >= uint64_t(rows.in_width)) continue;
      Vector<A> x = load_vector(input + p * rows.input_pixel_stride);
      keep_in_register(x);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j)
        if (p >= j && (p - j) % step == 0 && (p - j) / step < P) {
          const int f = (p - j) / step;
          sum[I > 1 ? i : J <= 4 ? f % 2 : 0][j] += grad[f] * x;
        }
    }
  }
}

// J taps of I rows of the filter. Their sums stay in registers over all rows of gy.
template <int J, int S, int P, int I, typename A>
void add_rows(A* sums, const Rows<A>& rows, int64_t taps, int64_t first_tap) {
  constexpr int L = lanes_of<A>;
  constexpr int chains = I == 1 ? 2 : I;
  Vector<A> sum[chains][J];
#pragma GCC unroll 3
  for (int i = 0; i < chains; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j)
      sum[i][j] = i < I ? load_vector(sums + (i * taps + first_tap + j) * L) : Vector<A>{};

  const int64_t stride = S > 0 ? S : rows.stride;
  const int64_t span = (J - 1) * rows.dilation;
  const int64_t shift = rows.left - first_tap * rows.dilation;  // column f reads x from f * stride - shift
  // Columns that meet any pixel of x, and those that meet only pixels of x. By hand: outputs_inside costs a
  // tenth of the time here.
  const int64_t begin = shift - span > 0 ? (shift - span + stride - 1) / stride : 0;
  const int64_t last = rows.in_width - 1 + shift;
  const int64_t end = last < 0 ? 0 : std::min(rows.columns, last / stride + 1);
  const int64_t inner_begin = shift > 0 ? (shift + stride - 1) / stride : 0;
  const int64_t inner_end = last < span ? 0 : (last - span) / stride + 1;
  const A *grad = rows.grad, *input = rows.input;
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t column = begin;
    for (; column + P <= end; column += P) {
      if (column >= inner_begin && column + P <= inner_end)
        add_products<J, S, P, I, false, A>(sum, rows, grad, input, column, first_tap);
      else
        add_products<J, S, P, I, true, A>(sum, rows, grad, input, column, first_tap);
    }
    for (; column < end; ++column)
      add_products<J, S, 1, I, true, A>(sum, rows, grad, input, column, first_tap);
    grad += rows.grad_row_stride;
    input += rows.input_row_step;
  }

  if (I == 1)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[0][j] += sum[1][j];
#pragma GCC unroll 3
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store_vector(sums + (i * taps + first_tap + j) * L, sum[i][j]);
}

// One row of the filter, any width.
template <int S, int P, typename A>
void add_filter_row(A* sums, const Rows<A>& rows, int64_t taps) {
  int64_t j = 0;
  if constexpr (S > 0) {
    if (taps == 5) return add_rows<5, S, P, 1, A>(sums, rows, taps, 0);
    for (; j + 7 <= taps; j += 7) add_rows<7, S, P, 1, A>(sums, rows, taps, j);
    for (; j + 3 <= taps; j += 3) add_rows<3, S, P, 1, A>(sums, rows, taps, j);
  }
  for (; j < taps; ++j) add_rows<1, S, P, 1, A>(sums, rows, taps, j);
}

// How a pass adds rows of the filter: one, or several that share gy, at once.
template <typename A>
struct FilterKernel {
  void (*one)(A* sums, const Rows<A>& rows, int64_t taps);
  void (*several)(A* sums, const Rows<A>& rows, int64_t taps, int64_t first_tap);  // or null
  int64_t several_rows;
};

template <int S, int P, typename A>
FilterKernel<A> filter_kernel(int64_t taps) {
  FilterKernel<A> kernel{add_filter_row<S, P, A>, nullptr, 0};
  if constexpr (S > 0 && vector_bytes == 64 && std::is_same_v<A, float>) {  // registers for all these sums
    if (taps == 3) kernel.several = add_rows<3, S, P, 3, A>, kernel.several_rows = 3;
    if (taps == 5) kernel.several = add_rows<5, S, P, 2, A>, kernel.several_rows = 2;
    if constexpr (S == 1)
      if (taps == 7) kernel.several = add_rows<7, S, P, 2, A>, kernel.several_rows = 2;
  }
  return kernel;
}

template <int P, typename A>
FilterKernel<A> choose_filter_kernel(const DepthwiseConv2dShape& s) {
  if (s.dilation_width == 1 && s.stride_width == 1) return filter_kernel<1, P, A>(s.kernel_width);
  if (s.dilation_width == 1 && s.stride_width == 2) return filter_kernel<2, P, A>(s.kernel_width);
  return filter_kernel<0, P, A>(s.kernel_width);
}

// All taps of one block of channels, over rows [begin, end) of gy.
template <typename A>
void add_taps_of_block(A* sums, const FilterKernel<A>& kernel, const Block<const A>& x,
                       const Block<const A>& gy, const DepthwiseConv2dShape& s, int64_t begin, int64_t end) {
  constexpr int L = lanes_of<A>;
  Rows<A> rows{};
  rows.columns = s.out_width;
  rows.grad_row_stride = gy.row_stride, rows.grad_pixel_stride = gy.pixel_stride;
  rows.input_row_step = s.stride_height * x.row_stride;
  rows.input_tap_stride = s.dilation_height * x.row_stride;
  rows.input_pixel_stride = x.pixel_stride;
  rows.in_width = s.in_width, rows.stride = s.stride_width, rows.dilation = s.dilation_width;
  rows.left = s.padding_left;
  // The rows of gy at which row i of the taps lies inside x.
  const auto inside = [&](int64_t i) {
    const Range all =
        outputs_inside(i * s.dilation_height - s.padding_top, s.stride_height, s.in_height, s.out_height);
    return Range{std::max(begin, all.begin), std::min(end, all.end)};
  };
  const auto add = [&](int64_t i, int64_t from, int64_t to, bool several) {
    if (from >= to) return;
    rows.grad = gy.data + from * gy.row_stride;
    rows.input = x.data + (from * s.stride_height + i * s.dilation_height - s.padding_top) * x.row_stride;
    rows.count = to - from;
    A* row_sums = sums + i * s.kernel_width * L;
    several ? kernel.several(row_sums, rows, s.kernel_width, 0) : kernel.one(row_sums, rows, s.kernel_width);
  };
  for (int64_t i = 0, count; i < s.kernel_height; i += count) {
    count = kernel.several && i + kernel.several_rows <= s.kernel_height ? kernel.several_rows : 1;
    const int64_t from = inside(i).begin, to = std::max(from, inside(i + count - 1).end);
    if (count > 1) add(i, from, to, true);
    for (int64_t k = i; k < i + count; ++k) {
      const auto [low, high] = inside(k);
      if (count == 1 || from == to) {
        add(k, low, high, false);
      } else {
        add(k, low, std::min(from, high), false);
        add(k, std::max(to, low), high, false);
      }
    }
  }
}

template <typename T>
class WeightGradient {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>;

  WeightGradient(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                 const DepthwiseConv2dShape& shape)
      : shape_(shape),
        geometry_(forward_geometry(shape)),
        input_{input, shape.in_channels, shape.in_height, shape.in_width, shape.channels_last},
        grad_output_{grad_output, shape.out_channels, shape.out_height, shape.out_width, shape.channels_last},
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        taps_(shape.kernel_height * shape.kernel_width),
        block_sums_((taps_ + 1) * L),  // the last is the bias
        in_place_(std::is_same_v<T, A> && shape.channels_last && shape.out_channels >= L &&
                  shape.multiplier() == 1),
        blocks_(ceil_div(shape.out_channels, L)) {
    const DepthwiseConv2dShape& s = shape_;
    // An item is a group of blocks and a slice of the rows of the whole batch: enough items for many threads,
    // slices few enough that adding up their sums costs little. Through a tile, a group is one block.
    const int64_t block_bytes = block_sums_ * int64_t(sizeof(A));
    const int64_t rows = s.batch * s.out_height;
    const int64_t most = std::max<int64_t>((1 << 20) / (blocks_ * block_bytes), 1);
    const int64_t items = in_place_ ? 64 : ceil_div(64, blocks_);
    const int64_t wanted = std::clamp<int64_t>(rows / 8, 1, std::min(most, items));
    const int64_t whole = s.out_height <= 16 ? s.out_height : 1;  // small images are not cut
    slice_rows_ = ceil_div(ceil_div(rows, wanted), whole) * whole;
    slices_ = ceil_div(rows, slice_rows_);
    const int64_t cached = std::clamp<int64_t>((192 << 10) / block_bytes, 1, blocks_);
    group_ = in_place_ ? std::min(cached, ceil_div(blocks_, ceil_div(16, slices_))) : 1;
    // A part of a slice: rows of one image that fit the cache.
    const int64_t row_bytes = int64_t(sizeof(A)) * group_ * L * (s.out_width + s.in_width * s.stride_height);
    part_rows_ = std::clamp<int64_t>((384 << 10) / row_bytes, 1, s.out_height);
    kernel_ =
        pixels_at_once(s.out_width) == 7 ? choose_filter_kernel<7, A>(s) : choose_filter_kernel<8, A>(s);
  }

  void run(ParallelFor threads) {
    const int64_t out_height = shape_.out_height;
    Scratch<A> partial(slices_ * blocks_ * block_sums_);  // (slices, blocks, taps + 1, L)
    parallel_for(threads, ceil_div(blocks_, group_) * slices_, [&](int64_t begin, int64_t end) {
      Worker worker(*this);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item / slices_, slice = item % slices_;
        A* sums = partial.data() + (slice * blocks_ + group * group_) * block_sums_;
        std::fill(sums, sums + (last_block(group) - group * group_) * block_sums_, A(0));
        const int64_t row_end = std::min((slice + 1) * slice_rows_, shape_.batch * out_height);
        for (int64_t row = slice * slice_rows_, part_end; row < row_end; row = part_end) {
          const int64_t image = row / out_height, first = row % out_height;
          part_end = std::min({row + part_rows_, row - first + out_height, row_end});
          add_part(worker, group, image, first, first + part_end - row, sums);
        }
      }
    });
    parallel_for(threads, blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) finish(partial.data(), block);
    });
  }

 private:
  struct Worker {
    explicit Worker(const WeightGradient& of)
        : in_tile(of.in_place_ ? 0 : most_input_rows(of.geometry_, of.part_rows_) * of.shape_.in_width * L),
          grad_tile(of.in_place_ ? 0 : of.part_rows_ * of.shape_.out_width * L) {}
    Scratch<A> in_tile, grad_tile;
    Prefetch next;
  };

  int64_t last_block(int64_t group) const { return std::min((group + 1) * group_, blocks_); }

  // Rows [begin, end) of grad_output of an image.
  void add_part(Worker& worker, int64_t group, int64_t n, int64_t begin, int64_t end, A* sums) {
    const DepthwiseConv2dShape& s = shape_;
    const Image<const T> x = input_.next(n), gy = grad_output_.next(n);
    const int64_t first_block = group * group_;
    if (!in_place_) {
      const int64_t start = first_block * L, lanes = std::min(L, s.out_channels - start);
      const auto [low, high] = input_rows(geometry_, begin, end);
      load_tile(x, Lanes{start, 1, s.multiplier(), 0}, lanes, low, high, worker.in_tile.data());
      load_tile(gy, Lanes{start}, lanes, begin, end, worker.grad_tile.data());
      add_block(sums, tile_block<const A>(worker.in_tile.data(), low, s.in_width),
                tile_block<const A>(worker.grad_tile.data(), begin, s.out_width), begin, end);
    } else if constexpr (std::is_same_v<T, A>) {
      // Blocks of channels take turns after each row, so that memory is read in the order in which it lies;
      // several rows at once where they are short, or where taller kernels come back to each row of x more
      // often.
      const int64_t rows_at_once = std::max<int64_t>((s.kernel_height > 3 ? 256 : 64) / s.out_width, 1);
      for (int64_t e = begin, e_next; e < end; e = e_next) {
        e_next = std::min(e + rows_at_once, end);
        worker.next.clear(group_);
        if (group_ == blocks_) {
          worker.next.add_pixels(gy, e_next, e_next + rows_at_once, 0, s.out_width);
          worker.next.add_pixels(x, input_rows(geometry_, e, e_next).second,
                                 input_rows(geometry_, e_next, e_next + rows_at_once).second, 0, s.in_width);
        }
        for (int64_t block = first_block; block < last_block(group); ++block) {
          worker.next.ask();
          const int64_t start = block_start(block, s.out_channels, L);
          add_block(sums + (block - first_block) * block_sums_, x.block(start), gy.block(start), e, e_next);
        }
      }
    }
  }

  // Rows [begin, end) of one block of channels.
  void add_block(A* sums, const Block<const A>& x, const Block<const A>& gy, int64_t begin, int64_t end) {
    add_taps_of_block(sums, kernel_, x, gy, shape_, begin, end);
    if (!grad_bias_) return;
    Vector<A> sum = load_vector(sums + taps_ * L);
    for (int64_t e = begin; e < end; ++e)
      for (int64_t f = 0; f < shape_.out_width; ++f)
        sum += load_vector(gy.data + e * gy.row_stride + f * gy.pixel_stride);
    store_vector(sums + taps_ * L, sum);
  }

  // Adds the slices' sums of a block in their order, and stores them.
  void finish(A* partial, int64_t block) {
    A* total = partial + block * block_sums_;
    for (int64_t slice = 1; slice < slices_; ++slice)
      for (int64_t k = 0; k < block_sums_; ++k) total[k] += total[slice * blocks_ * block_sums_ + k];
    const int64_t start = in_place_ ? block_start(block, shape_.out_channels, L) : block * L;
    const int64_t channel_end = std::min(start + L, shape_.out_channels);
    for (int64_t channel = block * L; channel < channel_end; ++channel) {  // the overlap is stored once
      const A* lane = total + channel - start;
      for (int64_t t = 0; t < taps_; ++t) store(&grad_weight_[channel * taps_ + t], lane[t * L]);
      if (grad_bias_) store(&grad_bias_[channel], lane[taps_ * L]);
    }
  }

  DepthwiseConv2dShape shape_;
  Geometry geometry_;  // which rows of x meet which of gy
  Image<const T> input_, grad_output_;
  T *grad_weight_, *grad_bias_;
  int64_t taps_, block_sums_;
  bool in_place_;
  int64_t blocks_, group_, slice_rows_, slices_, part_rows_;
  FilterKernel<A> kernel_;
};

}  // namespace

template <typename T>
void depthwise_conv2d_vectorized_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,
                                                 T* grad_bias, const DepthwiseConv2dShape& shape,
                                                 ParallelFor threads) {
  WeightGradient<T>(grad_output, input, grad_weight, grad_bias, shape).run(threads);
}

#define FASTCONV_INSTANTIATE(T)                                                            \
  template void depthwise_conv2d_vectorized_grad_weight_cpu<T>(const T*, const T*, T*, T*, \
                                                               const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

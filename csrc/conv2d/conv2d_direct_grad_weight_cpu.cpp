// Gradient of a convolution's weight, C++, direct.
//
//   grad_weight[m, c, i, j] = sum over n, e, f of grad_output[n, m, e, f]
//       * x[n, c, e * stride + i * dilation - padding, f * stride + j * dilation - padding]
// One step: 6 (taps of a row, channels) x 64 filters (AVX-512) in registers over the pixels of some rows;
//   one value of x meets 64 of grad_output. Both come from scratch tiles, x with its padding: (rows, width,
//   channels) and (pixels, 64 filters), so layout, types and borders cost nothing in the inner step.
// Bytes: the tiles are copied once for 64 filters and some rows of taps, and are read from the L2 cache.
// Threads share no sums: an item is a slice of the batch's rows, 64 filters, and some rows of taps. Slices
//   are added up in their order, so the result has the same bits for any number of threads; their number
//   depends on the shape.
// Limits: multiply-adds; images of a few pixels, whose sums are loaded and stored too often.
#include <vector>

#include "../common/tile.h"
#include "conv2d_direct_cpu.h"
#include "conv2d_direct_grad_weight_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t visit_pixels = 224;  // whose products are added before a block of sums goes back to memory
constexpr int64_t sums_bytes = 192 << 10;    // of an item, and
constexpr int64_t x_tile_bytes = 256 << 10;  // of the L2 cache
constexpr int64_t least_items = 8;           // for threads to share

template <typename T>
class DirectGradWeight {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>;

  DirectGradWeight(const T* grad_output, const T* input, const Conv2dShape& s, const MoveRow& move_row)
      : grad_output_{grad_output, s.out_channels, s.out_height, s.out_width, s.channels_last},
        input_{input, s.in_channels, s.in_height, s.in_width, s.channels_last},
        shape_(s),
        move_row_(move_row),
        panels_{s.out_group()} {
    const int64_t reach = (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1;
    if constexpr (std::is_same_v<T, A>) {
      x_in_place_ = s.channels_last && s.padding_left == 0 && reach <= s.in_width && !move_row;
      grad_in_place_ = s.channels_last && s.groups == 1 && s.out_channels % L == 0 && panels_.count() == 1;
    }
    tile_width_ = x_in_place_ ? s.in_width : std::max(reach, s.padding_left + s.in_width);
    x_pixel_ = x_in_place_ ? s.in_channels : s.in_group();
    // Rows of taps that share the tiles of an item, as far as their sums and the rows of x stay in the L2
    // cache.
    const int64_t width = std::min(panels_.width, panels_.padded());
    const int64_t most = std::max<int64_t>(1, sums_bytes / (lines() * width * int64_t(sizeof(A))));
    tap_rows_ = std::min(s.kernel_height, most);
    visit_rows_ = std::clamp<int64_t>(visit_pixels / s.out_width, 1, s.out_height);
    const auto fits = [&] {
      return tile_rows() * tile_width_ * s.in_group() * int64_t(sizeof(A)) <= x_tile_bytes;
    };
    while (visit_rows_ > 1 && !fits()) visit_rows_ = (visit_rows_ + 1) / 2;
    while (tap_rows_ > 1 && !fits()) tap_rows_ = (tap_rows_ + 1) / 2;
    visits_ = s.batch * ceil_div(s.out_height, visit_rows_);
    slices_ = std::min(visits_, ceil_div(least_items, columns()));
  }

  // Sums of a slice: (groups, panels, tap rows, lines, lanes of the panel), each panel with its bias behind.
  int64_t lines() const { return shape_.kernel_width * shape_.in_group(); }
  int64_t slice_size() const {
    return shape_.groups * panels_.padded() * (shape_.kernel_height * lines() + 1);
  }
  int64_t slices() const { return slices_; }
  int64_t columns() const { return shape_.groups * panels_.count(); }
  int64_t tap_parts() const { return ceil_div(shape_.kernel_height, tap_rows_); }
  int64_t items() const { return slices_ * columns() * tap_parts(); }

  void compute(int64_t begin, int64_t end, A* sums) const {
    const Scratch<A> x_tile(x_in_place_ ? 0 : tile_rows() * tile_width_ * shape_.in_group());
    const Scratch<A> grad_tile(grad_in_place_ ? 0 : visit_rows_ * shape_.out_width * panels_.width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item / tap_parts() % columns();
      const Item at{item / tap_parts() / columns(),
                    column / panels_.count(),
                    column % panels_.count(),
                    item % tap_parts() * tap_rows_,
                    x_tile.data(),
                    grad_tile.data()};
      with_constant<1, most_vectors>(panels_.vectors(at.panel),
                                     [&](auto vectors) { add_slice<vectors>(at, sums); });
    }
  }

  // Adds the slices of panels [begin, end) up and brings the sums into the weight's order.
  void finish(int64_t begin, int64_t end, const A* sums, T* grad_weight, T* grad_bias) const {
    const Conv2dShape& s = shape_;
    for (int64_t column = begin; column < end; ++column) {
      const int64_t group = column / panels_.count(), panel = column % panels_.count();
      const int64_t line = panels_.vectors(panel) * L, first = panel * panels_.width;
      const A* from = sums + sums_of(group, panel);
      for (int64_t v = 0; v < line; v += L) {
        const int64_t lanes = std::min(L, s.out_group() - first - v);
        T* to = grad_weight + (group * s.out_group() + first + v) * s.in_group() * s.taps();
        for (int64_t i = 0; i < s.kernel_height; ++i)
          for (int64_t q = 0; q < lines(); ++q) {
            Vector<A> total = load_vector(from + (i * lines() + q) * line + v);
            for (int64_t slice = 1; slice < slices_; ++slice)
              total += load_vector(from + slice * slice_size() + (i * lines() + q) * line + v);
            const int64_t j = q / s.in_group(), c = q % s.in_group();
            T* tap = to + c * s.taps() + i * s.kernel_width + j;
            A values[L];
            store_vector(values, total);
            for (int64_t lane = 0; lane < lanes; ++lane)
              store(tap + lane * s.in_group() * s.taps(), values[lane]);
          }
        if (!grad_bias) continue;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          A total = 0;
          for (int64_t slice = 0; slice < slices_; ++slice)
            total += from[slice * slice_size() + s.kernel_height * lines() * line + v + lane];
          store(grad_bias + group * s.out_group() + first + v + lane, total);
        }
      }
    }
  }

 private:
  int64_t sums_of(int64_t group, int64_t panel) const {
    return (group * panels_.padded() + panel * panels_.width) * (shape_.kernel_height * lines() + 1);
  }

  struct Item {
    int64_t slice, group, panel, tap_row;  // from which on
    A *x_tile, *grad_tile;
  };

  // Rows of x between two of its tile: a single row of taps leaves out those that the stride skips.
  int64_t row_step() const { return tap_rows_ == 1 && !x_in_place_ ? shape_.stride_height : 1; }
  int64_t tile_rows() const {
    const int64_t reach = (visit_rows_ - 1) * shape_.stride_height + (tap_rows_ - 1) * shape_.dilation_height;
    return std::min(reach, shape_.in_height - 1) / row_step() + 1;
  }

  // Some rows of taps of a panel, over the visits of a slice.
  template <int V>
  void add_slice(const Item& item, A* all) const {
    const Conv2dShape& s = shape_;
    const int64_t i_end = std::min(s.kernel_height, item.tap_row + tap_rows_), tap_size = lines() * V * L;
    A* sums = all + item.slice * slice_size() + sums_of(item.group, item.panel);
    A* bias_sums = sums + s.kernel_height * tap_size;
    std::fill_n(sums + item.tap_row * tap_size, (i_end - item.tap_row) * tap_size, A(0));
    if (item.tap_row == 0) std::fill_n(bias_sums, V * L, A(0));
    const int64_t parts = ceil_div(s.out_height, visit_rows_);
    for (int64_t visit = visits_ * item.slice / slices_; visit < visits_ * (item.slice + 1) / slices_;
         ++visit) {
      const int64_t n = visit / parts, e = visit % parts * visit_rows_;
      const int64_t e_end = std::min(s.out_height, e + visit_rows_);
      const A* grad = read_grad<V>(item, n, e, e_end);
      if (item.tap_row == 0) add_bias<V>(grad, (e_end - e) * s.out_width, bias_sums);
      // The rows of grad_output whose tap row i lies inside x.
      const auto inside = [&](int64_t i) {
        const Range all =
            outputs_inside(i * s.dilation_height - s.padding_top, s.stride_height, s.in_height, s.out_height);
        return Range{std::max(e, all.begin), std::min(e_end, all.end)};
      };
      const auto x_row = [&](int64_t i, int64_t row) {
        return row * s.stride_height + i * s.dilation_height - s.padding_top;
      };
      int64_t low = s.in_height, high = -1;  // rows of x, both read
      for (int64_t i = item.tap_row; i < i_end; ++i)
        if (const Range rows = inside(i); rows.begin < rows.end)
          low = std::min(low, x_row(i, rows.begin)), high = std::max(high, x_row(i, rows.end - 1));
      if (high < low) continue;
      const A* x = read_x(item, n, low, high);
      for (int64_t i = item.tap_row; i < i_end; ++i)
        if (const Range rows = inside(i); rows.begin < rows.end)
          add_visit<V>(x + (x_row(i, rows.begin) - low) / row_step() * tile_width_ * x_pixel_,
                       grad + (rows.begin - e) * s.out_width * V * L, rows.end - rows.begin,
                       sums + i * tap_size);
    }
  }

  // Rows [begin, end) of grad_output, (pixels, lanes of the panel).
  template <int V>
  const A* read_grad(const Item& item, int64_t n, int64_t begin, int64_t end) const {
    const Image<const T> image = grad_output_.next(n);
    if constexpr (std::is_same_v<T, A>)
      if (grad_in_place_) return image.data + begin * image.row_stride();
    const int64_t first = item.panel * panels_.width, channel = item.group * shape_.out_group() + first;
    for (int64_t v = 0; v < V; ++v)
      load_tile(image, Lanes{channel + v * L}, std::min(L, shape_.out_group() - first - v * L), begin, end,
                item.grad_tile + v * L, V * L);
    return item.grad_tile;
  }

  // Rows low, low + row_step, ... high of x, (width with padding, channels of the group).
  const A* read_x(const Item& item, int64_t n, int64_t low, int64_t high) const {
    const Image<const T> image = input_.next(n);
    const int64_t channels = shape_.in_group(), left = shape_.padding_left * channels, width = image.width;
    if constexpr (std::is_same_v<T, A>)
      if (x_in_place_) return image.data + low * image.row_stride() + item.group * channels;
    A* tile = item.x_tile;
    if (move_row_) {
      const Scratch<T> moved(std::is_same_v<T, A> ? 0 : width * channels);
      for (int64_t row = low; row <= high; row += row_step(), tile += width * channels) {
        void* to = moved.data();
        if constexpr (std::is_same_v<T, A>) to = tile;
        move_row_(image.data, row, to);
        if constexpr (!std::is_same_v<T, A>) convert_run(moved.data(), tile, width * channels);
      }
      return item.x_tile;
    }
    for (int64_t row = low; row <= high; row += row_step(), tile += tile_width_ * channels) {
      std::fill_n(tile, left, A(0));
      std::fill(tile + left + width * channels, tile + tile_width_ * channels, A(0));
      load_pixels(image, item.group * channels, channels, row * width, width, tile + left);
    }
    return item.x_tile;
  }

  template <int V>
  void add_bias(const A* tile, int64_t pixels, A* sums) const {
    for (int v = 0; v < V; ++v) {
      Vector<A> total = load_vector(sums + v * L);
      for (int64_t k = 0; k < pixels; ++k) total += load_vector(tile + (k * V + v) * L);
      store_vector(sums + v * L, total);
    }
  }

  template <int V>
  void add_visit(const A* x, const A* grad, int64_t rows, A* sums) const {
    constexpr int R = std::min(rows_of<V>, 12);
    const bool runs = shape_.dilation_width == 1 && x_pixel_ == shape_.in_group();
    const int64_t length = runs ? lines() : shape_.in_group();
    for (int64_t j = 0; j < (runs ? 1 : shape_.kernel_width); ++j) {
      const A* tap = x + j * shape_.dilation_width * x_pixel_;
      A* target = sums + j * length * V * L;
      int64_t q = 0;
      for (; q + R <= length; q += R) add_lines<R, V>(tap + q, grad, rows, target + q * V * L);
      if constexpr (R > 8)
        for (; q + 8 <= length; q += 8) add_lines<8, V>(tap + q, grad, rows, target + q * V * L);
      for (; q + 4 <= length; q += 4) add_lines<4, V>(tap + q, grad, rows, target + q * V * L);
      for (; q + 2 <= length; q += 2) add_lines<2, V>(tap + q, grad, rows, target + q * V * L);
      for (; q < length; ++q) add_lines<1, V>(tap + q, grad, rows, target + q * V * L);
    }
  }

  template <int R, int V>
  void add_lines(const A* x, const A* grad, int64_t rows, A* sums) const {
    const int64_t pixel_step = shape_.stride_width * x_pixel_;
    const int64_t row_step = shape_.stride_height / this->row_step() * tile_width_ * x_pixel_;
    Vector<A> sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = load_vector(sums + (r * V + v) * L);
    for (int64_t row = 0; row < rows; ++row) {
      const A* lines[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) lines[r] = x + r;
      multiply_add(sum, lines, pixel_step, grad, V * L, shape_.out_width);
      x += row_step;
      grad += shape_.out_width * V * L;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store_vector(sums + (r * V + v) * L, sum[r][v]);
  }

  Image<const T> grad_output_, input_;
  const Conv2dShape& shape_;
  const MoveRow& move_row_;
  Panels<A> panels_;
  bool x_in_place_ = false, grad_in_place_ = false;
  int64_t tile_width_, x_pixel_;  // x_pixel_: between two pixels of x
  int64_t tap_rows_, visit_rows_, visits_, slices_;
};

}  // namespace

template <typename T>
void direct_grad_weight(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                        const Conv2dShape& s, const MoveRow& move_row, ParallelFor threads) {
  const DirectGradWeight<T> gradient(grad_output, input, s, move_row);
  const Scratch<accumulate_t<T>> sums(gradient.slices() * gradient.slice_size());
  parallel_for(threads, gradient.items(),
               [&](int64_t begin, int64_t end) { gradient.compute(begin, end, sums.data()); });
  parallel_for(threads, gradient.columns(), [&](int64_t begin, int64_t end) {
    gradient.finish(begin, end, sums.data(), grad_weight, grad_bias);
  });
}

template <typename T>
void conv2d_direct_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                   const Conv2dShape& s, ParallelFor threads) {
  direct_grad_weight(grad_output, input, grad_weight, grad_bias, s, {}, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                    \
  template void direct_grad_weight(const T*, const T*, T*, T*, const Conv2dShape&, const MoveRow&, \
                                   ParallelFor);                                                   \
  template void conv2d_direct_grad_weight_cpu(const T*, const T*, T*, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

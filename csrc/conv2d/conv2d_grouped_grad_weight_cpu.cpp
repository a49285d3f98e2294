// Convolution, C++, narrow groups: grad_weight and grad_bias.
//
// Computes  gw[m, c, i, j] = sum over n, e, f of gy[n, m, e, f] * x[n, g * C/G + c, e*s + i*d - p,
//   f*s + j*d - p], a channel of x in each vector lane.
// One inner step: a pixel of gy meets 3 pixels of x, a row of taps. Each filter's value is spread over the
//   lanes of its group once: for 8 filters 8 spreads and 3 loads for 24 multiply-adds into 24 registers.
// Bytes: x + gy once for every L channels, where they lie or through a tile that the cache holds.
// Threads share no sums: an item is a unit of channels and a slice of the rows of the batch. Their sums are
//   added in a fixed order, so the result has the same bits for any number of threads.
// Limits: the number of slices, and with it the order of additions, depends on the shape. Lanes are wasted
//   where in_group is no multiple of L, unless in_group == out_group divides L.
#include "../depthwise_conv2d/depthwise_conv2d_vectorized_cpu.h"
#include "conv2d_grouped_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Some rows of L channels of x and of the filters that meet them.
template <typename A>
struct FilterRows {
  const A* grad;   // the first row of gy, pixel 0; of the first filter, where filters are broadcast
  const A* input;  // the row of x that meets it, pixel 0
  int64_t count, columns;
  int64_t grad_row_stride, grad_pixel_stride;
  int64_t input_row_step, input_pixel_stride;  // to the row of x that meets the next row of gy
  int64_t in_width, stride, dilation, left;
  const LaneIndex<A>* spread;  // (M), or null: lanes that each lane reads, to see filter m of its group
  PrefetchRuns* next;
};

// Filters at once: their sums, times three taps, fill the registers.
template <typename A>
constexpr int filters_at_once = std::min(lanes_of<A>, vector_bytes == 64 ? 8 : 4);

// Filter m of every group at a pixel of gy, in every lane of its group.
template <bool Permutes, typename A>
inline __attribute__((always_inline)) Vector<A> spread_filter(const FilterRows<A>& rows, const A* grad,
                                                              int m) {
  Vector<A> value;
  if constexpr (Permutes)
    value = __builtin_shuffle(load_vector(grad), rows.spread[m]);
  else
    value = broadcast(grad[m]);
  keep_in_register(value);
  return value;
}

// Adds a pixel of gy times J pixels of x. `first` is the column of input[0]; only if Edge may columns lie
// outside the row.
template <bool Permutes, int J, int M, bool Edge, typename A>
inline __attribute__((always_inline)) void add_pixel(Vector<A> (&sum)[M][J], const FilterRows<A>& rows,
                                                     const A* grad, const A* input, int64_t first) {
  const int64_t step = rows.dilation * rows.input_pixel_stride;
  if constexpr (Edge) {
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) {
      if (uint64_t(first + j * rows.dilation) >= uint64_t(rows.in_width)) continue;
      const Vector<A> x = load_vector(input + j * step);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][j] += spread_filter<Permutes>(rows, grad, m) * x;
    }
  } else {
    Vector<A> x[J];
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) x[j] = load_vector(input + j * step);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<A> value = spread_filter<Permutes>(rows, grad, m);
#pragma GCC unroll 3
      for (int j = 0; j < J; ++j) sum[m][j] += value * x[j];
    }
  }
}

// M filters, J taps of a row from `first_tap`. Their sums, (M, ..., J, L), stay in registers over all rows.
template <bool Permutes, int J, int M, typename A>
void add_products(A* sums, int64_t sums_stride, const FilterRows<A>& rows, int64_t first_tap) {
  constexpr int L = lanes_of<A>;
  constexpr int64_t columns_at_once = 8;
  Vector<A> sum[M][J];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) sum[m][j] = load_vector(sums + m * sums_stride + j * L);

  const int64_t stride = rows.stride, width = rows.in_width;
  const int64_t low = first_tap * rows.dilation - rows.left, reach = low + (J - 1) * rows.dilation;
  // Columns [begin, end) meet any pixel of x, and [inner_begin, inner_end) only pixels of x.
  const int64_t begin = outputs_inside(reach, stride, width, rows.columns).begin;
  const int64_t end = outputs_inside(low, stride, width, rows.columns).end;
  const int64_t inner_begin = std::min(outputs_inside(low, stride, width, rows.columns).begin, end);
  const int64_t inner_end = outputs_inside(reach, stride, width, rows.columns).end;
  const int64_t grad_step = rows.grad_pixel_stride, input_step = stride * rows.input_pixel_stride;
  const A* grad_row = rows.grad + begin * grad_step;
  const A* input_row = rows.input + (low + begin * stride) * rows.input_pixel_stride;
  for (int64_t row = 0; row < rows.count; ++row) {
    const A *grad = grad_row, *input = input_row;
    int64_t column = begin;
    for (; column < inner_begin; ++column, grad += grad_step, input += input_step)
      add_pixel<Permutes, J, M, true>(sum, rows, grad, input, column * stride + low);
    while (column < inner_end) {
      rows.next->ask();
      const int64_t chunk_end = std::min(column + columns_at_once, inner_end);
      for (; column < chunk_end; ++column, grad += grad_step, input += input_step)
        add_pixel<Permutes, J, M, false>(sum, rows, grad, input, 0);
    }
    for (; column < end; ++column, grad += grad_step, input += input_step)
      add_pixel<Permutes, J, M, true>(sum, rows, grad, input, column * stride + low);
    grad_row += rows.grad_row_stride;
    input_row += rows.input_row_step;
  }

#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) store_vector(sums + m * sums_stride + j * L, sum[m][j]);
}

template <typename A>
struct FilterKernel {
  void (*three)(A*, int64_t, const FilterRows<A>&, int64_t);  // taps
  void (*one)(A*, int64_t, const FilterRows<A>&, int64_t);
  int64_t filters;  // at once
};

template <bool Permutes, int M, typename A>
FilterKernel<A> filter_kernel() {
  return {add_products<Permutes, 3, M, A>, add_products<Permutes, 1, M, A>, M};
}

template <typename A>
FilterKernel<A> choose_filter_kernel(const GroupedChannels<A>& channels) {
  if constexpr (vector_bytes >= 32)
    if (channels.permutes()) {
      if (channels.in_group == 2) return filter_kernel<true, 2, A>();
      if constexpr (lanes_of<A> > 4)
        if (channels.in_group == 4) return filter_kernel<true, 4, A>();
      if constexpr (lanes_of<A> > 8) return filter_kernel<true, 8, A>();
    }
  return filter_kernel<false, filters_at_once<A>, A>();
}

template <typename T>
class GroupedWeightGradient {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>;

  GroupedWeightGradient(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                        const Conv2dShape& s)
      : shape_(s),
        geometry_(forward_geometry(s)),
        channels_{s.groups, s.in_group(), s.out_group()},
        input_{input, s.in_channels, s.in_height, s.in_width, s.channels_last},
        grad_output_{grad_output, s.out_channels, s.out_height, s.out_width, s.channels_last},
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        in_place_(std::is_same_v<T, A> && s.channels_last && channels_.reads_in_place()),
        kernel_(choose_filter_kernel(channels_)),
        filters_(channels_.permutes() ? s.out_group()
                                      : ceil_div(s.out_group(), kernel_.filters) * kernel_.filters),
        vector_sums_(filters_ * s.taps() * L),
        bias_sums_(channels_.in_vectors() * vector_sums_),
        unit_sums_(bias_sums_ + channels_.out_vectors() * L) {
    if (channels_.permutes())
      for (int64_t m = 0; m < s.out_group(); ++m) spreads_.push_back(channels_.spread(m));
    // An item is a few units and a slice of the rows of the whole batch: enough items for many threads,
    // slices few enough that adding up their sums costs little.
    const int64_t units = channels_.units(), rows = s.batch * s.out_height;
    const int64_t unit_bytes = unit_sums_ * int64_t(sizeof(A));
    const int64_t most = std::max<int64_t>((1 << 20) / (units * unit_bytes), 1);
    const int64_t items = s.channels_last ? 64 : ceil_div(64, units);
    const int64_t wanted = std::clamp<int64_t>(rows / 8, 1, std::min(most, items));
    const int64_t whole = s.out_height <= 16 ? s.out_height : 1;  // small images are not cut
    slice_rows_ = ceil_div(ceil_div(rows, wanted), whole) * whole;
    slices_ = ceil_div(rows, slice_rows_);
    // Where a pixel's channels lie together, units take turns on a part of a slice: rows of one image that
    // fit the cache.
    const int64_t cached = std::clamp<int64_t>((192 << 10) / unit_bytes, 1, units);
    turns_ = s.channels_last ? std::min(cached, ceil_div(units, ceil_div(16, slices_))) : 1;
    const int64_t row_bytes =
        int64_t(sizeof(A)) * L * turns_ *
        (channels_.out_vectors() * s.out_width + channels_.in_vectors() * s.in_width * s.stride_height);
    part_rows_ = std::clamp<int64_t>((256 << 10) / row_bytes, 1, s.out_height);
  }

  void run(ParallelFor threads) {
    const int64_t units = channels_.units();
    const int64_t turns = ceil_div(units, turns_);
    Scratch<A> sums(slices_ * units * unit_sums_);  // (slices, units, unit_sums)
    parallel_for(threads, turns * slices_, [&](int64_t begin, int64_t end) {
      Worker worker(*this);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t unit = k % turns * turns_, unit_end = std::min(unit + turns_, units);
        const int64_t slice = k / turns, slice_end = std::min((slice + 1) * slice_rows_, all_rows());
        A* item_sums = sums.data() + (slice * units + unit) * unit_sums_;
        std::fill_n(item_sums, (unit_end - unit) * unit_sums_, A(0));
        for (int64_t row = slice * slice_rows_; row < slice_end;) {
          const Part part = part_at(unit, row, slice_end);
          row += part.end - part.begin;
          prefetch(worker.next, part,
                   row < slice_end ? part_at(unit, row, slice_end)
                   : k + 1 < end   ? first_part(k + 1)
                                   : Part{});
          for (int64_t u = unit; u < unit_end; ++u)
            add_unit(worker, part, u, item_sums + (u - unit) * unit_sums_);
        }
      }
    });
    parallel_for(threads, units, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) finish(sums.data(), unit);
    });
  }

 private:
  struct Worker {
    explicit Worker(const GroupedWeightGradient& of)
        : in_tile_size(of.in_place_ ? 0
                                    : most_input_rows(of.geometry_, of.part_rows_) * of.shape_.in_width * L),
          grad_tile_size(of.in_place_ ? 0 : of.part_rows_ * of.shape_.out_width * L),
          in_tiles(of.channels_.in_vectors() * in_tile_size),
          grad_tiles(of.channels_.out_vectors() * grad_tile_size) {}
    int64_t in_tile_size, grad_tile_size;
    Scratch<A> in_tiles, grad_tiles;
    PrefetchRuns next;
  };

  // Rows [begin, end) of gy of an image, and the first of the units that take turns on them.
  struct Part {
    int64_t unit, image, begin, end;
  };
  int64_t all_rows() const { return shape_.batch * shape_.out_height; }
  Part part_at(int64_t unit, int64_t row, int64_t slice_end) const {
    const int64_t image = row / shape_.out_height, begin = row % shape_.out_height;
    return {unit, image, begin, std::min({begin + part_rows_, shape_.out_height, begin + slice_end - row})};
  }
  Part first_part(int64_t item) const {
    const int64_t turns = ceil_div(channels_.units(), turns_), row = item / turns * slice_rows_;
    return part_at(item % turns * turns_, row, std::min(row + slice_rows_, all_rows()));
  }

  void add_unit(Worker& worker, const Part& part, int64_t unit, A* sums) const {
    const Conv2dShape& s = shape_;
    const auto [low, high] = input_rows(geometry_, part.begin, part.end);
    const Image<const T> input = input_.next(part.image), grad_output = grad_output_.next(part.image);
    Block<const A> x = tile_block<const A>(worker.in_tiles.data(), low, s.in_width);
    Block<const A> gy = tile_block<const A>(worker.grad_tiles.data(), part.begin, s.out_width);
    if (in_place_) {
      if constexpr (std::is_same_v<T, A>) x = input.block(unit * L), gy = grad_output.block(unit * L);
    } else {
      for (int64_t v = 0; v < channels_.in_vectors(); ++v) {
        const Range lanes = channels_.in_channels(unit, v);
        load_tile(input, Lanes{lanes.begin}, lanes.end - lanes.begin, low, high,
                  worker.in_tiles.data() + v * worker.in_tile_size);
      }
      for (int64_t v = 0; v < channels_.out_vectors(); ++v) {
        const Range lanes = channels_.out_channels(unit, v);
        load_tile(grad_output, Lanes{lanes.begin}, lanes.end - lanes.begin, part.begin, part.end,
                  worker.grad_tiles.data() + v * worker.grad_tile_size);
      }
    }
    for (int64_t v = 0; v < channels_.out_vectors() && grad_bias_; ++v) {
      Vector<A> sum = load_vector(sums + bias_sums_ + v * L);
      for (int64_t e = part.begin; e < part.end; ++e)
        for (int64_t f = 0; f < s.out_width; ++f)
          sum += load_vector(gy.data + v * worker.grad_tile_size + e * gy.row_stride + f * gy.pixel_stride);
      store_vector(sums + bias_sums_ + v * L, sum);
    }
    FilterRows<A> rows{};
    rows.columns = s.out_width;
    rows.grad_row_stride = gy.row_stride, rows.grad_pixel_stride = gy.pixel_stride;
    rows.input_row_step = s.stride_height * x.row_stride, rows.input_pixel_stride = x.pixel_stride;
    rows.in_width = s.in_width, rows.stride = s.stride_width, rows.dilation = s.dilation_width;
    rows.left = s.padding_left;
    rows.spread = spreads_.data();
    rows.next = &worker.next;
    for (int64_t v = 0; v < channels_.in_vectors(); ++v)
      for (int64_t i = 0; i < s.kernel_height; ++i) {
        const int64_t offset = i * s.dilation_height - s.padding_top;
        const Range inside = outputs_inside(offset, s.stride_height, s.in_height, part.end);
        const int64_t begin = std::max(part.begin, inside.begin);
        if (begin >= inside.end) continue;
        rows.count = inside.end - begin;
        rows.input = x.data + v * worker.in_tile_size + (begin * s.stride_height + offset) * x.row_stride;
        for (int64_t m = 0; m < filters_; m += kernel_.filters) {
          rows.grad = gy.data + m / L * worker.grad_tile_size + begin * gy.row_stride + m % L;
          A* row_sums = sums + v * vector_sums_ + (m * s.taps() + i * s.kernel_width) * L;
          int64_t j = 0;
          for (; j + 3 <= s.kernel_width; j += 3) kernel_.three(row_sums + j * L, s.taps() * L, rows, j);
          for (; j < s.kernel_width; ++j) kernel_.one(row_sums + j * L, s.taps() * L, rows, j);
        }
      }
  }

  // Asks for what part `next` reads, while `now` is computed.
  void prefetch(PrefetchRuns& runs, const Part& now, const Part& next) const {
    const Conv2dShape& s = shape_;
    if (next.begin == next.end) return runs.clear(0);
    const int64_t passes =
        ceil_div(s.kernel_width, 3) * s.kernel_height * channels_.in_vectors() * (filters_ / kernel_.filters);
    runs.clear(turns_ * passes * (now.end - now.begin) * ceil_div(s.out_width, 8));
    const auto [low, high] = input_rows(geometry_, next.begin, next.end);
    const int64_t last = std::min(next.unit + turns_, channels_.units()) - 1;
    runs.add(input_.next(next.image), channels_.in_channels(next.unit, 0).begin,
             channels_.in_channels(last, channels_.in_vectors() - 1).end, low, high);
    runs.add(grad_output_.next(next.image), channels_.out_channels(next.unit, 0).begin,
             channels_.out_channels(last, channels_.out_vectors() - 1).end, next.begin, next.end);
  }

  // Adds the slices' sums of a unit in their order, and stores them.
  void finish(A* sums, int64_t unit) const {
    const Conv2dShape& s = shape_;
    const int64_t taps = s.taps(), in_group = s.in_group(), out_group = s.out_group();
    A* total = sums + unit * unit_sums_;
    for (int64_t slice = 1; slice < slices_; ++slice) {
      const A* more = total + slice * channels_.units() * unit_sums_;
      for (int64_t k = 0; k < unit_sums_; k += L)
        store_vector(total + k, load_vector(total + k) + load_vector(more + k));
    }
    for (int64_t v = 0; v < channels_.in_vectors(); ++v) {
      const Range lanes = channels_.in_channels(unit, v);
      for (int64_t m = 0; m < out_group; ++m)
        for (int64_t channel = lanes.begin; channel < lanes.end; ++channel) {
          const A* from = total + v * vector_sums_ + m * taps * L + channel - lanes.begin;
          T* to =
              grad_weight_ + ((channel / in_group * out_group + m) * in_group + channel % in_group) * taps;
          for (int64_t t = 0; t < taps; ++t) store(&to[t], from[t * L]);
        }
    }
    if (!grad_bias_) return;
    for (int64_t v = 0; v < channels_.out_vectors(); ++v) {
      const Range lanes = channels_.out_channels(unit, v);
      for (int64_t m = lanes.begin; m < lanes.end; ++m)
        store(&grad_bias_[m], total[bias_sums_ + v * L + m - lanes.begin]);
    }
  }

  Conv2dShape shape_;
  Geometry geometry_;  // which rows of x meet which of gy
  GroupedChannels<A> channels_;
  Image<const T> input_, grad_output_;
  T *grad_weight_, *grad_bias_;
  bool in_place_;
  FilterKernel<A> kernel_;
  int64_t filters_, vector_sums_, bias_sums_, unit_sums_;
  int64_t slice_rows_, slices_, turns_, part_rows_;
  std::vector<LaneIndex<A>> spreads_;
};

}  // namespace

template <typename T>
void conv2d_grouped_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                    const Conv2dShape& shape, ParallelFor threads) {
  GroupedWeightGradient<T>(grad_output, input, grad_weight, grad_bias, shape).run(threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                   \
  template void conv2d_grouped_grad_weight_cpu<T>(const T*, const T*, T*, T*, const Conv2dShape&, \
                                                  ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

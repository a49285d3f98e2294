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
#include <vector>

#include "depthwise_conv2d_vectorized_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

template <typename A>
struct Rows {
  const A* grad;                                                    // row e of gy, pixel 0
  const A* input;                                                   // row e*s + i*d - p of x, pixel 0
  int64_t grad_pixel_stride, input_pixel_stride, input_row_stride;  // input_row_stride: between two taps
  int64_t in_width, stride, dilation, left;
};

// sum[i][j] += gy[f] * x[i][f*S + j] for P outputs f from `column`, J taps from `first_tap`, and I rows of
// taps. A chain of additions into one register takes 4 cycles a link, so one row of few taps keeps two
// chains.
template <int J, int S, int P, int I, bool Edge, typename A>
inline __attribute__((always_inline)) void add_products(Vector<A> (&sum)[I == 1 ? 2 : I][J],
                                                        const Rows<A>& rows, int64_t column,
                                                        int64_t first_tap) {
  Vector<A> grad[P];
#pragma GCC unroll 8
  for (int f = 0; f < P; ++f) {
    grad[f] = load_vector(rows.grad + (column + f) * rows.grad_pixel_stride);
    keep_in_register(grad[f]);
  }
  constexpr int step = S > 0 ? S : 1;
  const int64_t stride = S > 0 ? S : rows.stride;
  const int64_t first = column * stride + first_tap * rows.dilation - rows.left;
  const A* input = rows.input + first * rows.input_pixel_stride;
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
  for (int i = 0; i < I; ++i, input += rows.input_row_stride) {
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

// J taps of I rows of the filter, over columns [column, column_end).
template <int J, int S, int P, int I, typename A>
void add_row(A* sums, const Rows<A>& rows, int64_t taps, int64_t first_tap, int64_t column,
             int64_t column_end) {
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
  // Columns that meet any pixel of x, and those that meet only pixels of x.
  const int64_t begin = shift - span > 0 ? (shift - span + stride - 1) / stride : 0;
  const int64_t last = rows.in_width - 1 + shift;
  const int64_t end = last < 0 ? 0 : std::min(column_end, last / stride + 1);
  const int64_t inner_begin = shift > 0 ? (shift + stride - 1) / stride : 0;
  const int64_t inner_end = last < span ? 0 : (last - span) / stride + 1;
  column = std::max(begin, column);
  for (; column + P <= end; column += P) {
    if (column >= inner_begin && column + P <= inner_end)
      add_products<J, S, P, I, false, A>(sum, rows, column, first_tap);
    else
      add_products<J, S, P, I, true, A>(sum, rows, column, first_tap);
  }
  for (; column < end; ++column) add_products<J, S, 1, I, true, A>(sum, rows, column, first_tap);

  if (I == 1)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[0][j] += sum[1][j];
#pragma GCC unroll 3
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store_vector(sums + (i * taps + first_tap + j) * L, sum[i][j]);
}

// `count` rows of the filter, the rows of x below each other, over columns [begin, end).
template <int S, int P, typename A>
void add_filter_rows(A* sums, Rows<A> rows, int64_t count, int64_t taps, int64_t begin, int64_t end) {
  constexpr int L = lanes_of<A>;
  constexpr bool many = vector_bytes == 64 && std::is_same_v<A, float>;  // registers for several rows of sums
  while (count > 0) {
    int64_t done = 1;
    if constexpr (S == 0) {
      for (int64_t j = 0; j < taps; ++j) add_row<1, 0, P, 1, A>(sums, rows, taps, j, begin, end);
    } else if (many && taps == 3 && count >= 3) {
      add_row<3, S, P, many ? 3 : 1, A>(sums, rows, taps, 0, begin, end), done = 3;
    } else if (many && taps == 5 && count >= 2) {
      add_row<5, S, P, many ? 2 : 1, A>(sums, rows, taps, 0, begin, end), done = 2;
    } else if (many && taps == 7 && count >= 2 && S == 1) {
      add_row<7, S, P, many ? 2 : 1, A>(sums, rows, taps, 0, begin, end), done = 2;
    } else if (taps == 5) {
      add_row<5, S, P, 1, A>(sums, rows, taps, 0, begin, end);
    } else {
      int64_t j = 0;
      for (; j + 7 <= taps; j += 7) add_row<7, S, P, 1, A>(sums, rows, taps, j, begin, end);
      for (; j + 3 <= taps; j += 3) add_row<3, S, P, 1, A>(sums, rows, taps, j, begin, end);
      for (; j < taps; ++j) add_row<1, S, P, 1, A>(sums, rows, taps, j, begin, end);
    }
    sums += done * taps * L;
    rows.input += done * rows.input_row_stride;
    count -= done;
  }
}

template <typename A>
using FilterRowKernel = void (*)(A* sums, Rows<A> rows, int64_t count, int64_t taps, int64_t begin,
                                 int64_t end);

template <int P, typename A>
FilterRowKernel<A> choose_filter_row_kernel(const DepthwiseConv2dShape& s) {
  if (s.dilation_width == 1 && s.stride_width == 1) return add_filter_rows<1, P, A>;
  if (s.dilation_width == 1 && s.stride_width == 2) return add_filter_rows<2, P, A>;
  return add_filter_rows<0, P, A>;
}

}  // namespace

template <typename T>
void depthwise_conv2d_vectorized_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,
                                                 T* grad_bias, const DepthwiseConv2dShape& s,
                                                 ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const int64_t taps = s.kernel_height * s.kernel_width,
                sums_of_block = (taps + 1) * L;  // the last is the bias
  const int64_t multiplier = s.multiplier();
  const bool in_place = std::is_same_v<T, A> && s.channels_last && s.out_channels >= L && multiplier == 1;
  const int64_t blocks = ceil_div(s.out_channels, L);

  // An item is a group of blocks and a slice of the rows of the whole batch: enough items for many threads,
  // slices few enough that their sums stay small. Through a tile, a group is one block.
  const int64_t block_bytes = sums_of_block * int64_t(sizeof(A));
  const int64_t group = in_place ? std::clamp<int64_t>((192 << 10) / block_bytes, 1, blocks) : 1;
  const int64_t groups = ceil_div(blocks, group);
  const int64_t rows = s.batch * s.out_height;
  const int64_t most = std::max<int64_t>((1 << 20) / (blocks * block_bytes), 1);
  const int64_t slices = std::clamp<int64_t>(64 / groups, 1, std::min(most, std::max<int64_t>(rows / 4, 1)));
  const int64_t slice_rows = ceil_div(rows, slices);
  // A tile holds a part of a slice: rows of one image that fit the cache.
  const int64_t row_bytes = int64_t(sizeof(A)) * L * (s.out_width + s.in_width * s.stride_height);
  const int64_t part_rows = std::clamp<int64_t>((384 << 10) / row_bytes, 1, s.out_height);
  const int64_t part_in_rows = std::min(
      s.in_height, (part_rows - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1);
  const bool by_seven = s.out_width % 8 != 0 && s.out_width % 7 == 0;
  const auto kernel = by_seven ? choose_filter_row_kernel<7, A>(s) : choose_filter_row_kernel<8, A>(s);

  Scratch<A> partial(slices * blocks * sums_of_block);  // (slices, blocks, taps + 1, L)
  parallel_for(threads, groups * slices, [&](int64_t begin, int64_t end) {
    Scratch<A> in_tile(in_place ? 0 : part_in_rows * s.in_width * L);
    Scratch<A> grad_tile(in_place ? 0 : part_rows * s.out_width * L);
    std::vector<Block<const A>> xs(group), gys(group);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first_block = item / slices * group, slice = item % slices;
      const int64_t count_blocks = std::min(group, blocks - first_block);
      A* sums = partial.data() + (slice * blocks + first_block) * sums_of_block;
      std::fill(sums, sums + count_blocks * sums_of_block, A(0));
      const int64_t row_end = std::min((slice + 1) * slice_rows, rows);
      for (int64_t row = slice * slice_rows; row < row_end;) {
        const int64_t n = row / s.out_height, e_begin = row % s.out_height;
        const int64_t e_end = std::min({e_begin + part_rows, s.out_height, e_begin + row_end - row});
        row += e_end - e_begin;
        const int64_t low = std::clamp<int64_t>(e_begin * s.stride_height - s.padding_top, 0, s.in_height);
        const int64_t high = std::clamp<int64_t>(
            (e_end - 1) * s.stride_height - s.padding_top + (s.kernel_height - 1) * s.dilation_height + 1,
            low, s.in_height);
        const Image<const T> x{input + n * s.in_channels * s.in_height * s.in_width, s.in_channels,
                               s.in_height, s.in_width, s.channels_last};
        const Image<const T> gy{grad_output + n * s.out_channels * s.out_height * s.out_width, s.out_channels,
                                s.out_height, s.out_width, s.channels_last};
        for (int64_t b = 0; b < count_blocks; ++b) {
          const int64_t start = in_place ? block_start(first_block + b, s.out_channels, L) : first_block * L;
          const int64_t count = std::min(L, s.out_channels - start);
          xs[b] = read_block<T, A>(x, Lanes{start, 1, multiplier, 0}, count, low, high, in_tile.data());
          gys[b] = read_block<T, A>(gy, Lanes{start}, count, e_begin, e_end, grad_tile.data());
        }
        for (int64_t e = e_begin; e < e_end; ++e) {
          for (int64_t b = 0; b < count_blocks; ++b) {
            A* sums_here = sums + b * sums_of_block;
            const int64_t top = e * s.stride_height - s.padding_top, dilation = s.dilation_height;
            const int64_t i = top < 0 ? ceil_div(-top, dilation) : 0;  // the first tap inside the image
            const int64_t i_end =
                top < s.in_height ? std::min(s.kernel_height, ceil_div(s.in_height - top, dilation)) : 0;
            const Rows<A> pair{gys[b].data + e * gys[b].row_stride,
                               xs[b].data + (top + i * dilation) * xs[b].row_stride,
                               gys[b].pixel_stride,
                               xs[b].pixel_stride,
                               dilation * xs[b].row_stride,
                               s.in_width,
                               s.stride_width,
                               s.dilation_width,
                               s.padding_left};
            kernel(sums_here + i * s.kernel_width * L, pair, i_end - i, s.kernel_width, 0, s.out_width);
            if (grad_bias) {
              Vector<A> sum = load_vector(sums_here + taps * L);
              for (int64_t f = 0; f < s.out_width; ++f)
                sum += load_vector(pair.grad + f * pair.grad_pixel_stride);
              store_vector(sums_here + taps * L, sum);
            }
          }
        }
      }
    }
  });

  for (int64_t slice = 1; slice < slices; ++slice)
    for (int64_t k = 0; k < blocks * sums_of_block; ++k)
      partial.data()[k] += partial.data()[slice * blocks * sums_of_block + k];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = in_place ? block_start(block, s.out_channels, L) : block * L;
    const A* total = partial.data() + block * sums_of_block;
    for (int64_t lane = 0; lane < std::min(L, s.out_channels - start); ++lane) {
      for (int64_t t = 0; t < taps; ++t) store(&grad_weight[(start + lane) * taps + t], total[t * L + lane]);
      if (grad_bias) store(&grad_bias[start + lane], total[taps * L + lane]);
    }
  }
}

#define FASTCONV_INSTANTIATE(T)                                                            \
  template void depthwise_conv2d_vectorized_grad_weight_cpu<T>(const T*, const T*, T*, T*, \
                                                               const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

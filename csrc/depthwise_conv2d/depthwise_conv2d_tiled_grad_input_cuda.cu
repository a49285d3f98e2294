// grad_input of depthwise convolution by tiles, where a stride or a multiplier makes it more than a
// convolution.
//
// Formula: grad_input[h] = sum over i with (h + padding - i * dilation) = e * stride of grad_output[e] *
// weight[i]. One thread: with stride 2, a few columns of 2 x 2 grad_input pixels, row after row: each
// grad_output row comes once
//   into registers, and each of the four pixels takes its own taps of K x K, none twice and none in vain.
//   Else, one pixel.
// Bytes: grad_output and grad_input once, and the halo again (from L2).
// Before it (plain): every tap is tried, and three of four fail at stride 2.
// Limits: K = 3, 5, 7 at stride 2 are compiled in; other sizes step through their taps; a halo too large for
//   shared memory is refused.

#include <numeric>

#include "depthwise_conv2d_tiled_cuda.h"

namespace fastconv {
namespace {

// Pixel S * t + p - padding, 0 <= p < S, is sum over a of grad_output[t - a] * weight[a * S + p]: for each p
// a convolution with every S-th tap. Rows and columns of tiles and walks are counted in t.
template <typename T, int K, int S, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1)
    depthwise_conv2d_tiled_grad_input_kernel(Source<T> grad_output,         // (N, C, E, F)
                                             const T* __restrict__ weight,  // (C, K, K)
                                             T* __restrict__ grad_input,    // (N, C, H, W)
                                             DepthwiseConv2dShape s, Tiling t, int rows_of_t,
                                             int columns_of_t) {
  using A = accumulate_t<T>;
  constexpr int Columns = ChannelsLast ? 2 : 1;
  constexpr int Live = (K + S - 1) / S;  // values of t that one grad_output row belongs to
  constexpr int Span = Columns + Live - 1;
  FASTCONV_DYNAMIC_SHARED(T, tile);
  const TilePosition at = tile_position<ChannelsLast>(t, grad_output, blockIdx.x);
  const int first_row = int(s.padding_top) / S + at.row, first_column = int(s.padding_left) / S + at.column;
  const int left = first_column - (Live - 1);
  const T* filters = nullptr;
  if constexpr (ChannelsLast) filters = fill_taps(tile, weight, t, at, K * K, s.in_channels);
  fill_tile<ChannelsLast>(tile, grad_output, t, at, first_row - (Live - 1), left);
  const int in_rows = int(s.in_height), in_columns = int(s.in_width);

  Walk walk;
  for (int round = 0; find_walk<ChannelsLast, Columns, 1>(t, at, rows_of_t, round, walk); ++round) {
    const int64_t plane = at.group * t.channels + walk.channel;  // channels_last: the channel
    const int64_t channel = ChannelsLast ? plane : plane % s.in_channels;
    if (walk.rows <= 0 || at.column + walk.column >= columns_of_t ||
        plane >= (ChannelsLast ? s.in_channels : s.batch * s.in_channels))
      continue;
    A taps[K][K];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap)
      taps[tap / K][tap % K] = load(ChannelsLast ? load_shared(filters + walk.channel * K * K + tap)
                                                 : load_global(weight + channel * K * K + tap));

    const T* from = ChannelsLast ? tile + walk.row * t.pitch + walk.column * t.channels + walk.channel
                                 : tile + (walk.channel * t.in_rows + walk.row) * t.pitch + walk.column +
                                       column_shift<T>(t, left, false);
    const int step = ChannelsLast ? t.channels : 1;
    A sums[Live][S][Columns * S] = {};
    for (int row = 0; row < walk.rows + Live - 1; ++row) {  // sums[a] is of t = row - (Live - 1) + a
      A values[Span];
#pragma unroll
      for (int x = 0; x < Span; ++x) values[x] = load(load_shared(from + row * t.pitch + x * step));
#pragma unroll
      for (int a = 0; a < Live; ++a) {
        if (unsigned(row - (Live - 1) + a) >= unsigned(walk.rows)) continue;
#pragma unroll
        for (int i = a * S; i < a * S + S && i < K; ++i)
#pragma unroll
          for (int j = 0; j < K; ++j)
#pragma unroll
            for (int x = 0; x < Columns; ++x)
              sums[a][i % S][x * S + j % S] += values[x + Live - 1 - j / S] * taps[i][j];
      }
      if (row >= Live - 1) {
#pragma unroll
        for (int p = 0; p < S; ++p) {
          const int y = (first_row + walk.row + row - (Live - 1)) * S + p - int(s.padding_top);
#pragma unroll
          for (int q = 0; q < Columns * S; ++q) {
            const int x = (first_column + walk.column) * S + q - int(s.padding_left);
            const int64_t target = ChannelsLast
                                       ? ((at.image * in_rows + y) * in_columns + x) * s.in_channels + channel
                                       : (plane * in_rows + y) * in_columns + x;
            store_global(grad_input + target, rounded<T>(sums[0][p][q]),
                         y >= 0 && y < in_rows && x >= 0 && x < in_columns);
          }
        }
      }
#pragma unroll
      for (int a = 0; a < Live; ++a)
#pragma unroll
        for (int p = 0; p < S; ++p)
#pragma unroll
          for (int q = 0; q < Columns * S; ++q)
            sums[a][p][q] = a < Live - 1 ? sums[a < Live - 1 ? a + 1 : 0][p][q] : A(0);
    }
  }
}

// The taps i of a pixel whose distance to the top, padding included, is `from`: i = first, first + step, ...
// read grad_output rows e, e - step_back, ...
struct TapStep {
  int step, step_back;
};

// Any kernel size, stride, dilation and multiplier.
template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1)
    depthwise_conv2d_tiled_any_grad_input_kernel(Source<T> grad_output,         // (N, O, E, F)
                                                 const T* __restrict__ weight,  // (O, KH, KW)
                                                 T* __restrict__ grad_input,    // (N, C, H, W)
                                                 DepthwiseConv2dShape s, Tiling t, TapStep down,
                                                 TapStep right) {
  using A = accumulate_t<T>;
  FASTCONV_DYNAMIC_SHARED(T, tile);
  const int multiplier = int(s.multiplier()), kernel_height = int(s.kernel_height),
            kernel_width = int(s.kernel_width);
  const int stride_height = int(s.stride_height), stride_width = int(s.stride_width);
  const int dilation_height = int(s.dilation_height), dilation_width = int(s.dilation_width);
  const TilePosition at = tile_position<ChannelsLast>(t, grad_output, blockIdx.x);
  // The first grad_output row and column that any pixel of the tile reads.
  const int reach_up = at.row + int(s.padding_top) - (kernel_height - 1) * dilation_height;
  const int reach_left = at.column + int(s.padding_left) - (kernel_width - 1) * dilation_width;
  const int top =
      reach_up > 0 ? (reach_up + stride_height - 1) / stride_height : -(-reach_up / stride_height);
  const int left =
      reach_left > 0 ? (reach_left + stride_width - 1) / stride_width : -(-reach_left / stride_width);
  fill_tile<ChannelsLast>(tile, grad_output, t, at, top, left);

  const int in_channels = t.channels / multiplier;  // the group's
  const int wide = ChannelsLast ? in_channels : t.out_columns,
            tall = ChannelsLast ? t.out_columns : t.out_rows;
  const int step_row = t.pitch, step_column = ChannelsLast ? t.channels : 1;
  const int step_filter = ChannelsLast ? 1 : t.in_rows * t.pitch;
  for (int item = int(threadIdx.x); item < in_channels * t.out_rows * t.out_columns;
       item += int(blockDim.x)) {
    const int first = item % wide, second = item / wide % tall, third = item / wide / tall;
    const int column = ChannelsLast ? second : first, row = ChannelsLast ? third : second;
    const int in_plane = ChannelsLast ? first : third;
    const int y = at.row + row, x = at.column + column;
    const int64_t plane = at.group * in_channels + in_plane;  // channels_last: the channel
    if (y >= s.in_height || x >= s.in_width ||
        plane >= (ChannelsLast ? s.in_channels : s.batch * s.in_channels))
      continue;
    const int64_t channel = ChannelsLast ? plane : plane % s.in_channels;

    const int from_top = y + int(s.padding_top), from_left = x + int(s.padding_left);
    int first_i = 0, first_j = 0;
    while (first_i < down.step && (from_top - first_i * dilation_height) % stride_height != 0) ++first_i;
    while (first_j < right.step && (from_left - first_j * dilation_width) % stride_width != 0) ++first_j;
    A sum = 0;
    if (first_i < down.step && first_j < right.step) {
      for (int m = 0; m < multiplier; ++m) {
        const T* filter = weight + (channel * multiplier + m) * kernel_height * kernel_width;
        const T* source = tile + (in_plane * multiplier + m) * step_filter +
                          (ChannelsLast ? 0 : column_shift<T>(t, left, false));
        int e = (from_top - first_i * dilation_height) / stride_height - top;
        for (int i = first_i; i < kernel_height; i += down.step, e -= down.step_back) {
          int f = (from_left - first_j * dilation_width) / stride_width - left;
          for (int j = first_j; j < kernel_width; j += right.step, f -= right.step_back)
            sum += load(load_shared(source + e * step_row + f * step_column)) *
                   load(load_global(filter + i * kernel_width + j));
        }
      }
    }
    const int64_t target = ChannelsLast
                               ? ((at.image * s.in_height + y) * s.in_width + x) * s.in_channels + channel
                               : (plane * s.in_height + y) * s.in_width + x;
    store_global(grad_input + target, rounded<T>(sum));
  }
}

TapStep tap_step(int64_t stride, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  return {int(stride / common), int(dilation / common)};
}

}  // namespace

template <typename T>
bool depthwise_conv2d_tiled_grad_input_cuda(const T* grad_output, const T* weight, T* grad_input,
                                            const DepthwiseConv2dShape& s, void* stream) {
  if (s.batch * s.in_channels * s.in_height * s.in_width == 0) return true;
  check_tiled(s);
  if (depthwise_conv2d_turned_forward_cuda(grad_output, weight, grad_input, s, stream)) return true;
  const Source<T> source{grad_output, s.batch, s.out_channels, int(s.out_height), int(s.out_width)};
  if (s.stride_height == 2) {
    const bool done = dispatch_walk<T>(s, [&]<int K, int S, bool ChannelsLast>() {
      if constexpr (S == 2) {
        const int rows = int((s.in_height - 1 + s.padding_top) / S - s.padding_top / S + 1);
        const int columns = int((s.in_width - 1 + s.padding_left) / S - s.padding_left / S + 1);
        const Tiling t = walking_tiling(source, ChannelsLast, 1, ChannelsLast ? 2 : 1, rows, columns,
                                        {1, (K + S - 1) / S - 1}, s.batch * s.in_channels);
        FASTCONV_LAUNCH((depthwise_conv2d_tiled_grad_input_kernel<T, K, S, ChannelsLast>),
                        grid_size(tile_count(t, s.batch, ChannelsLast)), t.threads,
                        t.shared_bytes + (ChannelsLast ? t.channels * K * K * int(sizeof(T)) : 0), stream,
                        source, weight, grad_input, s, t, rows, columns);
      }
    });
    if (done) return true;
  }

  Tiling t;
  if (!any_tiling(t, source, s.channels_last, s.in_height, s.in_width,
                  {1, (s.kernel_height - 1) * s.dilation_height, s.stride_height},
                  {1, (s.kernel_width - 1) * s.dilation_width, s.stride_width}, int(s.multiplier())))
    return false;
  const TapStep down = tap_step(s.stride_height, s.dilation_height),
                right = tap_step(s.stride_width, s.dilation_width);
  const unsigned grid = grid_size(tile_count(t, s.batch, s.channels_last));
  if (s.channels_last) {
    FASTCONV_LAUNCH((depthwise_conv2d_tiled_any_grad_input_kernel<T, true>), grid, t.threads, t.shared_bytes,
                    stream, source, weight, grad_input, s, t, down, right);
  } else {
    FASTCONV_LAUNCH((depthwise_conv2d_tiled_any_grad_input_kernel<T, false>), grid, t.threads, t.shared_bytes,
                    stream, source, weight, grad_input, s, t, down, right);
  }
  return true;
}

#define FASTCONV_INSTANTIATE(T)                                                   \
  template bool depthwise_conv2d_tiled_grad_input_cuda<T>(const T*, const T*, T*, \
                                                          const DepthwiseConv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

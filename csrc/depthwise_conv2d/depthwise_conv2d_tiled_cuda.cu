// Depthwise convolution by tiles: forward, and grad_input where it is a convolution too (stride 1, multiplier
// 1).
//
// Formula: depthwise_conv2d.h. grad_input at stride 1 is the same sum with the taps turned round.
// One block: a tile of the input in shared memory. One thread: a few columns of one channel, row after row;
// each input
//   row comes once from shared memory into registers and goes into every output row it belongs to.
// Bytes: input and output once, and the halo again (from L2): (rows + K - 1) / rows a direction.
// Before it (plain): KH * KW loads from global memory for each output; here about K / columns from shared
// memory. Limits: K = 3, 5, 7 at stride 1, 2 without dilation and multiplier are compiled in; other sizes
// read their taps in a
//   loop; a halo that does not fit in shared memory (dilation * (K - 1) beyond about 100) is refused.

#include <utility>

#include "depthwise_conv2d_tiled_cuda.h"

namespace fastconv {
namespace {

template <typename T, int K, int S, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1)
    depthwise_conv2d_tiled_forward_kernel(Source<T> input,               // (N, C, H, W)
                                          const T* __restrict__ weight,  // (C, K, K)
                                          const T* __restrict__ bias,    // (C) or null
                                          T* __restrict__ output,        // (N, C, E, F)
                                          DepthwiseConv2dShape s, Tiling t, Activation activation,
                                          bool turned) {
  using A = accumulate_t<T>;
  constexpr int Channels = ChannelsLast ? channels_per_lane<T, K> : 1, Columns = ChannelsLast ? 4 : 1;
  constexpr int Live = (K + S - 1) / S;  // output rows that one input row can belong to
  constexpr int Span = (Columns - 1) * S + K;
  FASTCONV_DYNAMIC_SHARED(T, tile);
  const TilePosition at = tile_position<ChannelsLast>(t, input, blockIdx.x);
  const int column = at.column * S - int(s.padding_left);
  const T* filters = nullptr;
  if constexpr (ChannelsLast) filters = fill_taps(tile, weight, t, at, K * K, s.out_channels);
  fill_tile<ChannelsLast>(tile, input, t, at, at.row * S - int(s.padding_top), column);
  const int out_rows = int(s.out_height), out_columns = int(s.out_width);
  const int64_t step_column = ChannelsLast ? s.out_channels : 1, step_row = out_columns * step_column;
  const bool packed = s.out_channels % Channels == 0;

  Walk walk;
  for (int round = 0; find_walk<ChannelsLast, Columns, Channels>(t, at, out_rows, round, walk); ++round) {
    const int64_t plane = at.group * t.channels + walk.channel;  // channels_last: the channel
    const int64_t channel = ChannelsLast ? plane : plane % s.out_channels;
    const int columns = min(Columns, out_columns - at.column - walk.column);
    if (walk.rows <= 0 || columns <= 0 || plane >= (ChannelsLast ? s.out_channels : s.batch * s.out_channels))
      continue;

    A taps[K][K][Channels], offset[Channels];
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
      const bool exists = channel + c < s.out_channels;
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        const int from = turned ? K * K - 1 - tap : tap;
        taps[tap / K][tap % K][c] =
            load(ChannelsLast ? load_shared(filters + (walk.channel + c) * K * K + from)
                              : load_global(weight + channel * K * K + from));
      }
      offset[c] = bias == nullptr ? 0 : load(load_global(bias + channel + c, exists));
    }

    const T* from = ChannelsLast ? tile + walk.row * S * t.pitch + walk.column * S * t.channels + walk.channel
                                 : tile + (walk.channel * t.in_rows + walk.row * S) * t.pitch +
                                       walk.column * S + column_shift<T>(t, column, false);
    const int step = ChannelsLast ? t.channels : 1;
    T* to =
        output + (ChannelsLast
                      ? ((at.image * out_rows + at.row + walk.row) * out_columns + at.column + walk.column) *
                                s.out_channels +
                            channel
                      : (plane * out_rows + at.row + walk.row) * out_columns + at.column + walk.column);
    A sums[Live][Columns][Channels] = {};
    for (int row = 0; row < walk.rows + Live - 1; ++row) {  // sums[a] is of output row `row - a`
#pragma unroll
      for (int phase = 0; phase < S; ++phase) {
        if (row * S + phase >= (walk.rows - 1) * S + K) break;
        A values[Span][Channels];
#pragma unroll
        for (int x = 0; x < Span; ++x) {
          const auto pack = load_shared(
              reinterpret_cast<const Pack<T, Channels>*>(from + (row * S + phase) * t.pitch + x * step));
#pragma unroll
          for (int c = 0; c < Channels; ++c) values[x][c] = load(pack.values[c]);
        }
#pragma unroll
        for (int a = 0; a < Live; ++a) {
          const int i = a * S + phase;
          if (i >= K || unsigned(row - a) >= unsigned(walk.rows)) continue;
#pragma unroll
          for (int j = 0; j < K; ++j)
#pragma unroll
            for (int x = 0; x < Columns; ++x)
#pragma unroll
              for (int c = 0; c < Channels; ++c)
                sums[a][x][c] += values[x * S + j][c] * taps[i < K ? i : 0][j][c];
        }
      }
      if (row >= Live - 1) {
#pragma unroll
        for (int x = 0; x < Columns; ++x) {
          Pack<T, Channels> pack;
#pragma unroll
          for (int c = 0; c < Channels; ++c)
            pack.values[c] = rounded<T>(activate(sums[Live - 1][x][c] + offset[c], activation));
          T* target = to + (row - (Live - 1)) * step_row + x * step_column;
          if (packed) {
            store_global(reinterpret_cast<Pack<T, Channels>*>(target), pack, x < columns);
          } else {
#pragma unroll
            for (int c = 0; c < Channels; ++c)
              store_global(target + c, pack.values[c], x < columns && channel + c < s.out_channels);
          }
        }
      }
#pragma unroll
      for (int a = Live - 1; a >= 0; --a)
#pragma unroll
        for (int x = 0; x < Columns; ++x)
#pragma unroll
          for (int c = 0; c < Channels; ++c) sums[a][x][c] = a > 0 ? sums[a > 0 ? a - 1 : 0][x][c] : A(0);
    }
  }
}

// Any kernel size, stride, dilation and multiplier. A thread has `rows_per_thread` outputs below one another.
// Dense: stride_height and dilation_height are 1, so that they share their inputs.
constexpr int rows_per_thread = 8;

template <typename T, bool Dense, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1)
    depthwise_conv2d_tiled_any_forward_kernel(Source<T> input,               // (N, C, H, W)
                                              const T* __restrict__ weight,  // (O, KH, KW)
                                              const T* __restrict__ bias,    // (O) or null
                                              T* __restrict__ output,        // (N, O, E, F)
                                              DepthwiseConv2dShape s, Tiling t, Activation activation,
                                              bool turned) {
  using A = accumulate_t<T>;
  constexpr int R = rows_per_thread;
  FASTCONV_DYNAMIC_SHARED(T, tile);
  const TilePosition at = tile_position<ChannelsLast>(t, input, blockIdx.x);
  const int stride_height = Dense ? 1 : int(s.stride_height),
            dilation_height = Dense ? 1 : int(s.dilation_height);
  const int kernel_height = int(s.kernel_height), kernel_width = int(s.kernel_width);
  const int stride_width = int(s.stride_width), dilation_width = int(s.dilation_width);
  const int top = at.row * stride_height - int(s.padding_top),
            left = at.column * stride_width - int(s.padding_left);
  fill_tile<ChannelsLast>(tile, input, t, at, top, left);
  const int multiplier = int(s.multiplier()), taps = kernel_height * kernel_width;
  const int wide = ChannelsLast ? t.channels * multiplier : t.out_columns;  // what lanes run over
  const int row_groups = (t.out_rows + R - 1) / R;
  const int items = t.channels * multiplier * t.out_columns * row_groups;
  const int step_column = ChannelsLast ? t.channels : 1;
  for (int item = int(threadIdx.x); item < items; item += tiled_threads) {
    const int first = item % wide, second = item / wide % (ChannelsLast ? t.out_columns : row_groups);
    const int third = item / wide / (ChannelsLast ? t.out_columns : row_groups);
    const int column = ChannelsLast ? second : first, row = (ChannelsLast ? third : second) * R;
    const int out_plane = ChannelsLast ? first : third;  // of the group
    const int64_t plane = at.group * t.channels * multiplier + out_plane;
    const int64_t channel = ChannelsLast ? plane : plane % s.out_channels;
    const int rows = min(R, min(t.out_rows - row, int(s.out_height) - at.row - row));
    if (rows <= 0 || at.column + column >= s.out_width ||
        plane >= (ChannelsLast ? s.out_channels : s.batch * s.out_channels))
      continue;

    // The taps that meet the image: [first_i, last_i) for any of the rows, [first_j, last_j) for the column.
    const int y = top + row * stride_height, x = left + column * stride_width;
    const int lowest = y + (rows - 1) * stride_height;
    const int first_i = lowest >= 0 ? 0 : (-lowest + dilation_height - 1) / dilation_height;
    const int last_i = min(kernel_height, (input.rows - y + dilation_height - 1) / dilation_height);
    const int first_j = x >= 0 ? 0 : (-x + dilation_width - 1) / dilation_width;
    const int last_j = min(kernel_width, (input.columns - x + dilation_width - 1) / dilation_width);
    const T* from = ChannelsLast
                        ? tile + row * stride_height * t.pitch + column * stride_width * t.channels +
                              out_plane / multiplier
                        : tile + (out_plane / multiplier * t.in_rows + row * stride_height) * t.pitch +
                              column * stride_width + column_shift<T>(t, left, false);
    const T* filter = weight + channel * taps;
    A sums[R] = {};
    for (int j = first_j; j < last_j; ++j) {
      const T* down = from + j * dilation_width * step_column;
      if constexpr (Dense) {
        constexpr int Chunk = 8;
        for (int i0 = first_i; i0 < last_i; i0 += Chunk) {
          A values[R + Chunk - 1];
#pragma unroll
          for (int r = 0; r < R + Chunk - 1; ++r)
            values[r] = load(load_shared(down + (i0 + r) * t.pitch, row + i0 + r < t.in_rows));
#pragma unroll
          for (int i = 0; i < Chunk; ++i) {
            if (i0 + i >= last_i) break;
            const int tap = (i0 + i) * kernel_width + j;
            const A factor = load(load_global(filter + (turned ? taps - 1 - tap : tap)));
#pragma unroll
            for (int r = 0; r < R; ++r) sums[r] += values[r + i] * factor;
          }
        }
      } else {
        for (int i = first_i; i < last_i; ++i) {
          const int tap = i * kernel_width + j;
          const A factor = load(load_global(filter + (turned ? taps - 1 - tap : tap)));
#pragma unroll
          for (int r = 0; r < R; ++r)
            sums[r] +=
                load(load_shared(down + (r * stride_height + i * dilation_height) * t.pitch, r < rows)) *
                factor;
        }
      }
    }
    const A offset = bias == nullptr ? 0 : load(load_global(bias + channel));
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t target =
          ChannelsLast ? ((at.image * s.out_height + at.row + row + r) * s.out_width + at.column + column) *
                                 s.out_channels +
                             channel
                       : (plane * s.out_height + at.row + row + r) * s.out_width + at.column + column;
      store_global(output + target, rounded<T>(activate(sums[r] + offset, activation)), r < rows);
    }
  }
}

// Convolves `input` with the taps, turned round for a gradient; false if no tile fits in shared memory.
template <typename T>
bool convolve(const T* input, const T* weight, const T* bias, T* output, const DepthwiseConv2dShape& s,
              Activation activation, bool turned, void* stream) {
  if (s.batch * s.out_channels * s.out_height * s.out_width == 0) return true;
  check_tiled(s);
  const Source<T> source{input, s.batch, s.in_channels, int(s.in_height), int(s.in_width)};
  const auto walk = [&]<int K, int S, bool ChannelsLast>() {
    const Tiling t = walking_tiling(source, ChannelsLast, channels_per_lane<T, K>, ChannelsLast ? 4 : 1,
                                    s.out_height, s.out_width, {S, K - 1}, s.batch * s.in_channels);
    FASTCONV_LAUNCH((depthwise_conv2d_tiled_forward_kernel<T, K, S, ChannelsLast>),
                    grid_size(tile_count(t, s.batch, ChannelsLast)), t.threads,
                    t.shared_bytes + (ChannelsLast ? t.channels * K * K * int(sizeof(T)) : 0), stream, source,
                    weight, bias, output, s, t, activation, turned);
  };
  if (dispatch_walk<T>(s, walk)) return true;

  Tiling t;
  if (!any_tiling(t, source, s.channels_last, s.out_height, s.out_width,
                  {s.stride_height, (s.kernel_height - 1) * s.dilation_height},
                  {s.stride_width, (s.kernel_width - 1) * s.dilation_width}, 1))
    return false;
  const unsigned grid = grid_size(tile_count(t, s.batch, s.channels_last));
  const auto any = [&]<bool Dense, bool ChannelsLast>() {
    FASTCONV_LAUNCH((depthwise_conv2d_tiled_any_forward_kernel<T, Dense, ChannelsLast>), grid, t.threads,
                    t.shared_bytes, stream, source, weight, bias, output, s, t, activation, turned);
  };
  const bool dense = s.stride_height == 1 && s.dilation_height == 1;
  if (dense && s.channels_last)
    any.template operator()<true, true>();
  else if (dense)
    any.template operator()<true, false>();
  else if (s.channels_last)
    any.template operator()<false, true>();
  else
    any.template operator()<false, false>();
  return true;
}

}  // namespace

template <typename T>
bool depthwise_conv2d_tiled_forward_cuda(const T* input, const T* weight, const T* bias, T* output,
                                         const DepthwiseConv2dShape& shape, Activation activation,
                                         void* stream) {
  return convolve(input, weight, bias, output, shape, activation, false, stream);
}

template <typename T>
bool depthwise_conv2d_turned_forward_cuda(const T* grad_output, const T* weight, T* grad_input,
                                          const DepthwiseConv2dShape& shape, void* stream) {
  if (shape.stride_height != 1 || shape.stride_width != 1 || shape.multiplier() != 1) return false;
  DepthwiseConv2dShape turned = shape;
  std::swap(turned.in_height, turned.out_height);
  std::swap(turned.in_width, turned.out_width);
  turned.padding_top = (shape.kernel_height - 1) * shape.dilation_height - shape.padding_top;
  turned.padding_left = (shape.kernel_width - 1) * shape.dilation_width - shape.padding_left;
  return convolve<T>(grad_output, weight, nullptr, grad_input, turned, Activation::none, true, stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                              \
  template bool depthwise_conv2d_tiled_forward_cuda<T>(const T*, const T*, const T*, T*,                     \
                                                       const DepthwiseConv2dShape&, Activation, void*);      \
  template bool depthwise_conv2d_turned_forward_cuda<T>(const T*, const T*, T*, const DepthwiseConv2dShape&, \
                                                        void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

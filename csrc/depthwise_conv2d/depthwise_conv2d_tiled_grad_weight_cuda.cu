// grad_weight and grad_bias of depthwise convolution by tiles, in two stages and always in the same order.
//
// Formula: grad_weight[o, i, j] = sum over n, e, f of grad_output[n, o, e, f] * input[n, o / m, e*S + i*D -
// P, f*S + j*D - P]. One thread: all K * K taps of one channel in registers, over the columns that it walks
// down; each input row comes once
//   from shared memory and meets the K grad_output rows that it belongs to. A block goes through every
//   slices-th tile.
// Bytes: grad_output and input once, and slices * O * (KH * KW + 1) partial sums written and read.
// Before it (plain): both tensors once for each tap.
// Limits: K = 3, 5, 7 at stride 1, 2 as in the forward kernel; other sizes: a warp for eight taps, and caches
// in the place
//   of tiles.

#include "depthwise_conv2d_tiled_cuda.h"

namespace fastconv {
namespace {

// Parts that the sum over images and rows is split into: enough blocks to fill a GPU, few partial sums, and
// 256 pixels at least for each.
int64_t slice_count(const DepthwiseConv2dShape& s) {
  const int64_t sums = s.out_channels * (s.kernel_height * s.kernel_width + 1);
  const int64_t chunks = s.channels_last ? ceil_div(s.out_channels, 32) : s.out_channels;
  const int64_t wanted = std::min(ceil_div(1024, chunks), (int64_t(1) << 20) / sums);
  return std::clamp<int64_t>(std::min(wanted, s.batch * s.out_height * s.out_width / 256), 1, 1024);
}

template <typename T, int K, int S, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1) depthwise_conv2d_tiled_grad_weight_kernel(
    const T* __restrict__ grad_output,           // (N, C, E, F)
    Source<T> input,                             // (N, C, H, W)
    accumulate_t<T>* __restrict__ partial_sums,  // (slices, C, K * K + 1)
    DepthwiseConv2dShape s, Tiling t, int64_t tiles) {
  using A = accumulate_t<T>;
  constexpr int Columns = ChannelsLast ? 4 : 1, Live = (K + S - 1) / S, Span = (Columns - 1) * S + K;
  constexpr int Warps = tiled_threads / 32;
  FASTCONV_DYNAMIC_SHARED(T, tile);
  __shared__ A warp_sums[K][Warps][32];
  const int out_rows = int(s.out_height), out_columns = int(s.out_width);
  const int64_t step_column = ChannelsLast ? s.out_channels : 1, step_row = out_columns * step_column;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

  A sums[K][K] = {}, bias_sum = 0;
  for (int64_t index = blockIdx.y; index < tiles; index += gridDim.y) {
    TilePosition at;
    if (ChannelsLast) {
      at = tile_position<true>(t, input, index * t.groups + blockIdx.x);
    } else {  // the planes of a group are images of one channel
      at = tile_position<false>(t, input, index);
      at.plane = at.group * t.channels * s.in_channels + blockIdx.x;
      at.plane_step = s.in_channels;
      at.planes = int(min(int64_t(t.channels), s.batch - at.group * t.channels));
    }
    const int left = at.column * S - int(s.padding_left);
    __syncthreads();  // the tile before is done with
    fill_tile<ChannelsLast>(tile, input, t, at, at.row * S - int(s.padding_top), left);

    Walk walk;
    for (int round = 0; find_walk<ChannelsLast, Columns, 1>(t, at, out_rows, round, walk); ++round) {
      const int64_t channel = at.group * t.channels + walk.channel;  // channels_last only
      const int columns = min(Columns, out_columns - at.column - walk.column);
      if (walk.rows <= 0 || columns <= 0 ||
          (ChannelsLast ? channel >= s.out_channels : walk.channel >= at.planes))
        continue;
      const T* from = ChannelsLast
                          ? tile + walk.row * S * t.pitch + walk.column * S * t.channels + walk.channel
                          : tile + (walk.channel * t.in_rows + walk.row * S) * t.pitch + walk.column * S +
                                column_shift<T>(t, left, false);
      const int step = ChannelsLast ? t.channels : 1;
      const int64_t corner =
          ChannelsLast
              ? ((at.image * out_rows + at.row + walk.row) * out_columns + at.column + walk.column) *
                        s.out_channels +
                    channel
              : ((at.plane + walk.channel * at.plane_step) * out_rows + at.row + walk.row) * out_columns +
                    at.column + walk.column;
      A grads[Live][Columns];  // grads[a] is grad_output row `row - a`
#pragma unroll
      for (int a = 0; a < Live; ++a)
#pragma unroll
        for (int x = 0; x < Columns; ++x) grads[a][x] = 0;
      for (int row = 0; row < walk.rows + Live - 1; ++row) {
#pragma unroll
        for (int a = Live - 1; a > 0; --a)
#pragma unroll
          for (int x = 0; x < Columns; ++x) grads[a][x] = grads[a - 1][x];
#pragma unroll
        for (int x = 0; x < Columns; ++x) {
          grads[0][x] = load(load_global(grad_output + corner + row * step_row + x * step_column,
                                         row < walk.rows && x < columns));
          bias_sum += grads[0][x];
        }
#pragma unroll
        for (int phase = 0; phase < S; ++phase) {
          if (row * S + phase >= (walk.rows - 1) * S + K) break;
          A values[Span];
#pragma unroll
          for (int x = 0; x < Span; ++x)
            values[x] = load(load_shared(from + (row * S + phase) * t.pitch + x * step));
#pragma unroll
          for (int a = 0; a < Live; ++a) {
            const int i = a * S + phase;
            if (i >= K || unsigned(row - a) >= unsigned(walk.rows)) continue;
#pragma unroll
            for (int x = 0; x < Columns; ++x) {
              if (x >= columns) break;  // zero times what lies there could be NaN
#pragma unroll
              for (int j = 0; j < K; ++j) sums[i < K ? i : 0][j] += grads[a][x] * values[x * S + j];
            }
          }
        }
      }
    }
  }

  // Over the block, one row of the filter after another, and the bias as a last one. channels_last: each lane
  // has its channel, so over warps; else over all threads.
  A* const target = partial_sums + blockIdx.y * s.out_channels * (K * K + 1);
#pragma unroll
  for (int i = 0; i <= K; ++i) {
    const int count = i < K ? K : 1;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      A sum = i < K ? sums[i < K ? i : 0][j] : bias_sum;
      if constexpr (!ChannelsLast) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          sum += __shfl_xor_sync(0xffffffff, sum, distance);
      }
      store_shared(&warp_sums[j][warp][lane], sum, ChannelsLast || lane == 0);
    }
    __syncthreads();
    for (int j = warp; j < count; j += warps) {
      const int64_t channel = ChannelsLast ? int64_t(blockIdx.x) * 32 + lane : blockIdx.x;
      const bool exists = ChannelsLast ? channel < s.out_channels : lane == 0;
      A total = 0;
      for (int other = 0; other < warps; ++other) total += load_shared(&warp_sums[j][other][lane], exists);
      store_global(target + channel * (K * K + 1) + i * K + j, total, exists);
    }
    __syncthreads();
  }
}

// Any kernel size, stride, dilation and multiplier: a warp for eight taps of one row of the filter (or for
// the bias) of 32 channels, channels_last, or of one.
constexpr int taps_per_warp = 8;

template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(tiled_threads, 1)
    depthwise_conv2d_tiled_any_grad_weight_kernel(const T* __restrict__ grad_output,  // (N, O, E, F)
                                                  const T* __restrict__ input,        // (N, C, H, W)
                                                  accumulate_t<T>* __restrict__ partial_sums,
                                                  DepthwiseConv2dShape s, int64_t items) {
  using A = accumulate_t<T>;
  const int lane = int(threadIdx.x) % 32;
  const int64_t item = (int64_t(blockIdx.x) * tiled_threads + threadIdx.x) / 32;
  if (item >= items) return;
  const int kernel_height = int(s.kernel_height), kernel_width = int(s.kernel_width);
  const int parts = (kernel_width + taps_per_warp - 1) / taps_per_warp;  // of a row of the filter
  const int part = int(item % (kernel_height * parts + 1));
  const bool is_bias = part == kernel_height * parts;
  const int i = part / parts, first_j = part % parts * taps_per_warp;
  const int64_t group = item / (kernel_height * parts + 1);
  const int64_t channel = ChannelsLast ? group * 32 + lane : group;
  const bool exists = channel < s.out_channels;
  const int64_t in_channel = channel / s.multiplier();

  const int64_t rows = s.batch * s.out_height;
  const int64_t first_row = rows * blockIdx.y / gridDim.y, last_row = rows * (blockIdx.y + 1) / gridDim.y;
  A sums[taps_per_warp] = {};
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t image = row / s.out_height, e = row % s.out_height;
    const int64_t y = e * s.stride_height + i * s.dilation_height - s.padding_top;
    if (!is_bias && (y < 0 || y >= s.in_height)) continue;
    const T* grads = grad_output +
                     offset_of(image, channel, e, 0, s.out_channels, s.out_height, s.out_width, ChannelsLast);
    const T* values =
        input + offset_of(image, in_channel, y, 0, s.in_channels, s.in_height, s.in_width, ChannelsLast);
    for (int64_t start = 0; start < s.out_width; start += ChannelsLast ? 1 : 32) {
      const int64_t f = ChannelsLast ? start : start + lane;
      const bool active = exists && f < s.out_width;
      const A grad = load(load_global(grads + f * (ChannelsLast ? s.out_channels : 1), active));
      if (is_bias) {
        sums[0] += grad;
        continue;
      }
#pragma unroll
      for (int tap = 0; tap < taps_per_warp; ++tap) {
        const int64_t x = f * s.stride_width + (first_j + tap) * s.dilation_width - s.padding_left;
        const bool inside = active && first_j + tap < kernel_width && x >= 0 && x < s.in_width;
        const A value = load(load_global(values + x * (ChannelsLast ? s.in_channels : 1), inside));
        if (inside) sums[tap] += grad * value;
      }
    }
  }

  const int64_t taps = s.kernel_height * s.kernel_width;
  A* const target = partial_sums + (blockIdx.y * s.out_channels + channel) * (taps + 1);
#pragma unroll
  for (int tap = 0; tap < taps_per_warp; ++tap) {
    A sum = sums[tap];
    if constexpr (!ChannelsLast) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    }
    const bool wanted = is_bias ? tap == 0 : first_j + tap < kernel_width;
    store_global(target + (is_bias ? taps : i * kernel_width + first_j + tap), sum,
                 wanted && exists && (ChannelsLast || lane == 0));
  }
}

// Second stage: 32 taps a block, eight threads each, adds up the slices.
constexpr int reduce_threads = 8;

template <typename T>
__global__ void __launch_bounds__(32 * reduce_threads, 1) depthwise_conv2d_tiled_reduce_grad_weight_kernel(
    const accumulate_t<T>* __restrict__ partial_sums,  // (slices, O, taps + 1)
    T* __restrict__ grad_weight,                       // (O, taps)
    T* __restrict__ grad_bias,                         // (O) or null
    int64_t channels, int taps, int slices) {
  using A = accumulate_t<T>;
  __shared__ A parts[reduce_threads][32];
  const int64_t count = channels * (taps + 1), index = int64_t(blockIdx.x) * 32 + threadIdx.x;
  A sum = 0;
  for (int slice = int(threadIdx.y); slice < slices; slice += reduce_threads)
    sum += load_global(partial_sums + slice * count + index, index < count);
  store_shared(&parts[threadIdx.y][threadIdx.x], sum);
  __syncthreads();
  if (threadIdx.y != 0 || index >= count) return;
#pragma unroll
  for (int other = 1; other < reduce_threads; ++other) sum += load_shared(&parts[other][threadIdx.x]);
  const int64_t channel = index / (taps + 1), tap = index % (taps + 1);
  if (tap < taps)
    store_global(grad_weight + channel * taps + tap, rounded<T>(sum));
  else if (grad_bias != nullptr)
    store_global(grad_bias + channel, rounded<T>(sum));
}

}  // namespace

int64_t depthwise_conv2d_grad_weight_workspace(const DepthwiseConv2dShape& s) {
  if (s.out_channels == 0) return 0;
  return slice_count(s) * s.out_channels * (s.kernel_height * s.kernel_width + 1);
}

template <typename T>
bool depthwise_conv2d_tiled_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight,
                                             T* grad_bias, accumulate_t<T>* workspace,
                                             const DepthwiseConv2dShape& s, void* stream) {
  if (s.out_channels == 0) return true;
  check_tiled(s);
  const Source<T> source{input, s.batch, s.in_channels, int(s.in_height), int(s.in_width)};
  const int64_t taps = s.kernel_height * s.kernel_width, slices = slice_count(s);
  const bool empty = s.batch * s.out_height * s.out_width == 0;
  const auto walk = [&]<int K, int S, bool ChannelsLast>() {
    Tiling t = walking_tiling(source, ChannelsLast, 1, ChannelsLast ? 4 : 1, s.out_height, s.out_width,
                              {S, K - 1}, s.batch);
    if (!ChannelsLast) t.groups = ceil_div(s.batch, t.channels);
    const int64_t tiles = t.row_tiles * t.column_tiles * (ChannelsLast ? s.batch : t.groups);
    const int64_t columns = ChannelsLast ? t.groups : s.out_channels;
    FASTCONV_LAUNCH((depthwise_conv2d_tiled_grad_weight_kernel<T, K, S, ChannelsLast>),
                    dim3(grid_size(columns), unsigned(slices)), t.threads, t.shared_bytes, stream,
                    grad_output, source, workspace, s, t, tiles);
  };
  if (empty || !dispatch_walk<T>(s, walk)) {
    const int64_t parts = s.kernel_height * ceil_div(s.kernel_width, taps_per_warp) + 1;
    const int64_t items = (s.channels_last ? ceil_div(s.out_channels, 32) : s.out_channels) * parts;
    const dim3 grid(grid_size(ceil_div(items * 32, tiled_threads)), unsigned(slices));
    if (s.channels_last) {
      FASTCONV_LAUNCH((depthwise_conv2d_tiled_any_grad_weight_kernel<T, true>), grid, tiled_threads, 0,
                      stream, grad_output, input, workspace, s, items);
    } else {
      FASTCONV_LAUNCH((depthwise_conv2d_tiled_any_grad_weight_kernel<T, false>), grid, tiled_threads, 0,
                      stream, grad_output, input, workspace, s, items);
    }
  }
  FASTCONV_LAUNCH(depthwise_conv2d_tiled_reduce_grad_weight_kernel<T>,
                  grid_size(ceil_div(s.out_channels * (taps + 1), 32)), dim3(32, reduce_threads), 0, stream,
                  workspace, grad_weight, grad_bias, s.out_channels,
                  narrow(taps, "kernel_height * kernel_width"), int(slices));
  return true;
}

#define FASTCONV_INSTANTIATE(T)                                                                          \
  template bool depthwise_conv2d_tiled_grad_weight_cuda<T>(const T*, const T*, T*, T*, accumulate_t<T>*, \
                                                           const DepthwiseConv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

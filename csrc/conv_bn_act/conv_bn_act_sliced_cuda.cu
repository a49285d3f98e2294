// Batch normalisation and activation behind a convolution, a channel's values in slices, 16 bytes at a time.
//
// Formula: conv_bn_act.h; mean and squares of a slice, about the first value that a thread meets, then those
//   of all slices by Chan's formula in an order that never changes.
// One thread: every rows-th unit of 16 bytes of its slice, some of them on their way at once; of one channel
//   where images are contiguous, of a unit's channels in channels_last. Three launches: slices, merge, rest.
// Bytes: an image is read twice and written once, coalesced; the residual is read once.
// Before it (plain): a thread for each channel, and three reads; here blocks enough to fill a GPU.
// Limits: single values where a pixel's channels, or an image's pixels, are no multiple of 16 bytes; a
//   contiguous channel of fewer values than a block has threads leaves some idle; an image that would fit
//   into the GPU's shared memory is read twice all the same.
#include "conv_bn_act_cuda.h"

namespace fastconv {
namespace {

// Loads of a thread at once, from each image: what registers allow.
template <int V>
constexpr int loads_each = V == 8 ? 2 : 4;
constexpr int normalized_each = 2;

template <typename T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(slice_threads, 1)
    conv_bn_act_sliced_moments_kernel(const T* __restrict__ input,            // (N, C, H, W)
                                      accumulate_t<T>* __restrict__ partial,  // (slices, 2, C)
                                      BatchNormShape s, int columns) {
  using A = accumulate_t<T>;
  constexpr int Numbers = ChannelsLast ? V : 1;
  Walk<V, ChannelsLast> walk(s, columns);
  // About a value of the channel, the two sums stay small, and so does what rounding takes from them.
  A shift[Numbers] = {}, sum[Numbers] = {}, squares[Numbers] = {};
  int count = 0;
  while (walk.inside()) {
    Unit<T, V> units[loads_each<V>];
    bool inside[loads_each<V>];
#pragma unroll
    for (int i = 0; i < loads_each<V>; ++i) {
      inside[i] = walk.inside();
      units[i] = load_unit<V>(input + (inside[i] ? walk.at : 0), inside[i]);
      walk.advance(s);
    }
    if (count == 0) {
#pragma unroll
      for (int n = 0; n < Numbers; ++n) shift[n] = load(units[0].values[n]);
    }
#pragma unroll
    for (int i = 0; i < loads_each<V>; ++i) {
      if (!inside[i]) break;
      count += V / Numbers;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int n = ChannelsLast ? v : 0;
        const A distance = load(units[i].values[v]) - shift[n];
        sum[n] += distance;
        squares[n] += distance * distance;
      }
    }
  }
  Moments<A> mine[Numbers];
#pragma unroll
  for (int n = 0; n < Numbers; ++n) {
    const A center = count > 0 ? sum[n] / A(count) : A(0);
    mine[n] = {A(count), shift[n], center, squares[n] - sum[n] * center};
    if (mine[n].squares < A(0)) mine[n].squares = 0;  // NaN stays NaN
  }
  store_slice(mine, walk, partial, s, columns);
}

template <typename T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(slice_threads)
    conv_bn_act_sliced_normalize_kernel(BatchNorm<T> norm,
                                        const accumulate_t<T>* __restrict__ mean,      // (C)
                                        const accumulate_t<T>* __restrict__ variance,  // (C)
                                        T* __restrict__ output,                        // (N, C, H, W)
                                        BatchNormShape s, int columns) {
  using A = accumulate_t<T>;
  constexpr int Numbers = ChannelsLast ? V : 1;
  const Walk<V, ChannelsLast> start(s, columns);
  A numbers[3][Numbers];
  share_numbers(numbers, start, s, columns, [&](int64_t c, A(&made)[3]) {
    const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
    made[0] = channel.mean, made[1] = channel.inverse * channel.weight, made[2] = channel.bias;
  });
  const auto& [center, scale, bias] = numbers;
  with_activation(norm.activation, [&](auto activation) {
    auto walk = start;
    while (walk.inside()) {
      Unit<T, V> units[normalized_each], residuals[normalized_each] = {};
      int64_t at[normalized_each];
#pragma unroll
      for (int i = 0; i < normalized_each; ++i) {
        at[i] = walk.inside() ? walk.at : -1;
        units[i] = load_unit<V>(norm.input + max(at[i], int64_t(0)), at[i] >= 0);
        if (norm.residual != nullptr)
          residuals[i] = load_unit<V>(norm.residual + max(at[i], int64_t(0)), at[i] >= 0);
        walk.advance(s);
      }
#pragma unroll
      for (int i = 0; i < normalized_each; ++i) {
        if (at[i] < 0) break;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int n = ChannelsLast ? v : 0;
          const A sum = (load(units[i].values[v]) - center[n]) * scale[n] + bias[n];
          units[i].values[v] =
              rounded<T>(activate(sum + load(residuals[i].values[v]), decltype(activation)::value));
        }
        store_unit(output + at[i], units[i]);
      }
    }
  });
}

}  // namespace

int64_t conv_bn_act_sliced_workspace(const BatchNormShape& shape) {
  return slice_count(settled(shape)) * 2 * shape.channels;
}

template <typename T>
void conv_bn_act_sliced_normalize_cuda(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                                       accumulate_t<T>* variance, accumulate_t<T>* workspace,
                                       const BatchNormShape& shape, void* stream) {
  const BatchNormShape s = settled(shape);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(norm.input) |
                              reinterpret_cast<uintptr_t>(norm.residual) |
                              reinterpret_cast<uintptr_t>(output);
  with_units<T>(s, addresses, [&]<int V, bool ChannelsLast>(dim3 grid, int columns) {
    FASTCONV_LAUNCH((conv_bn_act_sliced_moments_kernel<T, V, ChannelsLast>), grid, slice_threads, 0, stream,
                    norm.input, workspace, s, columns);
    launch_merge<Moments<accumulate_t<T>>, V, ChannelsLast>(workspace, mean, variance, s, grid.y, stream);
    FASTCONV_LAUNCH((conv_bn_act_sliced_normalize_kernel<T, V, ChannelsLast>), grid, slice_threads, 0, stream,
                    norm, mean, variance, output, s, columns);
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template void conv_bn_act_sliced_normalize_cuda<T>(const BatchNorm<T>&, T*, accumulate_t<T>*, \
                                                     accumulate_t<T>*, accumulate_t<T>*,        \
                                                     const BatchNormShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

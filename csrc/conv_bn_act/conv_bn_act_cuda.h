// What the sliced CUDA kernels share: how images are cut into slices, and how slices are merged.
#pragma once

#include <type_traits>

#include "../common/cuda.h"
#include "conv_bn_act.h"

namespace fastconv {

constexpr int slice_threads = 256;
constexpr int slice_columns = 32;  // threads side by side across channels, at most
constexpr int merge_columns = 8;   // channels of a block that merges slices: a sector of float

// V values side by side in memory, as one load brings them.
template <typename T, int V>
struct alignas(V * sizeof(T)) Unit {
  T values[V];
};

template <int V, typename T>
__device__ __forceinline__ Unit<T, V> load_unit(const T* address, bool active) {
  return load_global(reinterpret_cast<const Unit<T, V>*>(address), active);
}

template <int V, typename T>
__device__ __forceinline__ void store_unit(T* address, const Unit<T, V>& unit) {
  store_global(reinterpret_cast<Unit<T, V>*>(address), unit);
}

// What a part of a channel comes to forward. Two of them make one by the formula of Chan, Golub and LeVeque
// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979), which takes no
// difference of large sums. The mean in two parts: far from zero, one float would have no digits left for
// the distance of two means.
template <typename A>
struct Moments {
  A count, shift, mean, squares;  // mean: less shift; squares: the sum of (x - shift - mean)^2

  static __device__ __forceinline__ Moments of(A count, A mean, A squares) {
    return {count, mean, A(0), squares};
  }
  __device__ __forceinline__ void add(const Moments& other) {
    const A total = count + other.count, share = total > A(0) ? other.count / total : A(0);
    const A distance = (other.shift - shift) + (other.mean - mean);
    squares += other.squares + distance * (distance * (count * share));
    mean += distance * share;
    count = total;
  }
  __device__ __forceinline__ Moments of_lane_after(int distance) const {
    return {__shfl_down_sync(0xffffffff, count, distance), __shfl_down_sync(0xffffffff, shift, distance),
            __shfl_down_sync(0xffffffff, mean, distance), __shfl_down_sync(0xffffffff, squares, distance)};
  }
  __device__ __forceinline__ A first() const { return shift + mean; }
  __device__ __forceinline__ A second() const { return squares; }
  __device__ __forceinline__ A second_of_channel() const { return squares / count; }
};

// The same backward, of g and of g * normal.
template <typename A>
struct GradSums {
  A grad, product;

  static __device__ __forceinline__ GradSums of(A /*count*/, A grad, A product) { return {grad, product}; }
  __device__ __forceinline__ void add(const GradSums& other) {
    grad += other.grad;
    product += other.product;
  }
  __device__ __forceinline__ GradSums of_lane_after(int distance) const {
    return {__shfl_down_sync(0xffffffff, grad, distance), __shfl_down_sync(0xffffffff, product, distance)};
  }
  __device__ __forceinline__ A first() const { return grad; }
  __device__ __forceinline__ A second() const { return product; }
  __device__ __forceinline__ A second_of_channel() const { return product; }
};

// A channel has units of V pixels where images are contiguous, of one where they are channels_last.
FASTCONV_HOST_DEVICE constexpr int pixels_of_unit(int width, bool channels_last) {
  return channels_last ? 1 : width;
}

FASTCONV_HOST_DEVICE inline int64_t slice_begin(int64_t units, int64_t slice, int64_t slices) {
  return units * slice / slices;
}

// A thread's way through slice blockIdx.y of the channels of blockIdx.x: of one channel, or of V channels for
// each of `columns` threads; every rows-th unit, so that the block's loads lie side by side.
template <int V, bool ChannelsLast>
struct Walk {
  int row, column, rows;
  int64_t channel;      // the first
  int64_t index, last;  // units
  int64_t at;           // of the unit's first value, in memory
  int64_t step;         // from unit to unit there
  int64_t run;          // units of an image
  int64_t place;        // of the unit in its image; contiguous only, as is
  int64_t ahead;        // what a step adds to it

  __device__ __forceinline__ Walk(const BatchNormShape& s, int columns) {
    constexpr int Pixels = pixels_of_unit(V, ChannelsLast);
    row = int(threadIdx.x) / columns, column = int(threadIdx.x) % columns, rows = slice_threads / columns;
    channel = (int64_t(blockIdx.x) * columns + column) * (V / Pixels);
    const int64_t units = s.count() / Pixels;
    index = slice_begin(units, blockIdx.y, gridDim.y) + row;
    last = slice_begin(units, blockIdx.y + 1, gridDim.y);
    if (row >= rows || channel >= s.channels) index = last;
    at = s.index(index * Pixels, channel);
    run = s.pixels / Pixels;
    if constexpr (ChannelsLast) {
      step = rows * s.channels;
    } else {
      place = index % run;
      ahead = rows % run;
      step = (rows / run * s.channels * run + ahead) * V;
    }
  }

  __device__ __forceinline__ bool inside() const { return index < last; }

  __device__ __forceinline__ void advance(const BatchNormShape& s) {
    index += rows;
    at += step;
    if constexpr (!ChannelsLast) {
      place += ahead;
      if (place >= run) {  // the channel goes on in the next image
        place -= run;
        at += (s.channels - 1) * run * V;
      }
    }
  }
};

// Merges what the rows of a block have found, always in the same order. Row 0 gets it.
template <typename M, int Numbers>
__device__ __forceinline__ void merge_rows(M (&mine)[Numbers], int row, int column, int rows, int columns) {
  __shared__ M parts[Numbers][slice_threads / 2];
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    if (row >= half && row < rows) {
#pragma unroll
      for (int n = 0; n < Numbers; ++n) store_shared(&parts[n][(row - half) * columns + column], mine[n]);
    }
    __syncthreads();
    if (row < rows - half) {
#pragma unroll
      for (int n = 0; n < Numbers; ++n) mine[n].add(load_shared(&parts[n][row * columns + column]));
    }
    __syncthreads();
    rows = half;
  }
}

// Merges what the threads of a block have found, and stores it as the slice's.
template <bool ChannelsLast, int V, typename M, typename A, int Numbers>
__device__ __forceinline__ void store_slice(M (&mine)[Numbers], const Walk<V, ChannelsLast>& walk,
                                            A* partial,  // (slices, 2, C)
                                            const BatchNormShape& s, int columns) {
  int row = walk.row, rows = walk.rows;
  if constexpr (!ChannelsLast) {
    for (int distance = 16; distance > 0; distance /= 2) mine[0].add(mine[0].of_lane_after(distance));
    row = row % 32 == 0 ? row / 32 : slice_threads;
    rows = slice_threads / 32;
  }
  merge_rows(mine, row, walk.column, rows, columns);
  if (row != 0 || walk.channel >= s.channels) return;
  A* const target = partial + int64_t(blockIdx.y) * 2 * s.channels + walk.channel;
#pragma unroll
  for (int n = 0; n < Numbers; ++n) {
    store_global(target + n, mine[n].first());
    store_global(target + s.channels + n, mine[n].second());
  }
}

// One block: eight channels, 32 threads each. M: Moments, to mean and variance, or GradSums, to grad_bias and
// grad_weight.
template <typename M, typename A>
__global__ void __launch_bounds__(slice_threads)
    conv_bn_act_sliced_merge_kernel(const A* __restrict__ partial,  // (slices, 2, C)
                                    A* __restrict__ first,          // (C)
                                    A* __restrict__ second,         // (C)
                                    int64_t channels, int64_t units, int unit_pixels, int slices) {
  constexpr int rows = slice_threads / merge_columns;
  const int row = int(threadIdx.x) / merge_columns, column = int(threadIdx.x) % merge_columns;
  const int64_t channel = int64_t(blockIdx.x) * merge_columns + column;
  const bool exists = channel < channels;
  M mine[1] = {M{}};
  for (int slice = row; slice < slices; slice += rows) {
    const int64_t count = slice_begin(units, slice + 1, slices) - slice_begin(units, slice, slices);
    const A* const from = partial + int64_t(slice) * 2 * channels + channel;
    mine[0].add(
        M::of(A(count * unit_pixels), load_global(from, exists), load_global(from + channels, exists)));
  }
  merge_rows(mine, row, column, rows, merge_columns);
  if (row != 0 || !exists) return;
  store_global(first + channel, mine[0].first());
  store_global(second + channel, mine[0].second_of_channel());
}

// Numbers of a block's channels, worked out once: make(channel, numbers) gives those of one. `mine` gets a
// thread's own. Every thread of the block has to call it.
template <int V, bool ChannelsLast, typename A, int Kinds, int Numbers, typename Make>
__device__ __forceinline__ void share_numbers(A (&mine)[Kinds][Numbers], const Walk<V, ChannelsLast>& walk,
                                              const BatchNormShape& s, int columns, const Make& make) {
  __shared__ A shared[Kinds][Numbers][ChannelsLast ? slice_columns : 1];
  const int count = columns * Numbers;  // at most one for each thread
  const int64_t first = int64_t(blockIdx.x) * count;
  const int k = int(threadIdx.x);
  if (k < count && first + k < s.channels) {
    A numbers[Kinds];
    make(first + k, numbers);
#pragma unroll
    for (int kind = 0; kind < Kinds; ++kind)
      store_shared(&shared[kind][k % Numbers][k / Numbers], numbers[kind]);
  }
  __syncthreads();
#pragma unroll
  for (int kind = 0; kind < Kinds; ++kind)
#pragma unroll
    for (int n = 0; n < Numbers; ++n)
      mine[kind][n] = load_shared(&shared[kind][n][walk.column], walk.inside());
}

// body(constant): the activation as a constant, so that no value asks for it.
template <typename Body>
__device__ __forceinline__ void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return body(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
  }
}

// Images of one pixel lie in memory as channels_last ones do.
inline BatchNormShape settled(BatchNormShape s) {
  s.channels_last = s.channels_last || s.pixels == 1;
  return s;
}

// Slices of each channel: blocks enough to fill a GPU, and 8192 values at least for each.
inline int64_t slice_count(const BatchNormShape& s) {
  const int64_t side_by_side = s.channels_last ? std::min<int64_t>(s.channels, 128) : 1;
  const int64_t wanted = ceil_div(2048, ceil_div(s.channels, side_by_side));
  return std::clamp<int64_t>(std::min(wanted, s.count() * side_by_side / 8192), 1, 512);
}

// body.operator()<V, ChannelsLast>(grid, columns) with the widest unit that divides what lies side by side
// and the addresses (theirs, of every image, joined by |).
template <typename T, typename Body>
void with_units(const BatchNormShape& s, uintptr_t addresses, const Body& body) {
  constexpr int Widest = 16 / sizeof(T);
  const unsigned slices = unsigned(slice_count(s));
  const auto with = [&]<int V>() {
    if (!s.channels_last) return body.template operator()<V, false>(dim3(grid_size(s.channels), slices), 1);
    const int64_t units = s.channels / V, columns = ceil_div(units, ceil_div(units, slice_columns));
    body.template operator()<V, true>(dim3(grid_size(ceil_div(units, columns)), slices), int(columns));
  };
  const bool wide = (s.channels_last ? s.channels : s.pixels) % Widest == 0 && addresses % 16 == 0;
  if (wide)
    with.template operator()<Widest>();
  else
    with.template operator()<1>();
}

template <typename M, int V, bool ChannelsLast, typename A>
void launch_merge(const A* partial, A* first, A* second, const BatchNormShape& s, unsigned slices,
                  void* stream) {
  constexpr int Pixels = pixels_of_unit(V, ChannelsLast);
  FASTCONV_LAUNCH((conv_bn_act_sliced_merge_kernel<M, A>), grid_size(ceil_div(s.channels, merge_columns)),
                  slice_threads, 0, stream, partial, first, second, s.channels, s.count() / Pixels, Pixels,
                  int(slices));
}

}  // namespace fastconv

// What the CUDA kernels of dense convolution share: a pass as convolutions without waste, sums on their way
// to memory, and the second stage of grad_weight.
//
// Forward is one convolution. The transposed convolution is one for each residue of the result's row and
// column modulo the stride (a phase), each with the taps alone that reach it.
#pragma once

#include <algorithm>
#include <numeric>

#include "../common/cuda.h"
#include "conv2d.h"

namespace fastconv {

// Height or width of a pass.
struct Axis {
  int source, result;  // sizes of the image that is read and of the one that is written
  int kernel, stride, dilation, padding;
  int common;  // of stride and dilation: the greatest divisor
  int phases;
};

// A pass: forward reads the input and writes the output, the transposed convolution the other way.
struct Conv2dPass {
  int64_t batch, source_channels, result_channels;
  int groups, source_group, result_group;  // channels of a group
  int kernel_taps;
  int weight_source, weight_result;  // values of the weight from one channel of a group to the next
  Axis height, width;
  bool channels_last, transposed;
  // Channels of the result from one filter of a group to the next, and from a group to the next.
  int filter_step, group_step;
};

// One phase of an axis. Tap t of the phase is tap first_tap + t * tap_step of the kernel, result r reads
// source r * stride + t * dilation + offset, and is number first + r * every of the image's.
struct PhaseAxis {
  int taps, first_tap, tap_step;
  int stride, dilation, offset;
  int first, every, results;
};

__device__ __forceinline__ PhaseAxis phase_axis(const Axis& a, bool transposed, int phase) {
  if (!transposed) return {a.kernel, 0, 1, a.stride, a.dilation, -a.padding, 0, 1, a.result};
  PhaseAxis p{0, 0, a.stride / a.common, 1, -(a.dilation / a.common), 0, phase, a.stride, 0};
  p.results = (a.result - phase + a.stride - 1) / a.stride;
  const int candidates = min(a.kernel, p.tap_step);
  while (p.first_tap < candidates && (phase + a.padding - p.first_tap * a.dilation) % a.stride != 0)
    ++p.first_tap;
  if (p.first_tap < candidates) {
    p.taps = (a.kernel - 1 - p.first_tap) / p.tap_step + 1;
    p.offset = (phase + a.padding - p.first_tap * a.dilation) / a.stride;
  }
  return p;
}

// How far before the source of its first tap a result reads, where taps go backwards.
__device__ __forceinline__ int reach_back(const PhaseAxis& p) { return min(0, (p.taps - 1) * p.dilation); }

inline Axis axis_of(int64_t source, int64_t result, int64_t kernel, int64_t stride, int64_t dilation,
                    int64_t padding, bool transposed, const char* what) {
  // Positions, those of tiles that stand over the edge too, are computed in 32 bits, and need room for
  // "none".
  const int64_t image = transposed ? result : source, other = transposed ? source : result;
  narrow(4 * (std::max(image, (other + 256) * stride) + kernel * dilation + std::abs(padding)), what);
  return {int(source),
          int(result),
          int(kernel),
          int(stride),
          int(dilation),
          int(padding),
          int(std::gcd(stride, dilation)),
          transposed ? int(std::min(stride, result)) : 1};
}

inline Conv2dPass conv2d_pass(const Conv2dShape& s, bool transposed, bool shuffled = false) {
  Conv2dPass p{};
  p.batch = s.batch;
  p.source_channels = transposed ? s.out_channels : s.in_channels;
  p.result_channels = transposed ? s.in_channels : s.out_channels;
  p.groups = narrow(s.groups, "groups");
  p.source_group = narrow(p.source_channels / s.groups, "channels of a group");
  p.result_group = narrow(p.result_channels / s.groups, "channels of a group");
  p.kernel_taps = narrow(s.taps(), "kernel_height * kernel_width");
  const int filter = narrow(s.in_group() * s.taps(), "values of a filter");
  p.weight_source = transposed ? filter : p.kernel_taps;
  p.weight_result = transposed ? p.kernel_taps : filter;
  p.height = axis_of(transposed ? s.out_height : s.in_height, transposed ? s.in_height : s.out_height,
                     s.kernel_height, s.stride_height, s.dilation_height, s.padding_top, transposed,
                     "padded input height");
  p.width =
      axis_of(transposed ? s.out_width : s.in_width, transposed ? s.in_width : s.out_width, s.kernel_width,
              s.stride_width, s.dilation_width, s.padding_left, transposed, "padded input width");
  p.channels_last = s.channels_last;
  p.transposed = transposed;
  p.filter_step = shuffled ? p.groups : 1;
  p.group_step = shuffled ? 1 : p.result_group;
  return p;
}

// Most results of a phase of an axis.
inline int phase_results(const Axis& a, bool transposed) {
  return int(transposed ? ceil_div(a.result, a.stride) : a.result);
}
// Most taps of a phase, and the sources from the first to the last of them.
inline int phase_taps(const Axis& a, bool transposed) {
  return int(transposed ? ceil_div(a.kernel, a.stride / a.common) : a.kernel);
}
inline int phase_span(const Axis& a, bool transposed) {
  return (phase_taps(a, transposed) - 1) * (transposed ? a.dilation / a.common : a.dilation) + 1;
}

// Values of an image from one row, column or channel to the next.
struct Strides {
  int64_t image, channel, row, column;
};
__device__ __forceinline__ Strides strides_of(int64_t channels, int height, int width, bool channels_last) {
  const int64_t pixels = int64_t(height) * width;
  if (channels_last) return {pixels * channels, 1, width * channels, channels};
  return {pixels * channels, pixels, width, 1};
}

// A result, where pixels are numbered through a phase and all images: where it lies, and where the taps that
// it reads start. Offsets are of channel 0.
struct Pixel {
  int64_t source, result;  // result is negative where there is no such pixel
  int row, column;         // of the source
};
constexpr int nowhere = -(1 << 30);  // a row, or a way to a row, that is in no image

__device__ __forceinline__ Pixel pixel_of(int64_t index, int64_t end, const PhaseAxis& high,
                                          const PhaseAxis& wide, const Strides& from, const Strides& to) {
  if (index >= end) return {0, -1, nowhere, nowhere};
  const int64_t row_number = index / wide.results, image = row_number / high.results;
  const int r = int(row_number - image * high.results), c = int(index - row_number * wide.results);
  Pixel p;
  p.row = r * high.stride + high.offset;
  p.column = c * wide.stride + wide.offset;
  p.source = image * from.image + p.row * from.row + p.column * from.column;
  p.result =
      image * to.image + (high.first + r * high.every) * to.row + (wide.first + c * wide.every) * to.column;
  return p;
}

__device__ __forceinline__ bool is_inside(int row, int column, const Conv2dPass& pass) {
  return unsigned(row) < unsigned(pass.height.source) && unsigned(column) < unsigned(pass.width.source);
}

// What a block of a pass by pixel numbers works on.
struct PixelTile {
  int first_filter;                    // of the group
  int64_t group, first_pixel, pixels;  // pixels: of the phase
  PhaseAxis high, wide;
};
inline int64_t pixel_tile_blocks(const Conv2dPass& p, int filters, int pixels) {
  const int64_t results =
      p.batch * phase_results(p.height, p.transposed) * phase_results(p.width, p.transposed);
  return ceil_div(p.result_group, filters) * p.groups * ceil_div(results, pixels) * p.height.phases *
         p.width.phases;
}
__device__ __forceinline__ PixelTile pixel_tile(const Conv2dPass& p, int64_t index, int filters, int pixels) {
  PixelTile t;
  const int filter_tiles = (p.result_group + filters - 1) / filters;
  t.first_filter = int(index % filter_tiles) * filters;
  index /= filter_tiles;
  t.group = index % p.groups;
  index /= p.groups;
  t.wide = phase_axis(p.width, p.transposed, int(index % p.width.phases));
  index /= p.width.phases;
  t.high = phase_axis(p.height, p.transposed, int(index % p.height.phases));
  t.first_pixel = index / p.height.phases * pixels;
  t.pixels = p.batch * t.high.results * t.wide.results;
  return t;
}

// Some values that lie side by side, moved by up to 16 bytes at once.
template <typename T, int Count>
struct alignas(sizeof(T) * Count < 16 ? sizeof(T) * Count : 16) Pack {
  T values[Count];
};

// A tile's filters: the first is number `filter` of all and makes channel `channel` of the result; from one
// to the next it is `step` channels, and from a channel to the next `channel_step` values.
struct TileFilters {
  int64_t filter, channel, channel_step;
  int step, count;  // count: that the group has from the first on
};
__device__ __forceinline__ TileFilters tile_filters(const Conv2dPass& p, int64_t group, int first_filter,
                                                    int64_t channel_step) {
  return {group * p.result_group + first_filter, first_filter * int64_t(p.filter_step) + group * p.group_step,
          channel_step, p.filter_step, p.result_group - first_filter};
}

// The end of a block's work: sums from shared memory (pixels, filters; `pitch` values from one pixel to the
// next) get bias, residual and activation, and go to memory in its order. place(p) is where pixel p of the
// tile has channel 0 of the result, or negative where there is no such pixel. 16 bytes at once where
// `packed`. The loops stay loops: an activation is long.
template <int Pixels, int Filters, typename T, typename Place>
__device__ __forceinline__ void store_tile(const accumulate_t<T>* sums, int pitch,
                                           const Conv2dEpilogue<T>& epilogue, T* result,
                                           const TileFilters& filters, bool packed, const Place& place) {
  using A = accumulate_t<T>;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const bool has_bias = epilogue.bias != nullptr, has_residual = epilogue.residual != nullptr;
  const auto finished = [&](A sum, int filter, bool active, T residual) {
    sum += load(load_global(epilogue.bias + (has_bias ? filters.filter + filter : 0), has_bias && active));
    return rounded<T>(activate(sum + load(residual), epilogue.activation));
  };
  if (packed) {
    constexpr int Count = 16 / int(sizeof(T)), Together = Count < 4 ? Count : 4;
    using Values = Pack<T, Count>;
    using Sums = Pack<A, Together>;
#pragma unroll 1
    for (int index = thread; index < Pixels * (Filters / Count); index += threads) {
      const int pixel = index / (Filters / Count), filter = index % (Filters / Count) * Count;
      const int64_t at = place(pixel);
      const bool active = at >= 0 && filter < filters.count;
      const int64_t offset = active ? at + filters.channel + filter : 0;
      Values values =
          load_global(reinterpret_cast<const Values*>(epilogue.residual + (has_residual ? offset : 0)),
                      has_residual && active);
#pragma unroll
      for (int first = 0; first < Count; first += Together) {
        const Sums some = load_shared(reinterpret_cast<const Sums*>(sums + pixel * pitch + filter + first));
#pragma unroll
        for (int i = 0; i < Together; ++i)
          values.values[first + i] =
              finished(some.values[i], filter + first + i, active, values.values[first + i]);
      }
      store_global(reinterpret_cast<Values*>(result + offset), values, active);
    }
    return;
  }
#pragma unroll 1
  for (int index = thread; index < Pixels * Filters; index += threads) {  // neighbours in memory
    const int pixel = filters.channel_step == 1 ? index / Filters : index % Pixels;
    const int filter = filters.channel_step == 1 ? index % Filters : index / Pixels;
    const int64_t at = place(pixel);
    const bool active = at >= 0 && filter < filters.count;
    const int64_t offset =
        active ? at + (filters.channel + int64_t(filter) * filters.step) * filters.channel_step : 0;
    const T residual = load_global(epilogue.residual + (has_residual ? offset : 0), has_residual && active);
    store_global(result + offset,
                 finished(load_shared(sums + pixel * pitch + filter), filter, active, residual), active);
  }
}

// The pitch of a tile's sums that lets both ways of reading them go without bank conflicts.
FASTCONV_HOST_DEVICE constexpr int sums_pitch(int filters, bool channels_last) {
  return filters + (channels_last ? 4 : 1);
}

// Whether store_tile can move 16 bytes at once.
template <typename T>
bool is_packed(const Conv2dEpilogue<T>& epilogue, const T* result, const Conv2dPass& pass) {
  const auto aligned = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return pass.channels_last && pass.filter_step == 1 && pass.result_group % (16 / int(sizeof(T))) == 0 &&
         aligned(result) && aligned(epilogue.residual);
}

// grad_weight is summed in parts, over as many slices of the batch's pixels: enough blocks to fill a GPU, few
// partial sums, and 256 pixels at least for each. A slice's sums lie as (M, C/G, KH, KW), (M) for the bias.
inline int64_t grad_weight_values(const Conv2dShape& s) {
  return s.out_channels * s.in_group() * s.taps() + s.out_channels;
}
inline int grad_weight_slices(const Conv2dShape& s) {
  const int64_t sums = std::max<int64_t>(grad_weight_values(s), 1);
  const int64_t blocks = s.groups * ceil_div(s.out_group(), 64) * ceil_div(s.in_group() * s.taps(), 64);
  const int64_t wanted =
      std::min(ceil_div(1024, std::max<int64_t>(blocks, 1)), std::max<int64_t>((int64_t(1) << 24) / sums, 1));
  return int(std::clamp<int64_t>(std::min(wanted, s.batch * s.out_height * s.out_width / 256), 1, 1024));
}
inline int64_t grad_weight_workspace(const Conv2dShape& s) {
  return grad_weight_slices(s) * grad_weight_values(s);
}

// Sums grad_bias by slices, where it is wanted, and adds the slices of both up in a fixed order.
template <typename T>
void conv2d_finish_grad_weight_cuda(const T* grad_output, T* grad_weight, T* grad_bias,
                                    accumulate_t<T>* workspace, const Conv2dShape& shape, void* stream);

}  // namespace fastconv

// Shift with 1x1 convolution, as plain as CUDA can say it.
//
// Formula: shift_conv2d.h, written out.
// One thread: one value of the output; it fetches one pixel of every channel, from where the channel's offset
//   says.
// Bytes: each input is read M times, from L2 mostly; each output is written once. Loads of contiguous images
//   are rows; channels_last ones are shared by a warp, whose lanes are filters of one pixel.
// Before it: nothing; this is the first step of the ladder.
// Limits: no reuse in registers. A launch for each 4000 channels, which adds its sums to those before: these
//   wait in the output, rounded to its type.
#include "shift_conv2d_cuda.h"

namespace fastconv {
namespace {

constexpr int threads = 256, most_channels = 4000;  // the channels whose offsets fit in a launch's parameters

template <typename T>
__global__ void __launch_bounds__(threads)
    shift_conv2d_plain_forward_kernel(const T* __restrict__ input,   // (N, C, H, W) or (N, H, W, C)
                                      const T* __restrict__ weight,  // (M, C)
                                      Conv2dEpilogue<T> epilogue,    // (M), as the output
                                      T* output,                     // (N, M, E, F) or (N, E, F, M)
                                      Conv2dShape s, int64_t first, int count,
                                      const OffsetTable<int, most_channels> table) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.batch * s.out_channels * s.out_height * s.out_width) return;
  const Strides from = strides_of(s.in_channels, int(s.in_height), int(s.in_width), s.channels_last);
  int64_t rest = index, m = 0;  // from the fastest dimension to the slowest
  if (s.channels_last) m = rest % s.out_channels, rest /= s.out_channels;
  const int64_t f = rest % s.out_width, e = rest / s.out_width % s.out_height;
  rest /= s.out_height * s.out_width;
  if (!s.channels_last) m = rest % s.out_channels, rest /= s.out_channels;
  const T* const image = input + rest * from.image + first * from.channel;
  const T* const filter = weight + m * s.in_channels + first;

  const bool has_bias = epilogue.bias != nullptr, has_residual = epilogue.residual != nullptr;
  accumulate_t<T> sum = load(load_global(epilogue.bias + (has_bias ? m : 0), has_bias)) +
                        load(load_global(epilogue.residual + (has_residual ? index : 0), has_residual));
  for (int c = 0; c < count; ++c) {
    const int64_t h = e * s.stride_height + table.at[c].dh, w = f * s.stride_width + table.at[c].dw;
    const bool inside = h >= 0 && h < s.in_height && w >= 0 && w < s.in_width;
    const int64_t place = inside ? c * from.channel + h * from.row + w * from.column : 0;
    sum += load(load_global(image + place, inside)) * load(load_global(filter + c));
  }
  store_global(output + index, rounded<T>(activate(sum, epilogue.activation)));
}

}  // namespace

template <typename T>
bool shift_conv2d_plain_forward_cuda(const T* input, const int64_t* offsets, const T* weight,
                                     const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& shape,
                                     void* stream) {
  narrow(shape.in_height, "height"), narrow(shape.in_width, "width");
  const int64_t values = shape.batch * shape.out_channels * shape.out_height * shape.out_width;
  if (values == 0) return true;
  for (int64_t first = 0; first < shape.in_channels; first += most_channels) {
    const int64_t count = std::min<int64_t>(most_channels, shape.in_channels - first);
    const Conv2dEpilogue<T> part{first == 0 ? epilogue.bias : nullptr, first == 0 ? nullptr : output,
                                 first + count < shape.in_channels ? Activation::none : epilogue.activation};
    FASTCONV_LAUNCH(shift_conv2d_plain_forward_kernel<T>, grid_size(ceil_div(values, threads)), threads, 0,
                    stream, input, weight, part, output, shape, first, int(count),
                    offset_table<int, most_channels>(offsets, first, count, shape));
  }
  return true;
}

#define FASTCONV_INSTANTIATE(T)                                                        \
  template bool shift_conv2d_plain_forward_cuda<T>(const T*, const int64_t*, const T*, \
                                                   const Conv2dEpilogue<T>&, T*, const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Depthwise convolution, as plain as CUDA can say it.
//
// Formula: depthwise_conv2d.h, written out.
// One thread: one value of the output, or of grad_input. One block: one tap of grad_weight.
// Bytes: each output reads its KH * KW inputs from memory; the caches keep most of that away from DRAM, the
// load
//   units feel all of it. grad_weight reads grad_output and input once for each tap.
// Before it: nothing; this is the first step of the ladder.
// Limits: integer divisions for each value, 64-bit arithmetic throughout.

#include "depthwise_conv2d_cuda.h"

namespace fastconv {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads, 1)
    depthwise_conv2d_plain_forward_kernel(const T* __restrict__ input,   // (N, C, H, W)
                                          const T* __restrict__ weight,  // (O, KH, KW)
                                          const T* __restrict__ bias,    // (O) or null
                                          T* __restrict__ output,        // (N, O, E, F)
                                          DepthwiseConv2dShape s, Activation activation) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.batch * s.out_channels * s.out_height * s.out_width) return;
  const Position at = position_of(index, s.out_channels, s.out_height, s.out_width, s.channels_last);
  const int64_t channel = at.channel / s.multiplier();
  accumulate_t<T> sum = bias == nullptr ? 0 : load(load_global(bias + at.channel));
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    const int64_t row = at.row * s.stride_height + i * s.dilation_height - s.padding_top;
    for (int64_t j = 0; j < s.kernel_width; ++j) {
      const int64_t column = at.column * s.stride_width + j * s.dilation_width - s.padding_left;
      const bool inside = row >= 0 && row < s.in_height && column >= 0 && column < s.in_width;
      const T* source = input + offset_of(at.image, channel, row, column, s.in_channels, s.in_height,
                                          s.in_width, s.channels_last);
      const T* tap = weight + (at.channel * s.kernel_height + i) * s.kernel_width + j;
      sum += load(load_global(source, inside)) * load(load_global(tap, inside));
    }
  }
  store_global(output + index, rounded<T>(activate(sum, activation)));
}

template <typename T>
__global__ void __launch_bounds__(threads, 1)
    depthwise_conv2d_plain_grad_input_kernel(const T* __restrict__ grad_output,  // (N, O, E, F)
                                             const T* __restrict__ weight,       // (O, KH, KW)
                                             T* __restrict__ grad_input,         // (N, C, H, W)
                                             DepthwiseConv2dShape s) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.batch * s.in_channels * s.in_height * s.in_width) return;
  const Position at = position_of(index, s.in_channels, s.in_height, s.in_width, s.channels_last);
  accumulate_t<T> sum = 0;
  for (int64_t m = 0; m < s.multiplier(); ++m) {
    const int64_t channel = at.channel * s.multiplier() + m;
    for (int64_t i = 0; i < s.kernel_height; ++i) {
      // The output row that reads this row with tap i, if the stride does not step over it.
      const int64_t from_top = at.row + s.padding_top - i * s.dilation_height;
      const int64_t row = from_top / s.stride_height;
      const bool row_inside = from_top >= 0 && from_top % s.stride_height == 0 && row < s.out_height;
      for (int64_t j = 0; j < s.kernel_width; ++j) {
        const int64_t from_left = at.column + s.padding_left - j * s.dilation_width;
        const int64_t column = from_left / s.stride_width;
        const bool inside =
            row_inside && from_left >= 0 && from_left % s.stride_width == 0 && column < s.out_width;
        const T* source = grad_output + offset_of(at.image, channel, row, column, s.out_channels,
                                                  s.out_height, s.out_width, s.channels_last);
        const T* tap = weight + (channel * s.kernel_height + i) * s.kernel_width + j;
        sum += load(load_global(source, inside)) * load(load_global(tap, inside));
      }
    }
  }
  store_global(grad_input + index, rounded<T>(sum));
}

// Block b sums one tap over all images and output pixels; the blocks after the last tap sum grad_bias.
template <typename T>
__global__ void __launch_bounds__(threads, 1)
    depthwise_conv2d_plain_grad_weight_kernel(const T* __restrict__ grad_output,  // (N, O, E, F)
                                              const T* __restrict__ input,        // (N, C, H, W)
                                              T* __restrict__ grad_weight,        // (O, KH, KW)
                                              T* __restrict__ grad_bias,          // (O) or null
                                              DepthwiseConv2dShape s) {
  using A = accumulate_t<T>;
  __shared__ A sums[threads];
  const int64_t taps = s.kernel_height * s.kernel_width, pixels = s.out_height * s.out_width;
  const bool is_bias = blockIdx.x >= s.out_channels * taps;
  const int64_t tap = is_bias ? 0 : blockIdx.x % taps;
  const int64_t channel = is_bias ? blockIdx.x - s.out_channels * taps : blockIdx.x / taps;
  const int64_t i = tap / s.kernel_width, j = tap % s.kernel_width;
  A sum = 0;
  for (int64_t index = threadIdx.x; index < s.batch * pixels; index += threads) {
    const int64_t image = index / pixels, e = index % pixels / s.out_width, f = index % s.out_width;
    const int64_t row = e * s.stride_height + i * s.dilation_height - s.padding_top;
    const int64_t column = f * s.stride_width + j * s.dilation_width - s.padding_left;
    const bool inside = is_bias || (row >= 0 && row < s.in_height && column >= 0 && column < s.in_width);
    const A grad = load(load_global(grad_output + offset_of(image, channel, e, f, s.out_channels,
                                                            s.out_height, s.out_width, s.channels_last),
                                    inside));
    if (is_bias) {
      sum += grad;
      continue;
    }
    sum += grad * load(load_global(input + offset_of(image, channel / s.multiplier(), row, column,
                                                     s.in_channels, s.in_height, s.in_width, s.channels_last),
                                   inside));
  }
  store_shared(&sums[threadIdx.x], sum);
  for (int half = threads / 2; half > 0; half /= 2) {  // the same tree every time: the same bits
    __syncthreads();
    const bool adds = int(threadIdx.x) < half;
    const A other = load_shared(&sums[(threadIdx.x + half) % threads], adds);
    sum += other;
    store_shared(&sums[threadIdx.x], sum, adds);
  }
  if (threadIdx.x == 0)
    store_global(is_bias ? grad_bias + channel : grad_weight + blockIdx.x, rounded<T>(sum));
}

}  // namespace

template <typename T>
void depthwise_conv2d_plain_forward_cuda(const T* input, const T* weight, const T* bias, T* output,
                                         const DepthwiseConv2dShape& shape, Activation activation,
                                         void* stream) {
  const int64_t count = shape.batch * shape.out_channels * shape.out_height * shape.out_width;
  if (count == 0) return;
  FASTCONV_LAUNCH(depthwise_conv2d_plain_forward_kernel<T>, grid_size(ceil_div(count, threads)), threads, 0,
                  stream, input, weight, bias, output, shape, activation);
}

template <typename T>
void depthwise_conv2d_plain_grad_input_cuda(const T* grad_output, const T* weight, T* grad_input,
                                            const DepthwiseConv2dShape& shape, void* stream) {
  const int64_t count = shape.batch * shape.in_channels * shape.in_height * shape.in_width;
  if (count == 0) return;
  FASTCONV_LAUNCH(depthwise_conv2d_plain_grad_input_kernel<T>, grid_size(ceil_div(count, threads)), threads,
                  0, stream, grad_output, weight, grad_input, shape);
}

template <typename T>
void depthwise_conv2d_plain_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight,
                                             T* grad_bias, accumulate_t<T>* /*workspace*/,
                                             const DepthwiseConv2dShape& shape, void* stream) {
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  const int64_t blocks = shape.out_channels * (taps + (grad_bias != nullptr));
  if (blocks == 0) return;
  FASTCONV_LAUNCH(depthwise_conv2d_plain_grad_weight_kernel<T>, grid_size(blocks), threads, 0, stream,
                  grad_output, input, grad_weight, grad_bias, shape);
}

#define FASTCONV_INSTANTIATE(T)                                                                          \
  template void depthwise_conv2d_plain_forward_cuda<T>(const T*, const T*, const T*, T*,                 \
                                                       const DepthwiseConv2dShape&, Activation, void*);  \
  template void depthwise_conv2d_plain_grad_input_cuda<T>(const T*, const T*, T*,                        \
                                                          const DepthwiseConv2dShape&, void*);           \
  template void depthwise_conv2d_plain_grad_weight_cuda<T>(const T*, const T*, T*, T*, accumulate_t<T>*, \
                                                           const DepthwiseConv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

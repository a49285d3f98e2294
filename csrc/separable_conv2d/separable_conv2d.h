// Depthwise convolution, then 1x1 convolution: the plain-C++ signature of every kernel.
//
//   middle[n, c, e, f] = mid_activation(depthwise_bias[c] + sum over i, j of
//       input[n, c / multiplier, e * stride_height + i * dilation_height - padding_top,
//                                f * stride_width  + j * dilation_width  - padding_left]
//       * depthwise_weight[c, i, j]),
//   output[n, m, e, f] = activation(bias[m] + residual[n, m, e, f] + sum over c of
//       middle[n, c, e, f] * weight[m, c]).
//
// No kernel holds the whole of `middle`. Its shape, and how images lie in memory, are those of
// depthwise_conv2d.h; the epilogue is conv2d.h's.
#pragma once

#include "../conv2d/conv2d.h"
#include "../depthwise_conv2d/depthwise_conv2d.h"

namespace fastconv {

// The first of the two convolutions, but for its input.
template <typename T>
struct SeparableDepthwise {
  const T* weight;  // (out_channels, kernel_height, kernel_width)
  const T* bias;    // (out_channels), or null
  Activation activation;
  DepthwiseConv2dShape shape;
};

// The second one's shape.
inline Conv2dShape pointwise_shape(const DepthwiseConv2dShape& s, int64_t filters) {
  return {.batch = s.batch,
          .in_channels = s.out_channels,
          .in_height = s.out_height,
          .in_width = s.out_width,
          .out_channels = filters,
          .out_height = s.out_height,
          .out_width = s.out_width,
          .kernel_height = 1,
          .kernel_width = 1,
          .stride_height = 1,
          .stride_width = 1,
          .padding_top = 0,
          .padding_left = 0,
          .dilation_height = 1,
          .dilation_width = 1,
          .groups = 1,
          .channels_last = s.channels_last};
}

// T: float, double, BFloat16, Float16. `packed` is what conv2d_<variant>_pack_weight_cpu wrote of the 1x1
// weight, strips': conv2d_direct's.
#define FASTCONV_SEPARABLE_CONV2D_CPU(variant)                                               \
  template <typename T>                                                                      \
  void separable_conv2d_##variant##_forward_cpu(                                             \
      const T* input, const SeparableDepthwise<T>& depthwise, const accumulate_t<T>* packed, \
      const Conv2dEpilogue<T>& epilogue, T* output, int64_t filters, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_SEPARABLE_CONV2D_CPU(strips) FASTCONV_SEPARABLE_CONV2D_CPU(plain))

// weight: (filters, channels).
template <typename T>
void separable_conv2d_tiled_forward_cuda(const T* input, const SeparableDepthwise<T>& depthwise,
                                         const T* weight, const Conv2dEpilogue<T>& epilogue, T* output,
                                         int64_t filters, void* stream);

}  // namespace fastconv

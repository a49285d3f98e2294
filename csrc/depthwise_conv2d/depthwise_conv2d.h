// Depthwise convolution: the plain-C++ signature of every kernel.
//
//   output[n, o, e, f] = activation(bias[o] + sum over i, j of
//       input[n, o / multiplier, e * stride_height + i * dilation_height - padding_top,
//                                f * stride_width  + j * dilation_width  - padding_left]
//       * weight[o, i, j]),                      multiplier = out_channels / in_channels,
//
// zero outside the image. Tensors lie in memory as (N, C, H, W), or as (N, H, W, C) where
// shape.channels_last is set; the weight always as (out_channels, kernel_height, kernel_width).
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/cpu.h"
#include "../common/types.h"

namespace fastconv {

struct DepthwiseConv2dShape {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_top, padding_left;  // padding below and right is implied by out_height, out_width
  int64_t dilation_height, dilation_width;
  bool channels_last;

  FASTCONV_HOST_DEVICE int64_t multiplier() const { return out_channels / in_channels; }
};

// T: float, double, BFloat16, Float16. A null bias, or a null grad_bias, is left out.
// Shapes:  input, grad_input (batch, in_channels, in_height, in_width)
//          output, grad_output (batch, out_channels, out_height, out_width)
//          weight, grad_weight (out_channels, kernel_height, kernel_width)
//          bias, grad_bias (out_channels)
#define FASTCONV_DEPTHWISE_CONV2D_CPU(variant)                                                              \
  template <typename T>                                                                                     \
  void depthwise_conv2d_##variant##_forward_cpu(const T* input, const T* weight, const T* bias, T* output,  \
                                                const DepthwiseConv2dShape& shape, Activation activation,   \
                                                ParallelFor threads);                                       \
  template <typename T>                                                                                     \
  void depthwise_conv2d_##variant##_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,    \
                                                   const DepthwiseConv2dShape& shape, ParallelFor threads); \
  template <typename T>                                                                                     \
  void depthwise_conv2d_##variant##_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,   \
                                                    T* grad_bias, const DepthwiseConv2dShape& shape,        \
                                                    ParallelFor threads);

// The same, and mean and variance (out_channels) of what is stored; channels_last images in float or double.
#define FASTCONV_DEPTHWISE_CONV2D_MOMENTS_CPU(variant)                                 \
  template <typename T>                                                                \
  void depthwise_conv2d_##variant##_forward_moments_cpu(                               \
      const T* input, const T* weight, const T* bias, T* output, T* mean, T* variance, \
      const DepthwiseConv2dShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_DEPTHWISE_CONV2D_CPU(plain) FASTCONV_DEPTHWISE_CONV2D_CPU(row_blocked)
                         FASTCONV_DEPTHWISE_CONV2D_CPU(vectorized)
                             FASTCONV_DEPTHWISE_CONV2D_MOMENTS_CPU(vectorized))

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once.
// grad_weight sums in two stages: first into `workspace`, which holds
// depthwise_conv2d_grad_weight_workspace(shape) values of accumulate_t<T>, then in a fixed order.
int64_t depthwise_conv2d_grad_weight_workspace(const DepthwiseConv2dShape& shape);

#define FASTCONV_DEPTHWISE_CONV2D_CUDA(result, variant)                                                      \
  template <typename T>                                                                                      \
  result depthwise_conv2d_##variant##_forward_cuda(const T* input, const T* weight, const T* bias,           \
                                                   T* output, const DepthwiseConv2dShape& shape,             \
                                                   Activation activation, void* stream);                     \
  template <typename T>                                                                                      \
  result depthwise_conv2d_##variant##_grad_input_cuda(const T* grad_output, const T* weight, T* grad_input,  \
                                                      const DepthwiseConv2dShape& shape, void* stream);      \
  template <typename T>                                                                                      \
  result depthwise_conv2d_##variant##_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight, \
                                                       T* grad_bias, accumulate_t<T>* workspace,             \
                                                       const DepthwiseConv2dShape& shape, void* stream);

FASTCONV_DEPTHWISE_CONV2D_CUDA(void, plain)
FASTCONV_DEPTHWISE_CONV2D_CUDA(bool, tiled)  // false, and nothing done: no tile fits in shared memory

}  // namespace fastconv

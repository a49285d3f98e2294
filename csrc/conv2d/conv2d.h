// Convolution: the plain-C++ signature of every kernel.
//
//   output[n, m, e, f] = activation(bias[m] + residual[n, m, e, f] + sum over c, i, j of
//       input[n, g * C/G + c, e * stride_height + i * dilation_height - padding_top,
//                             f * stride_width  + j * dilation_width  - padding_left]
//       * weight[m, c, i, j]),                        g = m / (M/G),
//
// zero outside the image; C = in_channels, M = out_channels, G = groups. Images lie in memory as (N, C, H,
// W), or as (N, H, W, C) where shape.channels_last is set; the weight always as (M, C/G, kernel_height,
// kernel_width).
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/cpu.h"
#include "../common/types.h"

namespace fastconv {

struct Conv2dShape {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_top, padding_left;  // padding below and right is implied by out_height, out_width
  int64_t dilation_height, dilation_width;
  int64_t groups;
  bool channels_last;

  FASTCONV_HOST_DEVICE int64_t in_group() const { return in_channels / groups; }    // channels of a group
  FASTCONV_HOST_DEVICE int64_t out_group() const { return out_channels / groups; }  // filters of a group
  FASTCONV_HOST_DEVICE int64_t taps() const { return kernel_height * kernel_width; }
};

// What happens to a sum before it is stored.
template <typename T>
struct Conv2dEpilogue {
  const T* bias;      // (out_channels), or null
  const T* residual;  // as the output, or null
  Activation activation;
};

// T: float, double, BFloat16, Float16. A null bias, residual or grad_bias is left out.
// Shapes:  input (batch, in_channels, in_height, in_width)
//          output, grad_output (batch, out_channels, out_height, out_width)
//          weight, grad_weight (out_channels, in_channels / groups, kernel_height, kernel_width)
//          bias, grad_bias (out_channels)
// The gradient of the input is the transposed convolution of grad_output: csrc/conv_transpose2d.
//
// A kernel reads its weights in an order of its own: `packed` is what pack_weight wrote, packed_size values;
// the packed weights depend on the weight, the groups and the kernel's size alone.
#define FASTCONV_CONV2D_CPU(variant)                                                            \
  template <typename T>                                                                         \
  int64_t conv2d_##variant##_packed_size(const Conv2dShape& shape);                             \
  template <typename T>                                                                         \
  void conv2d_##variant##_pack_weight_cpu(const T* weight, accumulate_t<T>* packed,             \
                                          const Conv2dShape& shape, ParallelFor threads);       \
  template <typename T>                                                                         \
  void conv2d_##variant##_forward_cpu(const T* input, const accumulate_t<T>* packed,            \
                                      const Conv2dEpilogue<T>& epilogue, T* output,             \
                                      const Conv2dShape& shape, ParallelFor threads);           \
  template <typename T>                                                                         \
  void conv2d_##variant##_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, \
                                          T* grad_bias, const Conv2dShape& shape, ParallelFor threads);

// Winograd also takes the weight as it lies, and packs a panel at a time: no memory for all packed weights.
#define FASTCONV_CONV2D_UNPACKED_CPU(variant)                                                \
  template <typename T>                                                                      \
  void conv2d_##variant##_forward_unpacked_cpu(const T* input, const T* weight,              \
                                               const Conv2dEpilogue<T>& epilogue, T* output, \
                                               const Conv2dShape& shape, ParallelFor threads);

// Some gather mean and variance (out_channels) of what they store, of channels_last images in float or
// double. The weight is as it lies.
#define FASTCONV_CONV2D_MOMENTS_CPU(variant)                                                             \
  template <typename T>                                                                                  \
  void conv2d_##variant##_forward_moments_cpu(const T* input, const T* weight, const T* bias, T* output, \
                                              T* mean, T* variance, const Conv2dShape& shape,            \
                                              ParallelFor threads);
#define FASTCONV_CONV2D_INSTANTIATE_MOMENTS(variant, T)                                          \
  template void conv2d_##variant##_forward_moments_cpu(const T*, const T*, const T*, T*, T*, T*, \
                                                       const Conv2dShape&, ParallelFor);

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once. They return
// false, and have done nothing, where they do not serve a shape. grad_weight sums in two stages: first into
// `workspace`, which holds conv2d_<variant>_grad_weight_workspace(shape) values of accumulate_t<T>, then in a
// fixed order.
#define FASTCONV_CONV2D_CUDA(variant)                                                                      \
  template <typename T>                                                                                    \
  bool conv2d_##variant##_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue, \
                                       T* output, const Conv2dShape& shape, void* stream);                 \
  int64_t conv2d_##variant##_grad_weight_workspace(const Conv2dShape& shape);                              \
  template <typename T>                                                                                    \
  bool conv2d_##variant##_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight,           \
                                           T* grad_bias, accumulate_t<T>* workspace,                       \
                                           const Conv2dShape& shape, void* stream);

// The variants that the binding knows, as macro(variant), the first choice first.
#define FASTCONV_CONV2D_CPU_VARIANTS(macro)                                                           \
  macro(direct) macro(im2col) macro(winograd_f2) macro(winograd_f4) macro(winograd_f6) macro(grouped) \
      macro(plain)
#define FASTCONV_CONV2D_UNPACKED_CPU_VARIANTS(macro) macro(winograd_f2) macro(winograd_f4) macro(winograd_f6)
#define FASTCONV_CONV2D_MOMENTS_CPU_VARIANTS(macro) \
  macro(direct) macro(winograd_f2) macro(winograd_f4) macro(winograd_f6)
// implicit_gemm takes float16 and bfloat16 with groups of multiples of 8 channels; direct needs a patch of
// the input to fit in shared memory; im2col serves every shape.
#define FASTCONV_CONV2D_CUDA_VARIANTS(macro) macro(implicit_gemm) macro(direct) macro(im2col)
// clang-format off
FASTCONV_DECLARE_CPU(FASTCONV_CONV2D_CPU_VARIANTS(FASTCONV_CONV2D_CPU)
                         FASTCONV_CONV2D_UNPACKED_CPU_VARIANTS(FASTCONV_CONV2D_UNPACKED_CPU)
                             FASTCONV_CONV2D_MOMENTS_CPU_VARIANTS(FASTCONV_CONV2D_MOMENTS_CPU))
FASTCONV_CONV2D_CUDA_VARIANTS(FASTCONV_CONV2D_CUDA)
// clang-format on

}  // namespace fastconv

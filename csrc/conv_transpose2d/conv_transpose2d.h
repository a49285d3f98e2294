// Transposed convolution, which is also the gradient of a convolution with respect to its input: the
//   plain-C++ signature of every kernel.
//
//   output[n, c, h, w] = bias[c] + sum over m, i, j of input[n, m, e, f] * weight[m, c, i, j],
//       h = e * stride_height + i * dilation_height - padding_top,
//       w = f * stride_width  + j * dilation_width  - padding_left
//
// `shape` is the convolution's whose input gradient this is: the kernel's input has the shape of the
//   convolution's output, (batch, out_channels, out_height, out_width), and its output that of the
//   convolution's input.
#pragma once

#include "../conv2d/conv2d.h"

namespace fastconv {

// T: float, double, BFloat16, Float16. A null bias is left out.
// Shapes:  input (batch, shape.out_channels, shape.out_height, shape.out_width)
//          output (batch, shape.in_channels, shape.in_height, shape.in_width)
//          weight (shape.out_channels, shape.in_channels / groups, kernel_height, kernel_width)
//          bias (shape.in_channels)
// Packed weights: as in conv2d.h; they depend on the stride and the dilation too, which decide the phases,
// and on the padding.
#define FASTCONV_CONV_TRANSPOSE2D_CPU(variant)                                                      \
  template <typename T>                                                                             \
  int64_t conv_transpose2d_##variant##_packed_size(const Conv2dShape& shape);                       \
  template <typename T>                                                                             \
  void conv_transpose2d_##variant##_pack_weight_cpu(const T* weight, accumulate_t<T>* packed,       \
                                                    const Conv2dShape& shape, ParallelFor threads); \
  template <typename T>                                                                             \
  void conv_transpose2d_##variant##_forward_cpu(const T* input, const accumulate_t<T>* packed,      \
                                                const T* bias, T* output, const Conv2dShape& shape, \
                                                ParallelFor threads);

#define FASTCONV_CONV_TRANSPOSE2D_UNPACKED_CPU(variant)                                                  \
  template <typename T>                                                                                  \
  void conv_transpose2d_##variant##_forward_unpacked_cpu(const T* input, const T* weight, const T* bias, \
                                                         T* output, const Conv2dShape& shape,            \
                                                         ParallelFor threads);

// As the CUDA kernels of conv2d.h; false, and nothing done, where a kernel does not serve a shape.
#define FASTCONV_CONV_TRANSPOSE2D_CUDA(variant)                                                             \
  template <typename T>                                                                                     \
  bool conv_transpose2d_##variant##_forward_cuda(const T* input, const T* weight, const T* bias, T* output, \
                                                 const Conv2dShape& shape, void* stream);

// The variants that the binding knows, as macro(variant), the first choice first.
#define FASTCONV_CONV_TRANSPOSE2D_CPU_VARIANTS(macro)                                                 \
  macro(direct) macro(im2col) macro(winograd_f2) macro(winograd_f4) macro(winograd_f6) macro(grouped) \
      macro(plain)
#define FASTCONV_CONV_TRANSPOSE2D_CUDA_VARIANTS(macro) macro(implicit_gemm) macro(direct) macro(im2col)
// clang-format off
FASTCONV_DECLARE_CPU(FASTCONV_CONV_TRANSPOSE2D_CPU_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_CPU)
                         FASTCONV_CONV2D_UNPACKED_CPU_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_UNPACKED_CPU))
FASTCONV_CONV_TRANSPOSE2D_CUDA_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_CUDA)
// clang-format on

}  // namespace fastconv

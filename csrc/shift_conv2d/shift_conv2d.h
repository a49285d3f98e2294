// Shift, then 1x1 convolution: the plain-C++ signature of every kernel.
//
//   output[n, m, e, f] = activation(bias[m] + sum over c of
//       input[n, c, e * stride_height + dh[c], f * stride_width + dw[c]] * weight[m, c]),
//
// zero where that is outside the image. Shapes, and how images lie in memory, are those of conv2d.h with a
// 1x1 kernel, one group and no padding. The gradients are conv2d's, of the shifted input, shifted back.
#pragma once

#include "../conv2d/conv2d.h"

namespace fastconv {

// T: float, double, BFloat16, Float16; offsets: (in_channels, 2), rows (dh, dw), any integers, in the CPU's
// memory. `packed` is what conv2d_<variant>_pack_weight_cpu wrote. The epilogue has no residual.
#define FASTCONV_SHIFT_CONV2D_CPU(variant)                                   \
  template <typename T>                                                      \
  void shift_conv2d_##variant##_forward_cpu(                                 \
      const T* input, const int64_t* offsets, const accumulate_t<T>* packed, \
      const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_SHIFT_CONV2D_CPU(direct) FASTCONV_SHIFT_CONV2D_CPU(im2col)
                         FASTCONV_SHIFT_CONV2D_CPU(plain))

// Gradients of channels_last images, shapes as in conv2d.h; a null grad_bias is left out.
#define FASTCONV_SHIFT_CONV2D_GRADIENTS_CPU(variant)                                                  \
  template <typename T>                                                                               \
  void shift_conv2d_##variant##_grad_input_cpu(const T* grad_output, const T* weight,                 \
                                               const int64_t* offsets, T* grad_input,                 \
                                               const Conv2dShape& shape, ParallelFor threads);        \
  template <typename T>                                                                               \
  void shift_conv2d_##variant##_grad_weight_cpu(const T* grad_output, const T* input,                 \
                                                const int64_t* offsets, T* grad_weight, T* grad_bias, \
                                                const Conv2dShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_SHIFT_CONV2D_GRADIENTS_CPU(direct))

// As conv2d.h has it: false, and nothing done, where a kernel does not serve a shape. `offsets` are in the
// CPU's memory, and need not outlive the call.
#define FASTCONV_SHIFT_CONV2D_CUDA(variant)                                                           \
  template <typename T>                                                                               \
  bool shift_conv2d_##variant##_forward_cuda(const T* input, const int64_t* offsets, const T* weight, \
                                             const Conv2dEpilogue<T>& epilogue, T* output,            \
                                             const Conv2dShape& shape, void* stream);

FASTCONV_SHIFT_CONV2D_CUDA(implicit_gemm)
FASTCONV_SHIFT_CONV2D_CUDA(im2col)
FASTCONV_SHIFT_CONV2D_CUDA(plain)

}  // namespace fastconv

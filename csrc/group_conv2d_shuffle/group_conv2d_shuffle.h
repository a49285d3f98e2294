// Grouped convolution, then channel shuffle by the same groups: the plain-C++ signature of every kernel.
//
//   output[n, k * G + g] = activation(convolution[n, g * M/G + k]),        g < G, k < M/G,
//
// the convolution of conv2d.h with its bias. Shapes, and how images and weights lie in memory, are those of
// conv2d.h; bias is (M) in the order of the filters. The gradients are conv2d's, of grad_output shuffled
// back.
#pragma once

#include "../conv2d/conv2d.h"

namespace fastconv {

// T: float, double, BFloat16, Float16. `packed` is what conv2d_<variant>_pack_weight_cpu wrote. The epilogue
// has no residual.
#define FASTCONV_GROUP_CONV2D_SHUFFLE_CPU(variant)                                                 \
  template <typename T>                                                                            \
  void group_conv2d_shuffle_##variant##_forward_cpu(const T* input, const accumulate_t<T>* packed, \
                                                    const Conv2dEpilogue<T>& epilogue, T* output,  \
                                                    const Conv2dShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_GROUP_CONV2D_SHUFFLE_CPU(im2col) FASTCONV_GROUP_CONV2D_SHUFFLE_CPU(plain))

// As conv2d.h has it: false, and nothing done, where a kernel does not serve a shape.
#define FASTCONV_GROUP_CONV2D_SHUFFLE_CUDA(variant)                                                \
  template <typename T>                                                                            \
  bool group_conv2d_shuffle_##variant##_forward_cuda(const T* input, const T* weight,              \
                                                     const Conv2dEpilogue<T>& epilogue, T* output, \
                                                     const Conv2dShape& shape, void* stream);

FASTCONV_GROUP_CONV2D_SHUFFLE_CUDA(implicit_gemm)
FASTCONV_GROUP_CONV2D_SHUFFLE_CUDA(im2col)

}  // namespace fastconv

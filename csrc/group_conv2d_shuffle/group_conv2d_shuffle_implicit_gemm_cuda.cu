// Grouped convolution with channel shuffle on the tensor cores (mma.sync m16n8k16).
//
// Formula: group_conv2d_shuffle.h, in the kernel of conv2d_implicit_gemm_cuda.cu; the shuffle as in
//   group_conv2d_shuffle_im2col_cuda.cu: where the sums are stored.
// One block: 128 pixels by 64 (or 32) filters of a group.
// Bytes: those of the convolution, to the byte; channels_last results leave value by value, not 16 bytes at
//   once.
// Before it (im2col): multiplications one by one in float32, channels copied one by one.
// Limits: as conv2d_implicit_gemm_cuda.cu.

#include "../conv2d/conv2d_implicit_gemm_cuda.h"
#include "group_conv2d_shuffle.h"

namespace fastconv {

template <typename T>
bool group_conv2d_shuffle_implicit_gemm_forward_cuda(const T* input, const T* weight,
                                                     const Conv2dEpilogue<T>& epilogue, T* output,
                                                     const Conv2dShape& shape, void* stream) {
  return conv2d_implicit_gemm_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false, true),
                                        stream);
}

#define FASTCONV_INSTANTIATE(T)                                     \
  template bool group_conv2d_shuffle_implicit_gemm_forward_cuda<T>( \
      const T*, const T*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

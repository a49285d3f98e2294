// Transposed convolution on the tensor cores (mma.sync m16n8k16); also conv2d's grad_input.
//
// Formula: conv_transpose2d.h, by phases (conv_transpose2d_direct_cuda.cu): for each, result (pixels,
//   channels) = sum over the phase's taps of source at the tap (pixels, M/G) * weight's tap (M/G, channels).
// One block: 128 pixels of a phase by 64 (or 32) channels, in the kernel of conv2d_implicit_gemm_cuda.cu;
//   all phases in one launch. The weights come as they lie, with the taps of the other phases.
// Bytes: source once for each tap of a phase and tile of channels (mostly from L2), result once.
// Before it (im2col): multiplications one by one in float32, channels copied one by one.
// Limits: as conv2d_implicit_gemm_cuda.cu; a warp's contiguous results lie a stride apart.

#include "../conv2d/conv2d_implicit_gemm_cuda.h"
#include "conv_transpose2d.h"

namespace fastconv {

template <typename T>
bool conv_transpose2d_implicit_gemm_forward_cuda(const T* input, const T* weight, const T* bias, T* output,
                                                 const Conv2dShape& shape, void* stream) {
  return conv2d_implicit_gemm_pass_cuda(input, weight, Conv2dEpilogue<T>{bias, nullptr, Activation::none},
                                        output, conv2d_pass(shape, true), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                  \
  template bool conv_transpose2d_implicit_gemm_forward_cuda<T>(const T*, const T*, const T*, T*, \
                                                               const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

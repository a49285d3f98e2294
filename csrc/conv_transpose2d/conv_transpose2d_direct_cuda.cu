// Direct transposed convolution, which is also conv2d's grad_input.
//
// Formula: conv_transpose2d.h, by phases: the results whose row and column have one remainder modulo the
//   stride are a dense convolution with every (stride / gcd(stride, dilation))-th tap, so no multiplication
//   meets a zero between pixels. All phases run in one launch; one block: a rectangle of results of a phase,
//   in the kernel of conv2d_direct_cuda.cu.
// Bytes: source once for each phase and tile of filters (from L2 after the first), result once.
// Before it: nothing; this is the first step of the ladder.
// Limits: as conv2d_direct_cuda.cu; a warp's contiguous results lie a stride apart.

#include "../conv2d/conv2d_direct_cuda.h"
#include "conv_transpose2d.h"

namespace fastconv {

template <typename T>
bool conv_transpose2d_direct_forward_cuda(const T* input, const T* weight, const T* bias, T* output,
                                          const Conv2dShape& shape, void* stream) {
  return conv2d_direct_pass_cuda(input, weight, Conv2dEpilogue<T>{bias, nullptr, Activation::none}, output,
                                 conv2d_pass(shape, true), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                           \
  template bool conv_transpose2d_direct_forward_cuda<T>(const T*, const T*, const T*, T*, \
                                                        const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Transposed convolution as a matrix product, im2col panel by panel; also conv2d's grad_input.
//
// Formula: conv_transpose2d.h, by phases (conv_transpose2d_direct_cuda.cu): for each, result (pixels,
//   channels) = columns (pixels, M/G * taps of the phase) * weights (M/G * taps of the phase, channels).
// One block: 128 pixels of a phase by 64 channels (or 256 by 16), in the kernel of conv2d_im2col_cuda.cu;
//   all phases in one launch.
// Bytes: source once for each tap and tile of channels (from L1 and L2, mostly), result once.
// Before it (direct): as conv2d_im2col_cuda.cu. The other way of the textbook, columns first and then
//   col2im, would have to add up overlapping results; by phases each result is one sum.
// Limits: as conv2d_im2col_cuda.cu; a warp's contiguous results lie a stride apart.

#include "../conv2d/conv2d_im2col_cuda.h"
#include "conv_transpose2d.h"

namespace fastconv {

template <typename T>
bool conv_transpose2d_im2col_forward_cuda(const T* input, const T* weight, const T* bias, T* output,
                                          const Conv2dShape& shape, void* stream) {
  return conv2d_im2col_pass_cuda(input, weight, Conv2dEpilogue<T>{bias, nullptr, Activation::none}, output,
                                 conv2d_pass(shape, true), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                           \
  template bool conv_transpose2d_im2col_forward_cuda<T>(const T*, const T*, const T*, T*, \
                                                        const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

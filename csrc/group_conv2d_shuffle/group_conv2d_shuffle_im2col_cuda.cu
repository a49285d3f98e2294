// Grouped convolution with channel shuffle as a matrix product, im2col panel by panel.
//
// Formula: group_conv2d_shuffle.h, in the kernel of conv2d_im2col_cuda.cu. Where a filter's channel lies in
//   the result is a start and a step (conv2d_cuda.h); the shuffle is another start and another step.
// One block: 128 pixels by 64 filters of a group (or 256 by 16).
// Bytes: those of the convolution, to the byte. In contiguous images the stores are as coalesced as its own;
//   in channels_last ones neighbouring lanes write channels that lie G apart, one at a time, and blocks of
//   other groups write those between soon after, which the L2 cache can join to whole lines.
// Before it: convolution, then a kernel that reads and writes the whole result once more.
// Limits: as conv2d_im2col_cuda.cu.

#include "../conv2d/conv2d_im2col_cuda.h"
#include "group_conv2d_shuffle.h"

namespace fastconv {

template <typename T>
bool group_conv2d_shuffle_im2col_forward_cuda(const T* input, const T* weight,
                                              const Conv2dEpilogue<T>& epilogue, T* output,
                                              const Conv2dShape& shape, void* stream) {
  return conv2d_im2col_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false, true), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template bool group_conv2d_shuffle_im2col_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, \
                                                            T*, const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Shift with 1x1 convolution, C++, im2col: the shift is where the columns are read.
//
// Formula: shift_conv2d.h. conv2d_im2col_pass_cpu.h computes it, 64 pixels at a time: a line of its columns
// is a
//   channel at those pixels, and comes from the place that the channel's offset names. In contiguous images
//   that is another address; in channels_last ones, channels side by side with one offset are read together.
// Bytes: those of the 1x1 convolution without a shift.
// Before it: plain asks for each value whether it is inside.
// Limits: as conv2d_im2col_cpu.cpp; channels_last with neighbours of different offsets reads channel by
//   channel.
#include "../conv2d/conv2d_im2col_cpu.h"
#include "shift_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void shift_conv2d_im2col_forward_cpu(const T* input, const int64_t* offsets, const accumulate_t<T>* packed,
                                     const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                                     ParallelFor threads) {
  im2col_convolve(input, packed, epilogue, output, {direct_forward(s), offsets}, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                   \
  template void shift_conv2d_im2col_forward_cpu(const T*, const int64_t*, const accumulate_t<T>*, \
                                                const Conv2dEpilogue<T>&, T*, const Conv2dShape&, \
                                                ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

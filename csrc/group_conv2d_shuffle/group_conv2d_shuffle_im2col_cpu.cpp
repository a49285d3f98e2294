// Grouped convolution with channel shuffle, C++, im2col: the shuffle is where the sums are stored.
//
// Formula: group_conv2d_shuffle.h. conv2d_im2col_pass_cpu.h computes it, 6 filters of a group x 64 pixels at
// a
//   time. In contiguous images a filter's sums go to another plane. In channels_last ones the sums of all
//   groups of 64 pixels wait in the cache, line k * G + g of a tile, and are transposed into whole pixels.
// Bytes: those of the convolution without a shuffle.
// Limits: as conv2d_im2col_cpu.cpp.
#include "../conv2d/conv2d_im2col_cpu.h"
#include "group_conv2d_shuffle.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void group_conv2d_shuffle_im2col_forward_cpu(const T* input, const accumulate_t<T>* packed,
                                             const Conv2dEpilogue<T>& epilogue, T* output,
                                             const Conv2dShape& s, ParallelFor threads) {
  im2col_convolve(input, packed, epilogue, output, {direct_forward(s), nullptr, true}, threads);
}

#define FASTCONV_INSTANTIATE(T)                          \
  template void group_conv2d_shuffle_im2col_forward_cpu( \
      const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

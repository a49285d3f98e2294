// Shift with 1x1 convolution, C++, direct: about 192 pixels are shifted on their way into the cache.
//
// Formula: shift_conv2d.h. conv2d_direct_pass_cpu.h computes it; a chunk's rows come into its tile by the
// kernel
//   of shift2d_vectorized_cpu.cpp, row by row.
// Bytes: those of the 1x1 convolution without a shift; the tile stays in the L2 cache.
// Against im2col: lanes are filters, and nothing is transposed.
// Limits: as conv2d_direct_cpu.cpp; contiguous images come value by value; with a stride, pixels between are
//   shifted for nothing.
#include "../conv2d/conv2d_direct_cpu.h"
#include "../shift2d/shift2d_rows_cpu.h"
#include "shift_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void shift_conv2d_direct_forward_cpu(const T* input, const int64_t* offsets, const accumulate_t<T>* packed,
                                     const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                                     ParallelFor threads) {
  DirectPass pass = direct_forward(s);
  pass.move_row =
      shifted_rows<T>(offsets, {s.batch, s.in_channels, s.in_height, s.in_width, s.channels_last});
  direct_convolve(input, packed, epilogue, output, pass, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                   \
  template void shift_conv2d_direct_forward_cpu(const T*, const int64_t*, const accumulate_t<T>*, \
                                                const Conv2dEpilogue<T>&, T*, const Conv2dShape&, \
                                                ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

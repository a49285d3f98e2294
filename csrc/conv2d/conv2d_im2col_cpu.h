// One pass of convolution by blocked im2col, shared by forward, the transposed convolution, shift_conv2d and
// group_conv2d_shuffle.
#pragma once

#include "conv2d_direct_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

struct Im2colPass : DirectPass {
  // shift_conv2d's (channels read, 2), rows (dh, dw), or null: a place in the image for each channel, instead
  // of the taps.
  const int64_t* offsets = nullptr;
  // group_conv2d_shuffle's: filter k of group g is channel k * groups + g of the output.
  bool shuffled = false;
};

// Packed weights: for each group and phase (to_group, from_group, taps of the phase).
template <typename T>
void im2col_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads);

template <typename T>
void im2col_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const Im2colPass& pass, ParallelFor threads);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

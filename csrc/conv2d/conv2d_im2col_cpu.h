// One pass of convolution over contiguous images by blocked im2col, shared by forward and the transposed
// convolution.
#pragma once

#include "conv2d_direct_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Packed weights: for each group and phase (to_group, from_group, taps of the phase).
template <typename T>
void im2col_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads);

template <typename T>
void im2col_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const DirectPass& pass, ParallelFor threads);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// The gradient of the weight, direct, for operators whose input is not read as it lies.
#pragma once

#include "../common/image.h"
#include "conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Shapes as in conv2d.h. `move_row`, or none: what brings a row of a 1x1 convolution's channels_last input.
template <typename T>
void direct_grad_weight(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                        const Conv2dShape& s, const MoveRow& move_row, ParallelFor threads);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Rows of a depthwise convolution's output by the vectorized kernel, as the product with a 1x1 weight reads
// them.
#pragma once

#include "../common/image.h"
#include "depthwise_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// The taps are packed here; input, weight and bias must outlive what is returned. Rows of T, for any thread.
template <typename T>
RowSource depthwise_rows(const T* input, const T* weight, const T* bias, const DepthwiseConv2dShape& shape,
                         Activation activation);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

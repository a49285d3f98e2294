// Rows of images, shifted one at a time: shift2d's own, and those that shift_conv2d reads.
#pragma once

#include <functional>

#include "shift2d.h"

namespace fastconv {

using MoveRow =
    std::function<void(const void* image,  // (height, width, channels), or (channels, height, width)
                       int64_t row,        // of the result
                       void* target)>;     // (width, channels)

namespace FASTCONV_CPU_CAPABILITY {

// Of images of T; the offsets need not outlive the call.
template <typename T>
MoveRow shifted_rows(const int64_t* offsets, const Shift2dShape& s);

}  // namespace FASTCONV_CPU_CAPABILITY
}  // namespace fastconv

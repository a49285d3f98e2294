// Rows of images, shifted one at a time: shift2d's own, and those that shift_conv2d reads.
#pragma once

#include "shift2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Of images of T; the offsets need not outlive the call.
template <typename T>
MoveRow shifted_rows(const int64_t* offsets, const Shift2dShape& s);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

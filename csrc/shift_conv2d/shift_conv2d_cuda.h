// How the offsets come to the CUDA kernels: in the parameters of a launch, which may have 32,764 bytes from
// CUDA 12.1 and compute capability 7.0 on. That needs no memory on the device, no copy and nothing to wait
// for.
#pragma once

#include <algorithm>
#include <limits>

#include "../conv2d/conv2d_cuda.h"
#include "../shift2d/shift2d.h"
#include "shift_conv2d.h"

namespace fastconv {

// The offsets of up to Size channels. An Offset holds them limited to the image's size.
template <typename Offset, int Size>
struct OffsetTable {
  struct alignas(2 * sizeof(Offset)) {
    Offset dh, dw;
  } at[Size];
};

// Whether an Offset can hold those of these images.
template <typename Offset>
bool holds_offsets(const Conv2dShape& s) {
  return std::max(s.in_height, s.in_width) <= std::numeric_limits<Offset>::max();
}

// The table of `count` channels from `first` on; offsets: (in_channels, 2).
template <typename Offset, int Size>
OffsetTable<Offset, Size> offset_table(const int64_t* offsets, int64_t first, int64_t count,
                                       const Conv2dShape& s) {
  OffsetTable<Offset, Size> table{};
  for (int64_t i = 0; i < count; ++i)
    table.at[i] = {Offset(limited(offsets[2 * (first + i)], s.in_height)),
                   Offset(limited(offsets[2 * (first + i) + 1], s.in_width))};
  return table;
}

}  // namespace fastconv

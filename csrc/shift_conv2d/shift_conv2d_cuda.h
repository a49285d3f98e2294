// How the offsets come to the CUDA kernels: in the parameters of a launch, which may have 32,764 bytes from
// CUDA 12.1 and compute capability 7.0 on. That needs no memory on the device, no copy and nothing to wait
// for.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/image.h"
#include "../conv2d/conv2d_cuda.h"
#include "shift_conv2d.h"

namespace fastconv {

// The offsets of up to Size channels. An Offset holds them limited to the image's size.
template <typename Offset, int Size>
struct OffsetTable {
  static constexpr int channels = Size;
  struct alignas(2 * sizeof(Offset)) {
    Offset dh, dw;
  } at[Size];
};

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

// use(table) with the table of all channels, a small one for small layers; false where none can hold them.
template <typename Use>
bool with_table(const int64_t* offsets, const Conv2dShape& s, const Use& use) {
  if (s.in_channels > 4096 || std::max(s.in_height, s.in_width) > std::numeric_limits<int16_t>::max())
    return false;
  if (s.in_channels <= 512) return use(offset_table<int16_t, 512>(offsets, 0, s.in_channels, s));
  return use(offset_table<int16_t, 4096>(offsets, 0, s.in_channels, s));
}

}  // namespace fastconv

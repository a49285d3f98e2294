// How the offsets come to the CUDA kernels: in the parameters of a launch, which may have 4 KiB. That needs
// no memory on the device, no copy and nothing to wait for; more channels than a table holds take more
// launches.
#pragma once

#include <algorithm>

#include "../common/cuda.h"
#include "shift2d.h"

namespace fastconv {

struct Shift2dTable {
  static constexpr int size = 256;
  int first, count;  // channels
  int dh[size], dw[size];
};

// launch(table) for some channels after the other.
template <typename Launch>
void for_each_table(const int64_t* offsets, const Shift2dShape& s, const Launch& launch) {
  narrow(s.height, "height"), narrow(s.width, "width"), narrow(s.channels, "channels");
  for (int64_t first = 0; first < s.channels; first += Shift2dTable::size) {
    Shift2dTable table{};
    table.first = int(first);
    table.count = int(std::min<int64_t>(Shift2dTable::size, s.channels - first));
    for (int i = 0; i < table.count; ++i) {
      table.dh[i] = int(limited(offsets[2 * (first + i)], s.height));
      table.dw[i] = int(limited(offsets[2 * (first + i) + 1], s.width));
    }
    launch(table);
  }
}

}  // namespace fastconv

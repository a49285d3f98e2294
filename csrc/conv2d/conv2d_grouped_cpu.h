// What the passes of the grouped convolution share: how the channels of narrow groups lie in vectors.
//
// A unit is what can be computed by itself. Where L lanes hold several whole groups (4 or 8 channels read and
// written by each, in AVX-512), it is these L channels, and channel c of the groups is spread over their
// lanes by one permute. Any other unit is one group: its outputs are as many vectors as they need, and
// channel c of the group is broadcast.
#pragma once

#include <algorithm>

#include "../common/geometry.h"
#include "../common/prefetch.h"
#include "conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// A pass that reads in_group channels of each group and writes out_group channels: forward as the shape has
// them, transposed the other way round.
template <typename A>
struct GroupedChannels {
  static constexpr int64_t L = lanes_of<A>;
  int64_t groups, in_group, out_group;

  // SSE has no permute by a variable.
  bool permutes() const {
    return vector_bytes >= 32 && in_group == out_group && in_group > 1 && in_group < L && L % in_group == 0;
  }
  int64_t units() const { return permutes() ? ceil_div(groups * in_group, L) : groups; }
  int64_t in_vectors() const { return permutes() ? 1 : ceil_div(in_group, L); }    // of a unit
  int64_t out_vectors() const { return permutes() ? 1 : ceil_div(out_group, L); }  // of a unit

  // Vector v of a unit: its first channel, and how many of its lanes are channels.
  Range in_channels(int64_t unit, int64_t v) const { return lanes(unit, v, in_group); }
  Range out_channels(int64_t unit, int64_t v) const { return lanes(unit, v, out_group); }

  // Whether every lane is a channel of the output.
  bool fills_vectors() const { return permutes() ? groups * in_group % L == 0 : out_group % L == 0; }

  // Whether channels_last pixels are best read where they lie: 2 KiB apart and more, they share so few sets
  // of the L1 cache that a row of them pushes itself out.
  bool reads_in_place() const {
    return permutes() && fills_vectors() && groups * in_group * int64_t(sizeof(A)) <= 1024;
  }

  // Which lane each lane reads, to see channel c of its group.
  LaneIndex<A> spread(int64_t c) const {
    LaneIndex<A> index;
    for (int64_t lane = 0; lane < L; ++lane) index[lane] = lane / in_group * in_group + c;
    return index;
  }

 private:
  Range lanes(int64_t unit, int64_t v, int64_t group) const {
    const int64_t first = permutes() ? unit * L : unit * group + v * L;
    const int64_t end = permutes() ? groups * group : (unit + 1) * group;
    return {first, std::min(first + L, end)};
  }
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// What the vectorized passes share: images seen as blocks of channels, one channel a lane.
//
// A block is (rows, pixels, lanes). A channels_last image in the compute type already is one, so it is read
// and written where it lies; any other image (contiguous, bfloat16, float16, a channel multiplier, fewer
// channels than lanes) goes through a scratch tile of a few rows, transposed and converted on the way.
#pragma once

#include <algorithm>

#include "../common/geometry.h"
#include "../common/tile.h"
#include "depthwise_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Rows of channels_last pixels that will be needed next, asked for a few lines at a time between
// computations: blocks of channels jump from pixel to pixel, which hardware prefetchers do not follow.
class Prefetch {
 public:
  // Starts again; `parts` asks are to come.
  void clear(int64_t parts) { parts_ = parts, part_ = 0, size_ = 0; }

  // Columns [begin, end) of rows [top, bottom), all channels.
  template <typename T>
  void add_pixels(const Image<T>& image, int64_t top, int64_t bottom, int64_t begin, int64_t end) {
    end = std::min(end, image.width);
    for (int64_t row = std::max<int64_t>(top, 0); row < std::min(bottom, image.height); ++row) {
      T* pixels = image.data + row * image.row_stride();
      add(pixels + begin * image.channels, pixels + end * image.channels);
    }
  }

  // Asks for the next part of every run.
  void ask() {
    if (part_ == parts_) return;
    ++part_;
    for (int k = 0; k < size_; ++k) {
      Run& run = runs_[k];
      const char* end = std::min(run.begin + run.part, run.end);
      for (; run.begin < end; run.begin += line) {
        if (run.write)
          prefetch_for_write(run.begin);
        else
          __builtin_prefetch(run.begin, 0, 2);
      }
    }
  }

 private:
  static constexpr int64_t line = 64;
  static constexpr int most = 8;  // runs; more, of rows too short to matter, are not asked for
  struct Run {
    const char *begin, *end;
    int64_t part;
    bool write;
  };

  template <typename T>
  void add(T* begin, T* end) {
    const int64_t bytes = int64_t(end - begin) * int64_t(sizeof(T));
    if (bytes <= 0 || size_ == most) return;
    const auto* from = reinterpret_cast<const char*>(begin);
    const bool write = !std::is_const_v<T>;
    runs_[size_++] = {from, from + bytes, ceil_div(ceil_div(bytes, parts_), line) * line, write};
  }

  Run runs_[most];
  int64_t parts_ = 0, part_ = 0;
  int size_ = 0;
};

// Rows of the input that output rows [begin, end) of any phase read.
inline std::pair<int64_t, int64_t> input_rows(const Geometry& g, int64_t begin, int64_t end) {
  int64_t low = g.in_height, high = 0;
  for (const Phase& phase : g.phases) {
    if (phase.taps_high == 0 || phase.taps_wide == 0) continue;
    const int64_t first = ceil_div(std::max<int64_t>(begin - phase.first_row, 0), phase.row_step);
    const int64_t last = (end - 1 - phase.first_row) / phase.row_step;
    low = std::min(low, first * g.stride_height - phase.top);
    high = std::max(high,
                    last * g.stride_height + (phase.taps_high - 1) * phase.dilation_height - phase.top + 1);
  }
  low = std::clamp<int64_t>(low, 0, g.in_height);
  return {low, std::clamp<int64_t>(high, low, g.in_height)};
}

// The most rows of the input that `rows` rows of the output read, begun at a multiple of the phases' step.
inline int64_t most_input_rows(const Geometry& g, int64_t rows) {
  int64_t low = 0, high = 0;  // relative to the first row's
  for (const Phase& phase : g.phases) {
    low = std::min(low, -phase.top);
    high = std::max(high, (phase.taps_high - 1) * phase.dilation_height + 1 - phase.top);
  }
  return std::min((ceil_div(rows, g.phases[0].row_step) - 1) * g.stride_height + high - low, g.in_height);
}

// Outputs of a row in registers at once: 7 where they fill its width, 8 do not.
inline int64_t pixels_at_once(int64_t columns) { return columns % 8 != 0 && columns % 7 == 0 ? 7 : 8; }

// Channels are cut into blocks of L. In place, the last block starts early rather than be short: it computes
// some channels again, to the same bits.
inline int64_t block_start(int64_t block, int64_t channels, int64_t L) {
  return std::min(block * L, std::max<int64_t>(channels - L, 0));
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// What the vectorized passes share: images seen as blocks of channels, one channel a lane.
//
// A block is (rows, pixels, lanes). A channels_last image in the compute type already is one, so it is read
// and written where it lies; any other image (contiguous, bfloat16, float16, a channel multiplier, fewer
// channels than lanes) goes through a scratch tile of a few rows, transposed and converted on the way.
#pragma once

#include <algorithm>

#include "../common/simd.h"
#include "depthwise_conv2d_geometry.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
struct Image {
  T* data;  // of one image: (channels, height, width) or (height, width, channels)
  int64_t channels, height, width;
  bool channels_last;

  int64_t channel_stride() const { return channels_last ? 1 : height * width; }
  int64_t row_stride() const { return channels_last ? width * channels : width; }
  int64_t pixel_stride() const { return channels_last ? channels : 1; }
};

// Which channel of an image lane l of a block reads: (first + l) * step / divide + offset.
struct Lanes {
  int64_t first;
  int64_t step = 1, divide = 1, offset = 0;

  int64_t channel(int64_t lane) const { return (first + lane) * step / divide + offset; }
  bool is_identity() const { return step == 1 && divide == 1 && offset == 0; }
};

// A block of channels in the compute type; `data` is where row 0, pixel 0 of the image is (or would be).
template <typename A>
struct Block {
  A* data;
  int64_t row_stride, pixel_stride;
};

// Rows of channels_last pixels that will be needed next, asked for a few lines at a time between
// computations: blocks of channels jump from pixel to pixel, which hardware prefetchers do not follow.
class Prefetch {
 public:
  void clear(int64_t parts) {
    parts_ = parts, part_ = 0, size_ = 0;
  }  // starts again; `parts` asks are to come

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

// Copies rows [begin, end) of `count` valid lanes into a (rows, width, lanes) tile; other lanes repeat the
// last. In a contiguous image the rows of a channel are one run, transposed L pixels
// at a time.
template <typename T, typename A>
void load_tile(const Image<const T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end,
               A* tile) {
  constexpr int L = lanes_of<A>;
  const int64_t pixels = (end - begin) * image.width, first = begin * image.width;
  if (image.channels_last) {
    const T* pixel = image.data + first * image.channels;
    if (count == L && lanes.is_identity()) {
      for (int64_t k = 0; k < pixels; ++k)
        store_vector(tile + k * L, load_vector(pixel + k * image.channels + lanes.first));
    } else {
      for (int64_t k = 0; k < pixels; ++k, pixel += image.channels)
        for (int64_t lane = 0; lane < L; ++lane)
          tile[k * L + lane] = load(pixel[lanes.channel(std::min(lane, count - 1))]);
    }
    return;
  }
  const T* runs[L];
  for (int64_t lane = 0; lane < L; ++lane)
    runs[lane] = image.data + lanes.channel(std::min(lane, count - 1)) * image.channel_stride() + first;
  const auto load_square = [&](int64_t k) {
    transpose_square<A>([&](int lane) { return runs[lane] + k; },
                        [&](int pixel) { return tile + (k + pixel) * L; });
  };
  int64_t k = 0;
  for (; k + L <= pixels; k += L) load_square(k);
  if (k == pixels) return;
  if (pixels >= L) return load_square(pixels - L);  // overlaps the square before
  for (; k < pixels; ++k)
    for (int lane = 0; lane < L; ++lane) tile[k * L + lane] = load(runs[lane][k]);
}

// The way back: rows [begin, end) of a (rows, width, lanes) tile into the image.
template <typename T, typename A>
void store_tile(const Image<T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end,
                const A* tile) {
  constexpr int L = lanes_of<A>;
  const int64_t pixels = (end - begin) * image.width, first = begin * image.width;
  if (image.channels_last) {
    T* pixel = image.data + first * image.channels + lanes.first;
    for (int64_t k = 0; k < pixels; ++k, pixel += image.channels) {
      if (count == L) {
        store_vector(pixel, load_vector(tile + k * L));
      } else {
        for (int lane = 0; lane < count; ++lane) store(&pixel[lane], tile[k * L + lane]);
      }
    }
    return;
  }
  T* runs = image.data + lanes.first * image.channel_stride() + first;
  T nowhere[L];  // takes the lanes that are no channel
  const auto store_square = [&](int64_t k) {
    transpose_square<A>(
        [&](int pixel) { return tile + (k + pixel) * L; },
        [&](int lane) { return lane < count ? runs + lane * image.channel_stride() + k : nowhere; });
  };
  int64_t k = 0;
  for (; k + L <= pixels; k += L) store_square(k);
  if (k == pixels) return;
  if (pixels >= L) return store_square(pixels - L);  // overlaps the square before
  for (; k < pixels; ++k)
    for (int lane = 0; lane < count; ++lane)
      store(&runs[lane * image.channel_stride() + k], tile[k * L + lane]);
}

// Rows of the input that output rows [begin, end) of any phase read.
inline std::pair<int64_t, int64_t> input_rows(const Geometry& g, int64_t begin, int64_t end) {
  int64_t low = g.in_height, high = 0;
  for (const Phase& phase : g.phases) {
    if (phase.taps_high == 0 || phase.taps_wide == 0) continue;
    const int64_t first =
        (std::max<int64_t>(begin - phase.first_row, 0) + phase.row_step - 1) / phase.row_step;
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

// Asking for memory ahead of its use, where hardware prefetchers do not follow: runs that lie at a distance.
#pragma once

#include "geometry.h"
#include "tile.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Memory that will be needed next, asked for a few lines at a time between computations. A region is runs of
// values at equal distances: the pixels of a block of channels, or its channels.
class PrefetchRuns {
 public:
  static constexpr int64_t line = 64;  // bytes

  // Starts again; `parts` asks are to come.
  void clear(int64_t parts) { parts_ = std::max<int64_t>(parts, 1), size_ = 0; }

  // Channels [begin, end) of rows [top, bottom) of an image.
  template <typename T>
  void add(const Image<T>& image, int64_t begin, int64_t end, int64_t top, int64_t bottom) {
    const int64_t pixels = (bottom - top) * image.width;
    T* first = image.data + begin * image.channel_stride() + top * image.row_stride();
    if (image.channels_last)
      add(first, end - begin, image.channels, pixels);
    else
      add(first, pixels, image.channel_stride(), end - begin);
  }

  template <typename T>
  void add(T* begin, int64_t values, int64_t stride, int64_t runs) {
    if (values <= 0 || runs <= 0 || size_ == most) return;
    const int64_t bytes = values * int64_t(sizeof(T));
    const int64_t lines = ceil_div(bytes, line) * runs;
    regions_[size_++] = {reinterpret_cast<const char*>(begin),
                         bytes,
                         stride * int64_t(sizeof(T)),
                         runs,
                         0,
                         ceil_div(lines, parts_),
                         !std::is_const_v<T>};
  }

  // Asks for the next part of every region.
  void ask() {
    for (int k = 0; k < size_; ++k) {
      Region& region = regions_[k];
      for (int64_t n = 0; n < region.part && region.runs > 0; ++n) {
        if (region.write)
          prefetch_for_write(region.run + region.at);
        else
          __builtin_prefetch(region.run + region.at, 0, 2);
        region.at += line;
        if (region.at < region.bytes) continue;
        region.at = 0, region.run += region.stride, --region.runs;
      }
    }
  }

 private:
  static constexpr int most = 4;
  struct Region {
    const char* run;
    int64_t bytes, stride, runs, at, part;
    bool write;
  };
  Region regions_[most];
  int64_t parts_ = 1;
  int size_ = 0;
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// How images lie in memory.
#pragma once

#include <functional>

#include "types.h"

namespace fastconv {

// Where the value at (n, c, h, w) of a tensor of images with these sizes lies.
struct ImageIndex {
  int64_t channels, height, width;
  bool channels_last;

  FASTCONV_HOST_DEVICE int64_t operator()(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return channels_last ? ((n * height + h) * width + w) * channels + c
                         : ((n * channels + c) * height + h) * width + w;
  }
};

// Of a convolution's two images, by its shape: DepthwiseConv2dShape, Conv2dShape.
template <typename Shape>
inline FASTCONV_HOST_DEVICE ImageIndex input_index(const Shape& s) {
  return {s.in_channels, s.in_height, s.in_width, s.channels_last};
}
template <typename Shape>
inline FASTCONV_HOST_DEVICE ImageIndex output_index(const Shape& s) {
  return {s.out_channels, s.out_height, s.out_width, s.channels_last};
}

// A shift's offset along an axis of some size; all beyond the image are alike.
inline int64_t limited(int64_t offset, int64_t size) {
  return offset < -size ? -size : offset > size ? size : offset;
}

// Brings a row of a result where it is not read as it lies in the image.
using MoveRow =
    std::function<void(const void* image,  // (height, width, channels), or (channels, height, width)
                       int64_t row,        // of the result
                       void* target)>;     // (width, channels)

// Rows that a pass reads and that do not lie in memory as it reads them: they are brought into a tile in the
// cache, those of some pixels of its result at a time.
struct RowSource {
  std::function<void(int64_t image, int64_t begin, int64_t end,  // rows of an image of the batch
                     void* target)>                              // (end - begin, width, channels)
      bring;
  int64_t pixels = 0;  // about so many; 0: as many as the pass likes

  explicit operator bool() const { return bool(bring); }
};

}  // namespace fastconv

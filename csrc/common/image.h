// How images lie in memory.
#pragma once

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

}  // namespace fastconv

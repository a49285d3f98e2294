// What the CUDA kernels of depthwise convolution share.
#pragma once

#include "../common/cuda.h"
#include "depthwise_conv2d.h"

namespace fastconv {

// One value's place in a tensor, and the way from its place in memory and back.
struct Position {
  int64_t image, channel, row, column;
};

__device__ __forceinline__ Position position_of(int64_t index, int64_t channels, int64_t height,
                                                int64_t width, bool channels_last) {
  Position at;
  if (channels_last) {
    at.channel = index % channels;
    index /= channels;
  }
  at.column = index % width;
  index /= width;
  at.row = index % height;
  index /= height;
  if (!channels_last) {
    at.channel = index % channels;
    index /= channels;
  }
  at.image = index;
  return at;
}

__device__ __forceinline__ int64_t offset_of(int64_t image, int64_t channel, int64_t row, int64_t column,
                                             int64_t channels, int64_t height, int64_t width,
                                             bool channels_last) {
  return channels_last ? ((image * height + row) * width + column) * channels + channel
                       : ((image * channels + channel) * height + row) * width + column;
}

}  // namespace fastconv

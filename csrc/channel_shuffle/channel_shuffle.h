// Channel shuffle: the plain-C++ signature of every kernel.
//
//   output[n, k * groups + g, h, w] = input[n, g * per_group + k, h, w],    per_group = channels / groups,
//
// which transposes the channels, seen as a matrix of groups rows and per_group columns.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "../common/types.h"

namespace fastconv {

// Both layouts are (images, channels, run) in memory: contiguous tensors have N images and runs of H * W
// values, channels_last ones N * H * W images, of one pixel each, and runs of one value.
struct ChannelShuffleShape {
  int64_t images, channels, run;
  int64_t groups;

  FASTCONV_HOST_DEVICE int64_t per_group() const { return channels / groups; }
  // The input's channel that becomes this channel of the output.
  FASTCONV_HOST_DEVICE int64_t source(int64_t channel) const {
    return channel % groups * per_group() + channel / groups;
  }
};

// T: float, double, BFloat16, Float16. Input and output are (images, channels, run). The gradient is the
// shuffle with per_group() groups, so that there is only one pass.
#define FASTCONV_CHANNEL_SHUFFLE_CPU(variant)                                                               \
  template <typename T>                                                                                     \
  void channel_shuffle_##variant##_forward_cpu(const T* input, T* output, const ChannelShuffleShape& shape, \
                                               ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_CHANNEL_SHUFFLE_CPU(plain) FASTCONV_CHANNEL_SHUFFLE_CPU(vectorized))

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once.
#define FASTCONV_CHANNEL_SHUFFLE_CUDA(variant)                                                               \
  template <typename T>                                                                                      \
  void channel_shuffle_##variant##_forward_cuda(const T* input, T* output, const ChannelShuffleShape& shape, \
                                                void* stream);

FASTCONV_CHANNEL_SHUFFLE_CUDA(plain)
FASTCONV_CHANNEL_SHUFFLE_CUDA(tiled)

}  // namespace fastconv

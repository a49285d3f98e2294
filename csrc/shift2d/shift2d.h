// Shift: the plain-C++ signature of every kernel.
//
//   output[n, c, h, w] = input[n, c, h + dh[c], w + dw[c]], zero where that is outside.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "../common/image.h"
#include "../common/types.h"

namespace fastconv {

// Images are (batch, channels, height, width) in memory, or (batch, height, width, channels).
struct Shift2dShape {
  int64_t batch, channels, height, width;
  bool channels_last;

  FASTCONV_HOST_DEVICE int64_t plane() const { return height * width; }
  FASTCONV_HOST_DEVICE int64_t index(int64_t image, int64_t channel, int64_t row, int64_t column) const {
    if (channels_last) return ((image * height + row) * width + column) * channels + channel;
    return ((image * channels + channel) * height + row) * width + column;
  }
};

// T: float, double, BFloat16, Float16. Input and output are images as above; offsets are (channels, 2), rows
// (dh, dw), any integers. The gradient is the shift by the opposite offsets, so that there is only one pass.
#define FASTCONV_SHIFT2D_CPU(variant)                                                     \
  template <typename T>                                                                   \
  void shift2d_##variant##_forward_cpu(const T* input, const int64_t* offsets, T* output, \
                                       const Shift2dShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_SHIFT2D_CPU(plain) FASTCONV_SHIFT2D_CPU(vectorized))

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once. `offsets`
// are in the CPU's memory, and need not outlive the call.
#define FASTCONV_SHIFT2D_CUDA(variant)                                                     \
  template <typename T>                                                                    \
  void shift2d_##variant##_forward_cuda(const T* input, const int64_t* offsets, T* output, \
                                        const Shift2dShape& shape, void* stream);

FASTCONV_SHIFT2D_CUDA(plain)
FASTCONV_SHIFT2D_CUDA(tiled)

}  // namespace fastconv

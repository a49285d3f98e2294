// Depthwise and 1x1 convolution, C++, strips: what lies between them never leaves the cache.
//
// Formula: separable_conv2d.h. Some rows of the middle, all channels of them, are computed by the kernel of
//   depthwise_conv2d_vectorized_cpu.cpp into a thread's tile in the L2 cache; there they meet all the 1x1
//   filters, by the kernel of conv2d_direct_pass_cpu.h. Strips count rows through images.
// Bytes: input and output once; rows at the edge of a strip are read by two. Two passes would write the
//   middle, and read it again.
// Threads take strips and panels of 64 filters: a strip that two threads share is computed by both.
// Limits: a strip is a row at least, however wide; contiguous images are transposed on their way in and out;
//   float16 and bfloat16 round the middle to their type, as two passes do.
#include <algorithm>

#include "../conv2d/conv2d_direct_cpu.h"
#include "../depthwise_conv2d/depthwise_conv2d_rows_cpu.h"
#include "separable_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t tile_bytes = 256 << 10;  // of the middle: in an L2 cache, beside a panel of the weights
constexpr int64_t least_pixels = 96;       // of a strip: for fewer, a panel is not worth its way from L3
constexpr int64_t few_strips = 16;         // so few are an even number, for threads to share

// Pixels of a strip.
template <typename T>
int64_t strip_pixels(const DepthwiseConv2dShape& s) {
  const int64_t row_bytes = s.out_width * s.out_channels * int64_t(sizeof(T)), rows = s.batch * s.out_height;
  int64_t strips = ceil_div(rows, std::max(tile_bytes / row_bytes, ceil_div(least_pixels, s.out_width)));
  if (strips < few_strips) strips = std::min(ceil_div(strips, 2) * 2, rows);
  return ceil_div(rows, strips) * s.out_width;
}

}  // namespace

template <typename T>
void separable_conv2d_strips_forward_cpu(const T* input, const SeparableDepthwise<T>& depthwise,
                                         const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                                         T* output, int64_t filters, ParallelFor threads) {
  DirectPass pass = direct_forward(pointwise_shape(depthwise.shape, filters));
  pass.source =
      depthwise_rows(input, depthwise.weight, depthwise.bias, depthwise.shape, depthwise.activation);
  pass.source.pixels = strip_pixels<T>(depthwise.shape);
  direct_convolve<T>(nullptr, packed, epilogue, output, pass, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template void separable_conv2d_strips_forward_cpu(const T*, const SeparableDepthwise<T>&,               \
                                                    const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, \
                                                    int64_t, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Depthwise and 1x1 convolution, a tile at a time: what lies between them stays in shared memory.
//
// Formula: separable_conv2d.h. Result (pixels, filters) = middle (pixels, C) * weights (C, filters).
// One block: 64 pixels by 64 filters, 256 threads with 4 x 4 sums each. For 16 channels at a time its threads
//   compute the middle at its pixels into shared memory, four values each, and load the weights beside them.
// Bytes: each input is read once for every tap and 64 filters, from L1 and L2 mostly; each output is written
//   once. The middle takes none. Two passes would write it, and read it again for every 64 filters.
// Limits: the middle is computed again for every 64 filters (of 3x3 taps a seventh of the multiply-adds); one
//   buffer, so that loads wait for sums; no tensor cores.
#include "../common/cuda.h"
#include "../common/image.h"
#include "separable_conv2d.h"

namespace fastconv {
namespace {

constexpr int threads = 256, tile = 64, step = 16;  // pixels and filters of a block; channels at a time
constexpr int sums = 4;                             // of a thread, each way
constexpr int pitch = tile + 1;                     // of the weights, so that stores down a column spread

template <typename T>
__global__ void __launch_bounds__(threads, 2)
    separable_conv2d_tiled_forward_kernel(const T* __restrict__ input,  // (N, C, H, W) or (N, H, W, C)
                                          SeparableDepthwise<T> depthwise,
                                          const T* __restrict__ weight,  // (M, C)
                                          Conv2dEpilogue<T> epilogue,
                                          T* __restrict__ output,  // (N, M, E, F) or (N, E, F, M)
                                          int64_t filters, int64_t filter_blocks) {
  using A = accumulate_t<T>;
  __shared__ A middle[step][tile], weights[step][pitch];
  const DepthwiseConv2dShape& s = depthwise.shape;
  const ImageIndex in = input_index(s), out{filters, s.out_height, s.out_width, s.channels_last};
  const int64_t first_pixel = int64_t(blockIdx.x) / filter_blocks * tile;
  const int64_t first_filter = int64_t(blockIdx.x) % filter_blocks * tile;
  const int64_t pixels = s.batch * s.out_height * s.out_width;

  // The middle: a thread has one pixel, and every fourth channel. In channels_last images neighbouring
  // threads take neighbouring channels, in contiguous ones neighbouring pixels.
  constexpr int groups = threads / tile;
  const int mine = s.channels_last ? threadIdx.x / groups : threadIdx.x % tile;
  const int group = s.channels_last ? threadIdx.x % groups : threadIdx.x / tile;
  const int64_t pixel = first_pixel + mine;
  const int64_t f = pixel % s.out_width, e = pixel / s.out_width % s.out_height;
  const int64_t n = pixel / s.out_width / s.out_height;
  const int64_t top = e * s.stride_height - s.padding_top, left = f * s.stride_width - s.padding_left;

  A sum[sums][sums] = {};
  const int row = threadIdx.x / (tile / sums), column = threadIdx.x % (tile / sums);
  for (int64_t first = 0; first < s.out_channels; first += step) {
    for (int k = group; k < step; k += groups) {
      const int64_t c = first + k;
      const bool exists = c < s.out_channels && pixel < pixels, has_bias = depthwise.bias != nullptr;
      A value = load(load_global(depthwise.bias + (has_bias && exists ? c : 0), has_bias && exists));
      for (int64_t i = 0; i < s.kernel_height; ++i)
        for (int64_t j = 0; j < s.kernel_width; ++j) {
          const int64_t h = top + i * s.dilation_height, w = left + j * s.dilation_width;
          const bool inside = exists && h >= 0 && h < s.in_height && w >= 0 && w < s.in_width;
          const int64_t tap = exists ? (c * s.kernel_height + i) * s.kernel_width + j : 0;
          value += load(load_global(input + (inside ? in(n, c / s.multiplier(), h, w) : 0), inside)) *
                   load(load_global(depthwise.weight + tap, inside));
        }
      store_shared(&middle[k][mine], exists ? activate(value, depthwise.activation) : A(0));
    }
    for (int index = threadIdx.x; index < step * tile; index += threads) {
      const int64_t m = first_filter + index / step, c = first + index % step;
      const bool exists = m < filters && c < s.out_channels;
      store_shared(&weights[index % step][index / step],
                   load(load_global(weight + (exists ? m * s.out_channels + c : 0), exists)));
    }
    __syncthreads();
    for (int k = 0; k < step; ++k) {
      A x[sums], w[sums];
#pragma unroll
      for (int i = 0; i < sums; ++i) {
        x[i] = load_shared(&middle[k][row + i * (tile / sums)]);
        w[i] = load_shared(&weights[k][column + i * (tile / sums)]);
      }
#pragma unroll
      for (int i = 0; i < sums; ++i)
#pragma unroll
        for (int j = 0; j < sums; ++j) sum[i][j] += x[i] * w[j];
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < sums; ++i) {
    const int64_t p = first_pixel + row + i * (tile / sums);
#pragma unroll
    for (int j = 0; j < sums; ++j) {
      const int64_t m = first_filter + column + j * (tile / sums);
      const bool exists = p < pixels && m < filters;
      const bool has_bias = exists && epilogue.bias != nullptr;
      const bool has_residual = exists && epilogue.residual != nullptr;
      const int64_t at =
          exists ? out(p / s.out_width / s.out_height, m, p / s.out_width % s.out_height, p % s.out_width)
                 : 0;
      const A total = sum[i][j] + load(load_global(epilogue.bias + (has_bias ? m : 0), has_bias)) +
                      load(load_global(epilogue.residual + (has_residual ? at : 0), has_residual));
      store_global(output + at, rounded<T>(activate(total, epilogue.activation)), exists);
    }
  }
}

}  // namespace

template <typename T>
void separable_conv2d_tiled_forward_cuda(const T* input, const SeparableDepthwise<T>& depthwise,
                                         const T* weight, const Conv2dEpilogue<T>& epilogue, T* output,
                                         int64_t filters, void* stream) {
  const DepthwiseConv2dShape& s = depthwise.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width, filter_blocks = ceil_div(filters, tile);
  if (pixels * filters == 0) return;
  FASTCONV_LAUNCH(separable_conv2d_tiled_forward_kernel<T>, grid_size(ceil_div(pixels, tile) * filter_blocks),
                  threads, 0, stream, input, depthwise, weight, epilogue, output, filters, filter_blocks);
}

#define FASTCONV_INSTANTIATE(T)                                                                          \
  template void separable_conv2d_tiled_forward_cuda<T>(const T*, const SeparableDepthwise<T>&, const T*, \
                                                       const Conv2dEpilogue<T>&, T*, int64_t, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Dense convolution as a matrix product, im2col panel by panel; the transposed one too, phase by phase.
//
// Formula: result (pixels, filters) = columns (pixels, C/G * taps) * weights (C/G * taps, filters).
// One block: 128 pixels by 64 filters (or 256 by 16). It builds 16 columns of its pixels and 16 rows of the
//   weights in shared memory while it multiplies the 16 before. One thread: 8 pixels by 8 (or 4) filters.
// Bytes: source once for each tap and tile of filters (from L1 and L2, mostly), weights once for each tile
//   of pixels, result once; no column matrix in memory.
// Before it (direct): the unit was an image's rectangle and its patch. Here pixels are numbered through all
//   images and (channel, tap) is one index, so small images, strides and dilations leave nothing idle,
//   copies run beside the multiplications, and a value is fetched once for each tap that reads it.
// Limits: 2-byte values are copied one by one, and not asynchronously.

#include "conv2d_im2col_pass_cuda.h"

namespace fastconv {
namespace {

template <typename T, int Filters, int FilterThreads>
__global__ void __launch_bounds__(im2col_threads, 1)
    conv2d_im2col_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                 const T* __restrict__ weight,  // (M, C/G, KH, KW)
                                 Conv2dEpilogue<T> epilogue,    // (M), (N, M, E, F)
                                 T* __restrict__ result,        // (N, M, E, F)
                                 Conv2dPass pass, bool packed) {
  im2col_convolve<Filters, FilterThreads>(source, weight, epilogue, result, pass, packed,
                                          [&](int index, const PixelTile& tile, const Strides& from) {
                                            return column_of(index, pass, tile.high, tile.wide, from);
                                          });
}

}  // namespace

template <typename T>
bool conv2d_im2col_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, T* result,
                             const Conv2dPass& pass, void* stream) {
  with_im2col_tile<T>(pass, [&]<int Filters, int FilterThreads>(unsigned blocks, size_t shared_bytes) {
    FASTCONV_LAUNCH((conv2d_im2col_forward_kernel<T, Filters, FilterThreads>), blocks, im2col_threads,
                    shared_bytes, stream, source, weight, epilogue, result, pass,
                    is_packed(epilogue, result, pass));
  });
  return true;
}

template <typename T>
bool conv2d_im2col_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue, T* output,
                                const Conv2dShape& shape, void* stream) {
  return conv2d_im2col_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template bool conv2d_im2col_pass_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*,    \
                                           const Conv2dPass&, void*);                           \
  template bool conv2d_im2col_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*, \
                                              const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

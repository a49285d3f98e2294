// Shift with 1x1 convolution as a matrix product, im2col panel by panel: the shift is where a column starts.
//
// Formula: result (pixels, filters) = columns (pixels, C) * weights (C, filters); column c is channel c, from
//   its offset on. A column of conv2d_im2col_cuda.cu starts at its tap in just this way.
// One block: 128 pixels by 64 filters (or 256 by 16).
// Bytes: those of the 1x1 convolution, but for values that were shifted out, which nobody reads. A warp's
//   loads stay rows in contiguous images; in channels_last ones neighbouring channels come from other pixels.
// Before it (plain): each result fetched all its channels by itself; here 64 filters share what is fetched.
// Limits: at most 4096 channels, and images of 32767 rows and columns; 2-byte values are copied one by one.

#include "../conv2d/conv2d_im2col_pass_cuda.h"
#include "shift_conv2d_cuda.h"

namespace fastconv {
namespace {

template <typename T, int Filters, int FilterThreads, int Channels>
__global__ void __launch_bounds__(im2col_threads, 1)
    shift_conv2d_im2col_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                       const T* __restrict__ weight,  // (M, C)
                                       Conv2dEpilogue<T> epilogue,    // (M)
                                       T* __restrict__ result,        // (N, M, E, F)
                                       Conv2dPass pass, bool packed,
                                       const OffsetTable<int16_t, Channels> table) {
  im2col_convolve<Filters, FilterThreads>(source, weight, epilogue, result, pass, packed,
                                          [&](int channel, const PixelTile&, const Strides& from) -> Column {
                                            if (channel >= pass.source_group)
                                              return {0, nowhere, nowhere, -1};
                                            const int dh = table.at[channel].dh, dw = table.at[channel].dw;
                                            return {channel * from.channel + dh * from.row + dw * from.column,
                                                    dh, dw, channel};
                                          });
}

}  // namespace

template <typename T>
bool shift_conv2d_im2col_forward_cuda(const T* input, const int64_t* offsets, const T* weight,
                                      const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& shape,
                                      void* stream) {
  const Conv2dPass pass = conv2d_pass(shape, false);
  return with_table(offsets, shape, [&]<typename Table>(const Table& table) {
    with_im2col_tile<T>(pass, [&]<int Filters, int FilterThreads>(unsigned blocks, size_t shared_bytes) {
      FASTCONV_LAUNCH((shift_conv2d_im2col_forward_kernel<T, Filters, FilterThreads, Table::channels>),
                      blocks, im2col_threads, shared_bytes, stream, input, weight, epilogue, output, pass,
                      is_packed(epilogue, output, pass), table);
    });
    return true;
  });
}

#define FASTCONV_INSTANTIATE(T)                      \
  template bool shift_conv2d_im2col_forward_cuda<T>( \
      const T*, const int64_t*, const T*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

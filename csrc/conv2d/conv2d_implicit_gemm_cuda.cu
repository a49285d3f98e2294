// Dense convolution as a matrix product on the tensor cores (mma.sync m16n8k16); the transposed one too.
//
// Formula: result (pixels, filters) = sum over taps of source at the tap (pixels, C/G) * weight's tap (C/G,
//   M).
// One block: 128 pixels by 64 (or 32) filters; one warp: 64 (or 32) by 32, in fragments. A stage is one tap
//   of 16 to 64 channels, copied two stages ahead; the weights of all taps of those channels come as they
//   lie, a share with each stage. ldmatrix reads the pixels' fragments (one instruction for four of 16-bit
//   pairs); weights of adjacent channels lie a filter's taps apart, so theirs are gathered value by value.
// Bytes: source once for each tap and tile of filters (mostly from L2), weights once for each tile of
//   pixels.
// Before it (im2col): multiplications one by one in float32, channels copied one by one.
// Limits: float16, bfloat16; channels of a group and filters of a group multiples of 8; kernels whose
//   weights of 16 channels do not fit in shared memory twice (beyond about 8 x 8 taps) are refused.
//   Contiguous images, and data off a 16-byte boundary, are copied in pairs of values, not asynchronously.

#include "conv2d_implicit_gemm_pass_cuda.h"

namespace fastconv {
namespace {

template <typename T, int BlockFilters>
__global__ void __launch_bounds__(gemm_threads, 1)
    conv2d_implicit_gemm_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                        const T* __restrict__ weight,  // (M, C/G, KH, KW)
                                        Conv2dEpilogue<T> epilogue,    // (M), (N, M, E, F)
                                        T* __restrict__ result,        // (N, M, E, F)
                                        Conv2dPass pass, GemmTiling t) {
  implicit_gemm_convolve<BlockFilters>(source, weight, epilogue, result, pass, t, [&](const GemmStage<T>& s) {
    const T* const origin =
        s.group_source + s.row * s.from.row + s.column * s.from.column + s.chunk * s.from.channel;
    fill_units<gemm_pixels>(
        s.panel, t.chunk / 8, t.wide_source, s.from.channel, [&](int p, int unit, bool& active) {
          active = s.chunk + unit * 8 < pass.source_group &&
                   is_inside(s.pixels[p].row + s.row, s.pixels[p].column + s.column, pass);
          return origin + s.pixels[p].source + unit * 8 * s.from.channel;
        });
  });
}

}  // namespace

template <typename T>
bool conv2d_implicit_gemm_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue,
                                    T* result, const Conv2dPass& pass, void* stream) {
  if constexpr (sizeof(T) == 2) {
    return with_gemm_tiling(
        source, weight, epilogue, result, pass, [&]<int BlockFilters>(unsigned blocks, const GemmTiling& t) {
          FASTCONV_LAUNCH((conv2d_implicit_gemm_forward_kernel<T, BlockFilters>), blocks, gemm_threads,
                          t.shared_bytes, stream, source, weight, epilogue, result, pass, t);
        });
  } else {
    return false;
  }
}

template <typename T>
bool conv2d_implicit_gemm_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue,
                                       T* output, const Conv2dShape& shape, void* stream) {
  return conv2d_implicit_gemm_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                        \
  template bool conv2d_implicit_gemm_pass_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*,    \
                                                  const Conv2dPass&, void*);                           \
  template bool conv2d_implicit_gemm_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*, \
                                                     const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Shift with 1x1 convolution on the tensor cores (mma.sync m16n8k16).
//
// Formula: result (pixels, filters) = shifted source (pixels, C) * weights (C, filters).
// One block: 128 pixels by 64 (or 32) filters, in the kernel of conv2d_implicit_gemm_cuda.cu; the shift is
//   where a channel is copied from.
// Bytes: those of the 1x1 convolution, but for values that were shifted out, which nobody reads.
// Before it (im2col): multiplications one by one in float32.
// Limits: float16, bfloat16; channels and filters multiples of 8; at most 4096 channels, and images of 32767
//   rows and columns. In channels_last images 8 channels are copied at once if each 8 share an offset, all
//   through the table; else, and in contiguous ones, values go through registers in pairs.

#include "../conv2d/conv2d_implicit_gemm_pass_cuda.h"
#include "shift_conv2d_cuda.h"

namespace fastconv {
namespace {

template <typename T, int BlockFilters, int Channels>
__global__ void __launch_bounds__(gemm_threads, 1)
    shift_conv2d_implicit_gemm_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                              const T* __restrict__ weight,  // (M, C)
                                              Conv2dEpilogue<T> epilogue,    // (M)
                                              T* __restrict__ result,        // (N, M, E, F)
                                              Conv2dPass pass, GemmTiling t,
                                              const OffsetTable<int16_t, Channels> table) {
  implicit_gemm_convolve<BlockFilters>(source, weight, epilogue, result, pass, t, [&](const GemmStage<T>& s) {
    const auto at = [&](int p, int channel, bool& active) {  // of the stage
      const int c = s.chunk + channel;
      active = c < pass.source_group;
      const int dh = table.at[active ? c : 0].dh, dw = table.at[active ? c : 0].dw;
      active = active && is_inside(s.pixels[p].row + dh, s.pixels[p].column + dw, pass);
      return s.group_source + s.pixels[p].source + c * s.from.channel + dh * s.from.row + dw * s.from.column;
    };
    bool active;
    if (t.wide_source)
      fill_units<gemm_pixels>(s.panel, t.chunk / 8, true, 0,
                              [&](int p, int unit, bool& inside) { return at(p, unit * 8, inside); });
    else
      fill_pairs<gemm_pixels>(s.panel, t.chunk / 8, [&](int p, int unit, int pair) -> Pack<T, 2> {
        const T* const first = at(p, unit * 8 + pair * 2, active);
        const T value = load_global(first, active);
        const T* const second = at(p, unit * 8 + pair * 2 + 1, active);
        return {value, load_global(second, active)};
      });
  });
}

// Whether channels that are copied together are read from one place.
bool moves_in_eights(const int64_t* offsets, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c)
    if (offsets[2 * c] != offsets[c / 8 * 16] || offsets[2 * c + 1] != offsets[c / 8 * 16 + 1]) return false;
  return true;
}

}  // namespace

template <typename T>
bool shift_conv2d_implicit_gemm_forward_cuda(const T* input, const int64_t* offsets, const T* weight,
                                             const Conv2dEpilogue<T>& epilogue, T* output,
                                             const Conv2dShape& shape, void* stream) {
  if constexpr (sizeof(T) == 2) {
    const Conv2dPass pass = conv2d_pass(shape, false);
    return with_table(offsets, shape, [&]<typename Table>(const Table& table) {
      return with_gemm_tiling(
          input, weight, epilogue, output, pass, [&]<int BlockFilters>(unsigned blocks, GemmTiling t) {
            t.wide_source = t.wide_source && moves_in_eights(offsets, shape.in_channels);
            FASTCONV_LAUNCH((shift_conv2d_implicit_gemm_forward_kernel<T, BlockFilters, Table::channels>),
                            blocks, gemm_threads, t.shared_bytes, stream, input, weight, epilogue, output,
                            pass, t, table);
          });
    });
  } else {
    return false;
  }
}

#define FASTCONV_INSTANTIATE(T)                             \
  template bool shift_conv2d_implicit_gemm_forward_cuda<T>( \
      const T*, const int64_t*, const T*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

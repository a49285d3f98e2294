// Convolution, C++, im2col: a panel of columns at a time.
//
// Formula: conv2d.h, as output (M, pixels) = weights (M, C/G * taps) * columns (C/G * taps, pixels).
// One step: the columns of 64 output pixels (AVX-512), one line for each channel and tap, are gathered into
//   a panel in the L2 cache; then 6 filters x 64 pixels are summed in registers: one weight meets 64 pixels.
//   The matrix of all columns, kernel_height * kernel_width times the image, is never in memory.
// Bytes: the input once for each tap, mostly from the L1 cache; the weights once for each panel.
// Against direct: lanes are pixels, not filters. Contiguous images are read and written without a transpose,
//   and a group of few filters leaves no lane idle; channels_last ones are transposed in registers.
// Limits: multiply-adds; few filters, for which gathering (a load and a store for each 16 values) is no
//   trifle.
#include "conv2d_im2col_pass_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void im2col_pack(const T* weight, accumulate_t<T>* packed, const DirectPass& pass, ParallelFor threads) {
  const int64_t from = pass.from_group, to = pass.to_group, taps = pass.shape.taps();
  const Geometry& g = pass.geometry;
  parallel_for(threads, pass.shape.groups * to, [&](int64_t begin, int64_t end) {
    for (int64_t filter = begin; filter < end; ++filter) {
      const int64_t group = filter / to, m = filter % to;
      for (const Phase& phase : g.phases) {
        const int64_t count = phase.taps_high * phase.taps_wide;
        accumulate_t<T>* target =
            packed + (group * int64_t(g.taps.size()) + phase.weight_offset) * from * to + m * from * count;
        for (int64_t c = 0; c < from; ++c) {
          const T* source =
              weight + (pass.transposed ? (group * from + c) * to + m : filter * from + c) * taps;
          for (int64_t k = 0; k < count; ++k) *target++ = load(source[g.taps[phase.weight_offset + k]]);
        }
      }
    }
  });
}

template <typename T>
void im2col_convolve(const T* input, const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                     T* output, const Im2colPass& pass, ParallelFor threads) {
  const Im2col<T> im2col(input, packed, epilogue, output, pass);
  parallel_for(threads, im2col.items(), [&](int64_t begin, int64_t end) { im2col.compute(begin, end); });
}

template <typename T>
int64_t conv2d_im2col_packed_size(const Conv2dShape& s) {
  return s.out_channels * s.in_group() * s.taps();
}

template <typename T>
void conv2d_im2col_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                   ParallelFor threads) {
  im2col_pack(weight, packed, direct_forward(s), threads);
}

template <typename T>
void conv2d_im2col_forward_cpu(const T* input, const accumulate_t<T>* packed,
                               const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                               ParallelFor threads) {
  im2col_convolve(input, packed, epilogue, output, {direct_forward(s)}, threads);
}

// Direct's serves contiguous images as well: its tiles hold each value once, not once for each tap.
template <typename T>
void conv2d_im2col_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                   const Conv2dShape& s, ParallelFor threads) {
  conv2d_direct_grad_weight_cpu(grad_output, input, grad_weight, grad_bias, s, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template void im2col_pack(const T*, accumulate_t<T>*, const DirectPass&, ParallelFor);                    \
  template void im2col_convolve(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,             \
                                const Im2colPass&, ParallelFor);                                            \
  template int64_t conv2d_im2col_packed_size<T>(const Conv2dShape&);                                        \
  template void conv2d_im2col_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&, ParallelFor); \
  template void conv2d_im2col_forward_cpu(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*,   \
                                          const Conv2dShape&, ParallelFor);                                 \
  template void conv2d_im2col_grad_weight_cpu(const T*, const T*, T*, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

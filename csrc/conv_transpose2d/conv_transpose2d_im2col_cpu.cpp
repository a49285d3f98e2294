// Transposed convolution, C++, im2col: a panel of columns of each phase at a time.
//
// Formula: conv_transpose2d.h. As direct, each residue of the output modulo the stride is a convolution of
//   stride 1 with its own few taps, which conv2d_im2col_cpu.cpp computes.
// Bytes: as there.
// Limits: as there; the outputs of a phase lie `stride` pixels apart and are written one by one.
#include "../conv2d/conv2d_im2col_cpu.h"
#include "conv_transpose2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
int64_t conv_transpose2d_im2col_packed_size(const Conv2dShape& s) {
  return s.out_channels * s.in_group() * s.taps();
}

template <typename T>
void conv_transpose2d_im2col_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                             ParallelFor threads) {
  im2col_pack(weight, packed, direct_transposed(s), threads);
}

template <typename T>
void conv_transpose2d_im2col_forward_cpu(const T* input, const accumulate_t<T>* packed, const T* bias,
                                         T* output, const Conv2dShape& s, ParallelFor threads) {
  const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};
  im2col_convolve(input, packed, epilogue, output, {direct_transposed(s)}, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                         \
  template int64_t conv_transpose2d_im2col_packed_size<T>(const Conv2dShape&);                          \
  template void conv_transpose2d_im2col_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&, \
                                                        ParallelFor);                                   \
  template void conv_transpose2d_im2col_forward_cpu(const T*, const accumulate_t<T>*, const T*, T*,     \
                                                    const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

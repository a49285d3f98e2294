// Transposed convolution, C++, direct: one dense convolution for each residue of the output modulo the
//   stride.
//
// Formula: conv_transpose2d.h. An output row h takes part in row e of the input by taps i with h = e *
//   stride + i * dilation - padding: rows of the same residue have the same taps. Each residue (a phase) is
//   a convolution of stride 1 with its own few taps, so no zero is multiplied; conv2d_direct_pass_cpu.h
//   computes it.
// Bytes: as conv2d_direct_cpu.cpp; phases take turns on neighbouring pixels, so the input comes from memory
//   once.
// Limits: as there; a phase's few taps make short sums, and its outputs lie `stride` pixels apart.
#include "../conv2d/conv2d_direct_cpu.h"
#include "conv_transpose2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
int64_t conv_transpose2d_direct_packed_size(const Conv2dShape& s) {
  return direct_transposed(s).packed_size<accumulate_t<T>>();
}

template <typename T>
void conv_transpose2d_direct_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                             ParallelFor threads) {
  direct_pack(weight, packed, direct_transposed(s), threads);
}

template <typename T>
void conv_transpose2d_direct_forward_cpu(const T* input, const accumulate_t<T>* packed, const T* bias,
                                         T* output, const Conv2dShape& s, ParallelFor threads) {
  const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};
  direct_convolve(input, packed, epilogue, output, direct_transposed(s), threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                         \
  template int64_t conv_transpose2d_direct_packed_size<T>(const Conv2dShape&);                          \
  template void conv_transpose2d_direct_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&, \
                                                        ParallelFor);                                   \
  template void conv_transpose2d_direct_forward_cpu(const T*, const accumulate_t<T>*, const T*, T*,     \
                                                    const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

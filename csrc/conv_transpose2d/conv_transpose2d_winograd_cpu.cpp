// Transposed convolution, C++, Winograd F(M x M, 3 x 3): 3 x 3 filters, stride 1, dilation 1.
//
// With stride 1 the transposed convolution is a convolution whose filters are turned round and whose two
//   channel axes change places: an output row h reads input rows h + padding - 2 ... h + padding, so its
//   padding is 2 - padding, negative where the convolution's is more than 2.
// csrc/conv2d/conv2d_winograd_cpu.cpp computes it; only the packing of the weights differs.
// Bytes and limits: as there.
#include "../conv2d/conv2d_winograd_cpu.h"
#include "conv_transpose2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

#define FASTCONV_WINOGRAD(M)                                                                                 \
  template <typename T>                                                                                      \
  int64_t conv_transpose2d_winograd_f##M##_packed_size(const Conv2dShape& s) {                               \
    return winograd_packed_size<M, T>(winograd_transposed(s));                                               \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv_transpose2d_winograd_f##M##_pack_weight_cpu(const T* weight, accumulate_t<T>* packed,            \
                                                        const Conv2dShape& s, ParallelFor threads) {         \
    winograd_pack<M>(weight, packed, winograd_transposed(s), threads);                                       \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv_transpose2d_winograd_f##M##_forward_cpu(const T* input, const accumulate_t<T>* packed,           \
                                                    const T* bias, T* output, const Conv2dShape& s,          \
                                                    ParallelFor threads) {                                   \
    const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};                                       \
    winograd_convolve<M, T>(input, {nullptr, packed}, epilogue, output, winograd_transposed(s), threads);    \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv_transpose2d_winograd_f##M##_forward_unpacked_cpu(const T* input, const T* weight, const T* bias, \
                                                             T* output, const Conv2dShape& s,                \
                                                             ParallelFor threads) {                          \
    const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};                                       \
    winograd_convolve<M, T>(input, {weight, nullptr}, epilogue, output, winograd_transposed(s), threads);    \
  }
FASTCONV_WINOGRAD(2)
FASTCONV_WINOGRAD(4)
FASTCONV_WINOGRAD(6)

#define FASTCONV_INSTANTIATE_TILE(M, T)                                                                      \
  template int64_t conv_transpose2d_winograd_f##M##_packed_size<T>(const Conv2dShape&);                      \
  template void conv_transpose2d_winograd_f##M##_pack_weight_cpu(const T*, accumulate_t<T>*,                 \
                                                                 const Conv2dShape&, ParallelFor);           \
  template void conv_transpose2d_winograd_f##M##_forward_cpu(const T*, const accumulate_t<T>*, const T*, T*, \
                                                             const Conv2dShape&, ParallelFor);               \
  template void conv_transpose2d_winograd_f##M##_forward_unpacked_cpu(const T*, const T*, const T*, T*,      \
                                                                      const Conv2dShape&, ParallelFor);
#define FASTCONV_INSTANTIATE(T) \
  FASTCONV_INSTANTIATE_TILE(2, T) FASTCONV_INSTANTIATE_TILE(4, T) FASTCONV_INSTANTIATE_TILE(6, T)
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

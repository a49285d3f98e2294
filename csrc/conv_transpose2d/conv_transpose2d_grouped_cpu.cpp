// Transposed convolution, C++, narrow groups.
//
// Computes  out[c] = bias[c] + sum over m, i, j of in[g * M/G + m, ...] * w[m, c, i, j], as a convolution for
//   each residue of an output's row and column modulo the stride: no product with a zero, no atomics.
// One inner step, and its limit: ../conv2d/conv2d_grouped_cpu.cpp, with the taps of one residue.
// Bytes: input + output once, while a strip of rows stays in the L2 cache.
// Limits: as forward, with in_group and out_group exchanged.
#include "../conv2d/conv2d_grouped_convolution_cpu.h"
#include "conv_transpose2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

template <typename T>
GroupedChannels<accumulate_t<T>> channels_of(const Conv2dShape& s) {
  return {s.groups, s.out_group(), s.in_group()};
}

}  // namespace

template <typename T>
int64_t conv_transpose2d_grouped_packed_size(const Conv2dShape& s) {
  const auto channels = channels_of<T>(s);
  return channels.units() * channels.out_vectors() * s.out_group() * s.taps() * lanes_of<accumulate_t<T>>;
}

template <typename T>
void conv_transpose2d_grouped_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                              ParallelFor threads) {
  const int64_t in_group = s.in_group(), out_group = s.out_group();
  const auto weight_at = [&](int64_t c, int64_t m) {
    return weight + ((c / in_group * out_group + m) * in_group + c % in_group) * s.taps();
  };
  pack_grouped<T>(channels_of<T>(s), transposed_geometry(s), weight_at, packed, threads);
}

template <typename T>
void conv_transpose2d_grouped_forward_cpu(const T* input, const accumulate_t<T>* packed, const T* bias,
                                          T* output, const Conv2dShape& s, ParallelFor threads) {
  GroupedConvolution<T>(input, packed, {bias, nullptr, Activation::none}, output, channels_of<T>(s), s.batch,
                        s.channels_last, transposed_geometry(s))
      .run(threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template int64_t conv_transpose2d_grouped_packed_size<T>(const Conv2dShape&);                             \
  template void conv_transpose2d_grouped_pack_weight_cpu<T>(const T*, accumulate_t<T>*, const Conv2dShape&, \
                                                            ParallelFor);                                   \
  template void conv_transpose2d_grouped_forward_cpu<T>(const T*, const accumulate_t<T>*, const T*, T*,     \
                                                        const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

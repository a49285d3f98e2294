// Convolution, C++, narrow groups: forward.
//
// Computes  out[m] = act(bias[m] + residual[m] + sum over c, i, j of in[g * C/G + c, ...] * w[m, c, i, j]).
// One inner step: 8 (or 7) pixels of two rows of L output channels (conv2d_grouped_columns_cpu.h). For a 3x3
//   filter a channel of the groups costs 144 multiply-adds, 40 spreads and 18 loads. Zen 4 does one 512-bit
//   multiply-add a cycle, and up to one permute in two cycles beside it: the multiply-adds are the limit.
// Bytes: input + output (+ residual) once, while a strip of rows stays in the L2 cache.
// Against a dense convolution's kernel: no lane waits for another group's channels.
// Limits: right for any groups, made for at most 32 channels of a group read and written. Lanes are wasted
//   where out_group is no multiple of L, unless in_group == out_group divides L.
#include "conv2d_grouped_convolution_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

template <typename T>
GroupedChannels<accumulate_t<T>> channels_of(const Conv2dShape& s) {
  return {s.groups, s.in_group(), s.out_group()};
}

}  // namespace

template <typename T>
int64_t conv2d_grouped_packed_size(const Conv2dShape& s) {
  const auto channels = channels_of<T>(s);
  return channels.units() * channels.out_vectors() * s.in_group() * s.taps() * lanes_of<accumulate_t<T>>;
}

template <typename T>
void conv2d_grouped_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                    ParallelFor threads) {
  const auto weight_at = [&](int64_t m, int64_t c) { return weight + (m * s.in_group() + c) * s.taps(); };
  pack_grouped<T>(channels_of<T>(s), forward_geometry(s), weight_at, packed, threads);
}

template <typename T>
void conv2d_grouped_forward_cpu(const T* input, const accumulate_t<T>* packed,
                                const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                                ParallelFor threads) {
  GroupedConvolution<T>(input, packed, epilogue, output, channels_of<T>(s), s.batch, s.channels_last,
                        forward_geometry(s))
      .run(threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template int64_t conv2d_grouped_packed_size<T>(const Conv2dShape&);                                     \
  template void conv2d_grouped_pack_weight_cpu<T>(const T*, accumulate_t<T>*, const Conv2dShape&,         \
                                                  ParallelFor);                                           \
  template void conv2d_grouped_forward_cpu<T>(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, \
                                              T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

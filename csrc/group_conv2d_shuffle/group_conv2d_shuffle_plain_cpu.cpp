// Grouped convolution with channel shuffle, C++, plain: the formula, one value of the result at a time.
//
// One step of the outer loop computes one plane of the result: channel k * G + g, by filter k of group g.
// Bytes: every input is read M/G * kernel_height * kernel_width times from the caches; neighbours share
//   nothing.
// Limits: no vectors, no reuse in registers. Read it first: the shuffle is one line, and moves nothing.
#include "../common/image.h"
#include "group_conv2d_shuffle.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void group_conv2d_shuffle_plain_forward_cpu(const T* input, const accumulate_t<T>* packed,
                                            const Conv2dEpilogue<T>& epilogue, T* output,
                                            const Conv2dShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.batch * s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.out_channels, channel = plane % s.out_channels;
      const int64_t k = channel / s.groups, g = channel % s.groups;
      const int64_t m = g * s.out_group() + k;  // the filter
      for (int64_t e = 0; e < s.out_height; ++e)
        for (int64_t f = 0; f < s.out_width; ++f) {
          A sum = epilogue.bias ? load(epilogue.bias[m]) : A(0);
          const A* tap = packed + m * s.in_group() * s.taps();
          for (int64_t c = g * s.in_group(); c < (g + 1) * s.in_group(); ++c)
            for (int64_t i = 0; i < s.kernel_height; ++i)
              for (int64_t j = 0; j < s.kernel_width; ++j, ++tap) {
                const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
                const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
                if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
                sum += load(input[in(n, c, h, w)]) * *tap;
              }
          store(&output[out(n, channel, e, f)], activate(sum, epilogue.activation));
        }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                         \
  template void group_conv2d_shuffle_plain_forward_cpu( \
      const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

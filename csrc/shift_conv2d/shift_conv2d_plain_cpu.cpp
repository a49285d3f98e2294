// Shift with 1x1 convolution, C++, plain: the formula, one value of the result at a time.
//
// One step of the outer loop computes one plane of the result; each value gathers one pixel of every channel,
//   from where the channel's offset says.
// Bytes: every input is read M times from the caches; neighbours share nothing.
// Limits: no vectors, no reuse in registers, a test for the border at every channel. Read it first.
#include "../common/image.h"
#include "shift_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void shift_conv2d_plain_forward_cpu(const T* input, const int64_t* offsets, const accumulate_t<T>* packed,
                                    const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                                    ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.batch * s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.out_channels, m = plane % s.out_channels;
      for (int64_t e = 0; e < s.out_height; ++e)
        for (int64_t f = 0; f < s.out_width; ++f) {
          A sum = epilogue.bias ? load(epilogue.bias[m]) : A(0);
          for (int64_t c = 0; c < s.in_channels; ++c) {
            const int64_t h = e * s.stride_height + limited(offsets[2 * c], s.in_height);
            const int64_t w = f * s.stride_width + limited(offsets[2 * c + 1], s.in_width);
            if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
            sum += load(input[in(n, c, h, w)]) * packed[m * s.in_channels + c];
          }
          store(&output[out(n, m, e, f)], activate(sum, epilogue.activation));
        }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                  \
  template void shift_conv2d_plain_forward_cpu(const T*, const int64_t*, const accumulate_t<T>*, \
                                               const Conv2dEpilogue<T>&, T*, const Conv2dShape&, \
                                               ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

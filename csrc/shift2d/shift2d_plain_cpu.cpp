// Shift, C++, plain: the formula.
//
// Formula: shift2d.h. One step of the inner loop copies one value, or writes a zero.
// Bytes: each value is read once and written once; what leaves the image is not read.
// Before it: nothing; read it first.
// Limits: asks of each value whether it is inside; in channels_last the values of a channel lie far apart.
#include "shift2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void shift2d_plain_forward_cpu(const T* input, const int64_t* offsets, T* output, const Shift2dShape& s,
                               ParallelFor threads) {
  parallel_for(threads, s.batch * s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t image = plane / s.channels, channel = plane % s.channels;
      const int64_t dh = limited(offsets[2 * channel], s.height);
      const int64_t dw = limited(offsets[2 * channel + 1], s.width);
      for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) {
          const bool inside = h + dh >= 0 && h + dh < s.height && w + dw >= 0 && w + dw < s.width;
          output[s.index(image, channel, h, w)] =
              inside ? input[s.index(image, channel, h + dh, w + dw)] : T{};
        }
    }
  });
}

#define FASTCONV_INSTANTIATE(T) \
  template void shift2d_plain_forward_cpu<T>(const T*, const int64_t*, T*, const Shift2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

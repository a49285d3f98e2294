// Transposed convolution, C++, plain: the formula turned into a gather, one value of the output at a time.
//
// One step of the outer loop computes one output; it asks of every tap which input it carries there, if any.
// Bytes: every input is read in_channels / groups * kernel_height * kernel_width times from the caches.
// Limits: of the taps of a strided convolution only one in stride_height * stride_width carries anything;
//   the test costs more than the sum. Read it first. Any layout, any groups.
#include "../common/image.h"
#include "conv_transpose2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
int64_t conv_transpose2d_plain_packed_size(const Conv2dShape& s) {
  return conv2d_plain_packed_size<T>(s);
}

// Packed: as conv2d_plain.
template <typename T>
void conv_transpose2d_plain_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                            ParallelFor threads) {
  conv2d_plain_pack_weight_cpu(weight, packed, s, threads);
}

template <typename T>
void conv_transpose2d_plain_forward_cpu(const T* input, const accumulate_t<T>* packed, const T* bias,
                                        T* output, const Conv2dShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = output_index(s), out = input_index(s);  // the shape is the convolution's
  parallel_for(threads, s.batch * s.in_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.in_channels, c = plane % s.in_channels;
      const int64_t group = c / s.in_group(), channel = c % s.in_group();
      for (int64_t h = 0; h < s.in_height; ++h)
        for (int64_t w = 0; w < s.in_width; ++w) {
          A sum = bias ? load(bias[c]) : A(0);
          for (int64_t m = group * s.out_group(); m < (group + 1) * s.out_group(); ++m) {
            const A* tap = packed + (m * s.in_group() + channel) * s.taps();
            for (int64_t i = 0; i < s.kernel_height; ++i)
              for (int64_t j = 0; j < s.kernel_width; ++j, ++tap) {
                const int64_t down = h + s.padding_top - i * s.dilation_height;
                const int64_t right = w + s.padding_left - j * s.dilation_width;
                if (down % s.stride_height != 0 || right % s.stride_width != 0) continue;
                const int64_t e = down / s.stride_height, f = right / s.stride_width;
                if (e < 0 || e >= s.out_height || f < 0 || f >= s.out_width) continue;
                sum += load(input[in(n, m, e, f)]) * *tap;
              }
          }
          store(&output[out(n, c, h, w)], sum);
        }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template int64_t conv_transpose2d_plain_packed_size<T>(const Conv2dShape&);                             \
  template void conv_transpose2d_plain_pack_weight_cpu<T>(const T*, accumulate_t<T>*, const Conv2dShape&, \
                                                          ParallelFor);                                   \
  template void conv_transpose2d_plain_forward_cpu<T>(const T*, const accumulate_t<T>*, const T*, T*,     \
                                                      const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

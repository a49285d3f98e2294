// Convolution, C++, plain: the formula, one value of the result at a time.
//
// One step of the outer loop computes one value of the result; it gathers all that the value depends on.
// Bytes: every input is read out_channels / groups * kernel_height * kernel_width times from the caches;
//   neighbours share nothing.
// Limits: no vectors, no reuse in registers, a test for the border at every tap. Read it first: it is what
//   the other variants are measured against. Any layout, any groups.
#include "../common/image.h"
#include "conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
int64_t conv2d_plain_packed_size(const Conv2dShape& s) {
  return s.out_channels * s.in_group() * s.taps();
}

// Packed: the weight in its own order, (out_channels, in_channels / groups, kernel_height, kernel_width).
template <typename T>
void conv2d_plain_pack_weight_cpu(const T* weight, accumulate_t<T>* packed, const Conv2dShape& s,
                                  ParallelFor threads) {
  const int64_t filter = s.in_group() * s.taps();
  parallel_for(threads, s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * filter; i < end * filter; ++i) packed[i] = load(weight[i]);
  });
}

template <typename T>
void conv2d_plain_forward_cpu(const T* input, const accumulate_t<T>* packed,
                              const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                              ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.batch * s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.out_channels, m = plane % s.out_channels;
      const int64_t first_channel = m / s.out_group() * s.in_group();
      for (int64_t e = 0; e < s.out_height; ++e)
        for (int64_t f = 0; f < s.out_width; ++f) {
          A sum = epilogue.bias ? load(epilogue.bias[m]) : A(0);
          if (epilogue.residual) sum += load(epilogue.residual[out(n, m, e, f)]);
          const A* tap = packed + m * s.in_group() * s.taps();
          for (int64_t c = first_channel; c < first_channel + s.in_group(); ++c)
            for (int64_t i = 0; i < s.kernel_height; ++i)
              for (int64_t j = 0; j < s.kernel_width; ++j, ++tap) {
                const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
                const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
                if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
                sum += load(input[in(n, c, h, w)]) * *tap;
              }
          store(&output[out(n, m, e, f)], activate(sum, epilogue.activation));
        }
    }
  });
}

template <typename T>
void conv2d_plain_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                  const Conv2dShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t first_channel = m / s.out_group() * s.in_group();
      T* tap = grad_weight + m * s.in_group() * s.taps();
      for (int64_t c = first_channel; c < first_channel + s.in_group(); ++c)
        for (int64_t i = 0; i < s.kernel_height; ++i)
          for (int64_t j = 0; j < s.kernel_width; ++j, ++tap) {
            A sum = 0;
            for (int64_t n = 0; n < s.batch; ++n)
              for (int64_t e = 0; e < s.out_height; ++e)
                for (int64_t f = 0; f < s.out_width; ++f) {
                  const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
                  const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
                  if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
                  sum += load(grad_output[out(n, m, e, f)]) * load(input[in(n, c, h, w)]);
                }
            store(tap, sum);
          }
      if (grad_bias) {
        A sum = 0;
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t e = 0; e < s.out_height; ++e)
            for (int64_t f = 0; f < s.out_width; ++f) sum += load(grad_output[out(n, m, e, f)]);
        store(&grad_bias[m], sum);
      }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template int64_t conv2d_plain_packed_size<T>(const Conv2dShape&);                                         \
  template void conv2d_plain_pack_weight_cpu<T>(const T*, accumulate_t<T>*, const Conv2dShape&,             \
                                                ParallelFor);                                               \
  template void conv2d_plain_forward_cpu<T>(const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, \
                                            const Conv2dShape&, ParallelFor);                               \
  template void conv2d_plain_grad_weight_cpu<T>(const T*, const T*, T*, T*, const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

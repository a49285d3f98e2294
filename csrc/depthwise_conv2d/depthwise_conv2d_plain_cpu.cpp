// Depthwise convolution, C++, plain: the formula, one value of the result at a time.
//
// One step of the outer loop computes one value of the result; it gathers all that the value depends on.
// Bytes: every input is read kernel_height * kernel_width times from the caches; neighbours share nothing.
// Limits: no vectors, no reuse in registers, a test for the border at every tap. Read it first: it is what
//   the other variants are measured against.
#include "../common/image.h"
#include "depthwise_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void depthwise_conv2d_plain_forward_cpu(const T* input, const T* weight, const T* bias, T* output,
                                        const DepthwiseConv2dShape& s, Activation activation,
                                        ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.batch * s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.out_channels, o = plane % s.out_channels;
      for (int64_t e = 0; e < s.out_height; ++e)
        for (int64_t f = 0; f < s.out_width; ++f) {
          A sum = bias ? load(bias[o]) : A(0);
          for (int64_t i = 0; i < s.kernel_height; ++i)
            for (int64_t j = 0; j < s.kernel_width; ++j) {
              const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
              const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
              if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
              sum += load(input[in(n, o / s.multiplier(), h, w)]) *
                     load(weight[(o * s.kernel_height + i) * s.kernel_width + j]);
            }
          store(&output[out(n, o, e, f)], activate(sum, activation));
        }
    }
  });
}

template <typename T>
void depthwise_conv2d_plain_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,
                                           const DepthwiseConv2dShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.batch * s.in_channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / s.in_channels, c = plane % s.in_channels;
      for (int64_t h = 0; h < s.in_height; ++h)
        for (int64_t w = 0; w < s.in_width; ++w) {
          A sum = 0;
          for (int64_t o = c * s.multiplier(); o < (c + 1) * s.multiplier(); ++o)
            for (int64_t i = 0; i < s.kernel_height; ++i)
              for (int64_t j = 0; j < s.kernel_width; ++j) {
                // The output that tap (i, j) carries this input to, if there is one.
                const int64_t down = h + s.padding_top - i * s.dilation_height;
                const int64_t right = w + s.padding_left - j * s.dilation_width;
                if (down % s.stride_height != 0 || right % s.stride_width != 0) continue;
                const int64_t e = down / s.stride_height, f = right / s.stride_width;
                if (e < 0 || e >= s.out_height || f < 0 || f >= s.out_width) continue;
                sum += load(grad_output[out(n, o, e, f)]) *
                       load(weight[(o * s.kernel_height + i) * s.kernel_width + j]);
              }
          store(&grad_input[in(n, c, h, w)], sum);
        }
    }
  });
}

template <typename T>
void depthwise_conv2d_plain_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,
                                            T* grad_bias, const DepthwiseConv2dShape& s,
                                            ParallelFor threads) {
  using A = accumulate_t<T>;
  const ImageIndex in = input_index(s), out = output_index(s);
  parallel_for(threads, s.out_channels, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t i = 0; i < s.kernel_height; ++i)
        for (int64_t j = 0; j < s.kernel_width; ++j) {
          A sum = 0;
          for (int64_t n = 0; n < s.batch; ++n)
            for (int64_t e = 0; e < s.out_height; ++e)
              for (int64_t f = 0; f < s.out_width; ++f) {
                const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
                const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
                if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
                sum += load(grad_output[out(n, o, e, f)]) * load(input[in(n, o / s.multiplier(), h, w)]);
              }
          store(&grad_weight[(o * s.kernel_height + i) * s.kernel_width + j], sum);
        }
      if (grad_bias) {
        A sum = 0;
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t e = 0; e < s.out_height; ++e)
            for (int64_t f = 0; f < s.out_width; ++f) sum += load(grad_output[out(n, o, e, f)]);
        store(&grad_bias[o], sum);
      }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                              \
  template void depthwise_conv2d_plain_forward_cpu<T>(const T*, const T*, const T*, T*,                      \
                                                      const DepthwiseConv2dShape&, Activation, ParallelFor); \
  template void depthwise_conv2d_plain_grad_input_cpu<T>(const T*, const T*, T*,                             \
                                                         const DepthwiseConv2dShape&, ParallelFor);          \
  template void depthwise_conv2d_plain_grad_weight_cpu<T>(const T*, const T*, T*, T*,                        \
                                                          const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

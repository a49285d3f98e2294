// Depthwise and 1x1 convolution, C++, plain: the formula, one pixel of the result at a time.
//
// One step of the outer loop computes one row of the result: for each pixel the middle's channels, kept in a
//   line of scratch, and then every filter's sum over that line.
// Bytes: an input is read once for each tap from the caches, all weights once for each pixel.
// Limits: no vectors, no reuse in registers, a test for the border at every tap. Read it first.
#include "../common/image.h"
#include "separable_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void separable_conv2d_plain_forward_cpu(const T* input, const SeparableDepthwise<T>& depthwise,
                                        const accumulate_t<T>* packed, const Conv2dEpilogue<T>& epilogue,
                                        T* output, int64_t filters, ParallelFor threads) {
  using A = accumulate_t<T>;
  const DepthwiseConv2dShape& s = depthwise.shape;
  const ImageIndex in = input_index(s), out = output_index(pointwise_shape(s, filters));
  parallel_for(threads, s.batch * s.out_height, [&](int64_t begin, int64_t end) {
    const Scratch<A> middle(s.out_channels);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / s.out_height, e = row % s.out_height;
      for (int64_t f = 0; f < s.out_width; ++f) {
        for (int64_t c = 0; c < s.out_channels; ++c) {
          A sum = depthwise.bias ? load(depthwise.bias[c]) : A(0);
          for (int64_t i = 0; i < s.kernel_height; ++i)
            for (int64_t j = 0; j < s.kernel_width; ++j) {
              const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
              const int64_t w = f * s.stride_width + j * s.dilation_width - s.padding_left;
              if (h < 0 || h >= s.in_height || w < 0 || w >= s.in_width) continue;
              sum += load(input[in(n, c / s.multiplier(), h, w)]) *
                     load(depthwise.weight[(c * s.kernel_height + i) * s.kernel_width + j]);
            }
          middle.data()[c] = activate(sum, depthwise.activation);
        }
        for (int64_t m = 0; m < filters; ++m) {
          const int64_t at = out(n, m, e, f);
          A sum = epilogue.bias ? load(epilogue.bias[m]) : A(0);
          if (epilogue.residual) sum += load(epilogue.residual[at]);
          for (int64_t c = 0; c < s.out_channels; ++c)
            sum += middle.data()[c] * packed[m * s.out_channels + c];
          store(&output[at], activate(sum, epilogue.activation));
        }
      }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                          \
  template void separable_conv2d_plain_forward_cpu(const T*, const SeparableDepthwise<T>&,               \
                                                   const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, \
                                                   int64_t, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

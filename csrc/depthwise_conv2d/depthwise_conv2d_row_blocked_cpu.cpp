// Depthwise convolution, C++, row_blocked: whole rows, so that the compiler can make vectors.
//
// The tap loops move outside the loop over a row. One step adds a scaled row of the input to a row of sums,
//   sums[f] += w * x[f + shift], with no test inside: contiguous along the width, or along the channels.
// Bytes: the input once from memory, the row of sums once for each tap from the L1 cache; that traffic is the
//   limit, two loads and a store for each multiply-add.
// Against plain: borders are cut off once a row instead of tested at every tap.
#include "../common/geometry.h"
#include "depthwise_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// A pass visits rows; a row is a strip of `lines` parallel channels (1 in contiguous tensors, all in
// channels_last).
struct Layout {
  int64_t lines, row_groups;  // channels in a row; rows side by side in an image
  explicit Layout(const DepthwiseConv2dShape& s)
      : lines(s.channels_last ? s.out_channels : 1), row_groups(s.channels_last ? 1 : s.out_channels) {}
};

// visit(i, j, e, f, h, w): tap, output row, range of outputs in the row, input row, input column of the
// first.
template <typename Visit>
void for_taps_of_row(const DepthwiseConv2dShape& s, int64_t e, const Visit& visit) {
  for (int64_t i = 0; i < s.kernel_height; ++i) {
    const int64_t h = e * s.stride_height + i * s.dilation_height - s.padding_top;
    if (h < 0 || h >= s.in_height) continue;
    for (int64_t j = 0; j < s.kernel_width; ++j) {
      const int64_t offset = j * s.dilation_width - s.padding_left;
      const Range f = outputs_inside(offset, s.stride_width, s.in_width, s.out_width);
      if (f.begin < f.end) visit(i, j, h, f, f.begin * s.stride_width + offset);
    }
  }
}

template <typename T>
const T* input_row(const T* input, const DepthwiseConv2dShape& s, int64_t n, int64_t o, int64_t h) {
  return s.channels_last ? input + (n * s.in_height + h) * s.in_width * s.in_channels
                         : input + ((n * s.in_channels + o / s.multiplier()) * s.in_height + h) * s.in_width;
}

template <typename T>
T* output_row(T* output, const DepthwiseConv2dShape& s, int64_t n, int64_t o, int64_t e) {
  return s.channels_last ? output + (n * s.out_height + e) * s.out_width * s.out_channels
                         : output + ((n * s.out_channels + o) * s.out_height + e) * s.out_width;
}

}  // namespace

template <typename T>
void depthwise_conv2d_row_blocked_forward_cpu(const T* input, const T* weight, const T* bias, T* output,
                                              const DepthwiseConv2dShape& s, Activation activation,
                                              ParallelFor threads) {
  using A = accumulate_t<T>;
  const Layout layout(s);
  const int64_t lines = layout.lines, multiplier = s.multiplier(), taps = s.kernel_height * s.kernel_width;
  parallel_for(threads, s.batch * layout.row_groups * s.out_height, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(s.out_width * lines), tap_scratch(lines);
    A *sums = scratch.data(), *tap = tap_scratch.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t e = row % s.out_height, o = row / s.out_height % layout.row_groups;
      const int64_t n = row / s.out_height / layout.row_groups;
      for (int64_t f = 0; f < s.out_width; ++f)
        for (int64_t c = 0; c < lines; ++c) sums[f * lines + c] = bias ? load(bias[o + c]) : A(0);
      for_taps_of_row(s, e, [&](int64_t i, int64_t j, int64_t h, Range f, int64_t w) {
        const T* x = input_row(input, s, n, o, h);
        for (int64_t c = 0; c < lines; ++c) tap[c] = load(weight[(o + c) * taps + i * s.kernel_width + j]);
        if (lines == 1) {
          const A factor = tap[0];
          if (s.stride_width == 1) {
            for (int64_t k = 0; k < f.end - f.begin; ++k) sums[f.begin + k] += factor * load(x[w + k]);
          } else {
            for (int64_t k = 0; k < f.end - f.begin; ++k)
              sums[f.begin + k] += factor * load(x[w + k * s.stride_width]);
          }
        } else {
          for (int64_t k = f.begin; k < f.end; ++k, w += s.stride_width) {
            const T* pixel = x + w * s.in_channels;
            A* sum = sums + k * lines;
            if (multiplier == 1) {
              for (int64_t c = 0; c < lines; ++c) sum[c] += tap[c] * load(pixel[c]);
            } else {
              for (int64_t c = 0; c < lines; ++c) sum[c] += tap[c] * load(pixel[c / multiplier]);
            }
          }
        }
      });
      T* y = output_row(output, s, n, o, e);
      for (int64_t k = 0; k < s.out_width * lines; ++k) store(&y[k], activate(sums[k], activation));
    }
  });
}

template <typename T>
void depthwise_conv2d_row_blocked_grad_input_cpu(const T* grad_output, const T* weight, T* grad_input,
                                                 const DepthwiseConv2dShape& s, ParallelFor threads) {
  // An item is one input plane (contiguous) or one input image (channels_last), so that rows of grad_output
  // can be scattered into it without another thread near.
  using A = accumulate_t<T>;
  const int64_t planes = s.channels_last ? 1 : s.in_channels, lines = s.channels_last ? s.in_channels : 1;
  const int64_t multiplier = s.multiplier(), taps = s.kernel_height * s.kernel_width;
  const int64_t row_length = s.in_width * lines;
  parallel_for(threads, s.batch * planes * s.in_height, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(row_length);
    A* sums = scratch.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % s.in_height, c = row / s.in_height % planes, n = row / s.in_height / planes;
      std::fill(sums, sums + row_length, A(0));
      for (int64_t i = 0; i < s.kernel_height; ++i) {
        const int64_t down = h + s.padding_top - i * s.dilation_height;
        if (down < 0 || down % s.stride_height != 0 || down / s.stride_height >= s.out_height) continue;
        for (int64_t j = 0; j < s.kernel_width; ++j) {
          const int64_t offset = j * s.dilation_width - s.padding_left;
          const Range f = outputs_inside(offset, s.stride_width, s.in_width, s.out_width);
          for (int64_t m = 0; m < multiplier; ++m) {
            const T* gy = output_row(grad_output, s, n, c * multiplier + m, down / s.stride_height);
            const T* w = weight + (c * multiplier + m) * taps + i * s.kernel_width + j;
            if (!s.channels_last) {
              const A factor = load(*w);
              for (int64_t k = f.begin; k < f.end; ++k)
                sums[k * s.stride_width + offset] += factor * load(gy[k]);
            } else {
              for (int64_t k = f.begin; k < f.end; ++k) {
                A* sum = sums + (k * s.stride_width + offset) * lines;
                const T* pixel = gy + k * s.out_channels + m;
                for (int64_t l = 0; l < lines; ++l)
                  sum[l] += load(w[l * multiplier * taps]) * load(pixel[l * multiplier]);
              }
            }
          }
        }
      }
      T* gx = s.channels_last ? grad_input + (n * s.in_height + h) * row_length
                              : grad_input + ((n * s.in_channels + c) * s.in_height + h) * row_length;
      for (int64_t k = 0; k < row_length; ++k) store(&gx[k], sums[k]);
    }
  });
}

template <typename T>
void depthwise_conv2d_row_blocked_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,
                                                  T* grad_bias, const DepthwiseConv2dShape& s,
                                                  ParallelFor threads) {
  using A = accumulate_t<T>;
  const int64_t multiplier = s.multiplier(), taps = s.kernel_height * s.kernel_width;
  const int64_t width = 16;  // channels of an item: a cache line of float32 in a channels_last pixel
  const int64_t items = (s.out_channels + width - 1) / width;
  parallel_for(threads, items, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch((taps + 1) * width);
    A* sums = scratch.data();  // (taps + 1, width); the last row is the bias
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * width, count = std::min(width, s.out_channels - first);
      std::fill(sums, sums + (taps + 1) * width, A(0));
      for (int64_t n = 0; n < s.batch; ++n)
        for (int64_t e = 0; e < s.out_height; ++e)
          for (int64_t l = 0; l < (s.channels_last ? 1 : count); ++l) {
            const T* gy = output_row(grad_output, s, n, first + l, e) + (s.channels_last ? first : 0);
            for_taps_of_row(s, e, [&](int64_t i, int64_t j, int64_t h, Range f, int64_t w) {
              const T* x = input_row(input, s, n, first + l, h);
              A* sum = sums + (i * s.kernel_width + j) * width + l;
              if (!s.channels_last) {
                A total = 0;
                for (int64_t k = f.begin; k < f.end; ++k, w += s.stride_width)
                  total += load(gy[k]) * load(x[w]);
                *sum += total;
              } else {
                for (int64_t k = f.begin; k < f.end; ++k, w += s.stride_width)
                  for (int64_t c = 0; c < count; ++c)
                    sum[c] += load(gy[k * s.out_channels + c]) *
                              load(x[w * s.in_channels + (first + c) / multiplier]);
              }
            });
            for (int64_t k = 0; k < s.out_width; ++k)
              for (int64_t c = 0; c < (s.channels_last ? count : 1); ++c)
                sums[taps * width + l + c] += load(gy[k * (s.channels_last ? s.out_channels : 1) + c]);
          }
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t t = 0; t < taps; ++t) store(&grad_weight[(first + c) * taps + t], sums[t * width + c]);
        if (grad_bias) store(&grad_bias[first + c], sums[taps * width + c]);
      }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template void depthwise_conv2d_row_blocked_forward_cpu<T>(                                              \
      const T*, const T*, const T*, T*, const DepthwiseConv2dShape&, Activation, ParallelFor);            \
  template void depthwise_conv2d_row_blocked_grad_input_cpu<T>(const T*, const T*, T*,                    \
                                                               const DepthwiseConv2dShape&, ParallelFor); \
  template void depthwise_conv2d_row_blocked_grad_weight_cpu<T>(const T*, const T*, T*, T*,               \
                                                                const DepthwiseConv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

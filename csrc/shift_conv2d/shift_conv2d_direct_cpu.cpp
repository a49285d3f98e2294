// Shift with 1x1 convolution, C++, direct: about 192 pixels are shifted on their way into the cache.
//
// Formula: shift_conv2d.h. conv2d_direct_pass_cpu.h computes it; a chunk's rows come into its tile
//   by the kernel of shift2d_vectorized_cpu.cpp, row by row.
// Bytes: those of the 1x1 convolution without a shift; the tile stays in the L2 cache.
// Against im2col: lanes are filters, and nothing is transposed.
// Gradients: that of the weight moves its tiles' rows the same way, once for 64 filters; that of the input is
//   computed for some images into a buffer that stays in the caches, and is shifted on its way out of it.
// Limits: as conv2d_direct_cpu.cpp; contiguous images come value by value; with a stride, pixels between are
//   shifted for nothing.
#include <algorithm>
#include <vector>

#include "../conv2d/conv2d_direct_cpu.h"
#include "../conv2d/conv2d_direct_grad_weight_cpu.h"
#include "../shift2d/shift2d_rows_cpu.h"
#include "shift_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t part_bytes = 1 << 20;  // of images that are convolved, and then shifted

template <typename T>
MoveRow rows_of_input(const int64_t* offsets, const Conv2dShape& s) {
  return shifted_rows<T>(offsets, {s.batch, s.in_channels, s.in_height, s.in_width, s.channels_last});
}

}  // namespace

template <typename T>
void shift_conv2d_direct_forward_cpu(const T* input, const int64_t* offsets, const accumulate_t<T>* packed,
                                     const Conv2dEpilogue<T>& epilogue, T* output, const Conv2dShape& s,
                                     ParallelFor threads) {
  DirectPass pass = direct_forward(s);
  const int64_t values = s.in_width * s.in_channels;  // of a row
  pass.source.bring = [=, move_row = rows_of_input<T>(offsets, s)](int64_t n, int64_t begin, int64_t end,
                                                                   void* target) {
    for (int64_t row = begin; row < end; ++row)
      move_row(input + n * s.in_height * values, row, static_cast<T*>(target) + (row - begin) * values);
  };
  direct_convolve(input, packed, epilogue, output, pass, threads);
}

template <typename T>
void shift_conv2d_direct_grad_input_cpu(const T* grad_output, const T* weight, const int64_t* offsets,
                                        T* grad_input, const Conv2dShape& s, ParallelFor threads) {
  const int64_t pixels = s.in_height * s.in_width, values = pixels * s.in_channels;
  const int64_t most = std::clamp<int64_t>(part_bytes / (values * int64_t(sizeof(T))), 1, s.batch);
  Conv2dShape part = s;
  // A longer stride has the same one output, and more phases than there are pixels.
  part.stride_height = std::min(s.stride_height, s.in_height);
  part.stride_width = std::min(s.stride_width, s.in_width);
  const Scratch<accumulate_t<T>> packed(direct_transposed(part).packed_size<accumulate_t<T>>());
  direct_pack(weight, packed.data(), direct_transposed(part), threads);
  const Scratch<T> unmoved(most * values);
  std::vector<int64_t> opposite(offsets, offsets + 2 * s.in_channels);
  for (int64_t& offset : opposite) offset = -limited(offset, std::max(s.in_height, s.in_width));
  const MoveRow move_row = rows_of_input<T>(opposite.data(), s);
  for (int64_t n = 0; n < s.batch; n += most) {
    part.batch = std::min(most, s.batch - n);
    direct_convolve(grad_output + n * s.out_channels * s.out_height * s.out_width, packed.data(),
                    {nullptr, nullptr, Activation::none}, unmoved.data(), direct_transposed(part), threads);
    parallel_for(threads, part.batch * s.in_height, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        move_row(unmoved.data() + row / s.in_height * values, row % s.in_height,
                 grad_input + n * values + row * s.in_width * s.in_channels);
    });
  }
}

template <typename T>
void shift_conv2d_direct_grad_weight_cpu(const T* grad_output, const T* input, const int64_t* offsets,
                                         T* grad_weight, T* grad_bias, const Conv2dShape& s,
                                         ParallelFor threads) {
  direct_grad_weight(grad_output, input, grad_weight, grad_bias, s, rows_of_input<T>(offsets, s), threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                   \
  template void shift_conv2d_direct_forward_cpu(const T*, const int64_t*, const accumulate_t<T>*, \
                                                const Conv2dEpilogue<T>&, T*, const Conv2dShape&, \
                                                ParallelFor);                                     \
  template void shift_conv2d_direct_grad_input_cpu(const T*, const T*, const int64_t*, T*,        \
                                                   const Conv2dShape&, ParallelFor);              \
  template void shift_conv2d_direct_grad_weight_cpu(const T*, const T*, const int64_t*, T*, T*,   \
                                                    const Conv2dShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

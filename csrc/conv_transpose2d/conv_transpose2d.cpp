// Binds the transposed convolution's kernels to torch.ops.fastconv.
#include "conv_transpose2d.h"

#include "../conv2d/conv2d_binding.h"

namespace fastconv {
namespace {

// The shape of the convolution whose input gradient this is.
Conv2dShape make_shape(const Tensor& input, const Tensor& weight, const Integers& stride,
                       const Integers& padding, const Integers& output_padding, const Integers& dilation,
                       int64_t groups) {
  check_rank(input, 4, "input");
  check_like(weight, input, "weight");
  check_integers(output_padding, 2, 0, "output_padding");
  Conv2dShape shape = make_shape_of_weight(weight, stride, padding, dilation, groups);
  check_size(weight, 0, input.size(1), "weight");
  shape.batch = input.size(0);
  shape.out_height = input.size(2);
  shape.out_width = input.size(3);
  const int64_t kernel[] = {shape.kernel_height, shape.kernel_width};
  int64_t size[2];
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(output_padding[axis] < std::max(stride[axis], dilation[axis]),
                    "output_padding must be smaller than stride or dilation, got ", output_padding[axis]);
    STD_TORCH_CHECK(input.size(2 + axis) > 0, "input must have pixels, got size 0 in dimension ", 2 + axis);
    size[axis] = (input.size(2 + axis) - 1) * stride[axis] - 2 * padding[axis] +
                 dilation[axis] * (kernel[axis] - 1) + output_padding[axis] + 1;
    STD_TORCH_CHECK(size[axis] > 0, "padding must leave an output, got ", padding[axis], " for a size of ",
                    size[axis]);
  }
  shape.in_height = size[0];
  shape.in_width = size[1];
  shape.channels_last = memory_format_of(input) == MemoryFormat::ChannelsLast;
  return shape;
}

template <typename Backend>
Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> packed,
               Integers stride, Integers padding, Integers output_padding, Integers dilation, int64_t groups,
               std::optional<std::string> algorithm) {
  const Conv2dShape shape = make_shape(input, weight, stride, padding, output_padding, dilation, groups);
  check_bias(bias, input, shape.in_channels);
  const Tensor output =
      new_tensor({shape.batch, shape.in_channels, shape.in_height, shape.in_width}, input, format_of(shape));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(shape));
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::template transpose<T>(algorithm, input, weight, packed, const_data<T>(bias), output, shape);
  });
  return output;
}

#if !defined(FASTCONV_EMULATOR)
Tensor pack_weight(Tensor weight, Integers stride, Integers padding, Integers dilation, int64_t groups,
                   std::string algorithm) {
  const Conv2dShape shape = make_shape_of_weight(weight, stride, padding, dilation, groups);
  Tensor packed;
  dispatch_dtype(weight, "weight", [&](auto element) {
    using T = decltype(element);
    const auto all = cpu_variants<ConvTranspose2dCpuVariant<T>>();
    packed = Cpu::pack<T>(asked_for(std::optional(algorithm), all).front(), weight, shape);
  });
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) {
  library.impl("conv_transpose2d_pack_weight", TORCH_BOX(&pack_weight));
}
#endif

}  // namespace

FASTCONV_BIND(conv_transpose2d, forward)

}  // namespace fastconv

// Binds the convolution's kernels to torch.ops.fastconv.
#include "conv2d.h"

#include <tuple>

#include "conv2d_binding.h"

namespace fastconv {
namespace {

template <typename Backend>
Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
               std::optional<Tensor> packed, Integers stride, Integers padding, Integers dilation,
               int64_t groups, std::optional<std::string> activation, std::optional<std::string> algorithm) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, padding, dilation, groups);
  check_bias(bias, input, shape.out_channels);
  if (residual) {
    check_like_output(*residual, input, shape, "residual");
    residual = as_format(*residual, format_of(shape));
  }
  const Activation parsed = parse_activation(activation);
  const Tensor output = new_tensor(output_sizes(shape), input, format_of(shape));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(shape));
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    const Conv2dEpilogue<T> epilogue{const_data<T>(bias), const_data<T>(residual), parsed};
    Backend::template forward<T>(algorithm, input, weight, packed, epilogue, output, shape);
  });
  return output;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor input, Tensor weight, Integers stride,
                                            Integers padding, Integers dilation, int64_t groups,
                                            std::optional<std::string> algorithm, bool need_input,
                                            bool need_weight, bool need_bias) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, padding, dilation, groups);
  check_like_output(grad_output, input, shape, "grad_output");

  auto [grad_input, grad_weight, grad_bias] =
      new_gradients(input, weight, format_of(shape), need_input, need_weight, need_bias);
  if (grad_output.numel() == 0) {  // no outputs: nothing flows back
    if (need_weight) grad_weight = new_tensor(sizes_of(weight), input, format_of_weight(weight));
    for (Tensor tensor : {grad_input, grad_weight, grad_bias}) torch::stable::zero_(tensor);
    return {grad_input, need_weight ? grad_weight : new_tensor({0}, input), grad_bias};
  }
  grad_output = as_format(grad_output, format_of(shape));
  input = as_format(input, format_of(shape));
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    if (need_input)
      Backend::template transpose<T>(algorithm, grad_output, weight, std::nullopt, nullptr, grad_input,
                                     shape);
    if (need_weight || need_bias)
      Backend::template grad_weight<T>(algorithm, grad_output, input, grad_weight,
                                       need_bias ? mutable_data<T>(grad_bias) : nullptr, shape);
  });
  return {grad_input, need_weight ? as_format(grad_weight, format_of_weight(weight)) : new_tensor({0}, input),
          grad_bias};
}

#if !defined(FASTCONV_EMULATOR)
Tensor pack_weight(Tensor weight, int64_t groups, std::string algorithm) {
  const Conv2dShape shape = make_shape_of_weight(weight, {1, 1}, {0, 0}, {1, 1}, groups);
  Tensor packed;
  dispatch_dtype(weight, "weight", [&](auto element) {
    using T = decltype(element);
    const auto variant = asked_for(std::optional(algorithm), cpu_variants<Conv2dCpuVariant<T>>()).front();
    packed = Cpu::pack<T>(variant, weight, shape);
  });
  return packed;
}

// Convolution, and mean and variance of each channel of it.
std::tuple<Tensor, Tensor, Tensor> moments(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                           Integers stride, Integers padding, Integers dilation,
                                           int64_t groups, std::string algorithm) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, padding, dilation, groups);
  check_bias(bias, input, shape.out_channels);
  const Tensor output = new_moments_output(input, output_sizes(shape));
  const Tensor mean = new_tensor({shape.out_channels}, input),
               variance = new_tensor({shape.out_channels}, input);
  input = as_format(input, format_of(shape));
  weight = as_contiguous(weight);
  dispatch_sum_type(input, "input", [&](auto element) {
    using T = decltype(element);
    Cpu::find<Conv2dMomentsVariant<T>>(algorithm, shape)
        .forward(const_data<T>(input), const_data<T>(weight), const_data<T>(bias), mutable_data<T>(output),
                 mutable_data<T>(mean), mutable_data<T>(variance), shape, torch_threads);
  });
  return {output, mean, variance};
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) {
  library.impl("conv2d_moments", TORCH_BOX(&moments));
  library.impl("conv2d_pack_weight", TORCH_BOX(&pack_weight));
}
#endif

}  // namespace

FASTCONV_BIND(conv2d, forward)
FASTCONV_BIND(conv2d_backward, backward)

}  // namespace fastconv

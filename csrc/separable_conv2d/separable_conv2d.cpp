// Binds depthwise with 1x1 convolution to torch.ops.fastconv.
#include "separable_conv2d.h"

#include "../conv2d/conv2d_binding.h"

namespace fastconv {
namespace {

template <typename T>
void run(Cpu, const std::optional<std::string>& algorithm, const T* input,
         const SeparableDepthwise<T>& depthwise, const Tensor& weight, const std::optional<Tensor>& packed,
         const Conv2dEpilogue<T>& epilogue, T* output, const Tensor&) {
  const std::string variant = chosen(algorithm, {"strips", "plain"});
  const Conv2dShape shape = pointwise_shape(depthwise.shape, weight.size(0));
  const std::string product = variant == "strips" ? "direct" : "plain";
  const Tensor kept =
      Cpu::packed_weight<T>(Cpu::find<Conv2dCpuVariant<T>>(product, shape), packed, weight, shape);
  const auto* weights = const_data<accumulate_t<T>>(kept);
  if (variant == "strips") {
    FASTCONV_CALL_CPU(separable_conv2d_strips_forward_cpu<T>(input, depthwise, weights, epilogue, output,
                                                             shape.out_channels, torch_threads));
  } else {
    FASTCONV_CALL_CPU(separable_conv2d_plain_forward_cpu<T>(input, depthwise, weights, epilogue, output,
                                                            shape.out_channels, torch_threads));
  }
}

template <typename T>
void run(Cuda, const std::optional<std::string>& algorithm, const T* input,
         const SeparableDepthwise<T>& depthwise, const Tensor& weight, const std::optional<Tensor>& packed,
         const Conv2dEpilogue<T>& epilogue, T* output, const Tensor& tensor) {
  Cuda::check_not_packed(packed);
  chosen(algorithm, {"tiled"});
  const Tensor dense = as_contiguous(weight);
  separable_conv2d_tiled_forward_cuda<T>(input, depthwise, const_data<T>(dense), epilogue, output,
                                         weight.size(0), stream_of(tensor));
}

// The depthwise half's shape; raises where it and the input do not fit together.
DepthwiseConv2dShape depthwise_shape(const Tensor& input, const Tensor& weight, const Integers& stride,
                                     const Integers& padding, const Integers& dilation) {
  check_rank(input, 4, "input");
  check_rank(weight, 4, "depthwise_weight");
  check_like(weight, input, "depthwise_weight");
  check_integers(stride, 2, 1, "stride");
  check_integers(padding, 4, 0, "padding");
  check_integers(dilation, 2, 1, "dilation");
  check_size(weight, 1, 1, "depthwise_weight");
  const int64_t channels = input.size(1), kernel[] = {weight.size(2), weight.size(3)};
  STD_TORCH_CHECK(channels > 0, "input must have at least one channel");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(0) % channels == 0,
                  "depthwise_weight must have a multiple of input's ", channels, " channels, got ",
                  weight.size(0));
  STD_TORCH_CHECK(kernel[0] > 0 && kernel[1] > 0, "depthwise_weight must have at least one tap");
  return {
      .batch = input.size(0),
      .in_channels = channels,
      .in_height = input.size(2),
      .in_width = input.size(3),
      .out_channels = weight.size(0),
      .out_height = output_size(input.size(2), kernel[0], stride[0], padding[0] + padding[1], dilation[0]),
      .out_width = output_size(input.size(3), kernel[1], stride[1], padding[2] + padding[3], dilation[1]),
      .kernel_height = kernel[0],
      .kernel_width = kernel[1],
      .stride_height = stride[0],
      .stride_width = stride[1],
      .padding_top = padding[0],
      .padding_left = padding[2],
      .dilation_height = dilation[0],
      .dilation_width = dilation[1],
      .channels_last = memory_format_of(input) == MemoryFormat::ChannelsLast};
}

template <typename Backend>
Tensor forward(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight,
               std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias,
               std::optional<Tensor> residual, std::optional<Tensor> packed, Integers stride,
               Integers padding, Integers dilation, std::optional<std::string> mid_activation,
               std::optional<std::string> activation, std::optional<std::string> algorithm) {
  const DepthwiseConv2dShape shape = depthwise_shape(input, depthwise_weight, stride, padding, dilation);
  check_rank(pointwise_weight, 4, "pointwise_weight");
  check_like(pointwise_weight, input, "pointwise_weight");
  const int64_t expected[] = {pointwise_weight.size(0), shape.out_channels, 1, 1};
  for (int dim = 1; dim < 4; ++dim) check_size(pointwise_weight, dim, expected[dim], "pointwise_weight");
  STD_TORCH_CHECK(expected[0] > 0, "pointwise_weight must have at least one filter");
  check_bias(depthwise_bias, input, shape.out_channels, "depthwise_bias");
  check_bias(pointwise_bias, input, expected[0], "pointwise_bias");
  const Conv2dShape pointwise = pointwise_shape(shape, expected[0]);
  if (residual) check_like_output(*residual, input, pointwise, "residual");
  const Activation mid = parse_activation(mid_activation), last = parse_activation(activation);
  const Tensor output = new_tensor(output_sizes(pointwise), input, format_of(pointwise));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(pointwise));
  if (residual) residual = as_format(*residual, format_of(pointwise));
  const Tensor taps = as_contiguous(depthwise_weight);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    const SeparableDepthwise<T> depthwise{const_data<T>(taps), const_data<T>(depthwise_bias), mid, shape};
    const Conv2dEpilogue<T> epilogue{const_data<T>(pointwise_bias), const_data<T>(residual), last};
    run<T>(Backend(), algorithm, const_data<T>(input), depthwise, pointwise_weight, packed, epilogue,
           mutable_data<T>(output), input);
  });
  return output;
}

}  // namespace

FASTCONV_BIND(separable_conv2d, forward)

}  // namespace fastconv

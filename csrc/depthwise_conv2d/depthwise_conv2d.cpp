// Binds the depthwise kernels to torch.ops.fastconv.
#include "depthwise_conv2d.h"

#include <tuple>

#include "../common/binding.h"

namespace fastconv {
namespace {

DepthwiseConv2dShape make_shape(const Tensor& input, const Tensor& weight, const Integers& stride,
                                const Integers& padding, const Integers& dilation) {
  check_rank(input, 4, "input");
  check_rank(weight, 4, "weight");
  check_like(weight, input, "weight");
  check_integers(stride, 2, 1, "stride");
  check_integers(padding, 4, 0, "padding");
  check_integers(dilation, 2, 1, "dilation");
  DepthwiseConv2dShape shape{};
  shape.batch = input.size(0);
  shape.in_channels = input.size(1);
  shape.in_height = input.size(2);
  shape.in_width = input.size(3);
  shape.out_channels = weight.size(0);
  shape.kernel_height = weight.size(2);
  shape.kernel_width = weight.size(3);
  shape.stride_height = stride[0];
  shape.stride_width = stride[1];
  shape.padding_top = padding[0];
  shape.padding_left = padding[2];
  shape.dilation_height = dilation[0];
  shape.dilation_width = dilation[1];
  check_size(weight, 1, 1, "weight");
  STD_TORCH_CHECK(shape.kernel_height > 0 && shape.kernel_width > 0, "weight must have at least one tap");
  STD_TORCH_CHECK(
      shape.in_channels > 0 ? shape.out_channels % shape.in_channels == 0 : shape.out_channels == 0,
      "weight must have a multiple of input's ", shape.in_channels, " channels, got ", shape.out_channels);
  shape.out_height =
      output_size(shape.in_height, shape.kernel_height, stride[0], padding[0] + padding[1], dilation[0]);
  shape.out_width =
      output_size(shape.in_width, shape.kernel_width, stride[1], padding[2] + padding[3], dilation[1]);
  shape.channels_last = memory_format_of(input) == MemoryFormat::ChannelsLast;
  return shape;
}

MemoryFormat format_of(const DepthwiseConv2dShape& shape) {
  return shape.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// One backend's kernels, each called with its element type.
struct Cpu {
  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, const T* weight,
                      const T* bias, T* output, const DepthwiseConv2dShape& shape, Activation activation,
                      const Tensor&) {
    const std::string name = chosen(algorithm, {"vectorized", "row_blocked", "plain"});
    if (name == "vectorized") {
      FASTCONV_CALL_CPU(depthwise_conv2d_vectorized_forward_cpu<T>(input, weight, bias, output, shape,
                                                                   activation, torch_threads));
    } else if (name == "row_blocked") {
      FASTCONV_CALL_CPU(depthwise_conv2d_row_blocked_forward_cpu<T>(input, weight, bias, output, shape,
                                                                    activation, torch_threads));
    } else {
      FASTCONV_CALL_CPU(depthwise_conv2d_plain_forward_cpu<T>(input, weight, bias, output, shape, activation,
                                                              torch_threads));
    }
  }

  template <typename T>
  static void backward(const std::optional<std::string>& algorithm, const T* grad_output, const T* input,
                       const T* weight, T* grad_input, T* grad_weight, T* grad_bias,
                       const DepthwiseConv2dShape& shape, const Tensor&) {
    const std::string name = chosen(algorithm, {"vectorized", "row_blocked", "plain"});
#define FASTCONV_BACKWARD(variant)                                                                           \
  if (grad_input)                                                                                            \
    FASTCONV_CALL_CPU(depthwise_conv2d_##variant##_grad_input_cpu<T>(grad_output, weight, grad_input, shape, \
                                                                     torch_threads));                        \
  if (grad_weight)                                                                                           \
    FASTCONV_CALL_CPU(depthwise_conv2d_##variant##_grad_weight_cpu<T>(grad_output, input, grad_weight,       \
                                                                      grad_bias, shape, torch_threads));
    if (name == "vectorized") {
      FASTCONV_BACKWARD(vectorized)
    } else if (name == "row_blocked") {
      FASTCONV_BACKWARD(row_blocked)
    } else {
      FASTCONV_BACKWARD(plain)
    }
#undef FASTCONV_BACKWARD
  }
};

struct Cuda {
  // Runs tiled() if it is chosen and its tiles fit, else plain(); a tiled that was asked for by name is
  // refused.
  template <typename Tiled, typename Plain>
  static void run(const std::optional<std::string>& algorithm, const Tiled& tiled, const Plain& plain) {
    if (chosen(algorithm, {"tiled", "plain"}) == "tiled") {
      if (tiled()) return;
      STD_TORCH_CHECK(!algorithm,
                      "algorithm='tiled' cannot hold the rows that these taps and their dilation span in ",
                      "shared memory: use algorithm='plain', or leave the choice open");
    }
    plain();
  }

  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, const T* weight,
                      const T* bias, T* output, const DepthwiseConv2dShape& shape, Activation activation,
                      const Tensor& tensor) {
    void* stream = stream_of(tensor);
    const auto call = [&](auto kernel) {
      return kernel(input, weight, bias, output, shape, activation, stream);
    };
    run(
        algorithm, [&] { return call(depthwise_conv2d_tiled_forward_cuda<T>); },
        [&] { call(depthwise_conv2d_plain_forward_cuda<T>); });
  }

  template <typename T>
  static void backward(const std::optional<std::string>& algorithm, const T* grad_output, const T* input,
                       const T* weight, T* grad_input, T* grad_weight, T* grad_bias,
                       const DepthwiseConv2dShape& shape, const Tensor& tensor) {
    void* stream = stream_of(tensor);
    if (grad_input) {
      const auto call = [&](auto kernel) { return kernel(grad_output, weight, grad_input, shape, stream); };
      run(
          algorithm, [&] { return call(depthwise_conv2d_tiled_grad_input_cuda<T>); },
          [&] { call(depthwise_conv2d_plain_grad_input_cuda<T>); });
    }
    if (grad_weight) {
      const Tensor workspace = torch::stable::empty(
          {depthwise_conv2d_grad_weight_workspace(shape)},
          std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float, std::nullopt, tensor.device());
      const auto call = [&](auto kernel) {
        return kernel(grad_output, input, grad_weight, grad_bias, mutable_data<accumulate_t<T>>(workspace),
                      shape, stream);
      };
      run(
          algorithm, [&] { return call(depthwise_conv2d_tiled_grad_weight_cuda<T>); },
          [&] { call(depthwise_conv2d_plain_grad_weight_cuda<T>); });
    }
  }
};

template <typename Backend>
Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> bias, Integers stride, Integers padding,
               Integers dilation, std::optional<std::string> activation,
               std::optional<std::string> algorithm) {
  const DepthwiseConv2dShape shape = make_shape(input, weight, stride, padding, dilation);
  check_bias(bias, input, shape.out_channels);
  const Activation parsed = parse_activation(activation);
  const Tensor output = new_tensor({shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                                   input, format_of(shape));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(shape));
  weight = as_contiguous(weight);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::forward(algorithm, const_data<T>(input), const_data<T>(weight), const_data<T>(bias),
                     mutable_data<T>(output), shape, parsed, input);
  });
  return output;
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor input, Tensor weight, Integers stride,
                                            Integers padding, Integers dilation,
                                            std::optional<std::string> algorithm, bool need_input,
                                            bool need_weight, bool need_bias) {
  const DepthwiseConv2dShape shape = make_shape(input, weight, stride, padding, dilation);
  check_rank(grad_output, 4, "grad_output");
  check_like(grad_output, input, "grad_output");
  const int64_t expected[] = {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  for (int dim = 0; dim < 4; ++dim) check_size(grad_output, dim, expected[dim], "grad_output");

  auto [grad_input, grad_weight, grad_bias] =
      new_gradients(input, weight, format_of(shape), need_input, need_weight, need_bias);
  if (grad_output.numel() == 0) {  // no outputs: nothing flows back
    for (Tensor tensor : {grad_input, grad_weight, grad_bias}) torch::stable::zero_(tensor);
    return {grad_input, need_weight ? grad_weight : new_tensor({0}, input), grad_bias};
  }
  grad_output = as_format(grad_output, format_of(shape));
  input = as_format(input, format_of(shape));
  weight = as_contiguous(weight);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::backward(algorithm, const_data<T>(grad_output), const_data<T>(input), const_data<T>(weight),
                      need_input ? mutable_data<T>(grad_input) : nullptr,
                      need_weight || need_bias ? mutable_data<T>(grad_weight) : nullptr,
                      need_bias ? mutable_data<T>(grad_bias) : nullptr, shape, input);
  });
  return {grad_input, need_weight ? grad_weight : new_tensor({0}, input), grad_bias};
}

#if !defined(FASTCONV_EMULATOR)
// Convolution, and mean and variance of each channel of it.
std::tuple<Tensor, Tensor, Tensor> moments(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                           Integers stride, Integers padding, Integers dilation) {
  const DepthwiseConv2dShape shape = make_shape(input, weight, stride, padding, dilation);
  check_bias(bias, input, shape.out_channels);
  const Tensor output =
      new_moments_output(input, {shape.batch, shape.out_channels, shape.out_height, shape.out_width});
  const Tensor mean = new_tensor({shape.out_channels}, input),
               variance = new_tensor({shape.out_channels}, input);
  input = as_format(input, format_of(shape));
  weight = as_contiguous(weight);
  dispatch_sum_type(input, "input", [&](auto element) {
    using T = decltype(element);
    FASTCONV_CALL_CPU(depthwise_conv2d_vectorized_forward_moments_cpu<T>(
        const_data<T>(input), const_data<T>(weight), const_data<T>(bias), mutable_data<T>(output),
        mutable_data<T>(mean), mutable_data<T>(variance), shape, torch_threads));
  });
  return {output, mean, variance};
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) {
  library.impl("depthwise_conv2d_moments", TORCH_BOX(&moments));
}
#endif

}  // namespace

FASTCONV_BIND(depthwise_conv2d, forward)
FASTCONV_BIND(depthwise_conv2d_backward, backward)

}  // namespace fastconv

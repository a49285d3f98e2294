// Binds the normalisation behind a convolution to torch.ops.fastconv.
#include "conv_bn_act.h"

#include <tuple>

#include "../common/binding.h"

namespace fastconv {
namespace {

// What a kernel reads and writes beside the images.
template <typename T>
struct Channels {
  accumulate_t<T>*mean, *variance, *grad_weight, *grad_bias;  // (C); the last two backward alone
};

struct Cpu {
  template <typename T>
  static void normalize(const std::optional<std::string>& algorithm, const BatchNorm<T>& norm,
                        const Tensor& output, const Channels<T>& channels, const BatchNormShape& shape) {
    T* const out = mutable_data<T>(output);
    if (chosen(algorithm, {"vectorized", "plain"}) == "vectorized") {
      FASTCONV_CALL_CPU(conv_bn_act_vectorized_normalize_cpu<T>(norm, out, channels.mean, channels.variance,
                                                                shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(conv_bn_act_plain_normalize_cpu<T>(norm, out, channels.mean, channels.variance, shape,
                                                           torch_threads));
    }
  }

  template <typename T>
  static void grad_normalize(const std::optional<std::string>& algorithm, const T* grad_output,
                             const BatchNorm<T>& norm, const Tensor& grad_input, T* grad_residual,
                             const Channels<T>& channels, const BatchNormShape& shape) {
    T* const grad = mutable_data<T>(grad_input);
    if (chosen(algorithm, {"vectorized", "plain"}) == "vectorized") {
      FASTCONV_CALL_CPU(conv_bn_act_vectorized_grad_normalize_cpu<T>(
          grad_output, norm, channels.mean, channels.variance, grad, grad_residual, channels.grad_weight,
          channels.grad_bias, shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(conv_bn_act_plain_grad_normalize_cpu<T>(
          grad_output, norm, channels.mean, channels.variance, grad, grad_residual, channels.grad_weight,
          channels.grad_bias, shape, torch_threads));
    }
  }
};

struct Cuda {
  template <typename T>
  static Tensor workspace(bool sliced, const BatchNormShape& shape, const Tensor& like) {
    const int64_t size = (sliced ? conv_bn_act_sliced_workspace : conv_bn_act_plain_workspace)(shape);
    return torch::stable::empty({size}, accumulate_dtype<T>, std::nullopt, like.device());
  }

  template <typename T>
  static void normalize(const std::optional<std::string>& algorithm, const BatchNorm<T>& norm,
                        const Tensor& output, const Channels<T>& channels, const BatchNormShape& shape) {
    const bool sliced = chosen(algorithm, {"sliced", "plain"}) == "sliced";
    const Tensor space = workspace<T>(sliced, shape, output);
    (sliced ? conv_bn_act_sliced_normalize_cuda<T>
            : conv_bn_act_plain_normalize_cuda<T>)(norm, mutable_data<T>(output), channels.mean,
                                                   channels.variance, mutable_data<accumulate_t<T>>(space),
                                                   shape, stream_of(output));
  }

  template <typename T>
  static void grad_normalize(const std::optional<std::string>& algorithm, const T* grad_output,
                             const BatchNorm<T>& norm, const Tensor& grad_input, T* grad_residual,
                             const Channels<T>& channels, const BatchNormShape& shape) {
    const bool sliced = chosen(algorithm, {"sliced", "plain"}) == "sliced";
    const Tensor space = workspace<T>(sliced, shape, grad_input);
    (sliced ? conv_bn_act_sliced_grad_normalize_cuda<T>
            : conv_bn_act_plain_grad_normalize_cuda<T>)(grad_output, norm, channels.mean, channels.variance,
                                                        mutable_data<T>(grad_input), grad_residual,
                                                        channels.grad_weight, channels.grad_bias,
                                                        mutable_data<accumulate_t<T>>(space), shape,
                                                        stream_of(grad_input));
  }
};

BatchNormShape shape_of(const Tensor& input, MemoryFormat format) {
  return {input.size(0), input.size(1), input.size(2) * input.size(3), format == MemoryFormat::ChannelsLast};
}

// One number of each channel, in the type of sums, dense.
template <typename T>
void check_channels(std::optional<Tensor>& values, const Tensor& input, const char* name) {
  if (!values) return;
  check_rank(*values, 1, name);
  check_size(*values, 0, input.size(1), name);
  STD_TORCH_CHECK(values->scalar_type() == accumulate_dtype<T> && values->device() == input.device(), name,
                  " must be on the device of input, in the type of its sums (float32; float64 of float64)");
  values = as_contiguous(*values);
}

// Zeros where no kernel will write them.
template <typename T>
Tensor new_channels(const BatchNormShape& shape, const Tensor& like) {
  Tensor values = torch::stable::empty({shape.channels}, accumulate_dtype<T>, std::nullopt, like.device());
  if (shape.size() == 0) torch::stable::zero_(values);
  return values;
}

void check_image(std::optional<Tensor>& image, const Tensor& input, MemoryFormat format, const char* name) {
  if (!image) return;
  check_rank(*image, 4, name);
  check_like(*image, input, name);
  for (int dim = 0; dim < 4; ++dim) check_size(*image, dim, input.size(dim), name);
  image = as_format(*image, format);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> normalize(Tensor input, std::optional<Tensor> residual,
                                             std::optional<Tensor> weight, std::optional<Tensor> bias,
                                             double eps, std::optional<std::string> activation,
                                             std::optional<std::string> algorithm) {
  check_rank(input, 4, "input");
  const MemoryFormat format = memory_format_of(input);
  check_image(residual, input, format, "residual");
  const Activation parsed = parse_activation(activation);
  const BatchNormShape shape = shape_of(input, format);
  std::tuple<Tensor, Tensor, Tensor> result;
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    check_channels<T>(weight, input, "weight");
    check_channels<T>(bias, input, "bias");
    const Tensor output = new_tensor(sizes_of(input), input, format);
    const Tensor mean = new_channels<T>(shape, input), variance = new_channels<T>(shape, input);
    result = {output, mean, variance};
    if (shape.size() == 0) return;
    const Tensor dense = as_format(input, format);
    const OnDeviceOf guard(input);
    using A = accumulate_t<T>;
    const BatchNorm<T> norm{const_data<T>(dense),
                            const_data<T>(residual),
                            const_data<A>(weight),
                            const_data<A>(bias),
                            A(eps),
                            parsed};
    Backend::template normalize<T>(algorithm, norm, output,
                                   {mutable_data<A>(mean), mutable_data<A>(variance)}, shape);
  });
  return result;
}

#if !defined(FASTCONV_EMULATOR)
// normalize with a mean and a variance that are known.
Tensor apply(Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
             std::optional<Tensor> bias, Tensor mean, Tensor variance, double eps,
             std::optional<std::string> activation) {
  check_rank(input, 4, "input");
  const MemoryFormat format = memory_format_of(input);
  check_image(residual, input, format, "residual");
  const Activation parsed = parse_activation(activation);
  const BatchNormShape shape = shape_of(input, format);
  const Tensor output = new_tensor(sizes_of(input), input, format);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    std::optional<Tensor> means = mean, variances = variance;
    check_channels<T>(weight, input, "weight");
    check_channels<T>(bias, input, "bias");
    check_channels<T>(means, input, "mean");
    check_channels<T>(variances, input, "variance");
    if (shape.size() == 0) return;
    const Tensor dense = as_format(input, format);
    const BatchNorm<T> norm{const_data<T>(dense),
                            const_data<T>(residual),
                            const_data<A>(weight),
                            const_data<A>(bias),
                            A(eps),
                            parsed};
    FASTCONV_CALL_CPU(conv_bn_act_vectorized_apply_cpu<T>(
        norm, const_data<A>(means), const_data<A>(variances), mutable_data<T>(output), shape, torch_threads));
  });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) { library.impl("conv_bn_act_apply", TORCH_BOX(&apply)); }
#endif

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> grad_normalize(
    Tensor grad_output, Tensor input, std::optional<Tensor> residual, std::optional<Tensor> weight,
    std::optional<Tensor> bias, Tensor mean, Tensor variance, double eps,
    std::optional<std::string> activation, std::optional<std::string> algorithm, bool need_residual) {
  check_rank(input, 4, "input");
  const MemoryFormat format = memory_format_of(input);
  std::optional<Tensor> grad = grad_output;
  check_image(grad, input, format, "grad_output");
  check_image(residual, input, format, "residual");
  const Activation parsed = parse_activation(activation);
  const BatchNormShape shape = shape_of(input, format);
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    using A = accumulate_t<T>;
    std::optional<Tensor> means = mean, variances = variance;
    check_channels<T>(weight, input, "weight");
    check_channels<T>(bias, input, "bias");
    check_channels<T>(means, input, "mean");
    check_channels<T>(variances, input, "variance");
    const Tensor grad_input = new_tensor(sizes_of(input), input, format);
    const Tensor grad_residual =
        need_residual ? new_tensor(sizes_of(input), input, format) : new_tensor({0}, input);
    const Tensor grad_weight = new_channels<T>(shape, input), grad_bias = new_channels<T>(shape, input);
    result = {grad_input, grad_residual, grad_weight, grad_bias};
    if (shape.size() == 0) return;
    const Tensor dense = as_format(input, format);
    const OnDeviceOf guard(input);
    const BatchNorm<T> norm{const_data<T>(dense),
                            const_data<T>(residual),
                            const_data<A>(weight),
                            const_data<A>(bias),
                            A(eps),
                            parsed};
    Backend::template grad_normalize<T>(algorithm, const_data<T>(grad), norm, grad_input,
                                        need_residual ? mutable_data<T>(grad_residual) : nullptr,
                                        {mutable_data<A>(*means), mutable_data<A>(*variances),
                                         mutable_data<A>(grad_weight), mutable_data<A>(grad_bias)},
                                        shape);
  });
  return result;
}

}  // namespace

FASTCONV_BIND(conv_bn_act_normalize, normalize)
FASTCONV_BIND(conv_bn_act_normalize_backward, grad_normalize)

}  // namespace fastconv

// Binds grouped convolution with channel shuffle to torch.ops.fastconv.
#include "group_conv2d_shuffle.h"

#include "../conv2d/conv2d_binding.h"

namespace fastconv {
namespace {

template <typename T>
void run(Cpu, const std::optional<std::string>& algorithm, const Tensor& input, const Tensor& weight,
         const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue, const Tensor& output,
         const Conv2dShape& shape) {
  const std::string variant = chosen(algorithm, {"im2col", "plain"});
  const Tensor kept =
      Cpu::packed_weight<T>(Cpu::find<Conv2dCpuVariant<T>>(variant, shape), packed, weight, shape);
  const auto* weights = const_data<accumulate_t<T>>(kept);
  const T* images = const_data<T>(input);
  T* result = mutable_data<T>(output);
  if (variant == "im2col") {
    FASTCONV_CALL_CPU(
        group_conv2d_shuffle_im2col_forward_cpu<T>(images, weights, epilogue, result, shape, torch_threads));
  } else {
    FASTCONV_CALL_CPU(
        group_conv2d_shuffle_plain_forward_cpu<T>(images, weights, epilogue, result, shape, torch_threads));
  }
}

template <typename T>
void run(Cuda, const std::optional<std::string>& algorithm, const Tensor& input, const Tensor& weight,
         const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue, const Tensor& output,
         const Conv2dShape& shape) {
  const std::vector variants = {
      CudaForward{"implicit_gemm", group_conv2d_shuffle_implicit_gemm_forward_cuda<T>},
      CudaForward{"im2col", group_conv2d_shuffle_im2col_forward_cuda<T>}};
  Cuda::check_not_packed(packed);
  const Tensor dense = as_contiguous(weight);
  Cuda::run(algorithm, variants, [&](const auto& variant) {
    return variant.forward(const_data<T>(input), const_data<T>(dense), epilogue, mutable_data<T>(output),
                           shape, stream_of(input));
  });
}

template <typename Backend>
Tensor forward(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> packed,
               Integers stride, Integers padding, Integers dilation, int64_t groups,
               std::optional<std::string> activation, std::optional<std::string> algorithm) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, padding, dilation, groups);
  check_bias(bias, input, shape.out_channels);
  const Activation parsed = parse_activation(activation);
  const Tensor output = new_tensor(output_sizes(shape), input, format_of(shape));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(shape));
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    const Conv2dEpilogue<T> epilogue{const_data<T>(bias), nullptr, parsed};
    run<T>(Backend(), algorithm, input, weight, packed, epilogue, output, shape);
  });
  return output;
}

}  // namespace

FASTCONV_BIND(group_conv2d_shuffle, forward)

}  // namespace fastconv

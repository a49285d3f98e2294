// Binds shift with 1x1 convolution to torch.ops.fastconv.
#include "shift_conv2d.h"

#include "../conv2d/conv2d_binding.h"

namespace fastconv {
namespace {

template <typename T>
void run(Cpu, const std::optional<std::string>& algorithm, const Tensor& input, const int64_t* offsets,
         const Tensor& weight, const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue,
         const Tensor& output, const Conv2dShape& shape) {
  const bool whole_pixels = shape.channels_last && shape.stride_height * shape.stride_width == 1;
  const std::string variant = algorithm      ? chosen(algorithm, {"direct", "im2col", "plain"})
                              : whole_pixels ? "direct"
                                             : "im2col";
  const Tensor kept =
      Cpu::packed_weight<T>(Cpu::find<Conv2dCpuVariant<T>>(variant, shape), packed, weight, shape);
  const auto* weights = const_data<accumulate_t<T>>(kept);
  const T* images = const_data<T>(input);
  T* result = mutable_data<T>(output);
  if (variant == "direct") {
    FASTCONV_CALL_CPU(
        shift_conv2d_direct_forward_cpu<T>(images, offsets, weights, epilogue, result, shape, torch_threads));
  } else if (variant == "im2col") {
    FASTCONV_CALL_CPU(
        shift_conv2d_im2col_forward_cpu<T>(images, offsets, weights, epilogue, result, shape, torch_threads));
  } else {
    FASTCONV_CALL_CPU(
        shift_conv2d_plain_forward_cpu<T>(images, offsets, weights, epilogue, result, shape, torch_threads));
  }
}

template <typename T>
void run(Cuda, const std::optional<std::string>& algorithm, const Tensor& input, const int64_t* offsets,
         const Tensor& weight, const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue,
         const Tensor& output, const Conv2dShape& shape) {
  const std::vector variants = {CudaForward{"implicit_gemm", shift_conv2d_implicit_gemm_forward_cuda<T>},
                                CudaForward{"im2col", shift_conv2d_im2col_forward_cuda<T>},
                                CudaForward{"plain", shift_conv2d_plain_forward_cuda<T>}};
  Cuda::check_not_packed(packed);
  const Tensor dense = as_contiguous(weight);
  Cuda::run(algorithm, variants, [&](const auto& variant) {
    return variant.forward(const_data<T>(input), offsets, const_data<T>(dense), epilogue,
                           mutable_data<T>(output), shape, stream_of(input));
  });
}

template <typename Backend>
Tensor forward(Tensor input, Tensor offsets, Tensor weight, std::optional<Tensor> bias,
               std::optional<Tensor> packed, Integers stride, std::optional<std::string> activation,
               std::optional<std::string> algorithm) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, {0, 0, 0, 0}, {1, 1}, 1);
  check_offsets(offsets, shape.in_channels);
  check_size(weight, 2, 1, "weight");
  check_size(weight, 3, 1, "weight");
  check_bias(bias, input, shape.out_channels);
  const Activation parsed = parse_activation(activation);
  const Tensor output = new_tensor(output_sizes(shape), input, format_of(shape));
  if (output.numel() == 0) return output;
  input = as_format(input, format_of(shape));
  offsets = as_contiguous(offsets);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    const Conv2dEpilogue<T> epilogue{const_data<T>(bias), nullptr, parsed};
    run<T>(Backend(), algorithm, input, const_data<int64_t>(offsets), weight, packed, epilogue, output,
           shape);
  });
  return output;
}

}  // namespace

FASTCONV_BIND(shift_conv2d, forward)

}  // namespace fastconv

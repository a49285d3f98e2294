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

// Raises where the arguments do not fit together.
Conv2dShape shape_of(const Tensor& input, const Tensor& weight, const Tensor& offsets,
                     const Integers& stride) {
  const Conv2dShape shape = conv2d_shape(input, weight, stride, {0, 0, 0, 0}, {1, 1}, 1);
  check_offsets(offsets, shape.in_channels);
  check_size(weight, 2, 1, "weight");
  check_size(weight, 3, 1, "weight");
  return shape;
}

template <typename Backend>
Tensor forward(Tensor input, Tensor offsets, Tensor weight, std::optional<Tensor> bias,
               std::optional<Tensor> packed, Integers stride, std::optional<std::string> activation,
               std::optional<std::string> algorithm) {
  const Conv2dShape shape = shape_of(input, weight, offsets, stride);
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

#if !defined(FASTCONV_EMULATOR)
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor input, Tensor weight, Tensor offsets,
                                            Integers stride, bool need_input, bool need_weight,
                                            bool need_bias) {
  const Conv2dShape shape = shape_of(input, weight, offsets, stride);
  check_like_output(grad_output, input, shape, "grad_output");
  STD_TORCH_CHECK(shape.channels_last, "input must be channels_last and not empty: the gradients of other ",
                  "images are those of conv2d and shift2d");
  auto [grad_input, grad_weight, grad_bias] =
      new_gradients(input, weight, format_of(shape), need_input, need_weight, need_bias);
  grad_output = as_format(grad_output, format_of(shape));
  input = as_format(input, format_of(shape));
  offsets = as_contiguous(offsets);
  const Tensor dense = as_contiguous(weight);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    const auto* moves = const_data<int64_t>(offsets);
    if (need_input)
      FASTCONV_CALL_CPU(
          shift_conv2d_direct_grad_input_cpu<T>(const_data<T>(grad_output), const_data<T>(dense), moves,
                                                mutable_data<T>(grad_input), shape, torch_threads));
    if (need_weight || need_bias)
      FASTCONV_CALL_CPU(shift_conv2d_direct_grad_weight_cpu<T>(
          const_data<T>(grad_output), const_data<T>(input), moves, mutable_data<T>(grad_weight),
          need_bias ? mutable_data<T>(grad_bias) : nullptr, shape, torch_threads));
  });
  return {grad_input, need_weight ? as_format(grad_weight, format_of_weight(weight)) : new_tensor({0}, input),
          grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) {
  library.impl("shift_conv2d_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace

FASTCONV_BIND(shift_conv2d, forward)

}  // namespace fastconv

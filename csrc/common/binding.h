// What every binding shares: the launcher's ritual on PyTorch's stable ABI. Only <op>.cpp files include this.
//
//   device, dtype, shapes (check_*), empty returns early, guard, current stream, launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "activation.h"
#include "cpu.h"
#include "types.h"

namespace fastconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

// Calls body(T{}) with the kernel's element type for a tensor's dtype.
template <typename Body>
void dispatch_dtype(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Float16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// The same of kernels that know float32 and float64 alone.
template <typename Body>
void dispatch_sum_type(const Tensor& tensor, const char* name, const Body& body) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  " must be float32 or float64");
  type == ScalarType::Float ? body(float{}) : body(double{});
}

// The type that sums of a kernel's values are kept in.
template <typename T>
constexpr ScalarType accumulate_dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

template <typename T>
const T* const_data(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0,
                  "a tensor has values, but its memory is not allocated");
  return static_cast<const T*>(data);
}
template <typename T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline void check_rank(const Tensor& tensor, int64_t rank, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimensions, got ", tensor.dim());
}

inline void check_like(const Tensor& tensor, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  STD_TORCH_CHECK(tensor.device() == input.device(), name, " must be on the device of input");
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ",
                  tensor.size(dim));
}

// LARGEST in fastconv/ops/_arguments.py: a few products of one with a size fit 64 bits.
constexpr int64_t largest_integer = INT32_MAX;

inline void check_integers(const Integers& values, size_t count, int64_t least, const char* name) {
  STD_TORCH_CHECK(values.size() == count, name, " must have ", count, " values, got ", values.size());
  for (const int64_t value : values) {
    STD_TORCH_CHECK(value >= least, name, " must be at least ", least, ", got ", value);
    STD_TORCH_CHECK(value <= largest_integer, name, " must be at most ", largest_integer, ", got ", value);
  }
}

// Outputs along one axis: floor((size + padding - dilation * (kernel - 1) - 1) / stride) + 1.
inline int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(size + padding >= span, "weight spans ", span, " pixels, more than the padded input's ",
                  size + padding);
  return (size + padding - span) / stride + 1;
}

inline Activation parse_activation(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  if (*name == "relu") return Activation::relu;
  if (*name == "relu6") return Activation::relu6;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "activation must be relu, relu6, gelu, gelu_tanh or silu, got ", *name);
}

// channels_last if the strides say so; the twin of memory_format_of in fastconv/ops/_operator.py.
inline MemoryFormat memory_format_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return MemoryFormat::Contiguous;
  int64_t smallest = 0;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < smallest) return MemoryFormat::Contiguous;
    if (dim == 0 && smallest == strides[1]) return MemoryFormat::Contiguous;
    smallest = strides[dim] * sizes[dim];
  }
  return MemoryFormat::ChannelsLast;
}

inline bool is_dense(const Tensor& tensor, MemoryFormat format) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int orders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int dim : orders[format == MemoryFormat::ChannelsLast]) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

// The tensor itself where it lies as asked, else a copy that does.
inline Tensor as_format(const Tensor& tensor, MemoryFormat format) {
  return is_dense(tensor, format) ? tensor : torch::stable::contiguous(tensor, format);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A bias of one value for each channel, dense.
inline void check_bias(std::optional<Tensor>& bias, const Tensor& input, int64_t channels,
                       const char* name = "bias") {
  if (!bias) return;
  check_rank(*bias, 1, name);
  check_size(*bias, 0, channels, name);
  check_like(*bias, input, name);
  bias = as_contiguous(*bias);
}

inline Integers sizes_of(const Tensor& tensor) {
  return Integers(tensor.sizes().begin(), tensor.sizes().end());
}

inline Tensor new_tensor(const Integers& sizes, const Tensor& like,
                         MemoryFormat format = MemoryFormat::Contiguous) {
  try {
    return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
  } catch (const std::exception&) {  // which does not say what was too large
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "there is no memory for a result of shape (", shape, ")");
  }
}

// The output of a convolution that gathers mean and variance.
inline Tensor new_moments_output(const Tensor& input, const Integers& sizes) {
  STD_TORCH_CHECK(input.numel() > 0, "input must not be empty: no values have no mean");
  STD_TORCH_CHECK(memory_format_of(input) == MemoryFormat::ChannelsLast, "input must be channels_last");
  return new_tensor(sizes, input, MemoryFormat::ChannelsLast);
}

// Gradients of a convolution's input, weight and bias, not initialised; of size 0 where they are not needed.
// One pass over grad_output serves weight and bias, and needs memory for the weight's in either case.
inline std::tuple<Tensor, Tensor, Tensor> new_gradients(const Tensor& input, const Tensor& weight,
                                                        MemoryFormat format, bool need_input,
                                                        bool need_weight, bool need_bias) {
  const Integers nothing = {0};
  return {need_input ? new_tensor(sizes_of(input), input, format) : new_tensor(nothing, input),
          new_tensor(need_weight || need_bias ? sizes_of(weight) : nothing, input),
          new_tensor({need_bias ? weight.size(0) : 0}, input)};
}

// A shift's rows (dh, dw), one for each channel.
inline void check_offsets(const Tensor& offsets, int64_t channels) {
  check_rank(offsets, 2, "offsets");
  check_size(offsets, 0, channels, "offsets");
  check_size(offsets, 1, 2, "offsets");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.is_cpu(),
                  "offsets must be int64 on the CPU");
}

// PyTorch's threads, for a kernel's ParallelFor: one range of indices for each thread.
inline void torch_threads(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 1) return body(0, count, context);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
}

// The algorithm that was asked for, or the first where none was; raises where it is none of these.
inline std::string chosen(const std::optional<std::string>& algorithm,
                          std::initializer_list<const char*> names) {
  std::string known;
  for (const char* name : names) {
    if (!algorithm || *algorithm == name) return name;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  STD_TORCH_CHECK(false, "algorithm must be one of ", known, ", got ", *algorithm);
}

// The current stream of a CUDA tensor's device; the emulator has none.
inline void* stream_of([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#if defined(FASTCONV_WITH_CUDA)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return stream;
}

// Makes a CUDA tensor's device the current one for as long as it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf([[maybe_unused]] const Tensor& tensor) {
#if defined(FASTCONV_WITH_CUDA)
    if (tensor.is_cuda()) guard_.emplace(tensor.get_device_index());
#endif
  }

#if defined(FASTCONV_WITH_CUDA)
 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// FASTCONV_BIND(op, function): function<Cpu> serves CPU tensors and function<Cuda> CUDA tensors. In the
// emulator's library, function<Cuda> serves the overload ".emulator", of CPU tensors.
#if defined(FASTCONV_EMULATOR)
#define FASTCONV_BIND(op, function)                              \
  STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) {            \
    library.impl(#op ".emulator", TORCH_BOX(&(function<Cuda>))); \
  }
#elif defined(FASTCONV_WITH_CUDA)
#define FASTCONV_BIND(op, function)                                                                     \
  STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) { library.impl(#op, TORCH_BOX(&(function<Cpu>))); } \
  STABLE_TORCH_LIBRARY_IMPL(fastconv, CUDA, library) { library.impl(#op, TORCH_BOX(&(function<Cuda>))); }
#else
#define FASTCONV_BIND(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, library) { library.impl(#op, TORCH_BOX(&(function<Cpu>))); }
#endif

}  // namespace fastconv

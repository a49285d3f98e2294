// Binds the shift kernels to torch.ops.fastconv.
#include "shift2d.h"

#include "../common/binding.h"

namespace fastconv {
namespace {

struct Cpu {
  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, const int64_t* offsets,
                      T* output, const Shift2dShape& shape, const Tensor&) {
    if (chosen(algorithm, {"vectorized", "plain"}) == "vectorized") {
      FASTCONV_CALL_CPU(shift2d_vectorized_forward_cpu<T>(input, offsets, output, shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(shift2d_plain_forward_cpu<T>(input, offsets, output, shape, torch_threads));
    }
  }
};

struct Cuda {
  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, const int64_t* offsets,
                      T* output, const Shift2dShape& shape, const Tensor& tensor) {
    const bool tiled = chosen(algorithm, {"tiled", "plain"}) == "tiled";
    const auto kernel = tiled ? shift2d_tiled_forward_cuda<T> : shift2d_plain_forward_cuda<T>;
    kernel(input, offsets, output, shape, stream_of(tensor));
  }
};

template <typename Backend>
Tensor forward(Tensor input, Tensor offsets, std::optional<std::string> algorithm) {
  check_rank(input, 4, "input");
  check_offsets(offsets, input.size(1));
  const MemoryFormat format = memory_format_of(input);
  const Tensor output = new_tensor(sizes_of(input), input, format);
  if (output.numel() == 0) return output;
  const Shift2dShape shape{input.size(0), input.size(1), input.size(2), input.size(3),
                           format == MemoryFormat::ChannelsLast};
  input = as_format(input, format);
  offsets = as_contiguous(offsets);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::forward(algorithm, const_data<T>(input), const_data<int64_t>(offsets), mutable_data<T>(output),
                     shape, input);
  });
  return output;
}

}  // namespace

FASTCONV_BIND(shift2d, forward)

}  // namespace fastconv

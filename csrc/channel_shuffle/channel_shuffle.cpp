// Binds the channel shuffle kernels to torch.ops.fastconv.
#include "channel_shuffle.h"

#include "../common/binding.h"

namespace fastconv {
namespace {

struct Cpu {
  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, T* output,
                      const ChannelShuffleShape& shape, const Tensor&) {
    if (chosen(algorithm, {"vectorized", "plain"}) == "vectorized") {
      FASTCONV_CALL_CPU(channel_shuffle_vectorized_forward_cpu<T>(input, output, shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(channel_shuffle_plain_forward_cpu<T>(input, output, shape, torch_threads));
    }
  }
};

struct Cuda {
  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const T* input, T* output,
                      const ChannelShuffleShape& shape, const Tensor& tensor) {
    const bool tiled = chosen(algorithm, {"tiled", "plain"}) == "tiled";
    const auto kernel = tiled ? channel_shuffle_tiled_forward_cuda<T> : channel_shuffle_plain_forward_cuda<T>;
    kernel(input, output, shape, stream_of(tensor));
  }
};

template <typename Backend>
Tensor forward(Tensor input, int64_t groups, std::optional<std::string> algorithm) {
  check_rank(input, 4, "input");
  STD_TORCH_CHECK(groups >= 1, "groups must be at least 1, got ", groups);
  STD_TORCH_CHECK(input.size(1) % groups == 0, "groups must divide input's ", input.size(1),
                  " channels, got ", groups);
  const MemoryFormat format = memory_format_of(input);
  const Tensor output = new_tensor(sizes_of(input), input, format);
  if (output.numel() == 0) return output;
  ChannelShuffleShape shape{input.size(0), input.size(1), input.size(2) * input.size(3), groups};
  if (format == MemoryFormat::ChannelsLast) {
    shape.images *= shape.run;
    shape.run = 1;
  }
  input = as_format(input, format);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::forward(algorithm, const_data<T>(input), mutable_data<T>(output), shape, input);
  });
  return output;
}

}  // namespace

FASTCONV_BIND(channel_shuffle, forward)

}  // namespace fastconv

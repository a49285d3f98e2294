// Binds the temporal shift kernels to torch.ops.fastconv.
#include "temporal_shift.h"

#include "../common/binding.h"

namespace fastconv {
namespace {

struct Cpu {
  template <typename T>
  static void forward(bool vectorized, const T* input, T* output, const TemporalShiftShape& shape,
                      const Tensor&) {
    if (vectorized) {
      FASTCONV_CALL_CPU(temporal_shift_vectorized_forward_cpu<T>(input, output, shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(temporal_shift_plain_forward_cpu<T>(input, output, shape, torch_threads));
    }
  }

  template <typename T>
  static void in_place(bool vectorized, T* values, const TemporalShiftShape& shape, const Tensor&) {
    if (vectorized) {
      FASTCONV_CALL_CPU(temporal_shift_vectorized_in_place_cpu<T>(values, shape, torch_threads));
    } else {
      FASTCONV_CALL_CPU(temporal_shift_plain_in_place_cpu<T>(values, shape, torch_threads));
    }
  }
};

struct Cuda {
  template <typename T>
  static void forward(bool vectorized, const T* input, T* output, const TemporalShiftShape& shape,
                      const Tensor& tensor) {
    const auto kernel =
        vectorized ? temporal_shift_vectorized_forward_cuda<T> : temporal_shift_plain_forward_cuda<T>;
    kernel(input, output, shape, stream_of(tensor));
  }

  template <typename T>
  static void in_place(bool vectorized, T* values, const TemporalShiftShape& shape, const Tensor& tensor) {
    const auto kernel =
        vectorized ? temporal_shift_vectorized_in_place_cuda<T> : temporal_shift_plain_in_place_cuda<T>;
    kernel(values, shape, stream_of(tensor));
  }
};

bool is_vectorized(const std::optional<std::string>& algorithm) {
  return chosen(algorithm, {"vectorized", "plain"}) == "vectorized";
}

TemporalShiftShape checked_shape(const Tensor& input, MemoryFormat format, int64_t segments, int64_t fold,
                                 int64_t step, bool both) {
  STD_TORCH_CHECK(segments >= 1, "segments must be at least 1, got ", segments);
  STD_TORCH_CHECK(input.size(0) % segments == 0, "segments must divide input's ", input.size(0),
                  " frames, got ", segments);
  const int64_t channels = input.size(1), plane = input.size(2) * input.size(3);
  const int64_t most = channels / (both ? 2 : 1);
  STD_TORCH_CHECK(fold >= 0 && fold <= most, "fold must be from 0 to ", most, ", got ", fold);
  STD_TORCH_CHECK(step == 1 || step == -1, "step must be 1 or -1, got ", step);
  if (format == MemoryFormat::ChannelsLast)
    return {input.size(0), segments, plane, channels, fold, step, both};
  return {input.size(0), segments, 1, channels * plane, fold * plane, step, both};
}

template <typename Backend>
Tensor forward(Tensor input, int64_t segments, int64_t fold, int64_t step, bool both,
               std::optional<std::string> algorithm) {
  check_rank(input, 4, "input");
  const MemoryFormat format = memory_format_of(input);
  const TemporalShiftShape shape = checked_shape(input, format, segments, fold, step, both);
  const bool vectorized = is_vectorized(algorithm);
  const Tensor output = new_tensor(sizes_of(input), input, format);
  if (output.numel() == 0) return output;
  input = as_format(input, format);
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::forward(vectorized, const_data<T>(input), mutable_data<T>(output), shape, input);
  });
  return output;
}

template <typename Backend>
void in_place(Tensor input, int64_t segments, int64_t fold, int64_t step, bool both,
              std::optional<std::string> algorithm) {
  check_rank(input, 4, "input");
  const MemoryFormat format = memory_format_of(input);
  const TemporalShiftShape shape = checked_shape(input, format, segments, fold, step, both);
  const bool vectorized = is_vectorized(algorithm);
  if (input.numel() == 0) return;
  const Tensor dense = as_format(input, format);  // the input itself, if it is
  const OnDeviceOf guard(input);
  dispatch_dtype(input, "input", [&](auto element) {
    using T = decltype(element);
    Backend::in_place(vectorized, mutable_data<T>(dense), shape, input);
  });
  if (!is_dense(input, format)) torch::stable::copy_(input, dense);
}

}  // namespace

FASTCONV_BIND(temporal_shift, forward)
FASTCONV_BIND(temporal_shift_, in_place)

}  // namespace fastconv

// What the bindings of convolution and of its transpose share: the shape, and every variant of a kernel as a
// row of a table.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/binding.h"
#include "../conv_transpose2d/conv_transpose2d.h"
#include "conv2d.h"

namespace fastconv {

inline MemoryFormat format_of(const Conv2dShape& shape) {
  return shape.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The part of a shape that the weight and its arguments give: what packed weights depend on. The images are
// empty.
inline Conv2dShape make_shape_of_weight(const Tensor& weight, const Integers& stride, const Integers& padding,
                                        const Integers& dilation, int64_t groups) {
  check_rank(weight, 4, "weight");
  check_integers(stride, 2, 1, "stride");
  check_integers(padding, 2, 0, "padding");
  check_integers(dilation, 2, 1, "dilation");
  STD_TORCH_CHECK(groups >= 1, "groups must be at least 1, got ", groups);
  for (int dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(weight.size(dim) > 0, "weight must not be empty, got size 0 in dimension ", dim);
  STD_TORCH_CHECK(weight.size(0) % groups == 0, "weight must have a multiple of ", groups,
                  " groups in dimension 0, got ", weight.size(0));
  Conv2dShape shape{};
  shape.in_channels = weight.size(1) * groups;
  shape.out_channels = weight.size(0);
  shape.kernel_height = weight.size(2);
  shape.kernel_width = weight.size(3);
  shape.stride_height = stride[0];
  shape.stride_width = stride[1];
  shape.padding_top = padding[0];
  shape.padding_left = padding[1];
  shape.dilation_height = dilation[0];
  shape.dilation_width = dilation[1];
  shape.groups = groups;
  return shape;
}

// The shape of a convolution of these images; raises where they and the weight do not fit together.
inline Conv2dShape conv2d_shape(const Tensor& input, const Tensor& weight, const Integers& stride,
                                const Integers& padding, const Integers& dilation, int64_t groups) {
  check_rank(input, 4, "input");
  check_like(weight, input, "weight");
  check_integers(padding, 4, 0, "padding");
  Conv2dShape shape = make_shape_of_weight(weight, stride, {padding[0], padding[2]}, dilation, groups);
  STD_TORCH_CHECK(input.size(1) == shape.in_channels, "weight must have size ", input.size(1), " / ", groups,
                  " in dimension 1 (input's channels / groups), got ", weight.size(1));
  shape.batch = input.size(0);
  shape.in_height = input.size(2);
  shape.in_width = input.size(3);
  shape.out_height =
      output_size(shape.in_height, shape.kernel_height, stride[0], padding[0] + padding[1], dilation[0]);
  shape.out_width =
      output_size(shape.in_width, shape.kernel_width, stride[1], padding[2] + padding[3], dilation[1]);
  shape.channels_last = memory_format_of(input) == MemoryFormat::ChannelsLast;
  return shape;
}

inline Integers output_sizes(const Conv2dShape& shape) {
  return {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
}

inline void check_like_output(const Tensor& tensor, const Tensor& input, const Conv2dShape& shape,
                              const char* name) {
  check_rank(tensor, 4, name);
  check_like(tensor, input, name);
  const Integers expected = output_sizes(shape);
  for (int dim = 0; dim < 4; ++dim) check_size(tensor, dim, expected[dim], name);
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

// What a variant's kernels take for granted. fastconv.conv2d says the same in words before it comes to this.
inline bool serves(const std::string& variant, const Conv2dShape& s) {
  if (variant.starts_with("winograd"))
    return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 &&
           s.dilation_height == 1 && s.dilation_width == 1;
  return true;
}

// The kernels of one variant for one element type; the CPU's are those of the best instruction set here.
template <typename T>
struct Conv2dCpuVariant {
  const char* name;
  decltype(&portable::conv2d_plain_packed_size<T>) packed_size;
  decltype(&portable::conv2d_plain_pack_weight_cpu<T>) pack_weight;
  decltype(&portable::conv2d_plain_forward_cpu<T>) forward;
  decltype(&portable::conv2d_plain_grad_weight_cpu<T>) grad_weight;
  decltype(&portable::conv2d_winograd_f2_forward_unpacked_cpu<T>) forward_unpacked = nullptr;  // some have it
};
template <typename T>
struct ConvTranspose2dCpuVariant {
  const char* name;
  decltype(&portable::conv_transpose2d_plain_packed_size<T>) packed_size;
  decltype(&portable::conv_transpose2d_plain_pack_weight_cpu<T>) pack_weight;
  decltype(&portable::conv_transpose2d_plain_forward_cpu<T>) forward;
  decltype(&portable::conv_transpose2d_winograd_f2_forward_unpacked_cpu<T>) forward_unpacked = nullptr;
};
template <typename T>
struct Conv2dCudaVariant {
  const char* name;
  bool (*forward)(const T*, const T*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, void*);
  int64_t (*grad_weight_workspace)(const Conv2dShape&);
  bool (*grad_weight)(const T*, const T*, T*, T*, accumulate_t<T>*, const Conv2dShape&, void*);
};
// Of an operator whose gradients are others' kernels; a kernel that does not serve a shape returns false.
template <typename... Arguments>
struct CudaForward {
  const char* name;
  bool (*forward)(Arguments...);
};
template <typename T>
using ConvTranspose2dCudaVariant = CudaForward<const T*, const T*, const T*, T*, const Conv2dShape&, void*>;

#define FASTCONV_CONV2D_CPU_ROW(variant)                                               \
  {#variant, conv2d_##variant##_packed_size<T>, conv2d_##variant##_pack_weight_cpu<T>, \
   conv2d_##variant##_forward_cpu<T>, conv2d_##variant##_grad_weight_cpu<T>},
#define FASTCONV_CONV_TRANSPOSE2D_CPU_ROW(variant)                                                         \
  {#variant, conv_transpose2d_##variant##_packed_size<T>, conv_transpose2d_##variant##_pack_weight_cpu<T>, \
   conv_transpose2d_##variant##_forward_cpu<T>},
#define FASTCONV_CONV2D_CUDA_ROW(variant)                                                  \
  {#variant, conv2d_##variant##_forward_cuda<T>, conv2d_##variant##_grad_weight_workspace, \
   conv2d_##variant##_grad_weight_cuda<T>},
#define FASTCONV_CONV_TRANSPOSE2D_CUDA_ROW(variant) {#variant, conv_transpose2d_##variant##_forward_cuda<T>},

#define FASTCONV_CONV2D_UNPACKED(variant) \
  named(rows, #variant).forward_unpacked = conv2d_##variant##_forward_unpacked_cpu<T>;
#define FASTCONV_CONV_TRANSPOSE2D_UNPACKED(variant) \
  named(rows, #variant).forward_unpacked = conv_transpose2d_##variant##_forward_unpacked_cpu<T>;

template <typename Variant>
Variant& named(std::vector<Variant>& rows, std::string_view name) {
  return *std::ranges::find(rows, name, &Variant::name);
}

FASTCONV_DECLARE_CPU(
    template <typename T> void list(std::vector<Conv2dCpuVariant<T>>& rows) {
      rows = {FASTCONV_CONV2D_CPU_VARIANTS(FASTCONV_CONV2D_CPU_ROW)};
      FASTCONV_CONV2D_UNPACKED_CPU_VARIANTS(FASTCONV_CONV2D_UNPACKED)
    } template <typename T>
    void list(std::vector<ConvTranspose2dCpuVariant<T>>& rows) {
      rows = {FASTCONV_CONV_TRANSPOSE2D_CPU_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_CPU_ROW)};
      FASTCONV_CONV2D_UNPACKED_CPU_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_UNPACKED)
    })

template <typename Variant>
const std::vector<Variant>& cpu_variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> rows;
    FASTCONV_CALL_CPU(list(rows));
    return rows;
  }();
  return all;
}
template <typename T>
std::vector<Conv2dCudaVariant<T>> conv2d_cuda_variants() {
  return {FASTCONV_CONV2D_CUDA_VARIANTS(FASTCONV_CONV2D_CUDA_ROW)};
}
template <typename T>
std::vector<ConvTranspose2dCudaVariant<T>> conv_transpose2d_cuda_variants() {
  return {FASTCONV_CONV_TRANSPOSE2D_CUDA_VARIANTS(FASTCONV_CONV_TRANSPOSE2D_CUDA_ROW)};
}

// The rows to try: the one that was asked for, or all; raises where it is none of these.
template <typename Variant>
std::vector<Variant> asked_for(const std::optional<std::string>& algorithm,
                               const std::vector<Variant>& variants) {
  std::vector<Variant> rows;
  std::string known;
  for (const Variant& variant : variants) {
    if (!algorithm || *algorithm == variant.name) rows.push_back(variant);
    known += (known.empty() ? "" : ", ") + std::string(variant.name);
  }
  STD_TORCH_CHECK(!algorithm || !rows.empty(), "algorithm must be one of ", known, ", got ", *algorithm);
  return rows;
}

[[noreturn]] inline void refuse(const std::optional<std::string>& algorithm) {
  if (algorithm)
    STD_TORCH_CHECK(false, "algorithm='", *algorithm, "' does not serve this layout, kernel, stride, ",
                    "dilation or number of groups: use another, or leave the choice open");
  STD_TORCH_CHECK(false, "no algorithm serves this layout, kernel, stride, dilation and number of groups");
}

// The layout of a weight and of its gradient: channels_last where it is that and not contiguous as well.
inline MemoryFormat format_of_weight(const Tensor& weight) {
  return !weight.is_contiguous() && is_dense(weight, MemoryFormat::ChannelsLast) ? MemoryFormat::ChannelsLast
                                                                                 : MemoryFormat::Contiguous;
}

struct Cpu {
  // The first row that serves.
  template <typename Variant>
  static const Variant& find(const std::optional<std::string>& algorithm, const Conv2dShape& shape) {
    for (const Variant& variant : cpu_variants<Variant>())
      if ((!algorithm || *algorithm == variant.name) && serves(variant.name, shape)) return variant;
    asked_for(algorithm, cpu_variants<Variant>());  // raises where there is none of this name
    refuse(algorithm);
  }

  template <typename T, typename Variant>
  static Tensor pack(const Variant& variant, const Tensor& weight, const Conv2dShape& shape) {
    const Tensor packed = torch::stable::empty({variant.packed_size(shape)}, accumulate_dtype<T>);
    const Tensor dense = as_contiguous(weight);
    variant.pack_weight(const_data<T>(dense), mutable_data<accumulate_t<T>>(packed), shape, torch_threads);
    return packed;
  }

  // `packed` if it is what this variant would have packed, else an error; packs where there is none.
  template <typename T, typename Variant>
  static Tensor packed_weight(const Variant& variant, const std::optional<Tensor>& packed,
                              const Tensor& weight, const Conv2dShape& shape) {
    if (!packed) return pack<T>(variant, weight, shape);
    check_rank(*packed, 1, "packed");
    check_size(*packed, 0, variant.packed_size(shape), "packed");
    STD_TORCH_CHECK(packed->scalar_type() == accumulate_dtype<T> && packed->device() == weight.device() &&
                        packed->is_contiguous(),
                    "packed must be as the operator that packs weights returned it");
    return *packed;
  }

  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue,
                      const Tensor& output, const Conv2dShape& shape) {
    const auto& variant = find<Conv2dCpuVariant<T>>(algorithm, shape);
    if (!packed && variant.forward_unpacked) {
      const Tensor dense = as_contiguous(weight);
      return variant.forward_unpacked(const_data<T>(input), const_data<T>(dense), epilogue,
                                      mutable_data<T>(output), shape, torch_threads);
    }
    const Tensor weights = packed_weight<T>(variant, packed, weight, shape);
    variant.forward(const_data<T>(input), const_data<accumulate_t<T>>(weights), epilogue,
                    mutable_data<T>(output), shape, torch_threads);
  }

  template <typename T>
  static void transpose(const std::optional<std::string>& algorithm, const Tensor& input,
                        const Tensor& weight, const std::optional<Tensor>& packed, const T* bias,
                        const Tensor& output, const Conv2dShape& shape) {
    const auto& variant = find<ConvTranspose2dCpuVariant<T>>(algorithm, shape);
    if (!packed && variant.forward_unpacked) {
      const Tensor dense = as_contiguous(weight);
      return variant.forward_unpacked(const_data<T>(input), const_data<T>(dense), bias,
                                      mutable_data<T>(output), shape, torch_threads);
    }
    const Tensor weights = packed_weight<T>(variant, packed, weight, shape);
    variant.forward(const_data<T>(input), const_data<accumulate_t<T>>(weights), bias, mutable_data<T>(output),
                    shape, torch_threads);
  }

  template <typename T>
  static void grad_weight(const std::optional<std::string>& algorithm, const Tensor& grad_output,
                          const Tensor& input, const Tensor& grad_weight, T* grad_bias,
                          const Conv2dShape& shape) {
    find<Conv2dCpuVariant<T>>(algorithm, shape)
        .grad_weight(const_data<T>(grad_output), const_data<T>(input), mutable_data<T>(grad_weight),
                     grad_bias, shape, torch_threads);
  }
};

struct Cuda {
  // Runs the first row whose kernel takes the shape.
  template <typename Variants, typename Call>
  static void run(const std::optional<std::string>& algorithm, const Variants& variants, const Call& call) {
    for (const auto& variant : asked_for(algorithm, variants))
      if (call(variant)) return;
    refuse(algorithm);
  }

  static void check_not_packed(const std::optional<Tensor>& packed) {
    STD_TORCH_CHECK(!packed, "packed must be None: the CUDA kernels read the weight where it lies");
  }

  template <typename T>
  static void forward(const std::optional<std::string>& algorithm, const Tensor& input, const Tensor& weight,
                      const std::optional<Tensor>& packed, const Conv2dEpilogue<T>& epilogue,
                      const Tensor& output, const Conv2dShape& shape) {
    check_not_packed(packed);
    const Tensor dense = as_contiguous(weight);
    run(algorithm, conv2d_cuda_variants<T>(), [&](const auto& variant) {
      return variant.forward(const_data<T>(input), const_data<T>(dense), epilogue, mutable_data<T>(output),
                             shape, stream_of(input));
    });
  }

  template <typename T>
  static void transpose(const std::optional<std::string>& algorithm, const Tensor& input,
                        const Tensor& weight, const std::optional<Tensor>& packed, const T* bias,
                        const Tensor& output, const Conv2dShape& shape) {
    check_not_packed(packed);
    const Tensor dense = as_contiguous(weight);
    run(algorithm, conv_transpose2d_cuda_variants<T>(), [&](const auto& variant) {
      return variant.forward(const_data<T>(input), const_data<T>(dense), bias, mutable_data<T>(output), shape,
                             stream_of(input));
    });
  }

  template <typename T>
  static void grad_weight(const std::optional<std::string>& algorithm, const Tensor& grad_output,
                          const Tensor& input, const Tensor& grad_weight, T* grad_bias,
                          const Conv2dShape& shape) {
    run(algorithm, conv2d_cuda_variants<T>(), [&](const auto& variant) {
      const Tensor workspace = torch::stable::empty({variant.grad_weight_workspace(shape)},
                                                    accumulate_dtype<T>, std::nullopt, input.device());
      return variant.grad_weight(const_data<T>(grad_output), const_data<T>(input),
                                 mutable_data<T>(grad_weight), grad_bias,
                                 mutable_data<accumulate_t<T>>(workspace), shape, stream_of(input));
    });
  }
};

}  // namespace fastconv

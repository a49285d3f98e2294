// Convolution, batch normalisation and activation: the plain-C++ signature of every kernel.
//
// The convolution is conv2d's or depthwise_conv2d's. These kernels take its result x, in training:
//
//   mean[c], variance[c]: of x[:, c] over batch and pixels; the variance divides by their count
//   normal = (x - mean[c]) / sqrt(variance[c] + eps)
//   output = activation(sum),  sum = normal * weight[c] + bias[c] + residual
//
// and backward, with g = grad_output * activation'(sum):
//
//   grad_residual = g,  grad_bias[c] = sum of g,  grad_weight[c] = sum of g * normal
//   grad_input = weight[c] / sqrt(variance[c] + eps)
//                * (g - grad_bias[c] / count - normal * grad_weight[c] / count)
//
// sum is computed again, so nothing of an image's size is kept between the two but x and the residual.
#pragma once

#include <cmath>

#include "../common/activation.h"
#include "../common/cpu.h"
#include "../common/types.h"

namespace fastconv {

// Images are (batch, channels, pixels) in memory, or (batch, pixels, channels) where channels_last is set.
struct BatchNormShape {
  int64_t batch, channels, pixels;  // pixels: of an image
  bool channels_last;

  FASTCONV_HOST_DEVICE int64_t count() const { return batch * pixels; }  // values of a channel
  FASTCONV_HOST_DEVICE int64_t size() const { return count() * channels; }
  // Where the value of pixel p, counted through all images, lies.
  FASTCONV_HOST_DEVICE int64_t index(int64_t p, int64_t channel) const {
    return channels_last ? p * channels + channel : (p / pixels * channels + channel) * pixels + p % pixels;
  }
};

// T: float, double, BFloat16, Float16; A: the type of sums, accumulate_t<T>.
template <typename T>
struct BatchNorm {
  using A = accumulate_t<T>;
  const T* input;     // (N, C, H, W): x
  const T* residual;  // (N, C, H, W), or null
  const A* weight;    // (C), or null: ones
  const A* bias;      // (C), or null: zeros
  A eps;
  Activation activation;
};

// One channel's numbers.
template <typename A>
struct BatchNormChannel {
  A mean, inverse, weight, bias;  // inverse: of the standard deviation

  FASTCONV_HOST_DEVICE A normal(A x) const { return (x - mean) * inverse; }
  FASTCONV_HOST_DEVICE A sum(A x, A residual) const { return normal(x) * weight + bias + residual; }
};

template <typename T>
inline FASTCONV_HOST_DEVICE BatchNormChannel<accumulate_t<T>> channel_of(const BatchNorm<T>& norm,
                                                                         accumulate_t<T> mean,
                                                                         accumulate_t<T> variance,
                                                                         int64_t channel) {
  using A = accumulate_t<T>;
  return {mean, A(1) / A(sqrt(variance + norm.eps)), norm.weight ? norm.weight[channel] : A(1),
          norm.bias ? norm.bias[channel] : A(0)};
}

// mean and variance (C) are written by normalize, and read by grad_normalize. grad_residual may be null.
#define FASTCONV_CONV_BN_ACT_CPU(variant)                                                                \
  template <typename T>                                                                                  \
  void conv_bn_act_##variant##_normalize_cpu(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean, \
                                             accumulate_t<T>* variance, const BatchNormShape& shape,     \
                                             ParallelFor threads);                                       \
  template <typename T>                                                                                  \
  void conv_bn_act_##variant##_grad_normalize_cpu(                                                       \
      const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,                       \
      const accumulate_t<T>* variance, T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,    \
      accumulate_t<T>* grad_bias, const BatchNormShape& shape, ParallelFor threads);

// normalize where mean and variance are known.
#define FASTCONV_CONV_BN_ACT_APPLY_CPU(variant)                                                 \
  template <typename T>                                                                         \
  void conv_bn_act_##variant##_apply_cpu(const BatchNorm<T>& norm, const accumulate_t<T>* mean, \
                                         const accumulate_t<T>* variance, T* output,            \
                                         const BatchNormShape& shape, ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_CONV_BN_ACT_CPU(plain) FASTCONV_CONV_BN_ACT_CPU(vectorized)
                         FASTCONV_CONV_BN_ACT_APPLY_CPU(vectorized))

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once. `workspace`
// holds conv_bn_act_<variant>_workspace(shape) values.
#define FASTCONV_CONV_BN_ACT_CUDA(variant)                                                                \
  int64_t conv_bn_act_##variant##_workspace(const BatchNormShape& shape);                                 \
  template <typename T>                                                                                   \
  void conv_bn_act_##variant##_normalize_cuda(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean, \
                                              accumulate_t<T>* variance, accumulate_t<T>* workspace,      \
                                              const BatchNormShape& shape, void* stream);                 \
  template <typename T>                                                                                   \
  void conv_bn_act_##variant##_grad_normalize_cuda(                                                       \
      const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,                        \
      const accumulate_t<T>* variance, T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,     \
      accumulate_t<T>* grad_bias, accumulate_t<T>* workspace, const BatchNormShape& shape, void* stream);

FASTCONV_CONV_BN_ACT_CUDA(plain)
FASTCONV_CONV_BN_ACT_CUDA(sliced)

}  // namespace fastconv

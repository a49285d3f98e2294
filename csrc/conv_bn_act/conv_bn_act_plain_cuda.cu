// Batch normalisation and activation behind a convolution, as plain as CUDA can say it.
//
// Formula: conv_bn_act.h, written out.
// One thread: a channel, for its mean, then its variance, or backward its two sums; else one value.
// Bytes: an image is read three times and written once; backward, all are read twice.
// Before it: nothing; this is the first step of the ladder.
// Limits: a GPU has more threads than a layer has channels, and those that there are read apart from each
//   other where images are contiguous; sums in float64.
#include "../common/cuda.h"
#include "conv_bn_act.h"

namespace fastconv {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads)
    conv_bn_act_plain_moments_kernel(const T* __restrict__ input,             // (N, C, H, W)
                                     accumulate_t<T>* __restrict__ mean,      // (C)
                                     accumulate_t<T>* __restrict__ variance,  // (C)
                                     BatchNormShape s) {
  using A = accumulate_t<T>;
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (c >= s.channels) return;
  double total = 0, squares = 0;
  for (int64_t p = 0; p < s.count(); ++p) total += load(load_global(input + s.index(p, c)));
  const double center = total / double(s.count());
  for (int64_t p = 0; p < s.count(); ++p) {
    const double distance = load(load_global(input + s.index(p, c))) - center;
    squares += distance * distance;
  }
  store_global(mean + c, A(center));
  store_global(variance + c, A(squares / double(s.count())));
}

// The channel of the value that lies at `index`.
__device__ __forceinline__ int64_t channel_at(int64_t index, const BatchNormShape& s) {
  return (s.channels_last ? index : index / s.pixels) % s.channels;
}

template <typename T>
__global__ void __launch_bounds__(threads)
    conv_bn_act_plain_normalize_kernel(BatchNorm<T> norm,
                                       const accumulate_t<T>* __restrict__ mean,      // (C)
                                       const accumulate_t<T>* __restrict__ variance,  // (C)
                                       T* __restrict__ output,                        // (N, C, H, W)
                                       BatchNormShape s) {
  using A = accumulate_t<T>;
  const int64_t at = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (at >= s.size()) return;
  const int64_t c = channel_at(at, s);
  const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
  const A residual = norm.residual != nullptr ? load(load_global(norm.residual + at)) : A(0);
  const A sum = channel.sum(load(load_global(norm.input + at)), residual);
  store_global(output + at, rounded<T>(activate(sum, norm.activation)));
}

// The gradient of the sum before the activation.
template <typename T>
__device__ __forceinline__ accumulate_t<T> grad_sum(const T* grad_output, const BatchNorm<T>& norm,
                                                    const BatchNormChannel<accumulate_t<T>>& channel,
                                                    accumulate_t<T> x, int64_t at) {
  using A = accumulate_t<T>;
  const A residual = norm.residual != nullptr ? load(load_global(norm.residual + at)) : A(0);
  return activation_gradient(A(load(load_global(grad_output + at))), channel.sum(x, residual),
                             norm.activation);
}

template <typename T>
__global__ void __launch_bounds__(threads)
    conv_bn_act_plain_grad_sums_kernel(const T* __restrict__ grad_output,  // (N, C, H, W)
                                       BatchNorm<T> norm,
                                       const accumulate_t<T>* __restrict__ mean,      // (C)
                                       const accumulate_t<T>* __restrict__ variance,  // (C)
                                       T* __restrict__ grad_residual,                 // (N, C, H, W) or null
                                       accumulate_t<T>* __restrict__ grad_weight,     // (C)
                                       accumulate_t<T>* __restrict__ grad_bias,       // (C)
                                       BatchNormShape s) {
  using A = accumulate_t<T>;
  const int64_t c = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (c >= s.channels) return;
  const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
  double total = 0, products = 0;
  for (int64_t p = 0; p < s.count(); ++p) {
    const int64_t at = s.index(p, c);
    const A x = load(load_global(norm.input + at));
    const A grad = grad_sum(grad_output, norm, channel, x, at);
    total += grad;
    products += double(grad) * channel.normal(x);
    if (grad_residual != nullptr) store_global(grad_residual + at, rounded<T>(grad));
  }
  store_global(grad_bias + c, A(total));
  store_global(grad_weight + c, A(products));
}

template <typename T>
__global__ void __launch_bounds__(threads)
    conv_bn_act_plain_grad_input_kernel(const T* __restrict__ grad_output,  // (N, C, H, W)
                                        BatchNorm<T> norm,
                                        const accumulate_t<T>* __restrict__ mean,         // (C)
                                        const accumulate_t<T>* __restrict__ variance,     // (C)
                                        const accumulate_t<T>* __restrict__ grad_weight,  // (C)
                                        const accumulate_t<T>* __restrict__ grad_bias,    // (C)
                                        T* __restrict__ grad_input,                       // (N, C, H, W)
                                        BatchNormShape s) {
  using A = accumulate_t<T>;
  const int64_t at = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (at >= s.size()) return;
  const int64_t c = channel_at(at, s);
  const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
  const A x = load(load_global(norm.input + at)), count = A(s.count());
  const A rest = grad_sum(grad_output, norm, channel, x, at) - load_global(grad_bias + c) / count -
                 channel.normal(x) * load_global(grad_weight + c) / count;
  store_global(grad_input + at, rounded<T>(channel.weight * channel.inverse * rest));
}

}  // namespace

int64_t conv_bn_act_plain_workspace(const BatchNormShape&) { return 0; }

template <typename T>
void conv_bn_act_plain_normalize_cuda(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                                      accumulate_t<T>* variance, accumulate_t<T>*, const BatchNormShape& s,
                                      void* stream) {
  FASTCONV_LAUNCH(conv_bn_act_plain_moments_kernel<T>, grid_size(ceil_div(s.channels, threads)), threads, 0,
                  stream, norm.input, mean, variance, s);
  FASTCONV_LAUNCH(conv_bn_act_plain_normalize_kernel<T>, grid_size(ceil_div(s.size(), threads)), threads, 0,
                  stream, norm, mean, variance, output, s);
}

template <typename T>
void conv_bn_act_plain_grad_normalize_cuda(const T* grad_output, const BatchNorm<T>& norm,
                                           const accumulate_t<T>* mean, const accumulate_t<T>* variance,
                                           T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,
                                           accumulate_t<T>* grad_bias, accumulate_t<T>*,
                                           const BatchNormShape& s, void* stream) {
  FASTCONV_LAUNCH(conv_bn_act_plain_grad_sums_kernel<T>, grid_size(ceil_div(s.channels, threads)), threads, 0,
                  stream, grad_output, norm, mean, variance, grad_residual, grad_weight, grad_bias, s);
  FASTCONV_LAUNCH(conv_bn_act_plain_grad_input_kernel<T>, grid_size(ceil_div(s.size(), threads)), threads, 0,
                  stream, grad_output, norm, mean, variance, grad_weight, grad_bias, grad_input, s);
}

#define FASTCONV_INSTANTIATE(T)                                                                \
  template void conv_bn_act_plain_normalize_cuda<T>(const BatchNorm<T>&, T*, accumulate_t<T>*, \
                                                    accumulate_t<T>*, accumulate_t<T>*,        \
                                                    const BatchNormShape&, void*);             \
  template void conv_bn_act_plain_grad_normalize_cuda<T>(                                      \
      const T*, const BatchNorm<T>&, const accumulate_t<T>*, const accumulate_t<T>*, T*, T*,   \
      accumulate_t<T>*, accumulate_t<T>*, accumulate_t<T>*, const BatchNormShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

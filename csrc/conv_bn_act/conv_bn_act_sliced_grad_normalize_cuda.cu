// Gradients of batch normalisation and activation behind a convolution, a channel's values in slices.
//
// Formula: conv_bn_act.h; with d = x - mean, grad_input = g * scale + constant + d * slope.
// One thread: as forward: every rows-th unit of 16 bytes of its slice. Three launches: sums of slices, their
//   merge in an order that never changes, grad_input.
// Bytes: grad_output and input twice, and the residual twice; grad_input is written, and grad_residual in the
//   first pass. Where that keeps all of g, the second reads it in the place of grad_output and the residual.
// Before it (plain): a thread for each channel, whose values the others have to wait for.
// Limits: those of the forward kernels.
#include "conv_bn_act_cuda.h"

namespace fastconv {
namespace {

// Loads of a thread at once, from each image: what registers allow.
template <typename T, int V>
constexpr int loads_each = V == 8 || sizeof(T) == 8 ? 1 : 2;
// Of a multiprocessor: the compiler's own choice, but for double, which it would squeeze until it spills.
template <typename T>
constexpr int blocks_wanted = sizeof(T) == 8 ? 1 : 0;

// body(at, g, d) for each of a thread's units; g and d have V values. The first three numbers of a channel:
// mean, scale, bias.
template <int V, bool ChannelsLast, typename T, int Kinds, int Numbers, typename Body>
__device__ __forceinline__ void for_each_unit(const Walk<V, ChannelsLast>& start, const T* grad_output,
                                              const BatchNorm<T>& norm,
                                              const accumulate_t<T> (&numbers)[Kinds][Numbers],
                                              const BatchNormShape& s, const Body& body) {
  using A = accumulate_t<T>;
  with_activation(norm.activation, [&](auto activation) {
    auto walk = start;
    while (walk.inside()) {
      Unit<T, V> grads[loads_each<T, V>], inputs[loads_each<T, V>], residuals[loads_each<T, V>] = {};
      int64_t at[loads_each<T, V>];
#pragma unroll
      for (int i = 0; i < loads_each<T, V>; ++i) {
        at[i] = walk.inside() ? walk.at : -1;
        const int64_t place = max(at[i], int64_t(0));
        grads[i] = load_unit<V>(grad_output + place, at[i] >= 0);
        inputs[i] = load_unit<V>(norm.input + place, at[i] >= 0);
        if (norm.residual != nullptr) residuals[i] = load_unit<V>(norm.residual + place, at[i] >= 0);
        walk.advance(s);
      }
#pragma unroll
      for (int i = 0; i < loads_each<T, V>; ++i) {
        if (at[i] < 0) break;
        A g[V], d[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int n = ChannelsLast ? v : 0;
          d[v] = load(inputs[i].values[v]) - numbers[0][n];
          const A sum = d[v] * numbers[1][n] + numbers[2][n] + load(residuals[i].values[v]);
          g[v] = activation_gradient(A(load(grads[i].values[v])), sum, decltype(activation)::value);
        }
        body(at[i], g, d);
      }
    }
  });
}

template <typename T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(slice_threads, blocks_wanted<T>)
    conv_bn_act_sliced_grad_sums_kernel(const T* __restrict__ grad_output,  // (N, C, H, W)
                                        BatchNorm<T> norm,
                                        const accumulate_t<T>* __restrict__ mean,      // (C)
                                        const accumulate_t<T>* __restrict__ variance,  // (C)
                                        T* __restrict__ grad_residual,                 // (N, C, H, W) or null
                                        accumulate_t<T>* __restrict__ partial,         // (slices, 2, C)
                                        BatchNormShape s, int columns) {
  using A = accumulate_t<T>;
  constexpr int Numbers = ChannelsLast ? V : 1;
  const Walk<V, ChannelsLast> walk(s, columns);
  A numbers[4][Numbers];
  share_numbers(numbers, walk, s, columns, [&](int64_t c, A(&made)[4]) {
    const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
    made[0] = channel.mean, made[1] = channel.inverse * channel.weight, made[2] = channel.bias;
    made[3] = channel.inverse;
  });
  GradSums<A> mine[Numbers] = {};
  for_each_unit(walk, grad_output, norm, numbers, s, [&](int64_t at, const A(&g)[V], const A(&d)[V]) {
    Unit<T, V> unit;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mine[ChannelsLast ? v : 0].add({g[v], g[v] * d[v]});
      unit.values[v] = rounded<T>(g[v]);
    }
    if (grad_residual != nullptr) store_unit(grad_residual + at, unit);
  });
#pragma unroll
  for (int n = 0; n < Numbers; ++n) mine[n].product *= numbers[3][n];
  store_slice(mine, walk, partial, s, columns);
}

template <typename T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(slice_threads, blocks_wanted<T>)
    conv_bn_act_sliced_grad_input_kernel(const T* __restrict__ grad_output,  // (N, C, H, W)
                                         BatchNorm<T> norm,
                                         const accumulate_t<T>* __restrict__ mean,         // (C)
                                         const accumulate_t<T>* __restrict__ variance,     // (C)
                                         const accumulate_t<T>* __restrict__ grad_weight,  // (C)
                                         const accumulate_t<T>* __restrict__ grad_bias,    // (C)
                                         T* __restrict__ grad_input,                       // (N, C, H, W)
                                         BatchNormShape s, int columns) {
  using A = accumulate_t<T>;
  constexpr int Numbers = ChannelsLast ? V : 1;
  const Walk<V, ChannelsLast> walk(s, columns);
  A numbers[5][Numbers];
  share_numbers(numbers, walk, s, columns, [&](int64_t c, A(&made)[5]) {
    const auto channel = channel_of(norm, load_global(mean + c), load_global(variance + c), c);
    const A scale = channel.inverse * channel.weight, share = -scale / A(s.count());
    made[0] = channel.mean, made[1] = scale, made[2] = channel.bias;
    made[3] = share * load_global(grad_bias + c);
    made[4] = share * channel.inverse * load_global(grad_weight + c);
  });
  for_each_unit(walk, grad_output, norm, numbers, s, [&](int64_t at, const A(&g)[V], const A(&d)[V]) {
    Unit<T, V> unit;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int n = ChannelsLast ? v : 0;
      unit.values[v] = rounded<T>(g[v] * numbers[1][n] + (numbers[3][n] + d[v] * numbers[4][n]));
    }
    store_unit(grad_input + at, unit);
  });
}

}  // namespace

template <typename T>
void conv_bn_act_sliced_grad_normalize_cuda(const T* grad_output, const BatchNorm<T>& norm,
                                            const accumulate_t<T>* mean, const accumulate_t<T>* variance,
                                            T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,
                                            accumulate_t<T>* grad_bias, accumulate_t<T>* workspace,
                                            const BatchNormShape& shape, void* stream) {
  const BatchNormShape s = settled(shape);
  uintptr_t addresses = 0;
  for (const T* image :
       {grad_output, norm.input, norm.residual, (const T*)grad_input, (const T*)grad_residual})
    addresses |= reinterpret_cast<uintptr_t>(image);
  // g as it is stored loses nothing in the type of sums, nor where it is grad_output or 0.
  const bool keeps_g = grad_residual != nullptr &&
                       (sizeof(T) == sizeof(accumulate_t<T>) || norm.activation <= Activation::relu6);
  BatchNorm<T> first = norm, second = norm;
  if (norm.activation == Activation::none) first.residual = nullptr;  // g is grad_output
  if (keeps_g) second.activation = Activation::none;
  if (second.activation == Activation::none) second.residual = nullptr;
  with_units<T>(s, addresses, [&]<int V, bool ChannelsLast>(dim3 grid, int columns) {
    FASTCONV_LAUNCH((conv_bn_act_sliced_grad_sums_kernel<T, V, ChannelsLast>), grid, slice_threads, 0, stream,
                    grad_output, first, mean, variance, grad_residual, workspace, s, columns);
    launch_merge<GradSums<accumulate_t<T>>, V, ChannelsLast>(workspace, grad_bias, grad_weight, s, grid.y,
                                                             stream);
    FASTCONV_LAUNCH((conv_bn_act_sliced_grad_input_kernel<T, V, ChannelsLast>), grid, slice_threads, 0,
                    stream, keeps_g ? grad_residual : grad_output, second, mean, variance, grad_weight,
                    grad_bias, grad_input, s, columns);
  });
}

#define FASTCONV_INSTANTIATE(T)                                                              \
  template void conv_bn_act_sliced_grad_normalize_cuda<T>(                                   \
      const T*, const BatchNorm<T>&, const accumulate_t<T>*, const accumulate_t<T>*, T*, T*, \
      accumulate_t<T>*, accumulate_t<T>*, accumulate_t<T>*, const BatchNormShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// The ends of dense convolution's grad_weight that its variants share: grad_bias, and the sum of the slices.
//
// Formula: grad_bias[m] = sum over n, e, f of grad_output[n, m, e, f]; then both gradients, slice 0 + 1 +
//   ...
// One block: one slice of the batch's pixels for 32 channels (channels_last) or for one; in the second stage
//   32 sums, eight threads each.
// Bytes: grad_output once, and slices * (M * C/G * KH * KW + M) partial sums written and read.
// Before it: grad_weight's own kernels.
// Limits: none; no atomics, so the bits are the same every time.

#include "conv2d_cuda.h"

namespace fastconv {
namespace {

constexpr int rows = 8;  // of 32 threads

template <typename T>
__global__ void __launch_bounds__(32 * rows, 1)
    conv2d_grad_bias_kernel(const T* __restrict__ grad_output,           // (N, M, E, F)
                            accumulate_t<T>* __restrict__ partial_sums,  // (slices, values), M of each
                            Conv2dShape s, int64_t values) {
  using A = accumulate_t<T>;
  __shared__ A parts[rows][32];
  const int lane = int(threadIdx.x), row = int(threadIdx.y);
  const int64_t image_pixels = s.out_height * s.out_width, pixels = s.batch * image_pixels;
  const int64_t first = pixels * blockIdx.y / gridDim.y, last = pixels * (blockIdx.y + 1) / gridDim.y;
  const int64_t channel = s.channels_last ? int64_t(blockIdx.x) * 32 + lane : blockIdx.x;
  A sum = 0;
  if (s.channels_last) {
    for (int64_t p = first + row; p < last; p += rows)
      sum += load(load_global(grad_output + p * s.out_channels + channel, channel < s.out_channels));
  } else {
    for (int64_t p = first + row * 32 + lane; p < last; p += 32 * rows)
      sum += load(load_global(grad_output + (p / image_pixels * s.out_channels + channel) * image_pixels +
                              p % image_pixels));
  }
  if (!s.channels_last) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  }
  store_shared(&parts[row][lane], sum);
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int other = 1; other < rows; ++other) sum += load_shared(&parts[other][lane]);
  store_global(partial_sums + blockIdx.y * values + channel, sum,
               s.channels_last ? channel < s.out_channels : lane == 0);
}

template <typename T>
__global__ void __launch_bounds__(32 * rows, 1)
    conv2d_reduce_grad_weight_kernel(const accumulate_t<T>* __restrict__ partial_sums,  // (slices, values)
                                     T* __restrict__ grad_weight,                       // (weights)
                                     T* __restrict__ grad_bias,  // (values - weights) or null
                                     int64_t weights, int64_t values, int slices) {
  using A = accumulate_t<T>;
  __shared__ A parts[rows][32];
  const int64_t index = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const bool wanted = index < (grad_bias == nullptr ? weights : values);
  A sum = 0;
  for (int slice = int(threadIdx.y); slice < slices; slice += rows)
    sum += load_global(partial_sums + slice * values + index, wanted);
  store_shared(&parts[threadIdx.y][threadIdx.x], sum);
  __syncthreads();
  if (threadIdx.y != 0 || !wanted) return;
#pragma unroll
  for (int other = 1; other < rows; ++other) sum += load_shared(&parts[other][threadIdx.x]);
  store_global(index < weights ? grad_weight + index : grad_bias + (index - weights), rounded<T>(sum));
}

}  // namespace

template <typename T>
void conv2d_finish_grad_weight_cuda(const T* grad_output, T* grad_weight, T* grad_bias,
                                    accumulate_t<T>* workspace, const Conv2dShape& s, void* stream) {
  const int64_t values = grad_weight_values(s), weights = values - s.out_channels;
  const unsigned slices = unsigned(grad_weight_slices(s));
  if (grad_bias != nullptr)
    FASTCONV_LAUNCH(conv2d_grad_bias_kernel<T>,
                    dim3(grid_size(s.channels_last ? ceil_div(s.out_channels, 32) : s.out_channels), slices),
                    dim3(32, rows), 0, stream, grad_output, workspace + weights, s, values);
  FASTCONV_LAUNCH(conv2d_reduce_grad_weight_kernel<T>, grid_size(ceil_div(values, 32)), dim3(32, rows), 0,
                  stream, workspace, grad_weight, grad_bias, weights, values, int(slices));
}

#define FASTCONV_INSTANTIATE(T)                                                                           \
  template void conv2d_finish_grad_weight_cuda<T>(const T*, T*, T*, accumulate_t<T>*, const Conv2dShape&, \
                                                  void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

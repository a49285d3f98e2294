// What the im2col CUDA kernels of dense convolution share: panels in shared memory, and their product.
//
// The column matrix has a row for each pixel (of all images) and a column for each (channel, tap); only the
// panel at hand exists. Columns are numbered in the order of the source's memory: tap after tap of a channel,
// or, channels_last, channel after channel of a tap.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv {

constexpr int im2col_threads = 128, im2col_depth = 16;  // depth: of the two panels that are multiplied

// One column of the matrix: from a pixel's first tap to this one's.
struct Column {
  int64_t source;
  int row, column;
  int weight;  // offset in a filter; negative where there is no such column
};

__device__ __forceinline__ Column column_of(int index, const Conv2dPass& pass, const PhaseAxis& high,
                                            const PhaseAxis& wide, const Strides& from) {
  const int taps = high.taps * wide.taps;
  if (index >= pass.source_group * taps) return {0, nowhere, nowhere, -1};
  const int channel = pass.channels_last ? index % pass.source_group : index / taps;
  const int tap = pass.channels_last ? index / pass.source_group : index % taps;
  const int i = tap / wide.taps, j = tap % wide.taps;
  Column c;
  c.row = i * high.dilation;
  c.column = j * wide.dilation;
  c.source = channel * from.channel + c.row * from.row + c.column * from.column;
  c.weight = channel * pass.weight_source + (high.first_tap + i * high.tap_step) * pass.width.kernel +
             wide.first_tap + j * wide.tap_step;
  return c;
}

// Starts to copy a panel (depth, Inner) by the addresses at(depth, inner, active) gives; neighbouring lanes
// go along the side that lies together in memory: `along_inner`, or 8 steps of depth of each of 4.
template <int Inner, typename T, typename At>
__device__ __forceinline__ void fill_panel(T* panel, bool along_inner, const At& at) {
#pragma unroll 4
  for (int i = int(threadIdx.x); i < im2col_depth * Inner; i += im2col_threads) {
    const int inner = along_inner ? i % Inner : i / 8 % Inner;
    const int depth = along_inner ? i / Inner : i / (8 * Inner) * 8 + i % 8;
    bool active;
    const T* const from = at(depth, inner, active);
    copy_to_shared(panel + depth * (Inner + 4) + inner, from, active);
  }
}

// Which of a panel's values a thread takes: its n-th of fours that lie `threads * 4` apart, so that the
// lanes' 16 bytes lie side by side.
__device__ __forceinline__ int strided_four(int n, int thread, int threads) {
  return n / 4 * threads * 4 + thread * 4 + n % 4;
}

// sums[x][f] += over the depth of two panels, left (depth, LeftThreads * Left) and right alike.
template <int LeftThreads, int Left, int RightThreads, int Right, typename T>
__device__ __forceinline__ void multiply_panels(const T* left, const T* right, int left_thread,
                                                int right_thread, accumulate_t<T> (&sums)[Left][Right]) {
  using A = accumulate_t<T>;
  using Four = Pack<T, 4>;
#pragma unroll 4
  for (int k = 0; k < im2col_depth; ++k) {
    A x[Left], y[Right];
#pragma unroll
    for (int n = 0; n < Left; n += 4) {
      const Four four = load_shared(reinterpret_cast<const Four*>(left + k * (LeftThreads * Left + 4) +
                                                                  strided_four(n, left_thread, LeftThreads)));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n + i] = load(four.values[i]);
    }
#pragma unroll
    for (int n = 0; n < Right; n += 4) {
      const Four four = load_shared(reinterpret_cast<const Four*>(
          right + k * (RightThreads * Right + 4) + strided_four(n, right_thread, RightThreads)));
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n + i] = load(four.values[i]);
    }
#pragma unroll
    for (int i = 0; i < Left; ++i)
#pragma unroll
      for (int j = 0; j < Right; ++j) sums[i][j] += x[i] * y[j];
  }
}

// Any pass, forward or transposed, by the im2col kernel.
template <typename T>
bool conv2d_im2col_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, T* result,
                             const Conv2dPass& pass, void* stream);

}  // namespace fastconv

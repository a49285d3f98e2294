// What the tensor-core CUDA kernels of dense convolution share: a panel (pixels, channels) in shared memory.
#pragma once

#include "conv2d_cuda.h"

namespace fastconv {

constexpr int gemm_threads = 128, gemm_warps = gemm_threads / 32;
constexpr int gemm_most_shared_bytes = 160 << 10;  // what a block can have from compute capability 8.0 on

// Where 8 channels of a pixel lie in a panel of 16, 32 or 64 channels (2, 4 or 8 units), in values. Units
// swap places from pixel to pixel, so that one unit of 8 pixels, which ldmatrix reads at once, and 8 units
// that lie together are in different banks.
__device__ __forceinline__ int unit_place(int pixel, int unit, int units) {
  return (pixel * units + (unit ^ (pixel * units / 8 % units))) * 8;
}

// Copies a panel through registers, in pairs of values that pair_at(pixel, unit, pair of the unit) loads;
// lanes go along 8 pixels by 4 pairs.
template <int Pixels, typename T, typename PairAt>
__device__ __forceinline__ void fill_pairs(T* panel, int units, const PairAt& pair_at) {
#pragma unroll 4
  for (int i = int(threadIdx.x); i < Pixels * units * 4; i += gemm_threads) {
    const int pixel = i % 8 + i / 32 % (Pixels / 8) * 8, pair = i / 8 % 4, unit = i / (4 * Pixels);
    const Pack<T, 2> values = pair_at(pixel, unit, pair);
    store_shared(reinterpret_cast<Pack<T, 2>*>(panel + unit_place(pixel, unit, units) + 2 * pair), values);
  }
}

// Starts to copy a panel: units of 8 channels, at(pixel, unit, active) tells where from. `wide`: a unit is 16
// bytes together (channels_last). Else its values lie `step` apart, and go through registers.
template <int Pixels, typename T, typename At>
__device__ __forceinline__ void fill_units(T* panel, int units, bool wide, int64_t step, const At& at) {
  bool active;
  if (wide) {
    for (int i = int(threadIdx.x); i < Pixels * units; i += gemm_threads) {
      const int unit = i % units, pixel = i / units;
      const T* const from = at(pixel, unit, active);
      copy_to_shared(reinterpret_cast<uint4*>(panel + unit_place(pixel, unit, units)),
                     reinterpret_cast<const uint4*>(from), active);
    }
    return;
  }
  fill_pairs<Pixels>(panel, units, [&](int pixel, int unit, int pair) -> Pack<T, 2> {
    const T* const from = at(pixel, unit, active) + 2 * pair * step;
    return {load_global(from, active), load_global(from + step, active)};
  });
}

template <typename T>
__device__ __forceinline__ uint32_t two_values(T low, T high) {
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

inline bool on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether the tensor cores serve a shape: 16 bytes are 8 channels of a group, on either side.
template <typename T>
bool gemm_serves(const Conv2dPass& p) {
  return sizeof(T) == 2 && p.source_group > 0 && p.source_group % 8 == 0 && p.result_group > 0 &&
         p.result_group % 8 == 0;
}

// Any pass, forward or transposed, by the implicit GEMM kernel; false as conv2d.h says.
template <typename T>
bool conv2d_implicit_gemm_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue,
                                    T* result, const Conv2dPass& pass, void* stream);

}  // namespace fastconv

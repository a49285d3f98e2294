// The tensor-core CUDA kernel of dense convolution but for the copies of its source, and how it is launched.
#pragma once

#include "conv2d_implicit_gemm_cuda.h"

namespace fastconv {

constexpr int gemm_pixels = 128, gemm_source_stages = 3;

struct GemmTiling {
  int chunk;       // channels of a stage
  int slab_rows;   // weights of a chunk, all taps: filters (forward) or channels (transposed),
  int slab_pitch;  // of so many values
  int shared_bytes;
  bool packed, wide_source, wide_weight;
};

// The copy of a stage: channels from `chunk` on, of all pixels of a tile, `row` and `column` beyond each.
template <typename T>
struct GemmStage {
  T* panel;  // (pixels, channels), as unit_place has it
  const Pixel* pixels;
  const T* group_source;  // channel 0 of the group, pixel 0
  const Strides& from;
  int chunk, row, column;
};

// A block's work, as conv2d_implicit_gemm_cuda.cu has it. copy_source(stage) starts the copy of a stage.
template <int BlockFilters, typename T, typename CopySource>
__device__ __forceinline__ void implicit_gemm_convolve(
    const T* source,                    // (N, C, H, W)
    const T* weight,                    // (M, C/G, KH, KW)
    const Conv2dEpilogue<T>& epilogue,  // (M), (N, M, E, F)
    T* result,                          // (N, M, E, F)
    const Conv2dPass& pass, const GemmTiling& t, const CopySource& copy_source) {
  constexpr int WarpColumns = BlockFilters / 32, WarpRows = gemm_warps / WarpColumns;
  constexpr int Rows = gemm_pixels / WarpRows / 16, Columns = 4;  // fragments of a warp: 16 pixels, 8 filters
  FASTCONV_DYNAMIC_SHARED(T, shared);
  __shared__ Pixel pixels[gemm_pixels];
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const PixelTile tile = pixel_tile(pass, blockIdx.x, BlockFilters, gemm_pixels);
  if (tile.first_pixel >= tile.pixels) return;
  const Strides from =
      strides_of(pass.source_channels, pass.height.source, pass.width.source, pass.channels_last);
  const Strides to =
      strides_of(pass.result_channels, pass.height.result, pass.width.result, pass.channels_last);
  const T* const group_source = source + tile.group * pass.source_group * from.channel;
  const T* const group_weight =
      weight + tile.group * pass.source_group * pass.result_group * pass.kernel_taps;
  const PhaseAxis& high = tile.high;
  const PhaseAxis& wide = tile.wide;
  const int taps = high.taps * wide.taps;
  const int stages = (pass.source_group + t.chunk - 1) / t.chunk * taps;
  const int units = t.chunk / 8, source_size = gemm_pixels * t.chunk;
  T* const slabs = shared + gemm_source_stages * source_size;  // two, after three panels of the source

  for (int p = thread; p < gemm_pixels; p += gemm_threads)
    pixels[p] = pixel_of(tile.first_pixel + p, tile.pixels, high, wide, from, to);
  __syncthreads();

  const auto fill_source = [&](int stage) {
    const int tap = stage % taps;
    copy_source(GemmStage<T>{shared + stage % gemm_source_stages * source_size, pixels, group_source, from,
                             stage / taps * t.chunk, tap / wide.taps * high.dilation,
                             tap % wide.taps * wide.dilation});
  };
  // Part `part` of `parts` of the weights of a chunk: rows of filters, whose values are channels and taps, or
  // in a transposed convolution rows of channels, whose values are filters and taps.
  const auto fill_slab = [&](int number, int part, int parts) {
    const int chunk = number * t.chunk, row_units = (t.slab_pitch - 8) / 8;
    const int first_row = pass.transposed ? chunk : tile.first_filter;
    const int first_value = (pass.transposed ? tile.first_filter : chunk) * pass.kernel_taps;
    const int rows = pass.transposed ? pass.source_group : pass.result_group;
    const int row_values = (pass.transposed ? pass.result_group : pass.source_group) * pass.kernel_taps;
    T* const slab = slabs + number % 2 * t.slab_rows * t.slab_pitch;
    const int end = int(int64_t(t.slab_rows) * row_units * (part + 1) / parts);
    for (int i = int(int64_t(t.slab_rows) * row_units * part / parts) + thread; i < end; i += gemm_threads) {
      const int row = i / row_units, value = i % row_units * 8;
      const bool active = first_row + row < rows && first_value + value < row_values;
      const T* const at = group_weight + int64_t(first_row + row) * row_values + first_value + value;
      if (t.wide_weight) {
        copy_to_shared(reinterpret_cast<uint4*>(slab + row * t.slab_pitch + value),
                       reinterpret_cast<const uint4*>(at), active);
      } else {
        for (int v = 0; v < 8; ++v)
          store_shared(slab + row * t.slab_pitch + value + v, load_global(at + v, active));
      }
    }
  };

  const int warp_row = warp / WarpColumns * Rows * 16, warp_column = warp % WarpColumns * 32;
  const int channel_step = pass.transposed ? t.slab_pitch : pass.kernel_taps;
  const int filter_step = pass.transposed ? pass.kernel_taps : t.slab_pitch;
  float sums[Rows][Columns][4] = {};
  if (stages > 0) {
    fill_slab(0, 0, 1);
    fill_source(0);
  }
  end_copy_group();
  if (stages > 1) fill_source(1);
  end_copy_group();
  for (int stage = 0; stage < stages; ++stage) {
    const int number = stage / taps, tap = stage % taps;
    // The group before may be under way, but where it has the last part of the weights that are next.
    if (tap == 0)
      wait_for_copy_groups<0>();
    else
      wait_for_copy_groups<1>();
    __syncthreads();
    if (stage + 2 < stages) fill_source(stage + 2);
    if ((number + 1) * taps < stages) fill_slab(number + 1, tap, taps);
    end_copy_group();

    const T* const panel = shared + stage % gemm_source_stages * source_size;
    const T* const slab = slabs + number % 2 * t.slab_rows * t.slab_pitch +
                          (high.first_tap + tap / wide.taps * high.tap_step) * pass.width.kernel +
                          wide.first_tap + tap % wide.taps * wide.tap_step;
    for (int k = 0; k < t.chunk; k += 16) {
      uint32_t a[Rows][4];
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        load_matrices<false>(a[r],
                             panel + unit_place(warp_row + r * 16 + lane % 16, k / 8 + lane / 16, units));
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
        const T* const b_from =
            slab + (warp_column + c * 8 + lane / 4) * filter_step + (k + lane % 4 * 2) * channel_step;
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (channel_step == 1)
            b[i] = load_shared(reinterpret_cast<const uint32_t*>(b_from + i * 8));
          else
            b[i] = two_values(load_shared(b_from + i * 8 * channel_step),
                              load_shared(b_from + (i * 8 + 1) * channel_step));
        }
#pragma unroll
        for (int r = 0; r < Rows; ++r) mma_m16n8k16<T>(sums[r][c], a[r], b);
      }
    }
  }

  wait_for_copy_groups<0>();
  __syncthreads();  // the last panels are done with
  float* const tile_sums = reinterpret_cast<float*>(shared);
  const int sums_step = sums_pitch(BlockFilters, pass.channels_last);
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int c = 0; c < Columns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_shared(tile_sums + (warp_row + r * 16 + i / 2 * 8 + lane / 4) * sums_step + warp_column +
                         c * 8 + lane % 4 * 2 + i % 2,
                     sums[r][c][i]);
  __syncthreads();
  store_tile<gemm_pixels, BlockFilters>(tile_sums, sums_step, epilogue, result,
                                        tile_filters(pass, tile.group, tile.first_filter, to.channel),
                                        t.packed, [&](int p) { return pixels[p].result; });
}

// As many channels a stage as fit, 32 where there are taps enough to share their weights' copies with.
inline bool gemm_tiling(GemmTiling& t, const Conv2dPass& p, int block_filters) {
  const int64_t sums = sizeof(float) * gemm_pixels * sums_pitch(block_filters, p.channels_last);
  for (t.chunk = p.kernel_taps == 1 ? 64 : 32; t.chunk >= 16; t.chunk /= 2) {
    if (t.chunk > 16 && t.chunk / 2 >= p.source_group) continue;
    const int64_t values = int64_t(p.transposed ? block_filters : t.chunk) * p.kernel_taps;
    t.slab_rows = p.transposed ? t.chunk : block_filters;
    const int64_t bytes = 2 * (gemm_source_stages * gemm_pixels * t.chunk + 2 * t.slab_rows * (values + 8));
    if (bytes > gemm_most_shared_bytes) continue;
    t.slab_pitch = int(values) + 8;
    t.shared_bytes = int(std::max(bytes, sums));
    return true;
  }
  return false;
}

// launch.operator()<BlockFilters>(blocks, tiling) with the tiles for a pass; false where none fit.
template <typename T, typename Launch>
bool with_gemm_tiling(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, const T* result,
                      const Conv2dPass& pass, const Launch& launch) {
  const auto tiled = [&]<int BlockFilters>() {
    GemmTiling t{};
    if (!gemm_tiling(t, pass, BlockFilters)) return false;
    const int64_t blocks = pixel_tile_blocks(pass, BlockFilters, gemm_pixels);
    if (blocks == 0) return true;
    t.packed = is_packed(epilogue, result, pass);
    t.wide_source = pass.channels_last && on_16_bytes(source);
    t.wide_weight = on_16_bytes(weight);
    launch.template operator()<BlockFilters>(grid_size(blocks), t);
    return true;
  };
  if (!gemm_serves<T>(pass)) return false;
  return pass.result_group > 32 ? tiled.template operator()<64>() : tiled.template operator()<32>();
}

}  // namespace fastconv

// The im2col CUDA kernel of dense convolution but for its columns, and the tiles that it is launched with.
#pragma once

#include "conv2d_im2col_cuda.h"

namespace fastconv {

constexpr int im2col_pixels = 8;  // of a thread

template <int Filters, int FilterThreads>
constexpr int im2col_stage =
    im2col_depth *  // values of both panels
    (im2col_threads / FilterThreads * im2col_pixels + 4 + FilterThreads * Filters + 4);

// A block's work, as conv2d_im2col_cuda.cu has it. column_of(index, tile, from) is a column of the matrix.
template <int Filters, int FilterThreads, typename T, typename ColumnOf>
__device__ __forceinline__ void im2col_convolve(const T* source,                    // (N, C, H, W)
                                                const T* weight,                    // (M, C/G, KH, KW)
                                                const Conv2dEpilogue<T>& epilogue,  // (M), (N, M, E, F)
                                                T* result,                          // (N, M, E, F)
                                                const Conv2dPass& pass, bool packed,
                                                const ColumnOf& column_of) {
  using A = accumulate_t<T>;
  constexpr int Pixels = im2col_pixels;
  constexpr int PixelThreads = im2col_threads / FilterThreads, BlockPixels = PixelThreads * Pixels;
  constexpr int BlockFilters = FilterThreads * Filters, Stage = im2col_stage<Filters, FilterThreads>;
  FASTCONV_DYNAMIC_SHARED(T, panels);  // twice: (depth, pixels), (depth, filters)
  __shared__ Pixel pixels[BlockPixels];
  __shared__ Column columns[2][im2col_depth];
  const int thread = int(threadIdx.x);
  const PixelTile tile = pixel_tile(pass, blockIdx.x, BlockFilters, BlockPixels);
  if (tile.first_pixel >= tile.pixels) return;
  const Strides from =
      strides_of(pass.source_channels, pass.height.source, pass.width.source, pass.channels_last);
  const Strides to =
      strides_of(pass.result_channels, pass.height.result, pass.width.result, pass.channels_last);
  const T* const group_source = source + tile.group * pass.source_group * from.channel;
  const T* const group_weight =
      weight + tile.group * pass.source_group * pass.result_group * pass.kernel_taps;
  const int count = pass.source_group * tile.high.taps * tile.wide.taps;
  const int stages = (count + im2col_depth - 1) / im2col_depth;

  for (int p = thread; p < BlockPixels; p += im2col_threads)
    pixels[p] = pixel_of(tile.first_pixel + p, tile.pixels, tile.high, tile.wide, from, to);
  const auto find_columns = [&](int stage) {
    if (thread < im2col_depth)
      columns[stage % 2][thread] = column_of(stage * im2col_depth + thread, tile, from);
  };
  const auto fill = [&](int stage) {
    T* const panel = panels + stage % 2 * Stage;
    const Column* const at = columns[stage % 2];
    fill_panel<BlockPixels>(panel, !pass.channels_last, [&](int k, int p, bool& active) {
      const Pixel& pixel = pixels[p];
      active = is_inside(pixel.row + at[k].row, pixel.column + at[k].column, pass);
      return group_source + pixel.source + at[k].source;
    });
    fill_panel<BlockFilters>(
        panel + im2col_depth * (BlockPixels + 4), false, [&](int k, int f, bool& active) {
          active = at[k].weight >= 0 && tile.first_filter + f < pass.result_group;
          return group_weight + at[k].weight + int64_t(tile.first_filter + f) * pass.weight_result;
        });
    end_copy_group();
  };

  // Neighbouring lanes are neighbours in memory.
  const int filter_thread = pass.channels_last ? thread % FilterThreads : thread / PixelThreads;
  const int pixel_thread = pass.channels_last ? thread / FilterThreads : thread % PixelThreads;
  A sums[Pixels][Filters] = {};
  find_columns(0);
  __syncthreads();
  if (stages > 0) fill(0);
  find_columns(1);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copy_groups<0>();
    __syncthreads();  // this stage's panels are there, those before it are done with
    if (stage + 1 < stages) fill(stage + 1);
    find_columns(stage + 2);
    const T* const panel = panels + stage % 2 * Stage;
    multiply_panels<PixelThreads, Pixels, FilterThreads, Filters>(
        panel, panel + im2col_depth * (BlockPixels + 4), pixel_thread, filter_thread, sums);
  }

  __syncthreads();  // the last panels are done with
  A* const tile_sums = reinterpret_cast<A*>(panels);
  const int pitch = sums_pitch(BlockFilters, pass.channels_last);
#pragma unroll
  for (int x = 0; x < Pixels; ++x)
#pragma unroll
    for (int f = 0; f < Filters; ++f)
      store_shared(tile_sums + strided_four(x, pixel_thread, PixelThreads) * pitch +
                       strided_four(f, filter_thread, FilterThreads),
                   sums[x][f]);
  __syncthreads();
  store_tile<BlockPixels, BlockFilters>(tile_sums, pitch, epilogue, result,
                                        tile_filters(pass, tile.group, tile.first_filter, to.channel), packed,
                                        [&](int p) { return pixels[p].result; });
}

// launch.operator()<Filters, FilterThreads>(blocks, bytes of shared memory) with the tile for a pass.
template <typename T, typename Launch>
void with_im2col_tile(const Conv2dPass& pass, const Launch& launch) {
  if (pass.batch * pass.result_channels * pass.height.result * pass.width.result == 0) return;
  const auto tiled = [&]<int Filters, int FilterThreads>() {
    constexpr int BlockPixels = im2col_threads / FilterThreads * im2col_pixels,
                  BlockFilters = FilterThreads * Filters;
    const size_t sums = sizeof(accumulate_t<T>) * BlockPixels * sums_pitch(BlockFilters, pass.channels_last);
    launch.template operator()<Filters, FilterThreads>(
        grid_size(pixel_tile_blocks(pass, BlockFilters, BlockPixels)),
        std::max(sums, 2 * sizeof(T) * im2col_stage<Filters, FilterThreads>));
  };
  if (pass.result_group > 16)  // float64: half the pixels, for its sums to stay in registers
    tiled.template operator()<sizeof(T) < 8 ? 8 : 4, sizeof(T) < 8 ? 8 : 16>();
  else
    tiled.template operator()<4, 4>();
}

}  // namespace fastconv

// Dense convolution as a matrix product, im2col panel by panel; the transposed one too, phase by phase.
//
// Formula: result (pixels, filters) = columns (pixels, C/G * taps) * weights (C/G * taps, filters).
// One block: 128 pixels by 64 filters (or 256 by 16). It builds 16 columns of its pixels and 16 rows of the
//   weights in shared memory while it multiplies the 16 before. One thread: 8 pixels by 8 (or 4) filters.
// Bytes: source once for each tap and tile of filters (from L1 and L2, mostly), weights once for each tile
//   of pixels, result once; no column matrix in memory.
// Before it (direct): the unit was an image's rectangle and its patch. Here pixels are numbered through all
//   images and (channel, tap) is one index, so small images, strides and dilations leave nothing idle,
//   copies run beside the multiplications, and a value is fetched once for each tap that reads it.
// Limits: 2-byte values are copied one by one, and not asynchronously.

#include "conv2d_im2col_cuda.h"

namespace fastconv {
namespace {

constexpr int Pixels = 8;  // of a thread

template <int Filters, int FilterThreads>
constexpr int im2col_stage = im2col_depth *  // values of both panels
                             (im2col_threads / FilterThreads * Pixels + 4 + FilterThreads * Filters + 4);

template <typename T, int Filters, int FilterThreads>
__global__ void __launch_bounds__(im2col_threads, 1)
    conv2d_im2col_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                 const T* __restrict__ weight,  // (M, C/G, KH, KW)
                                 Conv2dEpilogue<T> epilogue,    // (M), (N, M, E, F)
                                 T* __restrict__ result,        // (N, M, E, F)
                                 Conv2dPass pass, bool packed) {
  using A = accumulate_t<T>;
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
      columns[stage % 2][thread] = column_of(stage * im2col_depth + thread, pass, tile.high, tile.wide, from);
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
  store_tile<BlockPixels, BlockFilters>(
      tile_sums, pitch, epilogue, result, tile.group * pass.result_group + tile.first_filter,
      pass.result_group - tile.first_filter, to.channel, packed, [&](int p) { return pixels[p].result; });
}

}  // namespace

template <typename T>
bool conv2d_im2col_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, T* result,
                             const Conv2dPass& pass, void* stream) {
  if (pass.batch * pass.result_channels * pass.height.result * pass.width.result == 0) return true;
  const auto launch = [&]<int Filters, int FilterThreads>() {
    constexpr int BlockPixels = im2col_threads / FilterThreads * Pixels,
                  BlockFilters = FilterThreads * Filters;
    const int64_t blocks = pixel_tile_blocks(pass, BlockFilters, BlockPixels);
    const size_t sums = sizeof(accumulate_t<T>) * BlockPixels * sums_pitch(BlockFilters, pass.channels_last);
    FASTCONV_LAUNCH((conv2d_im2col_forward_kernel<T, Filters, FilterThreads>), grid_size(blocks),
                    im2col_threads, std::max(sums, 2 * sizeof(T) * im2col_stage<Filters, FilterThreads>),
                    stream, source, weight, epilogue, result, pass, is_packed(epilogue, result, pass));
  };
  if (pass.result_group > 16)  // float64: half the pixels, for its sums to stay in registers
    launch.template operator()<sizeof(T) < 8 ? 8 : 4, sizeof(T) < 8 ? 8 : 16>();
  else
    launch.template operator()<4, 4>();
  return true;
}

template <typename T>
bool conv2d_im2col_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue, T* output,
                                const Conv2dShape& shape, void* stream) {
  return conv2d_im2col_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template bool conv2d_im2col_pass_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*,    \
                                           const Conv2dPass&, void*);                           \
  template bool conv2d_im2col_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*, \
                                              const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

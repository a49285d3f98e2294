// Dense convolution as a matrix product on the tensor cores (mma.sync m16n8k16); the transposed one too.
//
// Formula: result (pixels, filters) = sum over taps of source at the tap (pixels, C/G) * weight's tap (C/G,
//   M).
// One block: 128 pixels by 64 (or 32) filters; one warp: 64 (or 32) by 32, in fragments. A stage is one tap
//   of 16 to 64 channels, copied two stages ahead; the weights of all taps of those channels come as they
//   lie, a share with each stage. ldmatrix reads the pixels' fragments (one instruction for four of 16-bit
//   pairs); weights of adjacent channels lie a filter's taps apart, so theirs are gathered value by value.
// Bytes: source once for each tap and tile of filters (mostly from L2), weights once for each tile of
//   pixels.
// Before it (im2col): multiplications one by one in float32, channels copied one by one.
// Limits: float16, bfloat16; channels of a group and filters of a group multiples of 8; kernels whose
//   weights of 16 channels do not fit in shared memory twice (beyond about 8 x 8 taps) are refused.
//   Contiguous images, and data off a 16-byte boundary, are copied in pairs of values, not asynchronously.

#include "conv2d_implicit_gemm_cuda.h"

namespace fastconv {
namespace {

constexpr int BlockPixels = 128, source_stages = 3;

struct GemmTiling {
  int chunk;       // channels of a stage
  int slab_rows;   // weights of a chunk, all taps: filters (forward) or channels (transposed),
  int slab_pitch;  // of so many values
  int shared_bytes;
  bool packed, wide_source, wide_weight;
};

template <typename T, int BlockFilters>
__global__ void __launch_bounds__(gemm_threads, 1)
    conv2d_implicit_gemm_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                        const T* __restrict__ weight,  // (M, C/G, KH, KW)
                                        Conv2dEpilogue<T> epilogue,    // (M), (N, M, E, F)
                                        T* __restrict__ result,        // (N, M, E, F)
                                        Conv2dPass pass, GemmTiling t) {
  constexpr int WarpColumns = BlockFilters / 32, WarpRows = gemm_warps / WarpColumns;
  constexpr int Rows = BlockPixels / WarpRows / 16, Columns = 4;  // fragments of a warp: 16 pixels, 8 filters
  FASTCONV_DYNAMIC_SHARED(T, shared);
  __shared__ Pixel pixels[BlockPixels];
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const PixelTile tile = pixel_tile(pass, blockIdx.x, BlockFilters, BlockPixels);
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
  const int units = t.chunk / 8, source_size = BlockPixels * t.chunk;
  T* const slabs = shared + source_stages * source_size;  // two, after three panels of the source

  for (int p = thread; p < BlockPixels; p += gemm_threads)
    pixels[p] = pixel_of(tile.first_pixel + p, tile.pixels, high, wide, from, to);
  __syncthreads();

  const auto fill_source = [&](int stage) {
    const int chunk = stage / taps * t.chunk, tap = stage % taps;
    const int row = tap / wide.taps * high.dilation, column = tap % wide.taps * wide.dilation;
    const T* const origin = group_source + row * from.row + column * from.column + chunk * from.channel;
    fill_units<BlockPixels>(shared + stage % source_stages * source_size, units, t.wide_source, from.channel,
                            [&](int p, int unit, bool& active) {
                              active = chunk + unit * 8 < pass.source_group &&
                                       is_inside(pixels[p].row + row, pixels[p].column + column, pass);
                              return origin + pixels[p].source + unit * 8 * from.channel;
                            });
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

    const T* const panel = shared + stage % source_stages * source_size;
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
  store_tile<BlockPixels, BlockFilters>(tile_sums, sums_step, epilogue, result,
                                        tile_filters(pass, tile.group, tile.first_filter, to.channel),
                                        t.packed, [&](int p) { return pixels[p].result; });
}

// As many channels a stage as fit, 32 where there are taps enough to share their weights' copies with.
bool gemm_tiling(GemmTiling& t, const Conv2dPass& p, int block_filters) {
  const int64_t sums = sizeof(float) * BlockPixels * sums_pitch(block_filters, p.channels_last);
  for (t.chunk = p.kernel_taps == 1 ? 64 : 32; t.chunk >= 16; t.chunk /= 2) {
    if (t.chunk > 16 && t.chunk / 2 >= p.source_group) continue;
    const int64_t values = int64_t(p.transposed ? block_filters : t.chunk) * p.kernel_taps;
    t.slab_rows = p.transposed ? t.chunk : block_filters;
    const int64_t bytes = 2 * (source_stages * BlockPixels * t.chunk + 2 * t.slab_rows * (values + 8));
    if (bytes > gemm_most_shared_bytes) continue;
    t.slab_pitch = int(values) + 8;
    t.shared_bytes = int(std::max(bytes, sums));
    return true;
  }
  return false;
}

}  // namespace

template <typename T>
bool conv2d_implicit_gemm_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue,
                                    T* result, const Conv2dPass& pass, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (!gemm_serves<T>(pass)) return false;
    const auto launch = [&]<int BlockFilters>() {
      GemmTiling t{};
      if (!gemm_tiling(t, pass, BlockFilters)) return false;
      const int64_t blocks = pixel_tile_blocks(pass, BlockFilters, BlockPixels);
      if (blocks == 0) return true;
      t.packed = is_packed(epilogue, result, pass);
      t.wide_source = pass.channels_last && on_16_bytes(source);
      t.wide_weight = on_16_bytes(weight);
      FASTCONV_LAUNCH((conv2d_implicit_gemm_forward_kernel<T, BlockFilters>), grid_size(blocks), gemm_threads,
                      t.shared_bytes, stream, source, weight, epilogue, result, pass, t);
      return true;
    };
    return pass.result_group > 32 ? launch.template operator()<64>() : launch.template operator()<32>();
  } else {
    return false;
  }
}

template <typename T>
bool conv2d_implicit_gemm_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue,
                                       T* output, const Conv2dShape& shape, void* stream) {
  return conv2d_implicit_gemm_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                        \
  template bool conv2d_implicit_gemm_pass_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*,    \
                                                  const Conv2dPass&, void*);                           \
  template bool conv2d_implicit_gemm_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*, \
                                                     const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

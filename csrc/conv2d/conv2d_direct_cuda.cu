// Direct dense convolution by tiles; the transposed one too, phase by phase.
//
// Formula: conv2d.h, conv_transpose2d.h.
// One block: a rectangle of results of a phase, for a tile of a group's filters. One thread: 8 adjacent
//   columns of 4 filters, in registers. The patch of the source that the rectangle reads lies in shared
//   memory, some channels at a time, and every tap reads it there; 3 adjacent taps share the 10 values they
//   read, in registers.
// Bytes: source once for each tile of filters, and the halo; weights once for each rectangle; result once.
// Before it: nothing; this is the first step of the ladder.
// Limits: a halo of one channel that does not fit in shared memory is refused (dilation * (K - 1) beyond
//   about 180); small images leave part of a rectangle idle; pixels that the stride steps over are loaded as
//   well.

#include "conv2d_direct_cuda.h"

namespace fastconv {
namespace {

constexpr int Columns = 8, Filters = 4;  // of a thread

struct DirectTiling {
  int strips, rows;  // the rectangle: strips of 8 columns, rows
  int row_tiles, column_tiles, filter_tiles;
  Patch patch;
  int kernel_rows;  // rows of taps whose weights are in shared memory together
  int shared_bytes;
  bool packed;
};

// Width: 3 adjacent taps without stride, compiled in, or 0 for any.
template <typename T, int Width, int FilterThreads, int Threads>
__global__ void __launch_bounds__(Threads, sizeof(T) < 8 ? 512 / Threads : 1)
    conv2d_direct_forward_kernel(const T* __restrict__ source,  // (N, C, H, W)
                                 const T* __restrict__ weight,  // (M, C/G, KH, KW)
                                 Conv2dEpilogue<T> epilogue,    // (M), (N, M, E, F)
                                 T* __restrict__ result,        // (N, M, E, F)
                                 Conv2dPass pass, DirectTiling t) {
  using A = accumulate_t<T>;
  constexpr int BlockFilters = FilterThreads * Filters, PixelThreads = Threads / FilterThreads;
  constexpr int FilterPitch = BlockFilters + 4;  // 8 weights of each of 4 filters go to different banks
  FASTCONV_DYNAMIC_SHARED(A, patch);             // (channels, rows, columns)
  A* const filters = patch + t.patch.channels * t.patch.plane;  // (channels, taps, filters)

  int64_t index = blockIdx.x;
  const int first_filter = int(index % t.filter_tiles) * BlockFilters;
  index /= t.filter_tiles;
  const int group = int(index % pass.groups);
  index /= pass.groups;
  const int first_column = int(index % t.column_tiles) * t.strips * Columns;
  index /= t.column_tiles;
  const int first_row = int(index % t.row_tiles) * t.rows;
  index /= t.row_tiles;
  const PhaseAxis wide = phase_axis(pass.width, pass.transposed, int(index % pass.width.phases));
  index /= pass.width.phases;
  const PhaseAxis high = phase_axis(pass.height, pass.transposed, int(index % pass.height.phases));
  const int64_t image = index / pass.height.phases;
  if (first_column >= wide.results || first_row >= high.results) return;

  // Neighbouring lanes are neighbours in memory, when the results are stored.
  const int thread = int(threadIdx.x);
  const int filter = (pass.channels_last ? thread % FilterThreads : thread / PixelThreads) * Filters;
  const int place = pass.channels_last ? thread / FilterThreads : thread % PixelThreads;
  const int row = place / t.strips, column = place % t.strips * Columns;

  A sums[Columns][Filters] = {};
  const Strides step =
      strides_of(pass.source_channels, pass.height.source, pass.width.source, pass.channels_last);
  const int64_t first_channel = int64_t(group) * pass.source_group;
  // The group's weights start where its filters do, in the convolution whose weight this is.
  const T* const group_weight = weight + first_channel * pass.result_group * pass.kernel_taps;
  const int back_rows = reach_back(high), back_columns = reach_back(wide);
  for (int chunk = 0; chunk < pass.source_group; chunk += t.patch.channels) {
    const int channels = min(t.patch.channels, pass.source_group - chunk);
    for (int first_i = 0; first_i < high.taps; first_i += t.kernel_rows) {
      const int kernel_rows = min(t.kernel_rows, high.taps - first_i);
      __syncthreads();  // the weights before are done with
      if (first_i == 0)
        fill_patch(patch, t.patch, source + image * step.image, step, pass.height.source, pass.width.source,
                   pass.channels_last, first_channel + chunk, first_channel + chunk + channels,
                   first_row * high.stride + high.offset + back_rows,
                   first_column * wide.stride + wide.offset + back_columns);
      // Weights: lanes take 8 of each of 4 filters.
      const int weights = channels * kernel_rows * wide.taps;
      int c = 0, i = 0, j = thread % 8;
      for (int k = thread % 8; k < weights; k += 8, j += 8) {
        for (; j >= wide.taps; j -= wide.taps) ++i;
        for (; i >= kernel_rows; i -= kernel_rows) ++c;
        const int tap = (high.first_tap + (first_i + i) * high.tap_step) * pass.width.kernel +
                        wide.first_tap + j * wide.tap_step;
        const T* const from = group_weight + int64_t(chunk + c) * pass.weight_source + tap;
        for (int f = thread / 8; f < BlockFilters; f += Threads / 8)
          store_shared(filters + k * FilterPitch + f,
                       load(load_global(from + int64_t(first_filter + f) * pass.weight_result,
                                        first_filter + f < pass.result_group)));
      }
      __syncthreads();

      for (int c = 0; c < channels; ++c)
        for (int i = 0; i < kernel_rows; ++i) {
          const A* const line =
              patch + c * t.patch.plane +
              (row * high.stride + (first_i + i) * high.dilation - back_rows) * t.patch.pitch +
              column * wide.stride - back_columns;
          const A* const taps = filters + (c * kernel_rows + i) * wide.taps * FilterPitch + filter;
          if constexpr (Width > 0) {
            const bool backwards = wide.dilation < 0;
            A values[Columns + Width - 1];
#pragma unroll
            for (int x = 0; x < Columns + Width - 1; ++x) values[x] = load_shared(line + back_columns + x);
#pragma unroll
            for (int j = 0; j < Width; ++j) {
              const auto pack = load_shared(reinterpret_cast<const Pack<A, Filters>*>(
                  taps + (backwards ? Width - 1 - j : j) * FilterPitch));
#pragma unroll
              for (int x = 0; x < Columns; ++x)
#pragma unroll
                for (int f = 0; f < Filters; ++f) sums[x][f] += values[x + j] * pack.values[f];
            }
          } else {
            for (int j = 0; j < wide.taps; ++j) {
              const auto pack =
                  load_shared(reinterpret_cast<const Pack<A, Filters>*>(taps + j * FilterPitch));
#pragma unroll
              for (int x = 0; x < Columns; ++x) {
                const A value = load_shared(line + j * wide.dilation + x * wide.stride);
#pragma unroll
                for (int f = 0; f < Filters; ++f) sums[x][f] += value * pack.values[f];
              }
            }
          }
        }
    }
  }

  __syncthreads();  // the last patch is done with
  const int tile_columns = t.strips * Columns, pitch = sums_pitch(BlockFilters, pass.channels_last);
#pragma unroll
  for (int x = 0; x < Columns; ++x)
#pragma unroll
    for (int f = 0; f < Filters; ++f)
      store_shared(patch + (row * tile_columns + column + x) * pitch + filter + f, sums[x][f]);
  __syncthreads();
  const Strides to =
      strides_of(pass.result_channels, pass.height.result, pass.width.result, pass.channels_last);
  store_tile<PixelThreads * Columns, BlockFilters>(
      patch, pitch, epilogue, result, tile_filters(pass, group, first_filter, to.channel), t.packed,
      [&](int pixel) {
        const int r = first_row + pixel / tile_columns, c = first_column + pixel % tile_columns;
        return r < high.results && c < wide.results
                   ? image * to.image + (high.first + r * high.every) * to.row +
                         (wide.first + c * wide.every) * to.column
                   : int64_t(-1);
      });
}

// The rectangle that leaves the least idle; then as many channels as fit, 8 to 32 of them best.
template <typename T>
bool direct_tiling(DirectTiling& t, const Conv2dPass& p, int pixel_threads, int block_filters) {
  const int rows = phase_results(p.height, p.transposed), columns = phase_results(p.width, p.transposed);
  const int kernel_rows = phase_taps(p.height, p.transposed),
            kernel_columns = phase_taps(p.width, p.transposed);
  const int stride_high = p.transposed ? 1 : p.height.stride, stride_wide = p.transposed ? 1 : p.width.stride;
  int64_t least = INT64_MAX;
  for (int strips = 1; strips <= std::min(8, pixel_threads); strips *= 2) {
    const int high = pixel_threads / strips, wide = strips * Columns;
    const int64_t read_rows = int64_t(high - 1) * stride_high + phase_span(p.height, p.transposed);
    const int64_t read_columns = int64_t(wide - 1) * stride_wide + phase_span(p.width, p.transposed);
    const int64_t tiles = ceil_div(rows, high) * ceil_div(columns, wide);
    if (read_rows * (read_columns + 1) * int64_t(sizeof(accumulate_t<T>)) > direct_most_shared_bytes ||
        tiles * read_rows * read_columns >= least)
      continue;
    least = tiles * read_rows * read_columns;
    t.strips = strips;
    t.rows = high;
    t.patch = patch_of(1, int(read_rows), int(read_columns));
  }
  if (least == INT64_MAX) return false;
  t.row_tiles = int(ceil_div(rows, t.rows));
  t.column_tiles = int(ceil_div(columns, t.strips * Columns));
  t.filter_tiles = int(ceil_div(p.result_group, block_filters));
  const auto bytes = [&](int channels, int taps_high) {
    return int64_t(sizeof(accumulate_t<T>)) * channels *
           (t.patch.plane + int64_t(taps_high) * kernel_columns * (block_filters + 4));
  };
  t.patch.channels = 32;
  t.kernel_rows = kernel_rows;
  while (t.patch.channels > 1 && (t.patch.channels / 2 >= p.source_group ||
                                  (bytes(t.patch.channels, kernel_rows) > direct_shared_bytes)))
    t.patch.channels /= 2;
  while (t.kernel_rows > 1 && bytes(t.patch.channels, t.kernel_rows) > direct_most_shared_bytes)
    t.kernel_rows = (t.kernel_rows + 1) / 2;
  const int64_t sums =
      int64_t(sizeof(accumulate_t<T>)) * pixel_threads * Columns * sums_pitch(block_filters, p.channels_last);
  t.shared_bytes = int(std::min<int64_t>(std::max(bytes(t.patch.channels, t.kernel_rows), sums), INT32_MAX));
  return t.shared_bytes <= direct_most_shared_bytes;
}

}  // namespace

template <typename T>
bool conv2d_direct_pass_cuda(const T* source, const T* weight, const Conv2dEpilogue<T>& epilogue, T* result,
                             const Conv2dPass& pass, void* stream) {
  const int64_t results = pass.batch * pass.result_channels * pass.height.result * pass.width.result;
  if (results == 0) return true;
  const auto launch = [&]<int FilterThreads, int Threads>() {
    DirectTiling t{};
    if (!direct_tiling<T>(t, pass, Threads / FilterThreads, FilterThreads * Filters)) return false;
    t.packed = is_packed(epilogue, result, pass);
    const unsigned blocks = grid_size(pass.batch * pass.height.phases * pass.width.phases * t.row_tiles *
                                      t.column_tiles * pass.groups * t.filter_tiles);
    const bool three =
        phase_taps(pass.width, pass.transposed) == 3 && pass.width.stride == 1 && pass.width.dilation == 1;
    if (three) {
      FASTCONV_LAUNCH((conv2d_direct_forward_kernel<T, 3, FilterThreads, Threads>), blocks, Threads,
                      t.shared_bytes, stream, source, weight, epilogue, result, pass, t);
    } else {
      FASTCONV_LAUNCH((conv2d_direct_forward_kernel<T, 0, FilterThreads, Threads>), blocks, Threads,
                      t.shared_bytes, stream, source, weight, epilogue, result, pass, t);
    }
    return true;
  };
  // 64 filters of 128 pixels, or 16 filters of 256.
  return pass.result_group > 16 ? launch.template operator()<16, 256>()
                                : launch.template operator()<4, 128>();
}

template <typename T>
bool conv2d_direct_forward_cuda(const T* input, const T* weight, const Conv2dEpilogue<T>& epilogue, T* output,
                                const Conv2dShape& shape, void* stream) {
  return conv2d_direct_pass_cuda(input, weight, epilogue, output, conv2d_pass(shape, false), stream);
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template bool conv2d_direct_pass_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*,    \
                                           const Conv2dPass&, void*);                           \
  template bool conv2d_direct_forward_cuda<T>(const T*, const T*, const Conv2dEpilogue<T>&, T*, \
                                              const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// grad_weight of dense convolution as a matrix product, im2col panel by panel, in two stages.
//
// Formula: grad_weight (filters, C/G * taps) = grad_output^T (filters, pixels) * columns (pixels, C/G *
//   taps).
// One block: 64 filters by 128 columns (or 16 by 256) over one slice of the batch's pixels. It builds 16
//   pixels of both matrices in shared memory while it multiplies the 16 before. One thread: 8 (or 4) filters
//   by 8 columns.
// Bytes: grad_output once for each tile of columns, input once for each tap and tile of filters (from L1 and
//   L2, mostly), and the partial sums.
// Before it (direct): rectangles of one image at a time, and no copies beside the multiplications.
// Limits: 2-byte values are copied one by one, and not asynchronously.

#include "conv2d_im2col_cuda.h"

namespace fastconv {
namespace {

constexpr int Columns = 8;  // of a thread

template <int Filters, int FilterThreads>
constexpr int im2col_stage = im2col_depth *  // values of both panels
                             (im2col_threads / FilterThreads * Columns + 4 + FilterThreads * Filters + 4);

template <typename T, int Filters, int FilterThreads>
__global__ void __launch_bounds__(im2col_threads, 1)
    conv2d_im2col_grad_weight_kernel(const T* __restrict__ grad_output,           // (N, M, E, F)
                                     const T* __restrict__ input,                 // (N, C, H, W)
                                     accumulate_t<T>* __restrict__ partial_sums,  // (slices, values)
                                     Conv2dPass pass, int64_t values) {
  using A = accumulate_t<T>;
  constexpr int ColumnThreads = im2col_threads / FilterThreads, BlockColumns = ColumnThreads * Columns;
  constexpr int BlockFilters = FilterThreads * Filters, Stage = im2col_stage<Filters, FilterThreads>;
  FASTCONV_DYNAMIC_SHARED(T, panels);  // twice: (depth, columns), (depth, filters)
  __shared__ Pixel pixels[2][im2col_depth];
  __shared__ Column columns[BlockColumns];
  const int thread = int(threadIdx.x);
  const int weights = pass.source_group * pass.kernel_taps;
  const int filter_tiles = (pass.result_group + BlockFilters - 1) / BlockFilters;
  const int column_tiles = (weights + BlockColumns - 1) / BlockColumns;
  const int first_filter = int(blockIdx.x % filter_tiles) * BlockFilters;
  const int first_column = int(blockIdx.x / filter_tiles % column_tiles) * BlockColumns;
  const int64_t group = blockIdx.x / filter_tiles / column_tiles;
  const PhaseAxis high = phase_axis(pass.height, false, 0), wide = phase_axis(pass.width, false, 0);
  const Strides in =
      strides_of(pass.source_channels, pass.height.source, pass.width.source, pass.channels_last);
  const Strides out =
      strides_of(pass.result_channels, pass.height.result, pass.width.result, pass.channels_last);
  const T* const group_input = input + group * pass.source_group * in.channel;
  const T* const group_grads = grad_output + group * pass.result_group * out.channel;
  const int64_t all = pass.batch * high.results * wide.results;
  const int64_t first_pixel = all * blockIdx.y / gridDim.y, last_pixel = all * (blockIdx.y + 1) / gridDim.y;
  const int64_t stages = (last_pixel - first_pixel + im2col_depth - 1) / im2col_depth;

  for (int k = thread; k < BlockColumns; k += im2col_threads)
    columns[k] = column_of(first_column + k, pass, high, wide, in);
  const auto find_pixels = [&](int64_t stage) {
    if (thread < im2col_depth)
      pixels[stage % 2][thread] =
          pixel_of(first_pixel + stage * im2col_depth + thread, last_pixel, high, wide, in, out);
  };
  const auto fill = [&](int64_t stage) {
    T* const panel = panels + stage % 2 * Stage;
    const Pixel* const at = pixels[stage % 2];
    fill_panel<BlockColumns>(panel, pass.channels_last, [&](int p, int k, bool& active) {
      active = is_inside(at[p].row + columns[k].row, at[p].column + columns[k].column, pass);
      return group_input + at[p].source + columns[k].source;
    });
    fill_panel<BlockFilters>(panel + im2col_depth * (BlockColumns + 4), pass.channels_last,
                             [&](int p, int f, bool& active) {
                               active = at[p].result >= 0 && first_filter + f < pass.result_group;
                               return group_grads + at[p].result + (first_filter + f) * out.channel;
                             });
    end_copy_group();
  };

  const int column_thread = thread % ColumnThreads, filter_thread = thread / ColumnThreads;
  A sums[Columns][Filters] = {};
  find_pixels(0);
  __syncthreads();
  if (stages > 0) fill(0);
  find_pixels(1);
  for (int64_t stage = 0; stage < stages; ++stage) {
    wait_for_copy_groups<0>();
    __syncthreads();  // this stage's panels are there, those before it are done with
    if (stage + 1 < stages) fill(stage + 1);
    find_pixels(stage + 2);
    const T* const panel = panels + stage % 2 * Stage;
    multiply_panels<ColumnThreads, Columns, FilterThreads, Filters>(
        panel, panel + im2col_depth * (BlockColumns + 4), column_thread, filter_thread, sums);
  }

  A* const target = partial_sums + blockIdx.y * values;
#pragma unroll
  for (int f = 0; f < Filters; ++f) {
    const int filter = first_filter + strided_four(f, filter_thread, FilterThreads);
#pragma unroll
    for (int k = 0; k < Columns; ++k) {
      const int index = columns[strided_four(k, column_thread, ColumnThreads)].weight;
      store_global(target + (group * pass.result_group + filter) * weights + index, sums[k][f],
                   filter < pass.result_group && index >= 0);
    }
  }
}

}  // namespace

int64_t conv2d_im2col_grad_weight_workspace(const Conv2dShape& shape) { return grad_weight_workspace(shape); }

template <typename T>
bool conv2d_im2col_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                    accumulate_t<T>* workspace, const Conv2dShape& shape, void* stream) {
  if (shape.out_channels == 0) return true;
  const Conv2dPass pass = conv2d_pass(shape, false);
  const auto launch = [&]<int Filters, int FilterThreads>() {
    constexpr int BlockColumns = im2col_threads / FilterThreads * Columns;
    const unsigned blocks =
        grid_size(ceil_div(pass.result_group, Filters * FilterThreads) *
                  ceil_div(int64_t(pass.source_group) * pass.kernel_taps, BlockColumns) * pass.groups);
    if (blocks > 0)
      FASTCONV_LAUNCH((conv2d_im2col_grad_weight_kernel<T, Filters, FilterThreads>),
                      dim3(blocks, unsigned(grad_weight_slices(shape))), im2col_threads,
                      2 * sizeof(T) * im2col_stage<Filters, FilterThreads>, stream, grad_output, input,
                      workspace, pass, grad_weight_values(shape));
  };
  if (pass.result_group > 16)
    launch.template operator()<8, 8>();
  else
    launch.template operator()<4, 4>();
  conv2d_finish_grad_weight_cuda(grad_output, grad_weight, grad_bias, workspace, shape, stream);
  return true;
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template bool conv2d_im2col_grad_weight_cuda<T>(const T*, const T*, T*, T*, accumulate_t<T>*, \
                                                  const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

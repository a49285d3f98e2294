// grad_weight of dense convolution on the tensor cores (mma.sync m16n8k16), in two stages.
//
// Formula: grad_weight (filters, taps * C/G) = grad_output^T (filters, pixels) * columns (pixels, taps *
//   C/G).
// One block: 64 filters by 64 columns (8 units of 8 channels, each of a tap) over one slice of the batch's
//   pixels; one warp: 32 by 32, in fragments. A stage is 32 pixels of both, copied a stage ahead. Both lie
//   with their channels together and are multiplied along the pixels, so ldmatrix transposes them on the
//   way.
// Bytes: grad_output once for each tile of columns, input once for each tap and tile of filters (mostly from
//   L2), and the partial sums.
// Before it (im2col): multiplications one by one in float32, channels copied one by one.
// Limits: as conv2d_implicit_gemm_cuda.cu, but kernels of any size.

#include "conv2d_implicit_gemm_cuda.h"

namespace fastconv {
namespace {

constexpr int StagePixels = 32, BlockFilters = 64, BlockColumns = 64, Units = 8;
constexpr int panel_size = StagePixels * 64;

struct Unit {  // of 8 columns: from a pixel's first tap to theirs
  int64_t source;
  int row, column;
  int weight, weight_step;  // offset in a filter of the first; from one to the next
};

template <typename T>
__global__ void __launch_bounds__(gemm_threads, 1)
    conv2d_implicit_gemm_grad_weight_kernel(const T* __restrict__ grad_output,  // (N, M, E, F)
                                            const T* __restrict__ input,        // (N, C, H, W)
                                            float* __restrict__ partial_sums,   // (slices, values)
                                            Conv2dPass pass, bool wide_grads, bool wide_input,
                                            int64_t values) {
  alignas(16) __shared__ T grads[2][panel_size];   // (pixels, filters), twice
  alignas(16) __shared__ T inputs[2][panel_size];  // (pixels, columns), twice
  __shared__ Pixel pixels[2][StagePixels];
  __shared__ Unit units[Units];
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
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
  const T* const group_grads = grad_output + (group * pass.result_group + first_filter) * out.channel;
  const int64_t all = pass.batch * high.results * wide.results;
  const int64_t first_pixel = all * blockIdx.y / gridDim.y, last_pixel = all * (blockIdx.y + 1) / gridDim.y;
  const int64_t stages = (last_pixel - first_pixel + StagePixels - 1) / StagePixels;

  if (thread < Units) {  // column = tap * C/G + channel
    const int column = first_column + thread * 8, tap = column / pass.source_group;
    const int channel = column % pass.source_group;
    Unit u{0, nowhere, nowhere, -1, pass.kernel_taps};
    if (column < weights) {
      u.row = tap / wide.taps * high.dilation;
      u.column = tap % wide.taps * wide.dilation;
      u.source = channel * in.channel + u.row * in.row + u.column * in.column;
      u.weight = channel * pass.kernel_taps + tap;
    }
    units[thread] = u;
  }
  const auto find_pixels = [&](int64_t stage) {
    if (thread < StagePixels)
      pixels[stage % 2][thread] =
          pixel_of(first_pixel + stage * StagePixels + thread, last_pixel, high, wide, in, out);
  };
  const auto fill = [&](int64_t stage) {
    const Pixel* const at = pixels[stage % 2];
    fill_units<StagePixels>(grads[stage % 2], Units, wide_grads, out.channel,
                            [&](int p, int unit, bool& active) {
                              active = at[p].result >= 0 && first_filter + unit * 8 < pass.result_group;
                              return group_grads + at[p].result + unit * 8 * out.channel;
                            });
    fill_units<StagePixels>(inputs[stage % 2], Units, wide_input, in.channel,
                            [&](int p, int unit, bool& active) {
                              const Unit& u = units[unit];
                              active = is_inside(at[p].row + u.row, at[p].column + u.column, pass);
                              return group_input + at[p].source + u.source;
                            });
    end_copy_group();
  };

  const int warp_filter = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};
  find_pixels(0);
  __syncthreads();
  if (stages > 0) fill(0);
  find_pixels(1);
  for (int64_t stage = 0; stage < stages; ++stage) {
    wait_for_copy_groups<0>();
    __syncthreads();  // this stage's panels are there, those before it are done with
    if (stage + 1 < stages) fill(stage + 1);
    find_pixels(stage + 2);
    const T* const left = grads[stage % 2];
    const T* const right = inputs[stage % 2];
#pragma unroll
    for (int k = 0; k < StagePixels; k += 16) {
      uint32_t a[2][4], b[2][4];  // b: two fragments each
#pragma unroll
      for (int r = 0; r < 2; ++r)
        load_matrices<true>(a[r], left + unit_place(k + lane % 8 + lane / 16 * 8,
                                                    warp_filter / 8 + r * 2 + lane / 8 % 2, Units));
#pragma unroll
      for (int c = 0; c < 2; ++c)
        load_matrices<true>(b[c],
                            right + unit_place(k + lane % 16, warp_column / 8 + c * 2 + lane / 16, Units));
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          mma_m16n8k16<T>(sums[r][c], a[r], {b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1]});
    }
  }

  float* const target = partial_sums + blockIdx.y * values;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Unit u = units[warp_column / 8 + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int filter = first_filter + warp_filter + r * 16 + i / 2 * 8 + lane / 4;
        store_global(target + (group * pass.result_group + filter) * weights + u.weight +
                         (lane % 4 * 2 + i % 2) * u.weight_step,
                     sums[r][c][i], filter < pass.result_group && u.weight >= 0);
      }
    }
}

}  // namespace

int64_t conv2d_implicit_gemm_grad_weight_workspace(const Conv2dShape& shape) {
  return grad_weight_workspace(shape);
}

template <typename T>
bool conv2d_implicit_gemm_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                           accumulate_t<T>* workspace, const Conv2dShape& shape,
                                           void* stream) {
  if constexpr (sizeof(T) == 2) {
    const Conv2dPass pass = conv2d_pass(shape, false);
    if (!gemm_serves<T>(pass)) return false;
    const unsigned blocks =
        grid_size(ceil_div(pass.result_group, BlockFilters) *
                  ceil_div(int64_t(pass.source_group) * pass.kernel_taps, BlockColumns) * pass.groups);
    FASTCONV_LAUNCH(conv2d_implicit_gemm_grad_weight_kernel<T>,
                    dim3(blocks, unsigned(grad_weight_slices(shape))), gemm_threads, 0, stream, grad_output,
                    input, workspace, pass, pass.channels_last && on_16_bytes(grad_output),
                    pass.channels_last && on_16_bytes(input), grad_weight_values(shape));
    conv2d_finish_grad_weight_cuda(grad_output, grad_weight, grad_bias, workspace, shape, stream);
    return true;
  } else {
    return false;
  }
}

#define FASTCONV_INSTANTIATE(T)                                                                        \
  template bool conv2d_implicit_gemm_grad_weight_cuda<T>(const T*, const T*, T*, T*, accumulate_t<T>*, \
                                                         const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

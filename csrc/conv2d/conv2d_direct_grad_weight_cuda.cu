// grad_weight of direct dense convolution by tiles, in two stages and always in the same order.
//
// Formula: grad_weight[m, c, i, j] = sum over n, e, f of grad_output[n, m, e, f] * input[n, c, e * stride +
//   i * dilation - padding, f * ...].
// One block: 64 filters by 64 weights of each, for every slices-th rectangle of pixels. One thread: 8
//   filters by 4 weights, in registers. A rectangle's grad_output, and the patch of the input that the
//   block's weights meet, lie in shared memory; every tap reads the patch there.
// Bytes: grad_output once for each tile of weights, input once for each tile of filters, and the partial
//   sums.
// Before it: nothing; this is the first step of the ladder.
// Limits: a halo of the channels of 64 weights that does not fit in shared memory is refused.

#include "conv2d_direct_cuda.h"

namespace fastconv {
namespace {

constexpr int threads = 128, filter_threads = 8, weight_threads = 16;
constexpr int Weights = 4, block_weights = weight_threads * Weights;

struct DirectWeightTiling {
  int rows, columns;  // the rectangle
  int row_tiles, column_tiles, filter_tiles, weight_tiles;
  Patch patch;
  int shared_bytes;
};

template <typename T, int Filters>
__global__ void __launch_bounds__(threads, 1)
    conv2d_direct_grad_weight_kernel(const T* __restrict__ grad_output,           // (N, M, E, F)
                                     const T* __restrict__ input,                 // (N, C, H, W)
                                     accumulate_t<T>* __restrict__ partial_sums,  // (slices, values)
                                     Conv2dPass pass, DirectWeightTiling t, int64_t values) {
  using A = accumulate_t<T>;
  constexpr int BlockFilters = filter_threads * Filters, Pitch = BlockFilters + 4;
  FASTCONV_DYNAMIC_SHARED(A, patch);                          // (channels, rows, columns)
  A* const grads = patch + t.patch.channels * t.patch.plane;  // (pixels, filters)
  const int thread = int(threadIdx.x);
  const int weights = pass.source_group * pass.kernel_taps;
  const int first_filter = int(blockIdx.x % t.filter_tiles) * BlockFilters;
  const int first_weight = int(blockIdx.x / t.filter_tiles % t.weight_tiles) * block_weights;
  const int64_t group = blockIdx.x / t.filter_tiles / t.weight_tiles;
  const PhaseAxis high = phase_axis(pass.height, false, 0), wide = phase_axis(pass.width, false, 0);

  // Neighbouring lanes have neighbouring weights.
  const int filter = thread / weight_threads * Filters, weight = thread % weight_threads;
  const int first_channel = first_weight / pass.kernel_taps;
  int offsets[Weights];  // in the patch; any place will do for a weight that does not exist
#pragma unroll
  for (int k = 0; k < Weights; ++k) {
    const int index = min(first_weight + weight + k * weight_threads, weights - 1);
    const int tap = index % pass.kernel_taps;
    offsets[k] = (index / pass.kernel_taps - first_channel) * t.patch.plane +
                 tap / pass.width.kernel * high.dilation * t.patch.pitch +
                 tap % pass.width.kernel * wide.dilation;
  }

  const Strides in =
      strides_of(pass.source_channels, pass.height.source, pass.width.source, pass.channels_last);
  const Strides out =
      strides_of(pass.result_channels, pass.height.result, pass.width.result, pass.channels_last);
  A sums[Filters][Weights] = {};
  const int64_t tiles = pass.batch * t.row_tiles * t.column_tiles;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int first_column = int(tile % t.column_tiles) * t.columns;
    const int first_row = int(tile / t.column_tiles % t.row_tiles) * t.rows;
    const int64_t image = tile / t.column_tiles / t.row_tiles;
    const int rows = min(t.rows, high.results - first_row),
              columns = min(t.columns, wide.results - first_column);
    __syncthreads();  // the rectangle before is done with
    fill_patch(patch, t.patch, input + image * in.image, in, pass.height.source, pass.width.source,
               pass.channels_last, group * pass.source_group + first_channel, (group + 1) * pass.source_group,
               first_row * high.stride + high.offset, first_column * wide.stride + wide.offset);
    const T* const corner = grad_output + image * out.image +
                            (group * pass.result_group + first_filter) * out.channel + first_row * out.row +
                            first_column * out.column;
    for (int index = thread; index < rows * t.columns * BlockFilters; index += threads) {
      // Neighbours in memory: filters, or 8 pixels of each of 4 filters.
      const int f = pass.channels_last ? index % BlockFilters : index / 8 % BlockFilters;
      const int pixel =
          pass.channels_last ? index / BlockFilters : index / (8 * BlockFilters) * 8 + index % 8;
      const int y = pixel / t.columns, x = pixel % t.columns;
      const T value = load_global(corner + f * out.channel + y * out.row + x * out.column,
                                  x < columns && first_filter + f < pass.result_group);
      store_shared(grads + pixel * Pitch + f, load(value));
    }
    __syncthreads();
    for (int y = 0; y < rows; ++y)
      for (int x = 0; x < columns; ++x) {
        const A* const from = grads + (y * t.columns + x) * Pitch + filter;
        const A* const place = patch + y * high.stride * t.patch.pitch + x * wide.stride;
        const auto grad = load_shared(reinterpret_cast<const Pack<A, Filters>*>(from));
#pragma unroll
        for (int k = 0; k < Weights; ++k) {
          const A value = load_shared(place + offsets[k]);
#pragma unroll
          for (int f = 0; f < Filters; ++f) sums[f][k] += grad.values[f] * value;
        }
      }
  }

  A* const target = partial_sums + blockIdx.y * values;
#pragma unroll
  for (int f = 0; f < Filters; ++f)
#pragma unroll
    for (int k = 0; k < Weights; ++k) {
      const int index = first_weight + weight + k * weight_threads;
      store_global(target + (group * pass.result_group + first_filter + filter + f) * weights + index,
                   sums[f][k], first_filter + filter + f < pass.result_group && index < weights);
    }
}

// Rectangles of 64 pixels, or fewer where their patch does not fit.
template <typename T>
bool direct_weight_tiling(DirectWeightTiling& t, const Conv2dPass& p, int block_filters) {
  const int64_t weights = int64_t(p.source_group) * p.kernel_taps;
  const int64_t channels =
      std::min<int64_t>(p.source_group, (block_weights + p.kernel_taps - 2) / p.kernel_taps + 1);
  t.filter_tiles = int(ceil_div(p.result_group, block_filters));
  t.weight_tiles = int(ceil_div(weights, block_weights));
  for (int pixels = 64; pixels >= 8; pixels /= 2) {
    t.columns = p.width.result > 8 && pixels > 8 ? 16 : 8;
    t.rows = pixels / t.columns;
    const int64_t rows = int64_t(t.rows - 1) * p.height.stride + phase_span(p.height, false);
    const int64_t columns = int64_t(t.columns - 1) * p.width.stride + phase_span(p.width, false);
    if (rows * (columns + 1) > direct_most_shared_bytes) continue;
    t.patch = patch_of(int(channels), int(rows), int(columns));
    const int64_t bytes =
        sizeof(accumulate_t<T>) * (channels * t.patch.plane + int64_t(pixels) * (block_filters + 4));
    t.row_tiles = int(ceil_div(p.height.result, t.rows));
    t.column_tiles = int(ceil_div(p.width.result, t.columns));
    t.shared_bytes = int(std::min<int64_t>(bytes, INT32_MAX));
    if (bytes <= (pixels > 16 ? direct_shared_bytes : direct_most_shared_bytes)) return true;
  }
  return false;
}

}  // namespace

int64_t conv2d_direct_grad_weight_workspace(const Conv2dShape& shape) { return grad_weight_workspace(shape); }

template <typename T>
bool conv2d_direct_grad_weight_cuda(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                                    accumulate_t<T>* workspace, const Conv2dShape& shape, void* stream) {
  if (shape.out_channels == 0) return true;
  const Conv2dPass pass = conv2d_pass(shape, false);
  const auto launch = [&]<int Filters>() {
    DirectWeightTiling t{};
    if (!direct_weight_tiling<T>(t, pass, filter_threads * Filters)) return false;
    const unsigned blocks = grid_size(int64_t(t.filter_tiles) * t.weight_tiles * pass.groups);
    if (blocks > 0)
      FASTCONV_LAUNCH((conv2d_direct_grad_weight_kernel<T, Filters>),
                      dim3(blocks, unsigned(grad_weight_slices(shape))), threads, t.shared_bytes, stream,
                      grad_output, input, workspace, pass, t, grad_weight_values(shape));
    return true;
  };
  if (!(pass.result_group > 16 ? launch.template operator()<8>() : launch.template operator()<2>()))
    return false;
  conv2d_finish_grad_weight_cuda(grad_output, grad_weight, grad_bias, workspace, shape, stream);
  return true;
}

#define FASTCONV_INSTANTIATE(T)                                                                 \
  template bool conv2d_direct_grad_weight_cuda<T>(const T*, const T*, T*, T*, accumulate_t<T>*, \
                                                  const Conv2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

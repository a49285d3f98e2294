// Shift, tiled: an offset is looked up once for many values.
//
// Formula: shift2d.h.
// One block: a few pixels of all channels of a table (channels_last), where a thread stays with one channel
//   and walks over pixels; or a few planes (contiguous), where it stays with one plane and walks along it.
// Bytes: each value is read once and written once, coalesced as in plain.
// Before it: plain looks up the offset and divides 64-bit numbers for each value; here a thread divides in
//   32 bits, and looks up one offset.
// Limits: narrow planes, and few channels, leave lanes of a warp in different rows or pixels.
#include "shift2d_cuda.h"

namespace fastconv {
namespace {

constexpr int threads = 256;
constexpr int pixels_each = 8;  // of a thread

// threadIdx.x is the channel's place in the table, threadIdx.y walks over pixels of one image.
template <typename T>
__global__ void __launch_bounds__(threads)
    shift2d_tiled_forward_kernel(const T* __restrict__ input,  // (N, H, W, C)
                                 T* __restrict__ output,       // (N, H, W, C)
                                 int height, int width, int64_t channels, int tiles,
                                 const Shift2dTable table) {
  const int i = threadIdx.x;
  if (i >= table.count) return;
  const int dh = table.dh[i], dw = table.dw[i], plane = height * width;
  const int64_t start = blockIdx.x / tiles * int64_t(plane) * channels + table.first + i;
  int pixel = blockIdx.x % tiles * (pixels_each * blockDim.y) + threadIdx.y;
  for (int step = 0; step < pixels_each && pixel < plane; ++step, pixel += blockDim.y) {
    const int row = int(unsigned(pixel) / unsigned(width)), column = pixel - row * width;
    const bool inside = unsigned(row + dh) < unsigned(height) && unsigned(column + dw) < unsigned(width);
    const int source = inside ? pixel + dh * width + dw : pixel;
    const T value = load_global(input + start + source * channels, inside);
    store_global(output + start + pixel * channels, value);
  }
}

// threadIdx.x walks along a plane, threadIdx.y over the block's planes.
template <typename T>
__global__ void __launch_bounds__(threads)
    shift2d_planes_forward_kernel(const T* __restrict__ input,  // (N, C, H, W)
                                  T* __restrict__ output,       // (N, C, H, W)
                                  int64_t batch, int height, int width, int64_t channels,
                                  const Shift2dTable table) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= batch * table.count) return;
  const int i = int(index % table.count), size = height * width;
  const int64_t start = (index / table.count * channels + table.first + i) * size;
  const int dh = table.dh[i], dw = table.dw[i];
#pragma unroll 4
  for (int place = threadIdx.x; place < size; place += blockDim.x) {
    const int row = int(unsigned(place) / unsigned(width)), column = place - row * width;
    const bool inside = unsigned(row + dh) < unsigned(height) && unsigned(column + dw) < unsigned(width);
    const int source = inside ? place + dh * width + dw : place;
    store_global(output + start + place, load_global(input + start + source, inside));
  }
}

}  // namespace

template <typename T>
void shift2d_tiled_forward_cuda(const T* input, const int64_t* offsets, T* output, const Shift2dShape& shape,
                                void* stream) {
  const int64_t plane = shape.plane();
  narrow(2 * plane + threads * pixels_each, "2 * height * width");
  for_each_table(offsets, shape, [&](const Shift2dTable& table) {
    const int64_t wide = shape.channels_last ? table.count : plane;  // what neighbouring threads walk along
    unsigned lanes = 1;
    while (lanes < threads && lanes < wide) lanes *= 2;
    const dim3 block(lanes, threads / lanes);
    if (shape.batch * plane == 0) return;
    if (shape.channels_last) {
      const int64_t tiles = ceil_div(plane, pixels_each * block.y);
      FASTCONV_LAUNCH(shift2d_tiled_forward_kernel<T>, grid_size(shape.batch * tiles), block, 0, stream,
                      input, output, int(shape.height), int(shape.width), shape.channels, int(tiles), table);
    } else {
      FASTCONV_LAUNCH(shift2d_planes_forward_kernel<T>,
                      grid_size(ceil_div(shape.batch * table.count, block.y)), block, 0, stream, input,
                      output, shape.batch, int(shape.height), int(shape.width), shape.channels, table);
    }
  });
}

#define FASTCONV_INSTANTIATE(T) \
  template void shift2d_tiled_forward_cuda<T>(const T*, const int64_t*, T*, const Shift2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

// Channel shuffle, tiled: both sides coalesced.
//
// Formula: channel_shuffle.h.
// One block: a few whole pixels (channels_last), which pass through shared memory and change places there; or
//   parts of a few planes (contiguous), with neighbouring threads on neighbouring values.
// Bytes: each value is read once and written once, in whole sectors.
// Before it: plain loads parts of sectors in channels_last, and divides 64-bit numbers for each value; here
//   a thread divides once for each plane, or in 32 bits.
// Limits: a pixel of more than 48 KiB does not fit a tile, and goes to plain.
#include "../common/cuda.h"
#include "channel_shuffle.h"

namespace fastconv {
namespace {

constexpr int threads = 256;
constexpr int64_t tile_bytes = 16 << 10, most_tile_bytes = 48 << 10;

template <typename T>
__global__ void __launch_bounds__(threads)
    channel_shuffle_tiled_forward_kernel(const T* __restrict__ input,  // (images, channels)
                                         T* __restrict__ output,       // (images, channels)
                                         int64_t count, int tile_size, int groups, int per_group) {
  FASTCONV_DYNAMIC_SHARED(T, tile);  // (pixels, channels)
  const int64_t start = int64_t(blockIdx.x) * tile_size;
  const int size = int(min(int64_t(tile_size), count - start));
  for (int i = threadIdx.x; i < size; i += threads) store_shared(&tile[i], load_global(input + start + i));
  __syncthreads();
  const int channels = groups * per_group;
  for (int i = threadIdx.x; i < size; i += threads) {
    const int channel = i % channels;
    const int source = i - channel + channel % groups * per_group + channel / groups;
    store_global(output + start + i, load_shared(&tile[source]));
  }
}

// threadIdx.x walks along a plane, threadIdx.y over the block's planes.
template <typename T>
__global__ void __launch_bounds__(threads)
    channel_shuffle_rows_forward_kernel(const T* __restrict__ input,  // (images, channels, run)
                                        T* __restrict__ output,       // (images, channels, run)
                                        ChannelShuffleShape s) {
  const int64_t plane = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (plane >= s.images * s.channels) return;
  const int64_t channel = plane % s.channels;
  const T* from = input + (plane - channel + s.source(channel)) * s.run;
  T* to = output + plane * s.run;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < s.run; i += blockDim.x) store_global(to + i, load_global(from + i));
}

}  // namespace

template <typename T>
void channel_shuffle_tiled_forward_cuda(const T* input, T* output, const ChannelShuffleShape& shape,
                                        void* stream) {
  const int64_t planes = shape.images * shape.channels, pixel_bytes = shape.channels * int64_t(sizeof(T));
  if (planes * shape.run == 0) return;
  if (shape.run > 1) {
    unsigned lanes = 1;
    while (lanes < threads && lanes < shape.run) lanes *= 2;
    const dim3 block(lanes, threads / lanes);
    FASTCONV_LAUNCH(channel_shuffle_rows_forward_kernel<T>, grid_size(ceil_div(planes, block.y)), block, 0,
                    stream, input, output, shape);
  } else if (pixel_bytes <= most_tile_bytes) {
    const int64_t pixels = std::max<int64_t>(1, tile_bytes / pixel_bytes);
    const int tile_size = int(pixels * shape.channels);
    FASTCONV_LAUNCH(channel_shuffle_tiled_forward_kernel<T>, grid_size(ceil_div(shape.images, pixels)),
                    threads, tile_size * sizeof(T), stream, input, output, planes, tile_size,
                    int(shape.groups), int(shape.per_group()));
  } else {
    channel_shuffle_plain_forward_cuda(input, output, shape, stream);
  }
}

#define FASTCONV_INSTANTIATE(T) \
  template void channel_shuffle_tiled_forward_cuda<T>(const T*, T*, const ChannelShuffleShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

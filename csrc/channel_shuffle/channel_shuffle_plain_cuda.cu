// Channel shuffle, as plain as CUDA can say it.
//
// Formula: channel_shuffle.h, written out.
// One thread: one value of the output.
// Bytes: each value is read once and written once. Stores are coalesced; loads are where runs are long, and
//   in channels_last a warp reads from every group, each time a part of a sector.
// Before it: nothing; this is the first step of the ladder.
// Limits: 64-bit divisions for each value.
#include "../common/cuda.h"
#include "channel_shuffle.h"

namespace fastconv {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads)
    channel_shuffle_plain_forward_kernel(const T* __restrict__ input,  // (images, channels, run)
                                         T* __restrict__ output,       // (images, channels, run)
                                         ChannelShuffleShape s) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.images * s.channels * s.run) return;
  const int64_t place = index % s.run, channel = index / s.run % s.channels;
  const int64_t image = index / s.run / s.channels;
  store_global(output + index, load_global(input + (image * s.channels + s.source(channel)) * s.run + place));
}

}  // namespace

template <typename T>
void channel_shuffle_plain_forward_cuda(const T* input, T* output, const ChannelShuffleShape& shape,
                                        void* stream) {
  const int64_t count = shape.images * shape.channels * shape.run;
  if (count == 0) return;
  FASTCONV_LAUNCH(channel_shuffle_plain_forward_kernel<T>, grid_size(ceil_div(count, threads)), threads, 0,
                  stream, input, output, shape);
}

#define FASTCONV_INSTANTIATE(T) \
  template void channel_shuffle_plain_forward_cuda<T>(const T*, T*, const ChannelShuffleShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

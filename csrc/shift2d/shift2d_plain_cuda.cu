// Shift, as plain as CUDA can say it.
//
// Formula: shift2d.h, written out.
// One thread: one value of the output.
// Bytes: each value is read once and written once. Stores are coalesced, and so are loads where neighbours in
//   memory move together: a row (contiguous), or channels of the same offset (channels_last).
// Before it: nothing; this is the first step of the ladder.
// Limits: 64-bit divisions for each value. In channels_last a warp's lanes look up different offsets, which
//   the launch's parameters serve one after the other. A launch for each 256 channels.
#include "shift2d_cuda.h"

namespace fastconv {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads)
    shift2d_plain_forward_kernel(const T* __restrict__ input,  // (N, C, H, W) or (N, H, W, C)
                                 T* __restrict__ output,       // (N, C, H, W) or (N, H, W, C)
                                 Shift2dShape s, const Shift2dTable table) {
  int64_t rest = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (rest >= s.batch * s.plane() * table.count) return;
  // From the fastest dimension to the slowest; i is the channel's place in the table.
  int i = 0;
  if (s.channels_last) i = int(rest % table.count), rest /= table.count;
  const int64_t column = rest % s.width, row = rest / s.width % s.height;
  rest /= s.plane();
  if (!s.channels_last) i = int(rest % table.count), rest /= table.count;
  const int64_t image = rest, channel = table.first + i;
  const int64_t h = row + table.dh[i], w = column + table.dw[i];
  const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
  const T value = load_global(input + (inside ? s.index(image, channel, h, w) : 0), inside);
  store_global(output + s.index(image, channel, row, column), value);
}

}  // namespace

template <typename T>
void shift2d_plain_forward_cuda(const T* input, const int64_t* offsets, T* output, const Shift2dShape& shape,
                                void* stream) {
  for_each_table(offsets, shape, [&](const Shift2dTable& table) {
    const int64_t count = shape.batch * shape.plane() * table.count;
    if (count == 0) return;
    FASTCONV_LAUNCH(shift2d_plain_forward_kernel<T>, grid_size(ceil_div(count, threads)), threads, 0, stream,
                    input, output, shape, table);
  });
}

#define FASTCONV_INSTANTIATE(T) \
  template void shift2d_plain_forward_cuda<T>(const T*, const int64_t*, T*, const Shift2dShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

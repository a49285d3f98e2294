// Temporal shift, as plain as CUDA can say it.
//
// Formula: temporal_shift.h, written out.
// One thread: one value of the output; in place one column.
// Bytes: each value is read once and written once, coalesced: neighbours come from neighbours, but where a
//   fold ends. What leaves its clip is not read. In place the same of the folds alone.
// Before it: nothing; this is the first step of the ladder.
// Limits: 64-bit divisions for each value; in place each load waits for the one before.
#include "../common/cuda.h"
#include "temporal_shift.h"

namespace fastconv {
namespace {

constexpr int threads = 256;

template <typename T>
__global__ void __launch_bounds__(threads)
    temporal_shift_plain_forward_kernel(const T* __restrict__ input,  // (frames, rows, length)
                                        T* __restrict__ output,       // (frames, rows, length)
                                        TemporalShiftShape s) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.frames * s.frame_size()) return;
  const int64_t step = s.step_of(index % s.length);
  const bool inside = s.has(index / s.frame_size(), step);
  store_global(output + index, load_global(input + (inside ? index + step * s.frame_size() : 0), inside));
}

template <typename T>
__global__ void __launch_bounds__(threads)
    temporal_shift_plain_in_place_kernel(T* values,  // (frames, rows, length)
                                         TemporalShiftShape s) {
  const int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (index >= s.clips() * s.rows * s.moved()) return;
  const int64_t place = index % s.moved(), row = index / s.moved();  // of all clips
  const int64_t step = s.step_of(place), first = row / s.rows * s.segments + s.first_frame(step);
  T* at = values + (first * s.rows + row % s.rows) * s.length + place;
  for (int64_t left = s.segments - 1; left > 0; --left, at += step * s.frame_size())
    store_global(at, load_global(at + step * s.frame_size()));
  store_global(at, T{});
}

}  // namespace

template <typename T>
void temporal_shift_plain_forward_cuda(const T* input, T* output, const TemporalShiftShape& shape,
                                       void* stream) {
  const int64_t count = shape.frames * shape.frame_size();
  if (count == 0) return;
  FASTCONV_LAUNCH(temporal_shift_plain_forward_kernel<T>, grid_size(ceil_div(count, threads)), threads, 0,
                  stream, input, output, shape);
}

template <typename T>
void temporal_shift_plain_in_place_cuda(T* values, const TemporalShiftShape& shape, void* stream) {
  const int64_t count = shape.clips() * shape.rows * shape.moved();
  if (count == 0) return;
  FASTCONV_LAUNCH(temporal_shift_plain_in_place_kernel<T>, grid_size(ceil_div(count, threads)), threads, 0,
                  stream, values, shape);
}

#define FASTCONV_INSTANTIATE(T)                                                                       \
  template void temporal_shift_plain_forward_cuda<T>(const T*, T*, const TemporalShiftShape&, void*); \
  template void temporal_shift_plain_in_place_cuda<T>(T*, const TemporalShiftShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

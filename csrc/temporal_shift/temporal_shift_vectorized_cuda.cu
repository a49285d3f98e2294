// Temporal shift, vectorized: 16 bytes at a time, and all of a thread's loads on their way at once.
//
// Formula: temporal_shift.h, in units of 16 bytes, or of 8, 4 or 2 where rows and folds are no multiples.
// One thread: four units of one frame, a block's width apart; in place one column of units, four at a time.
// Bytes: each value is read once and written once, coalesced; what leaves its clip is not read. In place the
//   same of the folds alone.
// Before it: plain moves one value and divides 64-bit numbers for it; here a unit takes one division in 32
//   bits, a block finds its frame once, and no load waits for another.
// Limits: a last block of each frame that is not full; narrow units where C or C / fold_div is odd.
#include "../common/cuda.h"
#include "temporal_shift.h"

namespace fastconv {
namespace {

constexpr int threads = 256;
constexpr int units_each = 4;  // of a thread

template <typename Unit>
__global__ void __launch_bounds__(threads)
    temporal_shift_vectorized_forward_kernel(const Unit* __restrict__ input,  // (frames, size)
                                             Unit* __restrict__ output,       // (frames, size)
                                             int size, int length, int fold, int blocks, int segments,
                                             int step, bool both) {
  const int frame = blockIdx.x / blocks, t = frame % segments;
  const int first = int(blockIdx.x % blocks) * (threads * units_each) + threadIdx.x;
  const int64_t start = int64_t(frame) * size;
  Unit units[units_each];
#pragma unroll
  for (int i = 0; i < units_each; ++i) {
    const int at = first + i * threads, place = int(unsigned(at) % unsigned(length));
    const int steps = place < fold ? step : both && place < 2 * fold ? -step : 0;
    const bool inside = at < size && unsigned(t + steps) < unsigned(segments);
    units[i] = load_global(input + (inside ? start + int64_t(steps) * size + at : 0), inside);
  }
#pragma unroll
  for (int i = 0; i < units_each; ++i) {
    const int at = first + i * threads;
    if (at < size) store_global(output + start + at, units[i]);
  }
}

template <typename Unit>
__global__ void __launch_bounds__(threads)
    temporal_shift_vectorized_in_place_kernel(Unit* values,  // (frames, size)
                                              int size, int length, int fold, int moved, int columns,
                                              int blocks, int segments, int step) {
  const int column = int(blockIdx.x % blocks) * threads + threadIdx.x;  // of a clip
  if (column >= columns) return;
  const int row = int(unsigned(column) / unsigned(moved)), place = column - row * moved;
  const int steps = place < fold ? step : -step, start = steps > 0 ? 0 : segments - 1;
  const int64_t clip = blockIdx.x / blocks, along = int64_t(steps) * size;
  Unit* const first = values + (clip * segments + start) * size + int64_t(row) * length + place;
  for (int walked = 0; walked < segments; walked += units_each) {
    Unit units[units_each];
#pragma unroll
    for (int i = 0; i < units_each; ++i) {
      const bool inside = walked + i + 1 < segments;
      units[i] = load_global(first + (inside ? (walked + i + 1) * along : 0), inside);
    }
#pragma unroll
    for (int i = 0; i < units_each; ++i)
      if (walked + i < segments) store_global(first + (walked + i) * along, units[i]);
  }
}

// body(Unit{}, shape in units) with the widest unit that divides rows, folds and addresses: what does,
// divides the union of their bits.
template <typename Body>
void with_units(const TemporalShiftShape& bytes, uintptr_t addresses, const Body& body) {
  const uint64_t bits = uint64_t(bytes.length) | uint64_t(bytes.fold) | addresses;
  const auto with = [&](auto unit) { body(unit, bytes.in_units(1, sizeof(unit))); };
  if (bits % 16 == 0) return with(uint4{});
  if (bits % 8 == 0) return with(uint2{});
  if (bits % 4 == 0) return with(uint32_t{});
  with(uint16_t{});
}

template <typename Unit>
void launch_forward(const void* input, void* output, const TemporalShiftShape& s, void* stream) {
  const int64_t size = s.frame_size(), blocks = ceil_div(size, threads * units_each);
  narrow(size + threads * units_each, "channels * height * width");
  if (s.frames * blocks == 0) return;
  FASTCONV_LAUNCH(temporal_shift_vectorized_forward_kernel<Unit>, grid_size(s.frames * blocks), threads, 0,
                  stream, static_cast<const Unit*>(input), static_cast<Unit*>(output), int(size),
                  int(s.length), int(s.fold), int(blocks), int(s.segments), int(s.step), s.both);
}

template <typename Unit>
void launch_in_place(void* values, const TemporalShiftShape& s, void* stream) {
  const int64_t columns = s.rows * s.moved(), blocks = ceil_div(columns, threads);
  narrow(s.frame_size() + threads, "channels * height * width");
  if (s.clips() * blocks == 0) return;
  FASTCONV_LAUNCH(temporal_shift_vectorized_in_place_kernel<Unit>, grid_size(s.clips() * blocks), threads, 0,
                  stream, static_cast<Unit*>(values), int(s.frame_size()), int(s.length), int(s.fold),
                  int(s.moved()), int(columns), int(blocks), int(s.segments), int(s.step));
}

}  // namespace

template <typename T>
void temporal_shift_vectorized_forward_cuda(const T* input, T* output, const TemporalShiftShape& shape,
                                            void* stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output);
  with_units(shape.in_units(sizeof(T)), addresses, [&](auto unit, const TemporalShiftShape& s) {
    launch_forward<decltype(unit)>(input, output, s, stream);
  });
}

template <typename T>
void temporal_shift_vectorized_in_place_cuda(T* values, const TemporalShiftShape& shape, void* stream) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(values);
  with_units(shape.in_units(sizeof(T)), address, [&](auto unit, const TemporalShiftShape& s) {
    launch_in_place<decltype(unit)>(values, s, stream);
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                            \
  template void temporal_shift_vectorized_forward_cuda<T>(const T*, T*, const TemporalShiftShape&, void*); \
  template void temporal_shift_vectorized_in_place_cuda<T>(T*, const TemporalShiftShape&, void*);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv

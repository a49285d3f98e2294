// Temporal shift: the plain-C++ signature of every kernel.
//
//   output[t, c, h, w] = input[t + step, c, h, w]  for the first fold of channels,
//                        input[t - step, c, h, w]  for the second fold, where both folds move,
//                        input[t, c, h, w]         for the others;
//
// t counts the frames of one clip, and what is before its first or after its last is zero.
//
// In place, only the folds are touched. A column is what a fold has at one place of a row in each frame of a
// clip; its values all move one frame in one direction. Whoever owns a column walks it against that
// direction, from the frame whose value leaves the clip, and so overwrites only what it has moved before.
#pragma once

#include <cstdint>

#include "../common/cpu.h"
#include "../common/types.h"

namespace fastconv {

// Both layouts are (frames, rows, length) in memory: a frame of a channels_last tensor is H * W rows of C
// values, that of a contiguous one a single row of C * H * W. A fold is the first values of each row.
struct TemporalShiftShape {
  int64_t frames, segments;  // of all clips, one after the other, and of each
  int64_t rows, length;
  int64_t fold;  // values of a row
  int64_t step;  // 1 or -1
  bool both;

  FASTCONV_HOST_DEVICE int64_t frame_size() const { return rows * length; }
  FASTCONV_HOST_DEVICE int64_t clips() const { return frames / segments; }
  FASTCONV_HOST_DEVICE int64_t moved() const { return both ? 2 * fold : fold; }  // values of a row
  // The same shape, counted in units of other bytes than a value's.
  TemporalShiftShape in_units(int64_t value_bytes, int64_t unit_bytes = 1) const {
    TemporalShiftShape units = *this;
    units.length = length * value_bytes / unit_bytes;
    units.fold = fold * value_bytes / unit_bytes;
    return units;
  }
  // How many frames on a value of a row comes from.
  FASTCONV_HOST_DEVICE int64_t step_of(int64_t place) const {
    return place < fold ? step : place < moved() ? -step : 0;
  }
  // Whether the clip of a frame has the one so many frames on.
  FASTCONV_HOST_DEVICE bool has(int64_t frame, int64_t steps) const {
    const int64_t t = frame % segments + steps;
    return t >= 0 && t < segments;
  }
  // Where a walk along a column begins in which each frame takes the value from `steps` on.
  FASTCONV_HOST_DEVICE int64_t first_frame(int64_t steps) const { return steps > 0 ? 0 : segments - 1; }
};

// T: float, double, BFloat16, Float16. Input, output and values are (frames, rows, length). The gradient is
// the shift by the opposite step, so that there is only one pass.
#define FASTCONV_TEMPORAL_SHIFT_CPU(variant)                                                              \
  template <typename T>                                                                                   \
  void temporal_shift_##variant##_forward_cpu(const T* input, T* output, const TemporalShiftShape& shape, \
                                              ParallelFor threads);                                       \
  template <typename T>                                                                                   \
  void temporal_shift_##variant##_in_place_cpu(T* values, const TemporalShiftShape& shape,                \
                                               ParallelFor threads);

FASTCONV_DECLARE_CPU(FASTCONV_TEMPORAL_SHIFT_CPU(plain) FASTCONV_TEMPORAL_SHIFT_CPU(vectorized))

// The CUDA kernels launch on `stream` (a cudaStream_t) of the current device and return at once.
#define FASTCONV_TEMPORAL_SHIFT_CUDA(variant)                                                              \
  template <typename T>                                                                                    \
  void temporal_shift_##variant##_forward_cuda(const T* input, T* output, const TemporalShiftShape& shape, \
                                               void* stream);                                              \
  template <typename T>                                                                                    \
  void temporal_shift_##variant##_in_place_cuda(T* values, const TemporalShiftShape& shape, void* stream);

FASTCONV_TEMPORAL_SHIFT_CUDA(plain)
FASTCONV_TEMPORAL_SHIFT_CUDA(vectorized)

}  // namespace fastconv

// Temporal shift, C++, plain: the formula.
//
// Formula: temporal_shift.h. One step of the inner loop copies one value, or writes a zero.
// Bytes: each value is read once and written once, but those that leave their clip, which are not read; in
//   place those of the folds.
// Before it: nothing; read it first.
// Limits: asks of each value where it comes from; a thread takes whole frames, in place whole clips.
#include "temporal_shift.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void temporal_shift_plain_forward_cpu(const T* input, T* output, const TemporalShiftShape& s,
                                      ParallelFor threads) {
  parallel_for(threads, s.frames, [&](int64_t begin, int64_t end) {
    for (int64_t frame = begin; frame < end; ++frame)
      for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t place = 0; place < s.length; ++place) {
          const int64_t to = (frame * s.rows + row) * s.length + place, step = s.step_of(place);
          output[to] = s.has(frame, step) ? input[to + step * s.frame_size()] : T{};
        }
  });
}

template <typename T>
void temporal_shift_plain_in_place_cpu(T* values, const TemporalShiftShape& s, ParallelFor threads) {
  parallel_for(threads, s.clips(), [&](int64_t begin, int64_t end) {
    for (int64_t clip = begin; clip < end; ++clip)
      for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t place = 0; place < s.moved(); ++place) {
          const int64_t step = s.step_of(place), first = clip * s.segments + s.first_frame(step);
          T* at = values + (first * s.rows + row) * s.length + place;
          for (int64_t left = s.segments - 1; left > 0; --left, at += step * s.frame_size())
            *at = at[step * s.frame_size()];
          *at = T{};
        }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                            \
  template void temporal_shift_plain_forward_cpu<T>(const T*, T*, const TemporalShiftShape&, ParallelFor); \
  template void temporal_shift_plain_in_place_cpu<T>(T*, const TemporalShiftShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

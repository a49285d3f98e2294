// Shift, C++, vectorized: whole planes, or runs of channels that move together.
//
// Formula: shift2d.h. Contiguous, one step moves what stays of a plane as one block, and then zeroes the
//   columns at the edge, into which the block has carried values of the next row. In channels_last, one step
//   copies a run of neighbouring channels with the same offset from one pixel to another.
// Bytes: each value is read once and written once.
// Before it: plain moves one value at a time, and asks for each whether it is inside.
// Limits: where most runs are shorter than min_run values, channels_last moves single values.
#include <algorithm>
#include <cstring>

#include "../common/simd.h"
#include "shift2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t min_run = 4;
constexpr int64_t tile_bytes = 16 << 10;  // of output, which stays in the first cache

// The outputs [first, last) along an axis whose source is inside.
struct Span {
  int64_t first, last;
};
inline Span inside(int64_t offset, int64_t size) {
  return {std::max<int64_t>(0, -offset), std::min(size, size - offset)};
}

template <typename T>
void move_plane(const T* from, T* to, int64_t height, int64_t width, int64_t dh, int64_t dw) {
  const Span rows = inside(dh, height), columns = inside(dw, width);
  if (rows.first >= rows.last || columns.first >= columns.last) {
    std::memset(to, 0, height * width * sizeof(T));
    return;
  }
  const int64_t begin = rows.first * width + columns.first, end = (rows.last - 1) * width + columns.last;
  std::memset(to, 0, rows.first * width * sizeof(T));
  std::memcpy(to + begin, from + begin + dh * width + dw, (end - begin) * sizeof(T));
  std::memset(to + rows.last * width, 0, (height - rows.last) * width * sizeof(T));
  if (dw == 0) return;
  const int64_t edge = dw < 0 ? 0 : columns.last, count = dw < 0 ? -dw : dw;
  for (int64_t row = rows.first; row < rows.last; ++row) std::fill_n(to + row * width + edge, count, T{});
}

template <int Size>
inline void copy_ends(char* to, const char* from, int64_t bytes) {
  char first[Size], last[Size];
  __builtin_memcpy(first, from, Size);
  __builtin_memcpy(last, from + bytes - Size, Size);
  __builtin_memcpy(to, first, Size);
  __builtin_memcpy(to + bytes - Size, last, Size);
}

// memcpy, without the call: runs are short. The last vector may overlap the one before.
inline void copy_run(char* to, const char* from, int64_t bytes) {
  constexpr int V = vector_bytes;
  if (bytes >= V) {
    typedef char Bytes __attribute__((vector_size(V)));
    const auto step = [&](int64_t at) {
      Bytes value;
      __builtin_memcpy(&value, from + at, V);
      __builtin_memcpy(to + at, &value, V);
    };
    for (int64_t at = 0; at + V < bytes; at += V) step(at);
    step(bytes - V);
  } else if (bytes >= 32) {
    copy_ends<32>(to, from, bytes);
  } else if (bytes >= 16) {
    copy_ends<16>(to, from, bytes);
  } else if (bytes >= 8) {
    copy_ends<8>(to, from, bytes);
  } else if (bytes >= 4) {
    copy_ends<4>(to, from, bytes);
  } else {
    copy_ends<2>(to, from, bytes);
  }
}

// Neighbouring channels that move together, and what that means for a pixel.
struct Run {
  int64_t first, length;  // channels
  int64_t source;         // from an output to its source, in values
  Span rows, columns;
};

// The runs, into `runs` (at most one a channel); returns their number.
int64_t find_runs(const int64_t* offsets, const Shift2dShape& s, Run* runs) {
  int64_t count = 0;
  for (int64_t channel = 0; channel < s.channels; ++channel) {
    const int64_t* offset = offsets + 2 * channel;
    if (channel > 0 && offset[0] == offset[-2] && offset[1] == offset[-1]) {
      ++runs[count - 1].length;
      continue;
    }
    const int64_t dh = limited(offset[0], s.height), dw = limited(offset[1], s.width);
    runs[count++] = {channel, 1, (dh * s.width + dw) * s.channels, inside(dh, s.height), inside(dw, s.width)};
  }
  return count;
}

// Pixels [first, last) of a row, run by run.
template <typename T>
void move_runs(const T* from, T* to, const Shift2dShape& s, const Run* runs, int64_t count, int64_t row,
               int64_t first, int64_t last) {
  for (const Run* run = runs; run < runs + count; ++run) {
    const int64_t bytes = run->length * sizeof(T);
    const bool reads = row >= run->rows.first && row < run->rows.last;
    const int64_t begin = reads ? std::clamp(run->columns.first, first, last) : last;
    const int64_t end = reads ? std::clamp(run->columns.last, begin, last) : last;
    const int64_t at = run->first;
    for (int64_t w = first; w < begin; ++w) std::memset(to + w * s.channels + at, 0, bytes);
    for (int64_t w = begin; w < end; ++w)
      copy_run(reinterpret_cast<char*>(to + w * s.channels + at),
               reinterpret_cast<const char*>(from + w * s.channels + at + run->source), bytes);
    for (int64_t w = end; w < last; ++w) std::memset(to + w * s.channels + at, 0, bytes);
  }
}

// The same where runs are short: pixel by pixel, value by value.
template <typename T>
void move_values(const T* from, T* to, const Shift2dShape& s, const Run* runs, int64_t count, int64_t row,
                 int64_t first, int64_t last) {
  for (int64_t w = first; w < last; ++w)
    for (const Run* run = runs; run < runs + count; ++run) {
      const bool reads =
          row >= run->rows.first && row < run->rows.last && w >= run->columns.first && w < run->columns.last;
      const int64_t at = w * s.channels + run->first;
      for (int64_t i = 0; i < run->length; ++i) to[at + i] = reads ? from[at + i + run->source] : T{};
    }
}

template <typename T>
void move_pixels(const T* input, const int64_t* offsets, T* output, const Shift2dShape& s,
                 ParallelFor threads) {
  const Scratch<Run> scratch(s.channels);
  const Run* runs = scratch.data();
  const int64_t count = find_runs(offsets, s, scratch.data());
  const auto move = s.channels >= count * min_run ? move_runs<T> : move_values<T>;
  const int64_t tile = std::max<int64_t>(1, tile_bytes / (s.channels * int64_t(sizeof(T))));
  parallel_for(threads, s.batch * s.height, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t start = index * s.width * s.channels;
      for (int64_t first = 0; first < s.width; first += tile)
        move(input + start, output + start, s, runs, count, index % s.height, first,
             std::min(first + tile, s.width));
    }
  });
}

}  // namespace

template <typename T>
void shift2d_vectorized_forward_cpu(const T* input, const int64_t* offsets, T* output, const Shift2dShape& s,
                                    ParallelFor threads) {
  if (s.channels_last) return move_pixels(input, offsets, output, s, threads);
  parallel_for(threads, s.batch * s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t* offset = offsets + plane % s.channels * 2;
      move_plane(input + plane * s.plane(), output + plane * s.plane(), s.height, s.width,
                 limited(offset[0], s.height), limited(offset[1], s.width));
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                      \
  template void shift2d_vectorized_forward_cpu<T>(const T*, const int64_t*, T*, const Shift2dShape&, \
                                                  ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Shift, C++, vectorized: whole planes, or vectors of channels put together.
//
// Formula: shift2d.h. Contiguous, one step moves what stays of a plane as one block, and then zeroes the
//   columns at the edge, into which the block has carried values of the next row. In channels_last, one step
//   loads the same channels of each pixel that some of them come from, masks them, and stores one vector.
// Bytes: each value is read once and written once; in channels_last a vector for each piece of it.
// Before it: plain moves one value at a time, and asks for each whether it is inside.
// Limits: memory, or the L2 cache; in channels_last loads, where many directions share a vector.
#include <algorithm>
#include <limits>
#include <vector>

#include "../common/copy.h"
#include "../common/geometry.h"
#include "../common/simd.h"
#include "shift2d_rows_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t tile_bytes = 64 << 10;  // of output

// The outputs along an axis whose source is inside.
inline Range inside(int64_t offset, int64_t size) { return outputs_inside(offset, 1, size, size); }

template <typename T>
void move_plane(const T* from, T* to, int64_t height, int64_t width, int64_t dh, int64_t dw) {
  const Range rows = inside(dh, height), columns = inside(dw, width);
  if (rows.begin >= rows.end || columns.begin >= columns.end) {
    std::memset(to, 0, height * width * sizeof(T));
    return;
  }
  const int64_t begin = rows.begin * width + columns.begin, end = (rows.end - 1) * width + columns.end;
  std::memset(to, 0, rows.begin * width * sizeof(T));
  copy_run(reinterpret_cast<char*>(to + begin), reinterpret_cast<const char*>(from + begin + dh * width + dw),
           (end - begin) * sizeof(T));
  std::memset(to + rows.end * width, 0, (height - rows.end) * width * sizeof(T));
  if (dw == 0) return;
  const int64_t edge = dw < 0 ? 0 : columns.end, count = dw < 0 ? -dw : dw;
  for (int64_t column = edge; column < edge + count; ++column)
    for (int64_t row = rows.begin; row < rows.end; ++row) to[row * width + column] = T{};
}

// Of a vector's channels those that move together.
template <int B>
struct Piece {
  Bytes<B> mask;
  int64_t source;  // from an output to its source, in bytes
  Range rows, columns;

  Bytes<B> load(const char* from) const {
    Bytes<B> value;
    __builtin_memcpy(&value, from + source, B);
    return value & mask;
  }
};

inline Range common(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }
inline bool holds(Range range, int64_t k) { return k >= range.begin && k < range.end; }

// Neighbouring channels of a pixel: B bytes, a vector.
template <int B>
struct Slice {
  int64_t at;  // in a pixel, in bytes
  std::vector<Piece<B>> pieces;
  Range rows, columns;  // where all pieces read

  Slice only(int64_t row) const {  // the pieces that read this row
    Slice kept{at, {}, {row, row + 1}, {0, std::numeric_limits<int64_t>::max()}};
    for (const Piece<B>& piece : pieces) {
      if (!holds(piece.rows, row)) continue;
      kept.pieces.push_back(piece);
      kept.columns = common(kept.columns, piece.columns);
    }
    return kept;
  }
};

// A pixel's channels as vectors; the last may overlap the one before.
template <typename T, int B>
std::vector<Slice<B>> find_slices(const int64_t* offsets, const Shift2dShape& s) {
  constexpr int64_t count = B / sizeof(T);
  std::vector<Slice<B>> found(ceil_div(s.channels, count));
  for (size_t v = 0; v < found.size(); ++v) {
    const int64_t first = std::min(int64_t(v) * count, s.channels - count);
    Slice<B>& slice = found[v];
    slice = {first * int64_t(sizeof(T)), {}, {0, s.height}, {0, s.width}};
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t* offset = offsets + 2 * (first + lane);
      const int64_t dh = limited(offset[0], s.height), dw = limited(offset[1], s.width);
      const Range rows = inside(dh, s.height), columns = inside(dw, s.width);
      const int64_t source = (dh * s.width + dw) * s.channels * int64_t(sizeof(T));
      const auto same = [&](const Piece<B>& p) {
        return p.source == source && p.columns.begin == columns.begin && p.columns.end == columns.end;
      };
      auto piece = std::find_if(slice.pieces.begin(), slice.pieces.end(), same);
      if (piece == slice.pieces.end())
        piece = slice.pieces.insert(piece, {Bytes<B>{}, source, rows, columns});
      for (size_t k = 0; k < sizeof(T); ++k) piece->mask[lane * sizeof(T) + k] = 0xff;
      slice.rows = common(slice.rows, rows), slice.columns = common(slice.columns, columns);
    }
  }
  return found;
}

// Pixels [first, last) of a row, which lie `step` bytes apart; all pieces read the row.
template <int B>
void move_slice(const Slice<B>& slice, const char* from, char* to, int64_t step, int64_t first,
                int64_t last) {
  const Piece<B>* pieces = slice.pieces.data();
  const int64_t count = int64_t(slice.pieces.size());
  from += slice.at, to += slice.at;
  const auto move = [&](int64_t begin, int64_t end, const auto& value_at) {
    for (int64_t w = begin; w < end; ++w) {
      const Bytes<B> value = value_at(w);
      __builtin_memcpy(to + w * step, &value, B);
    }
  };
  const auto edge = [&](int64_t w) {
    Bytes<B> value{};
    for (int64_t k = 0; k < count; ++k)
      if (holds(pieces[k].columns, w)) value |= pieces[k].load(from + w * step);
    return value;
  };
  const int64_t begin = std::clamp(slice.columns.begin, first, last);
  const int64_t end = count > 4 ? begin : std::clamp(slice.columns.end, begin, last);
  move(first, begin, edge);
  with_constant<0, 4>(std::min<int64_t>(count, 4), [&](auto some) {
    Piece<B> own[some + 1];  // in registers
    for (int k = 0; k < some; ++k) own[k] = pieces[k];
    move(begin, end, [&](int64_t w) {
      Bytes<B> value{};
#pragma GCC unroll 4
      for (int k = 0; k < some; ++k) value |= own[k].load(from + w * step);
      return value;
    });
  });
  move(end, last, edge);
}

// With the widest vectors that a pixel fills.
template <typename T, int B>
MoveRow mover(const int64_t* offsets, const Shift2dShape& s) {
  if constexpr (B > int(sizeof(T)))
    if (s.channels * int64_t(sizeof(T)) < B) return mover<T, B / 2>(offsets, s);
  const int64_t width = s.width, step = s.channels * int64_t(sizeof(T));
  return [=, slices = find_slices<T, B>(offsets, s)](const void* image, int64_t row, void* target) {
    const char* from = static_cast<const char*>(image) + row * width * step;
    char* to = static_cast<char*>(target);
    const int64_t tile = std::max<int64_t>(1, tile_bytes / step);
    for (int64_t first = 0; first < width; first += tile)
      for (const Slice<B>& slice : slices) {
        const int64_t last = std::min(first + tile, width);
        if (holds(slice.rows, row))
          move_slice(slice, from, to, step, first, last);
        else
          move_slice(slice.only(row), from, to, step, first, last);
      }
  };
}

// A row of each plane, side by side.
template <typename T>
MoveRow gatherer(const int64_t* offsets, const Shift2dShape& s) {
  return [s, offsets = std::vector<int64_t>(offsets, offsets + 2 * s.channels)](const void* image,
                                                                                int64_t row, void* target) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t h = row + limited(offsets[2 * c], s.height), dw = limited(offsets[2 * c + 1], s.width);
      const Range columns = h >= 0 && h < s.height ? inside(dw, s.width) : Range{0, 0};
      const T* from = static_cast<const T*>(image) + (c * s.height + h) * s.width + dw;
      T* to = static_cast<T*>(target) + c;
      for (int64_t w = 0; w < s.width; ++w) to[w * s.channels] = holds(columns, w) ? from[w] : T{};
    }
  };
}

}  // namespace

template <typename T>
MoveRow shifted_rows(const int64_t* offsets, const Shift2dShape& s) {
  return s.channels_last ? mover<T, vector_bytes>(offsets, s) : gatherer<T>(offsets, s);
}

template <typename T>
void shift2d_vectorized_forward_cpu(const T* input, const int64_t* offsets, T* output, const Shift2dShape& s,
                                    ParallelFor threads) {
  if (s.channels_last) {
    const MoveRow move_row = shifted_rows<T>(offsets, s);
    return parallel_for(threads, s.batch * s.height, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        move_row(input + row / s.height * s.plane() * s.channels, row % s.height,
                 output + row * s.width * s.channels);
    });
  }
  parallel_for(threads, s.batch * s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t* offset = offsets + plane % s.channels * 2;
      move_plane(input + plane * s.plane(), output + plane * s.plane(), s.height, s.width,
                 limited(offset[0], s.height), limited(offset[1], s.width));
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                      \
  template MoveRow shifted_rows<T>(const int64_t*, const Shift2dShape&);                             \
  template void shift2d_vectorized_forward_cpu<T>(const T*, const int64_t*, T*, const Shift2dShape&, \
                                                  ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

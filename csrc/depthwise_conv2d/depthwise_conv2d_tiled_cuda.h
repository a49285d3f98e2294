// What the tiled CUDA kernels of depthwise convolution share: how a tensor is cut into tiles, and how a tile
// with its halo comes into shared memory.
//
// A tile is a rectangle of pixels of one group. channels_last: a group is a chunk of channels of one image,
// and a tile lies in shared memory as (rows, columns, channels). Contiguous: a group is a few planes (images
// times channels), and a tile lies as (planes, rows, columns).
#pragma once

#include <algorithm>

#include "depthwise_conv2d_cuda.h"

namespace fastconv {

constexpr int tiled_threads = 256;
constexpr int tiled_shared_bytes = 56 << 10;        // of a tile, so that four blocks share a multiprocessor
constexpr int tiled_most_shared_bytes = 160 << 10;  // what a block can have from compute capability 8.0 on

// The tensor that a kernel reads through tiles.
template <typename T>
struct Source {
  const T* data;
  int64_t images, channels;
  int rows, columns;
};

struct Tiling {
  int out_rows, out_columns;    // results of a tile
  int in_rows, in_columns;      // what they read, the halo included
  int pitch;                    // values from one row in shared memory to the next
  int channels;                 // channels_last: of a chunk; else planes of a group
  int segment_rows;             // result rows that one thread walks down
  int row_tiles, column_tiles;  // tiles of an image
  int64_t groups;               // chunks of channels, or groups of planes
  int unit_bytes;               // what one copy moves
  int threads, shared_bytes;    // of a block
};

struct TilePosition {
  int64_t image, group;
  int row, column;  // the tile's first result
  // Contiguous: the planes (images times channels) of the group are plane, plane + step, ...
  int64_t plane, plane_step;
  int planes;
};

template <bool ChannelsLast, typename T>
__device__ __forceinline__ TilePosition tile_position(const Tiling& t, const Source<T>& source,
                                                      int64_t index) {
  TilePosition at{};
  if (ChannelsLast) {  // neighbours in memory run at the same time
    at.group = index % t.groups;
    index /= t.groups;
  }
  at.column = int(index % t.column_tiles) * t.out_columns;
  index /= t.column_tiles;
  at.row = int(index % t.row_tiles) * t.out_rows;
  index /= t.row_tiles;
  if (ChannelsLast) {
    at.image = index;
  } else {
    at.group = index;
    at.plane = index * t.channels;
    at.plane_step = 1;
    at.planes = int(min(int64_t(t.channels), source.images * source.channels - at.plane));
  }
  return at;
}

template <int Bytes>
struct UnitOf;
template <>
struct UnitOf<2> {
  using type = unsigned short;
};
template <>
struct UnitOf<4> {
  using type = unsigned;
};
template <>
struct UnitOf<8> {
  using type = uint2;
};
template <>
struct UnitOf<16> {
  using type = uint4;
};

// How far the first column of a tile lies from a boundary that whole units start at.
template <typename T>
__device__ __forceinline__ int column_shift(const Tiling& t, int column, bool channels_last) {
  const int values = t.unit_bytes / int(sizeof(T));  // a power of two
  return channels_last ? 0 : column & (values - 1);
}

// Copies the pixels from (row, column) on, zero outside the image, by units of `Bytes`.
template <int Bytes, bool ChannelsLast, typename T>
__device__ __forceinline__ void fill_tile_by(T* tile, const Source<T>& source, const Tiling& t,
                                             const TilePosition& at, int row, int column) {
  using Unit = typename UnitOf<Bytes>::type;
  constexpr int values = Bytes / int(sizeof(T));
  const int units = ChannelsLast ? t.in_columns * t.channels / values : t.pitch / values;  // of one row
  int lanes_log = 5;  // threads of one row: a power of two
  while (lanes_log > 2 && units <= (1 << lanes_log) / 2) --lanes_log;
  const int planes = ChannelsLast ? 1 : t.channels;
  const int first = int(threadIdx.x) >> lanes_log, lane = int(threadIdx.x) & ((1 << lanes_log) - 1);
  int plane = first / t.in_rows, tile_row = first % t.in_rows;
  column -= column_shift<T>(t, column, ChannelsLast);
  while (plane < planes) {
    const int in_row = row + tile_row;
    const bool inside = in_row >= 0 && in_row < source.rows && (ChannelsLast || plane < at.planes);
    const T* from =
        source.data +
        (ChannelsLast
             ? (at.image * source.rows + in_row) * source.columns * source.channels + at.group * t.channels
             : ((at.plane + plane * at.plane_step) * source.rows + in_row) * source.columns);
    T* to = tile + (plane * t.in_rows + tile_row) * t.pitch;
#pragma unroll 4
    for (int unit = lane; unit < units; unit += 1 << lanes_log) {
      if constexpr (ChannelsLast) {
        const int in_column = column + unit * values / t.channels, channel = unit * values % t.channels;
        const bool active = inside && in_column >= 0 && in_column < source.columns &&
                            at.group * t.channels + channel < source.channels;
        copy_to_shared(reinterpret_cast<Unit*>(to + unit * values),
                       reinterpret_cast<const Unit*>(from + in_column * source.channels + channel), active);
      } else {
        const int in_column = column + unit * values;
        const bool active = inside && in_column >= 0 && in_column < source.columns;
        copy_to_shared(reinterpret_cast<Unit*>(to + unit * values),
                       reinterpret_cast<const Unit*>(from + in_column), active);
      }
    }
    for (tile_row += int(blockDim.x) >> lanes_log; tile_row >= t.in_rows; tile_row -= t.in_rows) ++plane;
  }
}

template <bool ChannelsLast, typename T>
__device__ __forceinline__ void fill_tile(T* tile, const Source<T>& source, const Tiling& t,
                                          const TilePosition& at, int row, int column) {
  if (t.unit_bytes == 16) {
    fill_tile_by<16, ChannelsLast>(tile, source, t, at, row, column);
  } else if (sizeof(T) < 4 && t.unit_bytes == 4) {
    fill_tile_by<sizeof(T) < 4 ? 4 : sizeof(T), ChannelsLast>(tile, source, t, at, row, column);
  } else {
    fill_tile_by<sizeof(T), ChannelsLast>(tile, source, t, at, row, column);
  }
  wait_for_copies();
  __syncthreads();
}

// channels_last: copies the filters of a chunk, which lie behind one another, to the place after the tile,
// before fill_tile. Read from there: in global memory the lanes' taps lie a whole filter apart, a sector for
// each.
template <typename T>
__device__ __forceinline__ T* fill_taps(T* tile, const T* weight, const Tiling& t, const TilePosition& at,
                                        int taps, int64_t channels) {
  T* const filters = tile + t.in_rows * t.pitch;
  const int64_t first = at.group * t.channels * taps;
  for (int i = int(threadIdx.x); i < t.channels * taps; i += int(blockDim.x))
    copy_to_shared(filters + i, weight + first + i, first + i < channels * taps);
  return filters;
}

// The widest unit of which every row of a tensor, and of a tile, has a whole number.
template <typename T>
int unit_bytes(const T* data, int64_t row_values, int64_t tile_values) {
  for (const int bytes : {16, 4})
    if (bytes > int(sizeof(T)) && row_values * int64_t(sizeof(T)) % bytes == 0 &&
        tile_values * int64_t(sizeof(T)) % bytes == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0)
      return bytes;
  return sizeof(T);
}

// Cuts `size` into equal parts of at most `limit`.
inline int even_part(int64_t size, int64_t limit) { return int(ceil_div(size, ceil_div(size, limit))); }

// Some values of adjacent channels.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T values[Count];
};

// Channels of one thread: 4 bytes of them, where the taps leave registers for it.
template <typename T, int K>
constexpr int channels_per_lane = sizeof(T) == 2 && K <= 3 ? 2 : 1;

// How many inputs some adjacent results read, in one direction.
struct Reach {
  int64_t step, halo, per = 1;
  int64_t operator()(int64_t results) const { return ((results - 1) * step + halo) / per + 1; }
};

// Completes a tiling whose tiles have out_rows, out_columns and channels; returns the bytes of a tile.
template <typename T>
int64_t complete_tiling(Tiling& t, const Source<T>& source, bool channels_last, int64_t out_rows,
                        int64_t out_columns, Reach down, Reach right) {
  const int64_t rows = down(t.out_rows), columns = right(t.out_columns);
  t.unit_bytes = channels_last ? unit_bytes(source.data, source.channels, t.channels)
                               : unit_bytes(source.data, source.columns, 16);
  const int values =
      t.unit_bytes / int(sizeof(T));  // contiguous: a row starts at a whole unit before its tile
  const int64_t pitch =
      channels_last ? columns * t.channels : ceil_div(columns + values - 1, values) * values;
  const int64_t bytes = int64_t(sizeof(T)) * rows * pitch * (channels_last ? 1 : t.channels);
  if (bytes > tiled_most_shared_bytes) return bytes;
  t.in_rows = int(rows);
  t.in_columns = int(columns);
  t.pitch = int(pitch);
  t.row_tiles = int(ceil_div(out_rows, t.out_rows));
  t.column_tiles = int(ceil_div(out_columns, t.out_columns));
  t.groups = ceil_div(channels_last ? source.channels : source.images * source.channels, t.channels);
  t.shared_bytes = int(bytes);
  return bytes;
}

// How the kernels with a compiled-in kernel size and stride cut their work: a thread walks down `columns`
// columns of `channels` channels.
template <typename T>
Tiling walking_tiling(const Source<T>& source, bool channels_last, int channels, int columns,
                      int64_t out_rows, int64_t out_columns, Reach reach, int64_t planes) {
  Tiling t{};
  int strips = even_part(ceil_div(out_columns, columns), channels_last ? 16 / columns : 64), segments = 2;
  t.segment_rows = even_part(out_rows, channels_last ? 8 : 16);
  t.channels = 32 * channels;
  if (!channels_last) {
    segments = std::max(1, tiled_threads / strips);
    const int64_t most = ceil_div(out_rows, t.segment_rows);
    t.channels = int(std::clamp<int64_t>(tiled_threads / (std::min<int64_t>(segments, most) * strips), 1,
                                         std::max<int64_t>(planes, 1)));
  }
  for (;;) {
    t.out_rows = int(std::min<int64_t>(segments * t.segment_rows, out_rows));
    t.out_columns = strips * columns;
    const int64_t bytes = complete_tiling(t, source, channels_last, out_rows, out_columns, reach, reach);
    if (bytes <= tiled_shared_bytes) break;
    if (!channels_last && t.channels > 1)
      t.channels = (t.channels + 1) / 2;
    else if (segments > 1)
      segments = (segments + 1) / 2;
    else if (strips > 1)
      strips = (strips + 1) / 2;
    else
      t.segment_rows = (t.segment_rows + 1) / 2;
  }
  const int64_t items = ceil_div(t.out_rows, t.segment_rows) * strips * (channels_last ? 32 : t.channels);
  t.threads = int(std::min<int64_t>(tiled_threads, ceil_div(items, 32) * 32));
  return t;
}

// How the kernels for any size cut theirs; false if no halo fits in shared memory. A tile has a multiple of
// `multiple` channels or planes.
template <typename T>
bool any_tiling(Tiling& t, const Source<T>& source, bool channels_last, int64_t out_rows, int64_t out_columns,
                Reach down, Reach right, int multiple) {
  for (const int64_t limit : {tiled_shared_bytes, tiled_most_shared_bytes}) {
    t = Tiling{};
    t.threads = tiled_threads;
    t.out_rows = even_part(out_rows, 16);
    t.out_columns = even_part(out_columns, channels_last ? 16 : 64);
    int chunk = 32;
    if (!channels_last)
      chunk = int(std::clamp<int64_t>(4 * tiled_threads / (t.out_rows * t.out_columns), 1,
                                      std::max<int64_t>(source.images * source.channels / multiple, 1)));
    for (;;) {
      t.channels = chunk * multiple;
      if (complete_tiling(t, source, channels_last, out_rows, out_columns, down, right) <= limit) return true;
      if (chunk > (channels_last ? 8 : 1))
        chunk /= 2;
      else if (t.out_columns > 8)
        t.out_columns = (t.out_columns + 1) / 2;
      else if (t.out_rows > 8)
        t.out_rows = (t.out_rows + 1) / 2;
      else if (chunk > 1)
        chunk /= 2;
      else if (t.out_columns > 1)
        t.out_columns = (t.out_columns + 1) / 2;
      else if (t.out_rows > 1)
        t.out_rows = (t.out_rows + 1) / 2;
      else
        break;
    }
  }
  return false;
}

inline int64_t tile_count(const Tiling& t, int64_t images, bool channels_last) {
  return t.groups * t.row_tiles * t.column_tiles * (channels_last ? images : 1);
}

// Whether a type has kernels with a compiled-in kernel size. On a GPU float64 goes without, to save compile
// time; in the emulator it has them, so that numerical gradients check these very kernels.
#if defined(FASTCONV_EMULATOR)
template <typename T>
constexpr bool compiled_in = true;
#else
template <typename T>
constexpr bool compiled_in = sizeof(T) < 8;
#endif

// Calls launch<K, S, ChannelsLast>() if such a kernel is compiled in.
template <typename T, typename Launch>
bool dispatch_walk(const DepthwiseConv2dShape& s, const Launch& launch) {
  if (!compiled_in<T> || s.kernel_height != s.kernel_width || s.stride_height != s.stride_width ||
      s.dilation_height != 1 || s.dilation_width != 1 || s.multiplier() != 1)
    return false;
  const auto with = [&]<int K, int S>() {
    if (s.kernel_height != K || s.stride_height != S) return false;
    if constexpr (compiled_in<T>) {
      if (s.channels_last)
        launch.template operator()<K, S, true>();
      else
        launch.template operator()<K, S, false>();
    }
    return true;
  };
  return with.template operator()<3, 1>() || with.template operator()<3, 2>() ||
         with.template operator()<5, 1>() || with.template operator()<5, 2>() ||
         with.template operator()<7, 1>() || with.template operator()<7, 2>();
}

// Positions within an image are computed in 32 bits.
inline void check_tiled(const DepthwiseConv2dShape& s) {
  narrow(s.in_height + s.padding_top, "input height");
  narrow(s.in_width + s.padding_left, "input width");
  narrow((s.out_height + 64) * s.stride_height + s.kernel_height * s.dilation_height + s.padding_top,
         "padded input height");
  narrow((s.out_width + 64) * s.stride_width + s.kernel_width * s.dilation_width + s.padding_left,
         "padded input width");
}

// Where one thread works in a tile: the segment of rows and the columns it walks down, channel or plane.
struct Walk {
  int row, rows, column;  // within the tile
  int channel;            // within the chunk, or the plane within the group
};

// The work of thread `threadIdx.x + round * blockDim.x`; false where none is left.
template <bool ChannelsLast, int Columns, int Channels>
__device__ __forceinline__ bool find_walk(const Tiling& t, const TilePosition& at, int out_rows, int round,
                                          Walk& w) {
  const int item = int(threadIdx.x) + round * int(blockDim.x);
  const int strips = (t.out_columns + Columns - 1) / Columns;
  const int segments = (t.out_rows + t.segment_rows - 1) / t.segment_rows;
  int rest;
  if constexpr (ChannelsLast) {  // a warp has one place and its lanes the channels
    w.channel = item % 32 * Channels;
    w.column = item / 32 % strips * Columns;
    w.row = item / 32 / strips * t.segment_rows;
    rest = item / 32 / strips / segments;
  } else {  // neighbouring lanes have neighbouring columns
    w.column = item % strips * Columns;
    w.row = item / strips % segments * t.segment_rows;
    w.channel = item / strips / segments;
    rest = w.channel >= t.channels;
  }
  w.rows = min(t.segment_rows, min(t.out_rows, out_rows - at.row) - w.row);
  return rest == 0;
}

// grad_input as a convolution of grad_output, where it is one (stride 1, multiplier 1); false where it is
// not, or where no tile fits in shared memory.
template <typename T>
bool depthwise_conv2d_turned_forward_cuda(const T* grad_output, const T* weight, T* grad_input,
                                          const DepthwiseConv2dShape& shape, void* stream);

}  // namespace fastconv

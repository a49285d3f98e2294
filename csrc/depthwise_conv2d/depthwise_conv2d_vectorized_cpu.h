// What the vectorized passes share: images seen as blocks of channels, one channel a lane.
//
// A block is (rows, pixels, lanes). A channels_last image in the compute type already is one, so it is read and
// written where it lies; any other image (contiguous, bfloat16, float16, a channel multiplier, fewer channels
// than lanes) goes through a scratch tile of a few rows, transposed and converted on the way.
#pragma once

#include <algorithm>

#include "../common/simd.h"
#include "depthwise_conv2d.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
struct Image {
  T* data;  // of one image: (channels, height, width) or (height, width, channels)
  int64_t channels, height, width;
  bool channels_last;

  int64_t channel_stride() const { return channels_last ? 1 : height * width; }
  int64_t row_stride() const { return channels_last ? width * channels : width; }
  int64_t pixel_stride() const { return channels_last ? channels : 1; }
};

// Which channel of an image lane l of a block reads: (first + l) * step / divide + offset.
struct Lanes {
  int64_t first;
  int64_t step = 1, divide = 1, offset = 0;

  int64_t channel(int64_t lane) const { return (first + lane) * step / divide + offset; }
  bool is_identity() const { return step == 1 && divide == 1 && offset == 0; }
};

// A block of channels in the compute type; `data` is where row 0, pixel 0 of the image is (or would be).
template <typename A>
struct Block {
  A* data;
  int64_t row_stride, pixel_stride;
};

template <typename T, typename A>
bool readable_in_place(const Image<T>& image, const Lanes& lanes) {
  return std::is_same_v<std::remove_const_t<T>, A> && image.channels_last && lanes.is_identity() &&
         lanes.first + lanes_of<A> <= image.channels;
}

// Copies rows [begin, end) of `count` valid lanes into a (rows, width, lanes) tile; other lanes become zero.
template <typename T, typename A>
void load_tile(const Image<const T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end, A* tile) {
  constexpr int L = lanes_of<A>;
  const bool full = count == L;
  for (int64_t row = begin; row < end; ++row) {
    if (image.channels_last) {
      for (int64_t w = 0; w < image.width; ++w, tile += L) {
        const T* pixel = image.data + row * image.row_stride() + w * image.pixel_stride();
        if (full && lanes.is_identity()) {
          store_vector(tile, load_vector(pixel + lanes.first));
        } else {
          for (int lane = 0; lane < L; ++lane) tile[lane] = lane < count ? load(pixel[lanes.channel(lane)]) : A(0);
        }
      }
      continue;
    }
    const T* rows[L];
    for (int lane = 0; lane < L; ++lane)
      rows[lane] = image.data + lanes.channel(std::min<int64_t>(lane, count - 1)) * image.channel_stride() +
                   row * image.width;
    int64_t w = 0;
    for (; w + L <= image.width; w += L, tile += L * L) {
      Vector<A> square[L];
      for (int lane = 0; lane < L; ++lane) square[lane] = load_vector(rows[lane] + w);
      transpose<A>(square);
      for (int pixel = 0; pixel < L; ++pixel) store_vector(tile + pixel * L, square[pixel]);
    }
    for (; w < image.width; ++w, tile += L)
      for (int lane = 0; lane < L; ++lane) tile[lane] = load(rows[lane][w]);
  }
}

// The way back: rows [begin, end) of a (rows, width, lanes) tile into the image.
template <typename T, typename A>
void store_tile(const Image<T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end, const A* tile) {
  constexpr int L = lanes_of<A>;
  for (int64_t row = begin; row < end; ++row) {
    if (image.channels_last) {
      for (int64_t w = 0; w < image.width; ++w, tile += L) {
        T* pixel = image.data + row * image.row_stride() + w * image.pixel_stride() + lanes.first;
        if (count == L) {
          store_vector(pixel, load_vector(tile));
        } else {
          for (int lane = 0; lane < count; ++lane) store(&pixel[lane], tile[lane]);
        }
      }
      continue;
    }
    T* rows = image.data + lanes.first * image.channel_stride() + row * image.width;
    int64_t w = 0;
    for (; w + L <= image.width; w += L, tile += L * L) {
      Vector<A> square[L];
      for (int pixel = 0; pixel < L; ++pixel) square[pixel] = load_vector(tile + pixel * L);
      transpose<A>(square);
      for (int lane = 0; lane < count; ++lane) store_vector(rows + lane * image.channel_stride() + w, square[lane]);
    }
    for (; w < image.width; ++w, tile += L)
      for (int lane = 0; lane < count; ++lane) store(&rows[lane * image.channel_stride() + w], tile[lane]);
  }
}

// Rows [begin, end) of a block of channels, in place if possible, else through `tile`.
template <typename T, typename A>
Block<const A> read_block(const Image<const T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end,
                          A* tile) {
  if constexpr (std::is_same_v<T, A>)
    if (readable_in_place<const T, A>(image, lanes))
      return {image.data + lanes.first, image.row_stride(), image.pixel_stride()};
  load_tile(image, lanes, count, begin, end, tile);
  constexpr int L = lanes_of<A>;
  return {tile - begin * image.width * L, image.width * L, L};
}

// Channels are cut into blocks of L. In place, the last block starts early rather than be short: it computes some
// channels again, to the same bits.
inline int64_t block_start(int64_t block, int64_t channels, int64_t L) {
  return std::min(block * L, std::max<int64_t>(channels - L, 0));
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Images of either layout, and tiles of a block of their channels: (rows, width, lanes).
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// A block of channels in the compute type; `data` is where row 0, pixel 0 of the image is (or would be).
template <typename A>
struct Block {
  A* data;
  int64_t row_stride, pixel_stride;
};

template <typename T>
struct Image {
  T* data;  // of one image: (channels, height, width) or (height, width, channels)
  int64_t channels, height, width;
  bool channels_last;

  Image next(int64_t images) const {  // so many further in the batch
    return {data + images * channels * height * width, channels, height, width, channels_last};
  }
  Block<T> block(int64_t channel) const { return {data + channel, row_stride(), pixel_stride()}; }

  int64_t channel_stride() const { return channels_last ? 1 : height * width; }
  int64_t row_stride() const { return channels_last ? width * channels : width; }
  int64_t pixel_stride() const { return channels_last ? channels : 1; }
};

// Whether so many bytes are stored past the caches: where reading their lines before they are overwritten
// would cost more than the next reader gains from those that are still in the L3 cache. Whole lines alone can
// be: vectors of this size, from the start of a line on.
inline bool stores_past_caches(const void* target, int64_t bytes, int64_t least_bytes = 4 << 20) {
  constexpr int64_t cache_line = 64;
  return vector_bytes == cache_line && bytes > least_bytes &&
         reinterpret_cast<uintptr_t>(target) % cache_line == 0;
}

// The same of a batch of images, whose vectors start at multiples of `step` values.
template <typename T>
bool stores_past_caches(const Image<T>& image, int64_t batch, int64_t step, int64_t least_bytes = 4 << 20) {
  const int64_t bytes = batch * image.channels * image.height * image.width * int64_t(sizeof(T));
  return std::is_same_v<T, float> && image.channels_last && step % lanes_of<float> == 0 &&
         stores_past_caches(image.data, bytes, least_bytes);
}

// Which channel of an image lane l of a block reads: (first + l) * step / divide + offset.
struct Lanes {
  int64_t first;
  int64_t step = 1, divide = 1, offset = 0;

  int64_t channel(int64_t lane) const { return (first + lane) * step / divide + offset; }
  bool is_identity() const { return step == 1 && divide == 1 && offset == 0; }
};

// A tile's (rows, width, lanes), of an image from row `first`.
template <typename A>
Block<A> tile_block(A* tile, int64_t first, int64_t width) {
  constexpr int64_t L = lanes_of<std::remove_const_t<A>>;
  return {tile - first * width * L, width * L, L};
}

// Copies rows [begin, end) of `count` valid lanes into a (rows, width, lanes) tile; other lanes repeat the
// last. In a contiguous image the rows of a channel are one run, transposed L pixels at a time. `step`:
// between two pixels of the tile.
template <typename T, typename A>
void load_tile(const Image<const T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end,
               A* tile, int64_t step = lanes_of<A>) {
  constexpr int L = lanes_of<A>;
  const int64_t pixels = (end - begin) * image.width, first = begin * image.width;
  if (image.channels_last) {
    const T* pixel = image.data + first * image.channels;
    if (count == L && lanes.is_identity()) {
      for (int64_t k = 0; k < pixels; ++k)
        store_vector(tile + k * step, load_vector(pixel + k * image.channels + lanes.first));
    } else {
      for (int64_t k = 0; k < pixels; ++k, pixel += image.channels)
        for (int64_t lane = 0; lane < L; ++lane)
          tile[k * step + lane] = load(pixel[lanes.channel(std::min(lane, count - 1))]);
    }
    return;
  }
  const T* runs[L];
  for (int64_t lane = 0; lane < L; ++lane)
    runs[lane] = image.data + lanes.channel(std::min(lane, count - 1)) * image.channel_stride() + first;
  const auto load_square = [&](int64_t k) {
    transpose_square<A>([&](int lane) { return runs[lane] + k; },
                        [&](int pixel) { return tile + (k + pixel) * step; });
  };
  int64_t k = 0;
  for (; k + L <= pixels; k += L) load_square(k);
  if (k == pixels) return;
  if (pixels >= L) return load_square(pixels - L);  // overlaps the square before
  for (; k < pixels; ++k)
    for (int lane = 0; lane < L; ++lane) tile[k * step + lane] = load(runs[lane][k]);
}

template <typename T, typename A>
void convert_run(const T* source, A* target, int64_t count) {
  constexpr int64_t L = lanes_of<A>;
  int64_t k = 0;
  for (; k + L <= count; k += L) store_vector(target + k, load_vector(source + k));
  for (; k < count; ++k) target[k] = load(source[k]);
}

// Copies pixels [first, first + pixels) of channels [channel, channel + channels) into a (pixels, channels)
// tile.
template <typename T, typename A>
void load_pixels(const Image<const T>& image, int64_t channel, int64_t channels, int64_t first,
                 int64_t pixels, A* tile) {
  constexpr int64_t L = lanes_of<A>;
  const int64_t plane = image.height * image.width;
  if (image.channels_last) {
    const T* source = image.data + first * image.channels + channel;
    const bool whole = channels == image.channels;
    const int64_t length = whole ? pixels * channels : channels;
    for (int64_t k = 0; k < (whole ? 1 : pixels); ++k)
      convert_run(source + k * image.channels, tile + k * channels, length);
    return;
  }
  const T* source = image.data + channel * plane + first;
  const T* end = image.data + image.channels * plane;
  if (channels < L) {
    for (int64_t k = 0; k < pixels; ++k)
      for (int64_t c = 0; c < channels; ++c) tile[k * channels + c] = load(source[c * plane + k]);
    return;
  }
  for (int64_t block = 0; block < channels; block += L) {
    const int64_t c = std::min(block, channels - L);  // the last block overlaps the one before
    for (int64_t k = 0; k < pixels; k += L) {
      T rest[L];
      A nowhere[L];  // takes what is read beyond the pixels
      transpose_square<A>(
          [&](int lane) {
            const T* at = source + (c + lane) * plane + k;
            if (at + L <= end) return at;
            std::copy(at, end, rest);
            return static_cast<const T*>(rest);
          },
          [&](int pixel) { return k + pixel < pixels ? tile + (k + pixel) * channels + c : nowhere; });
    }
  }
}

// The way back: rows [begin, end) of a (rows, width, lanes) tile into the image.
template <typename T, typename A>
void store_tile(const Image<T>& image, const Lanes& lanes, int64_t count, int64_t begin, int64_t end,
                const A* tile) {
  constexpr int L = lanes_of<A>;
  const int64_t pixels = (end - begin) * image.width, first = begin * image.width;
  if (image.channels_last) {
    T* pixel = image.data + first * image.channels + lanes.first;
    for (int64_t k = 0; k < pixels; ++k, pixel += image.channels) {
      if (count == L) {
        store_vector(pixel, load_vector(tile + k * L));
      } else {
        for (int lane = 0; lane < count; ++lane) store(&pixel[lane], tile[k * L + lane]);
      }
    }
    return;
  }
  T* runs = image.data + lanes.first * image.channel_stride() + first;
  T nowhere[L];  // takes the lanes that are no channel
  const auto store_square = [&](int64_t k) {
    transpose_square<A>(
        [&](int pixel) { return tile + (k + pixel) * L; },
        [&](int lane) { return lane < count ? runs + lane * image.channel_stride() + k : nowhere; });
  };
  int64_t k = 0;
  for (; k + L <= pixels; k += L) store_square(k);
  if (k == pixels) return;
  if (pixels >= L) return store_square(pixels - L);  // overlaps the square before
  for (; k < pixels; ++k)
    for (int lane = 0; lane < count; ++lane)
      store(&runs[lane * image.channel_stride() + k], tile[k * L + lane]);
}

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

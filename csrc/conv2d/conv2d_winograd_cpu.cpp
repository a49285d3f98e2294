// Convolution, C++, Winograd F(M x M, 3 x 3), M = 2, 4, 6: 3 x 3 filters, stride 1, dilation 1.
//
// One loop over blocks of tiles: the block is transformed into V[position][tile][channel], which stays in the
//   L2 cache; then, for each panel of 64 filters (AVX-512), T^2 products V[position] x packed[position] into
//   a scratch, and from there the outputs. The inner step is that of the direct kernel: 6 tiles x 64 filters
//   in registers.
// Bytes: the input and the output once, the packed weights (T^2 / 9 times the filters) once for each block.
// Against direct: 9 M^2 / T^2 = 2.25, 4, 5.06 times fewer multiplications, more rounding.
// Limits: less than a vector of channels, images not much larger than a tile, weights beyond the caches.
#include "conv2d_winograd_cpu.h"
#include "../common/moments.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

// Tiles of a block: few, so that they, their sums and the weights of few channels share the L2 cache, but
// enough to hide the reading of the weights, from beyond the caches where there are many.
template <int M, typename A>
int64_t block_tiles(int64_t channels) {
  constexpr int64_t budget = 160 << 10, tile = (M + 2) * (M + 2) * int64_t(sizeof(A));
  return std::clamp<int64_t>(std::max(budget / (tile * channels), channels / 16), 16, 48);
}

// The 9 taps of L filters, lane_step apart, as vectors; `end` is the end of the weights.
template <typename T, typename A>
void load_taps(const T* weight, int64_t lane_step, int64_t lanes, const T* end, A* taps) {
  constexpr int64_t L = lanes_of<A>, span = (9 + L - 1) / L * L;
  if (lanes == L && weight + (L - 1) * lane_step + span <= end) {  // reads some taps of the next channel
    for (int64_t q = 0; q < 9; q += L)
      transpose_square<A>([&](int lane) { return weight + lane * lane_step + q; },
                          [&](int k) { return taps + (q + k) * L; });
    return;
  }
  for (int64_t q = 0; q < 9; ++q)
    for (int64_t lane = 0; lane < L; ++lane)
      taps[q * L + lane] = lane < lanes ? load(weight[lane * lane_step + q]) : A(0);
}

// Weights of the filters of a panel and of some channels; packed: (positions, channels, lanes of the panel),
// the positions `position` values apart.
template <int M, typename T>
void pack_panel(const T* weight, accumulate_t<T>* packed, int64_t position, const WinogradPass& pass,
                int64_t group, int64_t panel, Range channels, bool stream) {
  using A = accumulate_t<T>;
  constexpr int64_t L = lanes_of<A>;
  const Panels<A> panels{pass.to_group};
  const int64_t from = pass.from_group, to = pass.to_group, line = panels.vectors(panel) * L;
  const T* end = weight + pass.groups * from * to * 9;
  alignas(64) A taps[(9 + L - 1) / L * L * L];
  for (int64_t v = 0; v < line; v += L) {
    const int64_t filter = panel * panels.width + v;
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      // weight: (groups, to, from, 9); transposed (groups, from, to, 9)
      const int64_t at =
          pass.transposed ? (group * from + c) * to + filter : (group * to + filter) * from + c;
      load_taps(weight + at * 9, pass.transposed ? 9 : from * 9, std::min(L, to - filter), end, taps);
      expand_square<FilterMatrix<M>, A>(
          [&](int i, int j) {
            const int tap = i * 3 + j;
            return load_vector(taps + (pass.transposed ? 8 - tap : tap) * L);
          },
          [&](int p, Vector<A> value) {
            A* vector = packed + p * position + (c - channels.begin) * line + v;
            if (stream)
              stream_vector(vector, value);
            else
              store_vector(vector, value);
          });
    }
  }
}

template <int M, typename T>
class WinogradConvolution {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, positions = (M + 2) * (M + 2);

  WinogradConvolution(const T* input, const WinogradWeights<T>& weights, const Conv2dEpilogue<T>& epilogue,
                      T* output, const WinogradPass& pass)
      : weights_(weights),
        epilogue_(epilogue),
        pass_(pass),
        panels_{pass.to_group},
        grid_{pass.batch, ceil_div(pass.out_height, M), ceil_div(pass.out_width, M),
              block_tiles<M, A>(pass.from_group)},
        output_{output, pass.groups * pass.to_group, pass.out_height, pass.out_width, pass.channels_last},
        reader_({input, pass.groups * pass.from_group, pass.in_height, pass.in_width, pass.channels_last},
                grid_, M, pass.top, pass.left),
        streams_(stores_past_caches(output_, pass.batch, pass.to_group)) {}

  int64_t items() const { return grid_.blocks() * pass_.groups * panels_.count(); }

  // Values of a channel in each block.
  std::vector<int64_t> counts() const {
    std::vector<int64_t> counts(grid_.blocks());
    for (int64_t k = 0; k < grid_.blocks(); ++k)
      for_images(grid_.block(k), [&](const Image<T>&, const Region& pixels) { counts[k] += pixels.area(); });
    return counts;
  }
  // Has compute look at what it stores, in channels_last; each block is a part.
  void gather(PartMoments& moments) { moments_ = &moments, streams_ = false; }

  void compute(int64_t begin, int64_t end) const {
    const int64_t most = grid_.most_tiles();
    const Transformed<A> no_tiles{nullptr, most, pass_.from_group}, no_sums{nullptr, most, panels_.width};
    const Scratch<A> tiles(no_tiles.size(positions)), sums(no_sums.size(positions));
    const Scratch<A> strip(std::max(reader_.strip_size(), most * M * M * L));
    const int64_t chunk = channels_at_once();
    const Scratch<A> own(weights_.packed ? 0 : positions * position_of<A>(chunk, panels_.width));
    int64_t transformed = -1, packed = -1;  // which block and group is in `tiles`, which panel in `own`
    for (int64_t number = begin; number < end; ++number) {
      const Item item = at(number);
      const Region block = grid_.block(item.block);
      const Transformed<A> from{tiles.data(), block.area(), pass_.from_group};
      const int64_t block_and_group = item.block * pass_.groups + item.group;
      if (block_and_group != transformed)
        reader_.expand_block(block, item.group * pass_.from_group, from, strip.data());
      transformed = block_and_group;

      const int64_t line = panels_.vectors(item.panel) * L, first = item.panel * panels_.width;
      const int64_t panel_and_group = item.group * panels_.count() + item.panel;
      const Transformed<A> to{sums.data(), from.tiles, line};
      for (int64_t c = 0; c < pass_.from_group; c += chunk) {
        const Range channels{c, std::min(c + chunk, pass_.from_group)};
        Panel panel{own.data(), position_of<A>(chunk, line)};
        if (weights_.packed)
          panel = {weights_.packed + packed_panel<M, A>(pass_, item.group, item.panel) + c * line,
                   position_of<A>(pass_.from_group, line)};
        else if (panel_and_group != packed || chunk < pass_.from_group)
          pack_panel<M>(weights_.weight, own.data(), panel.position, pass_, item.group, item.panel, channels,
                        false);
        with_constant<1, most_vectors>(panels_.vectors(item.panel),
                                       [&](auto vectors) { multiply<vectors>(from, panel, channels, to); });
      }
      packed = panel_and_group;
      store_block(block, item.group * pass_.to_group + first, std::min(line, pass_.to_group - first), to,
                  strip.data());
      if (moments_)
        add_moments(item.block, item.group * pass_.to_group + first, std::min(line, pass_.to_group - first));
    }
    if (streams_) stream_fence();
  }

 private:
  struct Item {
    int64_t block, group, panel;
  };

  // Packed weights serve one block after the other, each transformed once. Else a panel of weights is packed
  // once, and serves all blocks, which are transformed again: that takes a twentieth of their products.
  Item at(int64_t number) const {
    const int64_t panels = panels_.count(), blocks = grid_.blocks();
    if (weights_.packed)
      return {number / panels / pass_.groups, number / panels % pass_.groups, number % panels};
    return {number % blocks, number / blocks / panels, number / blocks % panels};
  }

  // Where weights are packed for one block alone, as many channels as fit in the L2 cache.
  int64_t channels_at_once() const {
    return !weights_.packed && grid_.blocks() == 1 ? std::min<int64_t>(64, pass_.from_group)
                                                   : pass_.from_group;
  }

  struct Panel {
    const A* weights;
    int64_t position;  // values between positions
  };

  // The sums over some channels, after those over the channels before.
  template <int V>
  void multiply(const Transformed<A>& from, const Panel& panel, Range channels,
                const Transformed<A>& sums) const {
    for (int64_t p = 0; p < positions; ++p)
      multiply_rows<V>(from.at(p, 0) + channels.begin, from.tile_stride(), 1, from.tiles,
                       panel.weights + p * panel.position, V * L, channels.end - channels.begin,
                       sums.at(p, 0), sums.tile_stride(), channels.begin > 0 ? Sum::continued : Sum::first);
  }

  // visit(image, its pixels) for each image that a block has outputs of.
  template <typename Visit>
  void for_images(const Region& block, const Visit& visit) const {
    for (int64_t row = block.row_begin; row < block.row_end;) {
      const Region tiles = grid_.in_one_image(block, row);
      const Image<T> image = output_.next(row / grid_.high);
      visit(image, pixels_under(image, tiles, grid_.high, M, M, 0, 0));
      row = tiles.row_end;
    }
  }

  void add_moments(int64_t block, int64_t channel, int64_t filters) const {
    PartMoments::Part part(*moments_, block, channel, filters);
    for_images(grid_.block(block), [&](const Image<T>& image, const Region& pixels) {
      part.add(PixelRows<T>{
          image.data + (pixels.row_begin * image.width + pixels.column_begin) * image.channels + channel,
          pixels.rows(), image.row_stride(), pixels.columns(), image.channels});
    });
  }

  // Outputs of a block, `filters` of them from channel `channel`.
  void store_block(const Region& block, int64_t channel, int64_t filters, const Transformed<A>& sums,
                   A* strip) const {
    A bias[most_vectors * L] = {};
    if (epilogue_.bias)
      for (int64_t k = 0; k < filters; ++k) bias[k] = load(epilogue_.bias[channel + k]);
    int64_t tile = 0;
    for (int64_t row = block.row_begin; row < block.row_end;) {
      const Region tiles = grid_.in_one_image(block, row);
      const Image<T> image = output_.next(row / grid_.high);
      const int64_t offset = image.data - output_.data;
      const T* residual = epilogue_.residual ? epilogue_.residual + offset : nullptr;
      if (image.channels_last) {
        store_tiles(image.block(channel), residual ? residual + channel : nullptr, filters, tiles, bias, sums,
                    tile);
      } else {
        const Region region = pixels_under(image, tiles, grid_.high, M, M, 0, 0);
        const int64_t row_stride = region.columns() * L;
        const Block<A> pixels{strip - region.row_begin * row_stride - region.column_begin * L, row_stride, L};
        for (int64_t k = 0; k < filters; k += L) {
          const int64_t lanes = std::min(L, filters - k);
          if (residual)
            load_region(Image<const T>{residual, image.channels, image.height, image.width, false},
                        channel + k, lanes, region, strip);
          store_tiles(pixels, residual ? pixels.data : nullptr, L, tiles, bias + k, sums.from_channel(k),
                      tile);
          store_region(image, channel + k, lanes, region, strip);
        }
      }
      tile += tiles.area();
      row = tiles.row_end;
    }
  }

  // Blocks of pixels of T or A; added: the residual, laid out as they are, or null.
  template <typename P>
  void store_tiles(const Block<P>& pixels, const P* added, int64_t filters, const Region& tiles,
                   const A* bias, const Transformed<A>& sums, int64_t tile) const {
    const Activation activation = epilogue_.activation;
    const bool simple = !added && is_floor(activation);
    const Vector<A> least = broadcast(floor_of<A>(activation));
    for (int64_t r = tiles.row_begin; r < tiles.row_end; ++r) {
      for (int64_t c = tiles.column_begin; c < tiles.column_end; ++c, ++tile) {
        const int64_t row = r % grid_.high * M, column = c * M;
        const int64_t first = row * pixels.row_stride + column * pixels.pixel_stride;
        const bool inside = row + M <= pass_.out_height && column + M <= pass_.out_width;
        for (int64_t v = 0; v < filters; v += L) {
          const A* source = sums.at(0, tile) + v;
          const Vector<A> start = load_vector(bias + v);
          const auto sum_at = [&](int p) { return load_vector(source + p * sums.position_stride()); };
          if (simple && inside && v + L <= filters) {
            P* target = pixels.data + first + v;
            contract_square<OutputMatrix<M>, A>(sum_at, [&](int i, int k, Vector<A> value) {
              value += start;
              P* pixel = target + i * pixels.row_stride + k * pixels.pixel_stride;
              value = value < least ? least : value;
              if (streams_) return stream_vector(pixel, value);
              prefetch_for_write(pixel + M * pixels.pixel_stride);  // of the next tile
              store_vector(pixel, value);
            });
            continue;
          }
          alignas(64) A square[M * M * L];
          contract_square<OutputMatrix<M>, A>(sum_at, [&](int i, int k, Vector<A> value) {
            store_vector(square + (i * M + k) * L, value + start);
          });
          for (int64_t i = 0; i < std::min<int64_t>(M, pass_.out_height - row); ++i)
            for (int64_t k = 0; k < std::min<int64_t>(M, pass_.out_width - column); ++k) {
              const int64_t at = first + i * pixels.row_stride + k * pixels.pixel_stride + v;
              store_pixel(square + (i * M + k) * L, pixels.data + at, added ? added + at : nullptr,
                          std::min(L, filters - v));
            }
        }
      }
    }
  }

  template <typename P>
  void store_pixel(A* sums, P* pixel, const P* added, int64_t lanes) const {
    if (lanes == L) {
      Vector<A> value = load_vector(sums);
      if (added) value += load_vector(added);
      value = activate_vector<A>(value, epilogue_.activation);
      if (streams_) return stream_vector(pixel, value);
      return store_vector(pixel, value);
    }
    for (int64_t lane = 0; lane < lanes; ++lane)
      store(pixel + lane,
            activate(added ? sums[lane] + load(added[lane]) : sums[lane], epilogue_.activation));
  }

  WinogradWeights<T> weights_;
  const Conv2dEpilogue<T>& epilogue_;
  const WinogradPass& pass_;
  Panels<A> panels_;
  TileGrid grid_;
  Image<T> output_;  // the first of the batch
  TileExpander<InputMatrix<M>, T> reader_;
  bool streams_;                    // store past the caches
  PartMoments* moments_ = nullptr;  // of what is stored, or null
};

}  // namespace

template <int M, typename T>
void winograd_pack(const T* weight, accumulate_t<T>* packed, const WinogradPass& pass, ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t together = 16;
  constexpr int64_t cached_bytes = 16 << 20;  // more than that is out of the caches when it is read again
  const Panels<A> panels{pass.to_group};
  const int64_t from = pass.from_group, chunks = ceil_div(from, together);
  const bool stream = winograd_packed_size<M, T>(pass) * int64_t(sizeof(A)) > cached_bytes &&
                      reinterpret_cast<uintptr_t>(packed) % vector_bytes == 0;
  parallel_for(threads, pass.groups * panels.count() * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / chunks % panels.count(), group = item / chunks / panels.count();
      const int64_t c = item % chunks * together;
      const int64_t line = panels.vectors(panel) * lanes_of<A>, position = position_of<A>(from, line);
      A* target = packed + packed_panel<M, A>(pass, group, panel);
      pack_panel<M>(weight, target + c * line, position, pass, group, panel,
                    {c, std::min(from, c + together)}, stream);
      if (c > 0) continue;
      for (int p = 0; p < (M + 2) * (M + 2); ++p)  // the vectors between positions
        store_vector(target + p * position + from * line, Vector<A>{});
    }
    stream_fence();
  });
}

template <int M, typename T>
void winograd_convolve(const T* input, const WinogradWeights<T>& weights, const Conv2dEpilogue<T>& epilogue,
                       T* output, const WinogradPass& pass, ParallelFor threads) {
  const WinogradConvolution<M, T> convolution(input, weights, epilogue, output, pass);
  parallel_for(threads, convolution.items(),
               [&](int64_t begin, int64_t end) { convolution.compute(begin, end); });
}

template <int M, typename T>
void winograd_moments(const T* input, const T* weight, const T* bias, T* output, T* mean, T* variance,
                      const Conv2dShape& s, ParallelFor threads) {
  const WinogradPass pass = winograd_forward(s);
  const Conv2dEpilogue<T> epilogue{bias, nullptr, Activation::none};
  WinogradConvolution<M, T> convolution(input, {weight, nullptr}, epilogue, output, pass);
  PartMoments moments(convolution.counts(), s.out_channels);
  convolution.gather(moments);
  parallel_for(threads, convolution.items(),
               [&](int64_t begin, int64_t end) { convolution.compute(begin, end); });
  moments.merge(mean, variance);
}

#define FASTCONV_WINOGRAD(M)                                                                                 \
  template <typename T>                                                                                      \
  int64_t conv2d_winograd_f##M##_packed_size(const Conv2dShape& s) {                                         \
    return winograd_packed_size<M, T>(winograd_forward(s));                                                  \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv2d_winograd_f##M##_pack_weight_cpu(const T* weight, accumulate_t<T>* packed,                      \
                                              const Conv2dShape& s, ParallelFor threads) {                   \
    winograd_pack<M>(weight, packed, winograd_forward(s), threads);                                          \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv2d_winograd_f##M##_forward_cpu(const T* input, const accumulate_t<T>* packed,                     \
                                          const Conv2dEpilogue<T>& epilogue, T* output,                      \
                                          const Conv2dShape& s, ParallelFor threads) {                       \
    winograd_convolve<M, T>(input, {nullptr, packed}, epilogue, output, winograd_forward(s), threads);       \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv2d_winograd_f##M##_forward_unpacked_cpu(const T* input, const T* weight,                          \
                                                   const Conv2dEpilogue<T>& epilogue, T* output,             \
                                                   const Conv2dShape& s, ParallelFor threads) {              \
    winograd_convolve<M, T>(input, {weight, nullptr}, epilogue, output, winograd_forward(s), threads);       \
  }                                                                                                          \
  template <typename T>                                                                                      \
  void conv2d_winograd_f##M##_forward_moments_cpu(const T* input, const T* weight, const T* bias, T* output, \
                                                  T* mean, T* variance, const Conv2dShape& s,                \
                                                  ParallelFor threads) {                                     \
    winograd_moments<M>(input, weight, bias, output, mean, variance, s, threads);                            \
  }
FASTCONV_WINOGRAD(2)
FASTCONV_WINOGRAD(4)
FASTCONV_WINOGRAD(6)

#define FASTCONV_INSTANTIATE_TILE(M, T)                                                                   \
  template void winograd_pack<M>(const T*, accumulate_t<T>*, const WinogradPass&, ParallelFor);           \
  template void winograd_convolve<M>(const T*, const WinogradWeights<T>&, const Conv2dEpilogue<T>&, T*,   \
                                     const WinogradPass&, ParallelFor);                                   \
  template int64_t conv2d_winograd_f##M##_packed_size<T>(const Conv2dShape&);                             \
  template void conv2d_winograd_f##M##_pack_weight_cpu(const T*, accumulate_t<T>*, const Conv2dShape&,    \
                                                       ParallelFor);                                      \
  template void conv2d_winograd_f##M##_forward_cpu(                                                       \
      const T*, const accumulate_t<T>*, const Conv2dEpilogue<T>&, T*, const Conv2dShape&, ParallelFor);   \
  template void conv2d_winograd_f##M##_forward_unpacked_cpu(const T*, const T*, const Conv2dEpilogue<T>&, \
                                                            T*, const Conv2dShape&, ParallelFor);
#define FASTCONV_INSTANTIATE(T) \
  FASTCONV_INSTANTIATE_TILE(2, T) FASTCONV_INSTANTIATE_TILE(4, T) FASTCONV_INSTANTIATE_TILE(6, T)
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)
#define FASTCONV_INSTANTIATE_MOMENTS(T)               \
  FASTCONV_CONV2D_INSTANTIATE_MOMENTS(winograd_f2, T) \
  FASTCONV_CONV2D_INSTANTIATE_MOMENTS(winograd_f4, T) FASTCONV_CONV2D_INSTANTIATE_MOMENTS(winograd_f6, T)
FASTCONV_INSTANTIATE_MOMENTS(float)
FASTCONV_INSTANTIATE_MOMENTS(double)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Convolution, C++, Winograd F(M x M, 3 x 3): grad_weight and grad_bias.
//
// The transposed formula of forward's: grad_weight = Filter^T [ sum over tiles of (Output gy Output^T) *
//   (Input d Input^T) ] Filter, which is, for each of the T^2 positions, a product of matrices over tiles.
// An item is 64 x 64 channels and a slice of the tiles. For each block of its tiles, both images are
//   transformed; a step adds tiles to 6 x 64 sums in registers, and all sums stay in the L2 cache. Bytes:
//   each image once for every 64 channels of the other.
// Slices are summed in a fixed order, and their number depends on the shape alone: the same bits for any
//   number of threads.
// Limits: few tiles, over which the last transform does not pay.
#include "conv2d_winograd_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

template <int M, typename T>
class WinogradGradWeight {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, positions = (M + 2) * (M + 2), chunk = 64;

  WinogradGradWeight(const T* grad_output, const T* input, const Conv2dShape& s)
      : shape_(s),
        grid_{s.batch, ceil_div(s.out_height, M), ceil_div(s.out_width, M), block_tiles},
        grad_({grad_output, s.out_channels, s.out_height, s.out_width, s.channels_last}),
        grad_reader_(grad_, grid_, M, 0, 0),
        input_reader_({input, s.in_channels, s.in_height, s.in_width, s.channels_last}, grid_, M,
                      s.padding_top, s.padding_left) {
    const int64_t tiles = grid_.rows() * grid_.wide;
    const int64_t wanted = std::max(tiles / 128, std::min(8 / chunks(), tiles / 32));
    slices_ = std::clamp<int64_t>(std::min(wanted, 64 / chunks()), 1, grid_.blocks());
  }

  int64_t slices() const { return slices_; }
  int64_t items() const { return slices_ * chunks(); }

  // Each slice's sums go to (slices, out_channels, in_group, 9) and (slices, out_channels); a null bias is
  // left out.
  template <typename P>
  void compute(int64_t begin, int64_t end, P* weight, A* bias) const {
    const int64_t most = grid_.most_tiles(), from = std::min(chunk, shape_.in_group());
    const int64_t to = std::min(chunk, shape_.out_group());
    const Transformed<A> no_input{nullptr, most, from}, no_grad{nullptr, most, to},
        no_sums{nullptr, from, to};
    const Scratch<A> inputs(no_input.size(positions)), grads(no_grad.size(positions));
    const Scratch<A> sums(no_sums.size(positions));
    const Scratch<A> strip(std::max({input_reader_.strip_size(), grad_reader_.strip_size(), from * 9 * L}));
    std::fill_n(grads.data(), no_grad.size(positions), A(0));  // also the lanes that are no channel
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slice = item / chunks();
      const Chunk c = chunk_number(item % chunks());
      const Transformed<A> sum{sums.data(), c.in_channels, c.out_channels};
      A bias_sum[chunk] = {};
      const int64_t first = grid_.blocks() * slice / slices_, last = grid_.blocks() * (slice + 1) / slices_;
      for (int64_t number = first; number < last; ++number) {
        const Region block = grid_.block(number);
        const Transformed<A> input{inputs.data(), block.area(), c.in_channels};
        const Transformed<A> grad{grads.data(), block.area(), c.out_channels};
        input_reader_.expand_block(block, c.group * shape_.in_group() + c.in_channel, input, strip.data());
        grad_reader_.expand_block(block, c.out_channel, grad, strip.data());
        for (int64_t p = 0; p < positions; ++p) add_products(input, grad, p, number > first, sum);
        if (bias && c.in_channel == 0)
          add_pixels(block, c.out_channel, c.out_channels, bias_sum, strip.data());
      }
      P* target = weight + slice * shape_.out_channels * shape_.in_group() * 9;
      store_filters(sum, target + (c.out_channel * shape_.in_group() + c.in_channel) * 9, strip.data());
      if (bias && c.in_channel == 0)
        std::copy_n(bias_sum, c.out_channels, bias + slice * shape_.out_channels + c.out_channel);
    }
  }

 private:
  static constexpr int64_t block_tiles = M == 2 ? 32 : 16;  // with the sums, they share the L2 cache

  struct Chunk {  // in_channel counts in the group, out_channel through all groups
    int64_t group, in_channel, in_channels, out_channel, out_channels;
  };

  int64_t in_chunks() const { return ceil_div(shape_.in_group(), chunk); }
  int64_t out_chunks() const { return ceil_div(shape_.out_group(), chunk); }
  int64_t chunks() const { return shape_.groups * in_chunks() * out_chunks(); }

  Chunk chunk_number(int64_t number) const {
    const int64_t in = number % in_chunks() * chunk, out = number / in_chunks() % out_chunks() * chunk;
    const int64_t group = number / in_chunks() / out_chunks();
    return {group, in, std::min(chunk, shape_.in_group() - in), group * shape_.out_group() + out,
            std::min(chunk, shape_.out_group() - out)};
  }

  // sums[position][c][m] += sum over tiles of input[position][tile][c] * grad[position][tile][m]
  static void add_products(const Transformed<A>& input, const Transformed<A>& grad, int64_t p, bool add,
                           const Transformed<A>& sums) {
    const Panels<A> panels{grad.channels};
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      const int64_t m = panel * panels.width;
      with_constant<1, most_vectors>(panels.vectors(panel), [&](auto vectors) {
        multiply_rows<vectors>(input.at(p, 0), 1, input.tile_stride(), input.channels, grad.at(p, 0) + m,
                               grad.tile_stride(), grad.tiles, sums.at(p, 0) + m, sums.tile_stride(),
                               add ? Sum::added : Sum::first);
      });
    }
  }

  // The sums as filters (m, c, 9), m in_group channels apart.
  template <typename P>
  void store_filters(const Transformed<A>& sums, P* target, A* strip) const {
    const int64_t run = sums.tiles * 9, step = shape_.in_group() * 9;
    P nowhere[L];
    for (int64_t m = 0; m < sums.channels; m += L, target += L * step) {
      for (int64_t c = 0; c < sums.tiles; ++c) {
        contract_square<FilterMatrix<M>, A>(
            [&](int p) { return load_vector(sums.at(p, c) + m); },
            [&](int i, int k, Vector<A> value) { store_vector(strip + (c * 9 + i * 3 + k) * L, value); });
      }
      const int64_t lanes = std::min(L, sums.channels - m);
      int64_t q = 0;
      for (; q + L <= run; q += L)
        transpose_square<A>([&](int k) { return strip + (q + k) * L; },
                            [&](int lane) { return lane < lanes ? target + lane * step + q : nowhere; });
      for (; q < run; ++q)
        for (int64_t lane = 0; lane < lanes; ++lane) store(&target[lane * step + q], strip[q * L + lane]);
    }
  }

  // Adds a block's pixels of grad_output to the sums of its channels, a row at a time.
  void add_pixels(const Region& block, int64_t channel, int64_t channels, A* sums, A* strip) const {
    for (int64_t row = block.row_begin; row < block.row_end;) {
      const Region tiles = grid_.in_one_image(block, row);
      const Image<const T> image = grad_.next(row / grid_.high);
      const Region region = pixels_under(image, tiles, grid_.high, M, M, 0, 0);
      for (int64_t k = 0; k < channels; k += L) {
        const int64_t lanes = std::min(L, channels - k);
        if (image.channels_last) {
          const T* first =
              image.data + (region.row_begin * image.width + region.column_begin) * image.channels;
          add_rows(first + channel + k, image.row_stride(), image.channels, region, lanes, sums + k);
        } else {
          load_region(image, channel + k, lanes, region, strip);
          add_rows(strip, region.columns() * L, L, region, lanes, sums + k);
        }
      }
      row = tiles.row_end;
    }
  }

  template <typename Pixel>
  static void add_rows(const Pixel* pixels, int64_t row_stride, int64_t pixel_stride, const Region& region,
                       int64_t lanes, A* sums) {
    for (int64_t i = 0; i < region.rows(); ++i, pixels += row_stride) {
      A row[L] = {};
      Vector<A> total{};
      for (int64_t k = 0; k < region.columns(); ++k) {
        if (lanes == L)
          total += load_vector(pixels + k * pixel_stride);
        else
          for (int64_t lane = 0; lane < lanes; ++lane) row[lane] += load(pixels[k * pixel_stride + lane]);
      }
      if (lanes == L) store_vector(row, total);
      for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += row[lane];
    }
  }

  const Conv2dShape& shape_;
  TileGrid grid_;
  Image<const T> grad_;  // the first of the batch
  TileExpander<OutputMatrix<M>, T> grad_reader_;
  TileExpander<InputMatrix<M>, T> input_reader_;
  int64_t slices_;
};

// target = the sum over slices of partial (slices, count).
template <typename T, typename A>
void add_slices(const A* partial, int64_t slices, int64_t count, T* target, ParallelFor threads) {
  constexpr int64_t L = lanes_of<A>, together = 256;
  parallel_for(threads, ceil_div(count, together), [&](int64_t begin, int64_t end) {
    int64_t k = begin * together;
    const int64_t last = std::min(count, end * together);
    for (; k + L <= last; k += L) {
      Vector<A> sum = load_vector(partial + k);
      for (int64_t slice = 1; slice < slices; ++slice) sum += load_vector(partial + slice * count + k);
      store_vector(target + k, sum);
    }
    for (; k < last; ++k) {
      A sum = partial[k];
      for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * count + k];
      store(&target[k], sum);
    }
  });
}

template <int M, typename T>
void winograd_grad_weight(const T* grad_output, const T* input, T* grad_weight, T* grad_bias,
                          const Conv2dShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const WinogradGradWeight<M, T> sums(grad_output, input, s);
  const int64_t slices = sums.slices(), count = s.out_channels * s.in_group() * 9;
  const Scratch<A> bias(slices * s.out_channels);
  A* bias_sums = grad_bias ? bias.data() : nullptr;
  const auto compute = [&](auto* weight) {
    parallel_for(threads, sums.items(),
                 [&](int64_t begin, int64_t end) { sums.compute(begin, end, weight, bias_sums); });
  };
  if (slices == 1) {
    compute(grad_weight);
  } else {
    const Scratch<A> partial(slices * count);
    compute(partial.data());
    add_slices(partial.data(), slices, count, grad_weight, threads);
  }
  if (grad_bias) add_slices(bias.data(), slices, s.out_channels, grad_bias, threads);
}

}  // namespace

#define FASTCONV_WINOGRAD(M)                                                                             \
  template <typename T>                                                                                  \
  void conv2d_winograd_f##M##_grad_weight_cpu(const T* grad_output, const T* input, T* grad_weight,      \
                                              T* grad_bias, const Conv2dShape& s, ParallelFor threads) { \
    winograd_grad_weight<M>(grad_output, input, grad_weight, grad_bias, s, threads);                     \
  }
FASTCONV_WINOGRAD(2)
FASTCONV_WINOGRAD(4)
FASTCONV_WINOGRAD(6)

#define FASTCONV_INSTANTIATE_TILE(M, T)                                                                \
  template void conv2d_winograd_f##M##_grad_weight_cpu(const T*, const T*, T*, T*, const Conv2dShape&, \
                                                       ParallelFor);
#define FASTCONV_INSTANTIATE(T) \
  FASTCONV_INSTANTIATE_TILE(2, T) FASTCONV_INSTANTIATE_TILE(4, T) FASTCONV_INSTANTIATE_TILE(6, T)
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

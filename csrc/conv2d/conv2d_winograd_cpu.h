// Convolution, C++, Winograd F(M x M, 3 x 3): what forward, the transposed convolution and grad_weight share.
//
// A tile of M x M outputs comes from values of polynomials at T = M + 2 points in each direction: T^2
// multiplications in place of 9 M^2. With d a tile of T x T inputs, g a filter and y the outputs,
//   y = Output^T [ (Filter g Filter^T) * (Input d Input^T) ] Output,   * by elements.
// Row i of each matrix belongs to a point p: Output has the powers of p, Filter the same divided by
//   N = product of (p - q) over the other points q, Input the coefficients of product of (x - q); the last
//   row is the point at infinity. Points come in pairs p, -p whose rows share their even and odd parts.
// F2: 0, 1, -1. F4: 0, +-5/8, +-3/2: less than half the error of the usual 0, +-1, +-2, and every coefficient
//   of Input and Output is exact. F6: 0, +-1/2, +-1, +-2, the best found. Measured: docs/conv2d.md.
#pragma once

#include <array>

#include "../common/tile.h"
#include "conv2d_direct_cpu.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <int M>
struct WinogradMatrices {
  static constexpr int T = M + 2;
  double input[T][T] = {}, filter[T][3] = {}, output[T][M] = {};

  constexpr WinogradMatrices() {
    constexpr std::array<double, 3> pairs = M == 2   ? std::array{1.0, 0.0, 0.0}
                                            : M == 4 ? std::array{0.625, 1.5, 0.0}
                                                     : std::array{0.5, 1.0, 2.0};
    double point[T - 1] = {}, product[T] = {1};  // coefficient k of the product of all (x - p)
    for (int i = 1; i < T - 1; ++i) point[i] = i % 2 ? pairs[i / 2] : -pairs[i / 2 - 1];
    for (int i = 0; i < T - 1; ++i) {
      for (int k = T - 1; k > 0; --k) product[k] = product[k - 1] - point[i] * product[k];
      product[0] *= -point[i];
    }
    for (int i = 0; i < T - 1; ++i) {
      for (int k = T - 1; k > 0; --k) input[i][k - 1] = product[k] + point[i] * (k < T - 1 ? input[i][k] : 0);
      double n = 0, power = 1;
      for (int k = 0; k < T - 1; ++k, power *= point[i]) n += input[i][k] * power;
      power = 1;
      for (int k = 0; k < std::max(M, 3); ++k, power *= point[i]) {
        if (k < M) output[i][k] = power;
        if (k < 3) filter[i][k] = power / n;
      }
    }
    for (int k = 0; k < T; ++k) input[T - 1][k] = product[k];
    filter[T - 1][2] = output[T - 1][M - 1] = 1;
  }
};
template <int M>
inline constexpr WinogradMatrices<M> winograd_matrices;

template <int M>
struct InputMatrix {
  static constexpr int rows = M + 2, columns = M + 2;
  static constexpr double at(int i, int k) { return winograd_matrices<M>.input[i][k]; }
};
template <int M>
struct FilterMatrix {
  static constexpr int rows = M + 2, columns = 3;
  static constexpr double at(int i, int k) { return winograd_matrices<M>.filter[i][k]; }
};
template <int M>
struct OutputMatrix {
  static constexpr int rows = M + 2, columns = M;
  static constexpr double at(int i, int k) { return winograd_matrices<M>.output[i][k]; }
};

// The sum of E(row, k) x[k] over k = first, first + step, ...
template <typename E, typename A>
inline __attribute__((always_inline)) Vector<A> partial_row(const Vector<A> (&x)[E::columns], int row,
                                                            int first, int step) {
  Vector<A> sum{};
  bool empty = true;
#pragma GCC unroll 8
  for (int k = first; k < E::columns; k += step) {
    const A factor = A(E::at(row, k));
    if (factor == 0) continue;
    sum = empty ? factor * x[k] : sum + factor * x[k];
    empty = false;
  }
  return sum;
}

// y = E x
template <typename E, typename A>
inline __attribute__((always_inline)) void expand(const Vector<A> (&x)[E::columns], Vector<A> (&y)[E::rows]) {
  y[0] = partial_row<E, A>(x, 0, 0, 1);
#pragma GCC unroll 3
  for (int i = 1; i + 2 < E::rows; i += 2) {
    const Vector<A> even = partial_row<E, A>(x, i, 0, 2), odd = partial_row<E, A>(x, i, 1, 2);
    y[i] = even + odd, y[i + 1] = even - odd;
  }
  y[E::rows - 1] = partial_row<E, A>(x, E::rows - 1, 0, 1);
}

// x = E^T y
template <typename E, typename A>
inline __attribute__((always_inline)) void contract(const Vector<A> (&y)[E::rows],
                                                    Vector<A> (&x)[E::columns]) {
  constexpr int last = E::rows - 1;
  Vector<A> folded[2][E::rows];  // of a pair of points: the sum, the difference
#pragma GCC unroll 3
  for (int i = 1; i + 1 < last; i += 2) folded[0][i] = y[i] + y[i + 1], folded[1][i] = y[i] - y[i + 1];
#pragma GCC unroll 6
  for (int k = 0; k < E::columns; ++k) {
    x[k] = A(E::at(1, k)) * folded[k % 2][1];
#pragma GCC unroll 2
    for (int i = 3; i + 1 < last; i += 2) x[k] += A(E::at(i, k)) * folded[k % 2][i];
    if (E::at(0, k) != 0) x[k] += A(E::at(0, k)) * y[0];
    if (E::at(last, k) != 0) x[k] += A(E::at(last, k)) * y[last];
  }
}

// Y = E X E^T of vectors load(i, k), to store(position, value).
template <typename E, typename A, typename Load, typename Store>
inline __attribute__((always_inline)) void expand_square(const Load& load, const Store& store) {
  constexpr int K = E::columns, T = E::rows, L = lanes_of<A>;
  alignas(64) A half[T * K * L];
#pragma GCC unroll 1
  for (int k = 0; k < K; ++k) {
    Vector<A> x[K], y[T];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) x[i] = load(i, k);
    expand<E, A>(x, y);
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) store_vector(half + (i * K + k) * L, y[i]);
  }
#pragma GCC unroll 1
  for (int i = 0; i < T; ++i) {
    Vector<A> x[K], y[T];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) x[k] = load_vector(half + (i * K + k) * L);
    expand<E, A>(x, y);
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) store(i * T + j, y[j]);
  }
}

// X = E^T Y E of vectors load(position), to store(i, k, value).
template <typename E, typename A, typename Load, typename Store>
inline __attribute__((always_inline)) void contract_square(const Load& load, const Store& store) {
  constexpr int K = E::columns, T = E::rows, L = lanes_of<A>;
  alignas(64) A half[T * K * L];
#pragma GCC unroll 1
  for (int j = 0; j < T; ++j) {
    Vector<A> y[T], x[K];
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) y[i] = load(i * T + j);
    contract<E, A>(y, x);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store_vector(half + (k * T + j) * L, x[k]);
  }
#pragma GCC unroll 1
  for (int i = 0; i < K; ++i) {
    Vector<A> y[T], x[K];
#pragma GCC unroll 8
    for (int j = 0; j < T; ++j) y[j] = load_vector(half + (i * T + j) * L);
    contract<E, A>(y, x);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store(i, k, x[k]);
  }
}

// A rectangle of rows and columns, of tiles or of pixels.
struct Region {
  int64_t row_begin, row_end, column_begin, column_end;

  int64_t rows() const { return row_end - row_begin; }
  int64_t columns() const { return column_end - column_begin; }
  int64_t area() const { return rows() * columns(); }
};

// The tiles of all images, cut into blocks: several whole rows of tiles (counted through the images), or,
// where a row alone has too many, parts of a row. Without tiles there is one block, of none.
struct TileGrid {
  int64_t images, high, wide;  // tiles of an image
  int64_t most;                // tiles of a block, about

  int64_t rows() const { return images * high; }
  int64_t parts() const { return std::max<int64_t>(1, ceil_div(wide, most)); }
  int64_t stripes() const {
    const int64_t together = std::max<int64_t>(1, most / std::max<int64_t>(1, wide));
    return std::max<int64_t>(1, ceil_div(rows(), together));
  }
  int64_t blocks() const { return stripes() * parts(); }
  int64_t most_rows() const { return ceil_div(rows(), stripes()); }
  int64_t most_columns() const { return ceil_div(wide, parts()); }
  int64_t most_tiles() const { return most_rows() * most_columns(); }

  Region block(int64_t number) const {
    const int64_t stripe = number / parts(), part = number % parts();
    return {rows() * stripe / stripes(), rows() * (stripe + 1) / stripes(), wide * part / parts(),
            wide * (part + 1) / parts()};
  }
  // The part of a block, from row `row` of tiles, that lies in one image.
  Region in_one_image(const Region& block, int64_t row) const {
    return {row, std::min(block.row_end, (row / high + 1) * high), block.column_begin, block.column_end};
  }
};

// Pixels of an image under a region of tiles of `size` pixels, `step` apart, the first at (-top, -left).
template <typename T>
Region pixels_under(const Image<T>& image, const Region& tiles, int64_t high, int64_t step, int64_t size,
                    int64_t top, int64_t left) {
  const int64_t row = tiles.row_begin % high * step - top, column = tiles.column_begin * step - left;
  Region r;
  r.row_begin = std::clamp<int64_t>(row, 0, image.height);
  r.row_end = std::clamp<int64_t>(row + (tiles.rows() - 1) * step + size, r.row_begin, image.height);
  r.column_begin = std::clamp<int64_t>(column, 0, image.width);
  r.column_end =
      std::clamp<int64_t>(column + (tiles.columns() - 1) * step + size, r.column_begin, image.width);
  return r;
}

// Pixels of a region of a contiguous image as (rows, columns, lanes), and the way back.
template <typename T, typename A>
void load_region(const Image<const T>& image, int64_t channel, int64_t lanes, const Region& region,
                 A* strip) {
  constexpr int64_t L = lanes_of<A>;
  if (region.columns() == image.width)
    return load_tile(image, Lanes{channel}, lanes, region.row_begin, region.row_end, strip);
  for (int64_t row = region.row_begin; row < region.row_end; ++row, strip += region.columns() * L) {
    const T* line = image.data + channel * image.channel_stride() + row * image.width + region.column_begin;
    const auto at = [&](int64_t lane) { return line + std::min(lane, lanes - 1) * image.channel_stride(); };
    for (int64_t k = 0; k < region.columns();) {
      if (k + L > region.columns() && k > 0) k = region.columns() - L;  // overlaps the square before
      if (k + L <= region.columns()) {
        transpose_square<A>([&](int lane) { return at(lane) + k; },
                            [&](int pixel) { return strip + (k + pixel) * L; });
        k += L;
        continue;
      }
      for (; k < region.columns(); ++k)
        for (int64_t lane = 0; lane < L; ++lane) strip[k * L + lane] = load(at(lane)[k]);
    }
  }
}

template <typename T, typename A>
void store_region(const Image<T>& image, int64_t channel, int64_t lanes, const Region& region,
                  const A* strip) {
  constexpr int64_t L = lanes_of<A>;
  if (region.columns() == image.width)
    return store_tile(image, Lanes{channel}, lanes, region.row_begin, region.row_end, strip);
  T nowhere[L];  // takes the lanes that are no channel
  for (int64_t row = region.row_begin; row < region.row_end; ++row, strip += region.columns() * L) {
    T* line = image.data + channel * image.channel_stride() + row * image.width + region.column_begin;
    for (int64_t k = 0; k < region.columns();) {
      if (k + L > region.columns() && k > 0) k = region.columns() - L;
      if (k + L <= region.columns()) {
        transpose_square<A>(
            [&](int pixel) { return strip + (k + pixel) * L; },
            [&](int lane) { return lane < lanes ? line + lane * image.channel_stride() + k : nowhere; });
        k += L;
        continue;
      }
      for (; k < region.columns(); ++k)
        for (int64_t lane = 0; lane < lanes; ++lane)
          store(&line[lane * image.channel_stride() + k], strip[k * L + lane]);
    }
  }
}

// Tiles in the transformed space: (positions, tiles, channels).
template <typename A>
struct Transformed {
  A* data;
  int64_t tiles, channels;

  static constexpr int64_t L = lanes_of<A>;
  int64_t tile_stride() const { return ceil_div(channels, L) * L; }
  // With a vector between positions, so that those of a tile do not all fall into one set of the cache.
  int64_t position_stride() const { return tiles * tile_stride() + L; }
  int64_t size(int64_t positions) const { return positions * position_stride(); }
  A* at(int64_t position, int64_t tile) const {
    return data + position * position_stride() + tile * tile_stride();
  }
  Transformed from_channel(int64_t channel) const { return {data + channel, tiles, channels}; }
};

// Tiles of E::columns squared pixels of an image, `step` apart, the first at (-top, -left), expanded by E.
template <typename E, typename T>
class TileExpander {
 public:
  using A = accumulate_t<T>;
  static constexpr int64_t L = lanes_of<A>, size = E::columns;

  TileExpander(const Image<const T>& image, const TileGrid& grid, int64_t step, int64_t top, int64_t left)
      : image_(image), grid_(grid), step_(step), top_(top), left_(left) {}

  int64_t strip_size() const {
    if (image_.channels_last) return 0;
    return ((grid_.most_rows() - 1) * step_ + size) *
           std::min(image_.width, (grid_.most_columns() - 1) * step_ + size) * L;
  }

  // Channels [channel, channel + target.channels). Where they are no multiple of the lanes, the last vector
  // overlaps the one before.
  void expand_block(const Region& block, int64_t channel, const Transformed<A>& target, A* strip) const {
    int64_t tile = 0;
    for (int64_t row = block.row_begin; row < block.row_end;) {
      const Region tiles = grid_.in_one_image(block, row);
      const Image<const T> image = image_.next(row / grid_.high);
      if (image.channels_last) {
        expand_tiles(image.block(channel), target.channels, tiles, target, tile);
      } else {
        const Region region = pixels_under(image, tiles, grid_.high, step_, size, top_, left_);
        const int64_t row_stride = region.columns() * L;
        const Block<const A> pixels{strip - region.row_begin * row_stride - region.column_begin * L,
                                    row_stride, L};
        for (int64_t c = 0; c < target.channels; c += L) {
          const int64_t from = std::clamp<int64_t>(target.channels - L, 0, c);
          load_region(image, channel + from, std::min(L, target.channels), region, strip);
          expand_tiles(pixels, L, tiles, target.from_channel(from), tile);
        }
      }
      tile += tiles.area();
      row = tiles.row_end;
    }
  }

 private:
  template <typename P>  // pixels of T or A
  void expand_tiles(const Block<const P>& pixels, int64_t channels, const Region& tiles,
                    const Transformed<A>& target, int64_t tile) const {
    for (int64_t r = tiles.row_begin; r < tiles.row_end; ++r) {
      for (int64_t c = tiles.column_begin; c < tiles.column_end; ++c, ++tile) {
        const int64_t row = r % grid_.high * step_ - top_, column = c * step_ - left_;
        const P* first = pixels.data + row * pixels.row_stride + column * pixels.pixel_stride;
        const bool inside = channels >= L && row >= 0 && column >= 0 && row + size <= image_.height &&
                            column + size <= image_.width;
        for (int64_t k = 0; k < channels; k += L) {
          const int64_t from = std::clamp<int64_t>(channels - L, 0, k);
          A* to = target.at(0, tile) + from;
          if (inside) {
            expand_tile(first + from, pixels.row_stride, pixels.pixel_stride, to, target.position_stride());
          } else {
            alignas(64) A square[size * size * L];
            copy_inside(first + from, pixels, std::min(L, channels), row, column, square);
            expand_tile(square, size * L, L, to, target.position_stride());
          }
        }
      }
    }
  }

  // A tile that juts out of the image, zero outside.
  template <typename P>
  void copy_inside(const P* first, const Block<const P>& pixels, int64_t lanes, int64_t row, int64_t column,
                   A* square) const {
    std::fill_n(square, size * size * L, A(0));
    for (int64_t i = std::max<int64_t>(-row, 0); i < std::min(size, image_.height - row); ++i)
      for (int64_t k = std::max<int64_t>(-column, 0); k < std::min(size, image_.width - column); ++k) {
        const P* pixel = first + i * pixels.row_stride + k * pixels.pixel_stride;
        A* vector = square + (i * size + k) * L;
        if (lanes == L)
          store_vector(vector, load_vector(pixel));
        else
          for (int64_t lane = 0; lane < lanes; ++lane) vector[lane] = load(pixel[lane]);
      }
  }

  template <typename P>
  void expand_tile(const P* pixels, int64_t row_stride, int64_t pixel_stride, A* to,
                   int64_t position_stride) const {
    expand_square<E, A>(
        [&](int i, int k) {
          const P* pixel = pixels + i * row_stride + k * pixel_stride;
          if (k >= size - step_) __builtin_prefetch(pixel + step_ * pixel_stride);  // of the next tile
          return load_vector(pixel);
        },
        [&](int position, Vector<A> value) { store_vector(to + position * position_stride, value); });
  }

  Image<const T> image_;  // the first of the batch
  TileGrid grid_;
  int64_t step_, top_, left_;
};

// What a sum is to those before it: the first; the next terms, as if there were no break; or a sum of its
// own, added to them, which rounds less than adding its terms one by one.
enum class Sum { first, continued, added };

// out[r] = sum over k of rows[r * row_stride + k * row_step] * panel[k * panel_step ...], V vectors wide, for
// `count` rows, 6 or fewer at a time.
template <int V, typename A>
void multiply_rows(const A* rows, int64_t row_stride, int64_t row_step, int64_t count, const A* panel,
                   int64_t panel_step, int64_t length, A* out, int64_t out_stride, Sum kind) {
  constexpr int64_t L = lanes_of<A>, most = 6;
  const auto block = [&]<int R>(std::integral_constant<int, R>, int64_t first) {
    const A* lines[R];
    Vector<A> sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      lines[r] = rows + (first + r) * row_stride;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[r][v] =
            kind == Sum::continued ? load_vector(out + (first + r) * out_stride + v * L) : Vector<A>{};
    }
    multiply_add(sum, lines, row_step, panel, panel_step, length);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        A* target = out + (first + r) * out_stride + v * L;
        store_vector(target, kind == Sum::added ? load_vector(target) + sum[r][v] : sum[r][v]);
      }
  };
  const int64_t parts = ceil_div(count, most);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = count * part / parts;
    with_constant<1, most>(count * (part + 1) / parts - first,
                           [&](auto rows_here) { block(rows_here, first); });
  }
}

// One pass: forward reads the input and writes the output, the transposed convolution the other way round.
struct WinogradPass {
  int64_t batch, groups, from_group, to_group;  // channels of a group: read, written
  int64_t in_height, in_width, out_height, out_width;
  int64_t top, left;
  bool transposed, channels_last;
};

inline WinogradPass winograd_forward(const Conv2dShape& s) {
  return {s.batch,      s.groups,    s.in_group(),  s.out_group(),  s.in_height, s.in_width,
          s.out_height, s.out_width, s.padding_top, s.padding_left, false,       s.channels_last};
}
inline WinogradPass winograd_transposed(const Conv2dShape& s) {  // the filters turned round
  return {s.batch,     s.groups,   s.out_group(),     s.in_group(),       s.out_height, s.out_width,
          s.in_height, s.in_width, 2 - s.padding_top, 2 - s.padding_left, true,         s.channels_last};
}

// Packed weights: (groups, panels, positions, from_group, lanes of the panel), with a vector between
// positions, or those of a filter would all fall into one set of the cache.
template <typename A>
int64_t position_of(int64_t channels, int64_t line) {
  return channels * line + lanes_of<A>;
}
template <int M, typename A>
int64_t packed_panel(const WinogradPass& pass, int64_t group, int64_t panel) {
  const Panels<A> panels{pass.to_group};
  const int64_t filters = group * panels.padded() + panel * panels.width;
  return (M + 2) * (M + 2) * (filters * pass.from_group + (group * panels.count() + panel) * lanes_of<A>);
}
template <int M, typename T>
int64_t winograd_packed_size(const WinogradPass& pass) {
  return packed_panel<M, accumulate_t<T>>(pass, pass.groups, 0);
}

template <int M, typename T>
void winograd_pack(const T* weight, accumulate_t<T>* packed, const WinogradPass& pass, ParallelFor threads);

// Weights as winograd_pack wrote them; or null, and then as they lie: a thread packs a panel at a time.
template <typename T>
struct WinogradWeights {
  const T* weight;
  const accumulate_t<T>* packed;
};

template <int M, typename T>
void winograd_convolve(const T* input, const WinogradWeights<T>& weights, const Conv2dEpilogue<T>& epilogue,
                       T* output, const WinogradPass& pass, ParallelFor threads);

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Mean and variance of values that come block by block, each block while it lies in a cache.
//
// A block is looked at once: sums of the distances d from its first value, and of their squares, make its
// mean and its squared distances from that, S = sum of d^2 - (sum of d)^2 / n. Nothing large cancels, for a
// block's first value is as near to its mean as its values are spread. Blocks are merged in float64 (Chan,
// Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
#pragma once

#include <utility>
#include <vector>

#include "cpu.h"
#include "simd.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Loops over a run are written once for V = Vector<A>, and V = A, for what is left of it.
template <typename V>
constexpr int64_t width_of = 1;
template <>
inline constexpr int64_t width_of<Vector<float>> = lanes_of<float>;
template <>
inline constexpr int64_t width_of<Vector<double>> = lanes_of<double>;

template <typename V, typename T>
inline V load_as(const T* source) {
  if constexpr (width_of<V> == 1)
    return load(*source);
  else
    return load_vector(source);
}
template <typename V, typename T>
inline void store_as(T* target, V value) {
  if constexpr (width_of<V> == 1)
    store(target, value);
  else
    store_vector(target, value);
}

// body(V{}, vectors, k) for columns of a row: a few vectors, as a constant, from value k on; one by one, what
// is no whole vector.
template <typename A, typename Body>
void for_columns(int64_t width, const Body& body) {
  constexpr int64_t L = lanes_of<A>, most = 4;
  int64_t k = 0;
  while (k + L <= width) {
    const int64_t vectors = std::min((width - k) / L, most);
    with_constant<1, most>(vectors, [&](auto constant) { body(Vector<A>{}, constant, k); });
    k += vectors * L;
  }
  for (; k < width; ++k) body(A{}, std::integral_constant<int, 1>{}, k);
}

// Count, mean and sum of squared distances from the mean.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double more, double its_mean, double its_squares) {
    if (more == 0) return;
    merge(mean, squares, its_mean, its_squares, count, more / (count + more));
    count += more;
  }

  // part: of the values that come, in all.
  static inline __attribute__((always_inline)) void merge(double& mean, double& squares, double its_mean,
                                                          double its_squares, double count, double part) {
    const double distance = its_mean - mean;
    mean += distance * part;
    squares += its_squares + distance * distance * count * part;
  }
};

// Values whose columns are channels: `rows` runs of `pixels`, at least one of each.
template <typename T>
struct PixelRows {
  const T* values;
  int64_t rows, row_stride, pixels, pixel_stride;

  int64_t count() const { return rows * pixels; }
};

// Merges the moments of each of `width` columns of a block into those of `count` values that came before.
// Sums of the block are rounded as often as it has values: a few hundred are well.
template <typename T>
void merge_block(const PixelRows<T>& block, int64_t width, double count, double* mean, double* squares) {
  using A = accumulate_t<T>;
  const double part = double(block.count()) / (count + double(block.count()));
  for_columns<A>(width, [&](auto zero, auto vectors, int64_t k) {
    using V = decltype(zero);
    constexpr int64_t W = width_of<V>;
    V shift[vectors], sum[vectors] = {}, square[vectors] = {};
    for (int v = 0; v < vectors; ++v) shift[v] = load_as<V>(block.values + k + v * W);
    for (int64_t row = 0; row < block.rows; ++row) {
      const T* pixel = block.values + k + row * block.row_stride;
      for (int64_t p = 0; p < block.pixels; ++p, pixel += block.pixel_stride)
        for (int v = 0; v < vectors; ++v) {
          const V distance = load_as<V>(pixel + v * W) - shift[v];
          sum[v] += distance;
          square[v] += distance * distance;
        }
    }
    A own[3][vectors * W];
    for (int v = 0; v < vectors; ++v) {
      const V of_mean = sum[v] / (V{} + A(block.count())), own_square = square[v] - sum[v] * of_mean;
      store_as<V>(own[0] + v * W, shift[v]);
      store_as<V>(own[1] + v * W, of_mean);
      store_as<V>(own[2] + v * W, own_square < V{} ? V{} : own_square);  // NaN stays
    }
    for (int64_t c = 0; c < vectors * W; ++c)
      Moments::merge(mean[k + c], squares[k + c], double(own[0][c]) + double(own[1][c]), own[2][c], count,
                     part);
  });
}

// Moments of each channel of an output that threads compute in parts. Each part's are kept by themselves and
// merged in their order: the same bits, whichever thread computed which.
class PartMoments {
 public:
  // counts: values of a channel in each part.
  PartMoments(std::vector<int64_t> counts, int64_t channels)
      : counts_(std::move(counts)), channels_(channels), values_(2 * counts_.size() * channels) {}

  // The moments of `width` channels of a part, from `channel` on, of blocks that make it up.
  class Part {
   public:
    Part(PartMoments& of, int64_t number, int64_t channel, int64_t width)
        : mean_(of.mean(number) + channel), squares_(of.squares(number) + channel), width_(width) {}

    template <typename T>
    void add(PixelRows<T> block) {
      const int64_t rows = block.rows, most = std::max<int64_t>(1, most_values / block.pixels);
      for (int64_t row = 0; row < rows; row += most, block.values += most * block.row_stride) {
        block.rows = std::min(most, rows - row);
        merge_block(block, width_, count_, mean_, squares_);
        count_ += double(block.count());
      }
    }

   private:
    static constexpr int64_t most_values = 512;
    double *mean_, *squares_, count_ = 0;
    int64_t width_;
  };

  template <typename A>
  void merge(A* mean, A* variance) {
    double count = double(counts_[0]);
    for (size_t k = 1; k < counts_.size(); ++k) {
      const double part = double(counts_[k]) / (count + double(counts_[k]));
      for (int64_t c = 0; c < channels_; ++c)
        Moments::merge(values_[c], values_[channels_ + c], this->mean(k)[c], squares(k)[c], count, part);
      count += double(counts_[k]);
    }
    for (int64_t c = 0; c < channels_; ++c) {
      mean[c] = A(values_[c]);
      variance[c] = A(values_[channels_ + c] / count);
    }
  }

 private:
  double* mean(int64_t part) { return values_.data() + 2 * part * channels_; }
  double* squares(int64_t part) { return mean(part) + channels_; }

  std::vector<int64_t> counts_;
  int64_t channels_;
  std::vector<double> values_;  // (parts, 2, channels)
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

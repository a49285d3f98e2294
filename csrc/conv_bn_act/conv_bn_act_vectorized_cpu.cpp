// Batch normalisation and activation behind a convolution, C++, vectorized.
//
// Formula: conv_bn_act.h. Mean and variance come block by block, each block while it lies in the cache.
// One step: a vector of a channel's pixels (contiguous), or of a pixel's channels (channels_last). Where the
//   channels are no whole vectors, several pixels are taken for one with more channels.
// Bytes: contiguous images are read once, for a channel's pixels stay in the cache between the passes, and
//   written once. channels_last ones are read twice and written once; backward, both images are read twice.
// Against plain: every value is loaded with its neighbours, in the order in which they lie.
// Limits: contiguous, a channel of all images that is larger than the cache is read from memory again.
#include "conv_bn_act_vectorized_cpu.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace fastconv::FASTCONV_CPU_CAPABILITY {
namespace {

constexpr int64_t block_bytes = 32 << 10;   // of an image, between two looks at it
constexpr int64_t slice_bytes = 256 << 10;  // of an image, for a thread's turn
constexpr int64_t most_slices = 64;

// Contiguous: a channel at a time.

template <typename T>
void add_moments(Moments& moments, const T* values, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int64_t most = block_bytes / int64_t(sizeof(T));
  for (int64_t first = 0; first < count; first += most) {
    const T* block = values + first;
    const int64_t length = std::min(most, count - first);
    double total = 0, squares = 0;
    in_vectors<A>(length, [&](auto zero, int64_t begin, int64_t end) {
      auto sum = zero;
      for (int64_t k = begin; k < end; k += width_of<decltype(zero)>)
        sum += load_as<decltype(zero)>(block + k);
      total += total_of(sum);
    });
    const A mean = A(total / double(length));
    in_vectors<A>(length, [&](auto zero, int64_t begin, int64_t end) {
      auto sum = zero;
      for (int64_t k = begin; k < end; k += width_of<decltype(zero)>) {
        const auto distance = load_as<decltype(zero)>(block + k) - mean;
        sum += distance * distance;
      }
      squares += total_of(sum);
    });
    moments.add(double(length), mean, squares);
  }
}

template <typename T>
Norm<Same<accumulate_t<T>>> norm_of(const BatchNormChannel<accumulate_t<T>>& channel) {
  return {{channel.mean}, {channel.weight * channel.inverse}, {channel.bias}, {}, {}};
}

template <typename T>
const T* at(const T* images, int64_t index) {
  return images ? images + index : nullptr;
}
template <typename T>
T* at(T* images, int64_t index) {
  return images ? images + index : nullptr;
}

template <typename T>
void normalize_contiguous(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                          accumulate_t<T>* variance, const BatchNormShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  parallel_for(threads, s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments moments;
      for (int64_t n = 0; n < s.batch; ++n)
        add_moments(moments, norm.input + (n * s.channels + c) * s.pixels, s.pixels);
      mean[c] = A(moments.mean);
      variance[c] = A(moments.squares / moments.count);
      const auto same = norm_of<T>(channel_of(norm, mean[c], variance[c], c));
      with_activation(norm.activation, [&](auto activation) {
        for (int64_t n = 0; n < s.batch; ++n) {
          const int64_t plane = (n * s.channels + c) * s.pixels;
          normalize_run<activation>(same, norm.input + plane, at(norm.residual, plane), output + plane,
                                    s.pixels);
        }
      });
    }
  });
}

template <typename T>
void grad_contiguous(const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                     const accumulate_t<T>* variance, T* grad_input, T* grad_residual,
                     accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias, const BatchNormShape& s,
                     ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t most = block_bytes / int64_t(sizeof(T));
  parallel_for(threads, s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const BatchNormChannel<A> channel = channel_of(norm, mean[c], variance[c], c);
      auto same = norm_of<T>(channel);
      with_activation(norm.activation, [&](auto activation) {
        double grads = 0, products = 0;
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t first = 0; first < s.pixels; first += most) {
            const int64_t block = (n * s.channels + c) * s.pixels + first;
            Vector<A> sums[2] = {};
            grad_sums_run<activation>(same, grad_output + block, norm.input + block, at(norm.residual, block),
                                      at(grad_residual, block), std::min(most, s.pixels - first),
                                      [&](auto zero, int64_t, auto grad, auto product) {
                                        if constexpr (width_of<decltype(zero)> == 1) {
                                          grads += grad;
                                          products += product;
                                        } else {
                                          sums[0] += grad;
                                          sums[1] += product;
                                        }
                                      });
            grads += total_of(sums[0]);
            products += total_of(sums[1]);
          }
        const GradSums<T> sums(channel, grads, products, s.count());
        grad_weight[c] = sums.weight;
        grad_bias[c] = sums.bias;
        same.constant.value = sums.constant;
        same.slope.value = sums.slope;
        for (int64_t n = 0; n < s.batch; ++n) {
          const int64_t plane = (n * s.channels + c) * s.pixels;
          grad_input_run<activation>(same, grad_output + plane, norm.input + plane, at(norm.residual, plane),
                                     grad_input + plane, s.pixels);
        }
      });
    }
  });
}

// channels_last: slices of rows. A row is so many pixels that their channels are whole vectors; the pixels
// that are left make a slice of their own, of narrower rows.

struct Slice {
  int64_t first, rows, width;  // first: value; width: values of a row
};

template <typename T>
class Slices {
 public:
  using A = accumulate_t<T>;

  explicit Slices(const BatchNormShape& s)
      : channels_(s.channels), width_(std::lcm(s.channels, int64_t(lanes_of<A>))) {
    const int64_t rows = s.size() / width_, bytes = s.size() * int64_t(sizeof(T));
    const int64_t count =
        std::clamp<int64_t>(bytes / slice_bytes, 1, std::min(most_slices, std::max<int64_t>(rows, 1)));
    for (int64_t k = 0; k < count && rows > 0; ++k) {
      const int64_t begin = rows * k / count, end = rows * (k + 1) / count;
      slices_.push_back({begin * width_, end - begin, width_});
    }
    const int64_t left = (s.size() - rows * width_) / channels_;
    if (left > 0) slices_.push_back({rows * width_, left, channels_});
  }

  int64_t count() const { return int64_t(slices_.size()); }
  int64_t width() const { return width_; }
  const Slice& operator[](int64_t k) const { return slices_[k]; }

  // Rows that are looked at twice while they are in the cache.
  int64_t block_rows() const { return std::max<int64_t>(16, block_bytes / (width_ * int64_t(sizeof(T)))); }

  // visit(index of one of its values in a slice's row) for each pixel of a row that has the channel.
  template <typename Visit>
  void for_places(const Slice& slice, int64_t channel, const Visit& visit) const {
    for (int64_t k = channel; k < slice.width; k += channels_) visit(k);
  }

 private:
  int64_t channels_, width_;
  std::vector<Slice> slices_;
};

// One number of each channel, for each value of a row.
template <typename A, typename Number>
std::vector<A> repeated(int64_t channels, int64_t width, const Number& number) {
  std::vector<A> values(width);
  for (int64_t k = 0; k < width; ++k) values[k] = k < channels ? number(k) : values[k - channels];
  return values;
}

template <typename T>
void add_moments(std::vector<Moments>& moments, const T* rows, const Slice& slice, int64_t block_rows) {
  using A = accumulate_t<T>;
  const int64_t width = slice.width;
  const Scratch<A> mean(width), squares(width);
  for (int64_t first = 0; first < slice.rows; first += block_rows) {
    const int64_t count = std::min(block_rows, slice.rows - first);
    const T* block = rows + slice.first + first * width;
    std::fill_n(mean.data(), width, A(0));
    std::fill_n(squares.data(), width, A(0));
    in_vectors<A>(width, [&](auto zero, int64_t begin, int64_t end) {
      using V = decltype(zero);
      for (int64_t row = 0; row < count; ++row)
        for (int64_t k = begin; k < end; k += width_of<V>)
          store_as<V>(mean.data() + k, load_as<V>(mean.data() + k) + load_as<V>(block + row * width + k));
      for (int64_t k = begin; k < end; k += width_of<V>)
        store_as<V>(mean.data() + k, load_as<V>(mean.data() + k) / A(count));
      for (int64_t row = 0; row < count; ++row)
        for (int64_t k = begin; k < end; k += width_of<V>) {
          const V distance = load_as<V>(block + row * width + k) - load_as<V>(mean.data() + k);
          store_as<V>(squares.data() + k, load_as<V>(squares.data() + k) + distance * distance);
        }
    });
    for (int64_t k = 0; k < width; ++k) moments[k].add(double(count), mean.data()[k], squares.data()[k]);
  }
}

// The numbers of a normalisation, for each value of a row.
template <typename A>
struct RowNumbers {
  std::vector<A> mean, scale, bias, constant, slope;

  template <typename T>
  RowNumbers(const BatchNorm<T>& norm, const A* means, const A* variances, int64_t channels, int64_t width)
      : mean(repeated<A>(channels, width, [&](int64_t c) { return means[c]; })),
        scale(repeated<A>(channels, width,
                          [&](int64_t c) {
                            const auto channel = channel_of(norm, means[c], variances[c], c);
                            return channel.weight * channel.inverse;
                          })),
        bias(repeated<A>(channels, width, [&](int64_t c) { return norm.bias ? norm.bias[c] : A(0); })) {}

  Norm<Each<A>> norm() const {
    return {{mean.data()}, {scale.data()}, {bias.data()}, {constant.data()}, {slope.data()}};
  }
};

template <typename T>
void normalize_channels_last(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                             accumulate_t<T>* variance, const BatchNormShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const Slices<T> slices(s);
  std::vector<std::vector<Moments>> moments(slices.count());
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      moments[k].resize(slices[k].width);
      add_moments(moments[k], norm.input, slices[k], slices.block_rows());
    }
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    Moments all;
    for (int64_t k = 0; k < slices.count(); ++k)
      slices.for_places(slices[k], c, [&](int64_t place) {
        const Moments& part = moments[k][place];
        all.add(part.count, part.mean, part.squares);
      });
    mean[c] = A(all.mean);
    variance[c] = A(all.squares / all.count);
  }
  const RowNumbers<A> numbers(norm, mean, variance, s.channels, slices.width());
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t row = 0; row < slices[k].rows; ++row) {
          const int64_t first = slices[k].first + row * slices[k].width;
          normalize_run<activation>(numbers.norm(), norm.input + first, at(norm.residual, first),
                                    output + first, slices[k].width);
        }
    });
  });
}

template <typename T>
void grad_channels_last(const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                        const accumulate_t<T>* variance, T* grad_input, T* grad_residual,
                        accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias, const BatchNormShape& s,
                        ParallelFor threads) {
  using A = accumulate_t<T>;
  const Slices<T> slices(s);
  RowNumbers<A> numbers(norm, mean, variance, s.channels, slices.width());
  std::vector<double> sums(2 * slices.count() * slices.width());
  const auto sums_of = [&](int64_t slice) { return sums.data() + 2 * slice * slices.width(); };
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    const Scratch<A> grads(slices.width()), products(slices.width());
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t width = slices[k].width;
        for (int64_t first = 0; first < slices[k].rows; first += slices.block_rows()) {
          std::fill_n(grads.data(), width, A(0));
          std::fill_n(products.data(), width, A(0));
          for (int64_t row = first; row < std::min(slices[k].rows, first + slices.block_rows()); ++row) {
            const int64_t value = slices[k].first + row * width;
            grad_sums_run<activation>(
                numbers.norm(), grad_output + value, norm.input + value, at(norm.residual, value),
                at(grad_residual, value), width, [&](auto zero, int64_t at, auto grad, auto product) {
                  using V = decltype(zero);
                  store_as<V>(grads.data() + at, load_as<V>(grads.data() + at) + grad);
                  store_as<V>(products.data() + at, load_as<V>(products.data() + at) + product);
                });
          }
          for (int64_t at = 0; at < width; ++at) {
            sums_of(k)[at] += grads.data()[at];
            sums_of(k)[slices.width() + at] += products.data()[at];
          }
        }
      }
    });
  });
  std::vector<A> constants(s.channels), slopes(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    double grads = 0, products = 0;
    for (int64_t k = 0; k < slices.count(); ++k)
      slices.for_places(slices[k], c, [&](int64_t place) {
        grads += sums_of(k)[place];
        products += sums_of(k)[slices.width() + place];
      });
    const GradSums<T> found(channel_of(norm, mean[c], variance[c], c), grads, products, s.count());
    grad_weight[c] = found.weight;
    grad_bias[c] = found.bias;
    constants[c] = found.constant;
    slopes[c] = found.slope;
  }
  numbers.constant = repeated<A>(s.channels, slices.width(), [&](int64_t c) { return constants[c]; });
  numbers.slope = repeated<A>(s.channels, slices.width(), [&](int64_t c) { return slopes[c]; });
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t row = 0; row < slices[k].rows; ++row) {
          const int64_t value = slices[k].first + row * slices[k].width;
          grad_input_run<activation>(numbers.norm(), grad_output + value, norm.input + value,
                                     at(norm.residual, value), grad_input + value, slices[k].width);
        }
    });
  });
}

}  // namespace

template <typename T>
void conv_bn_act_vectorized_normalize_cpu(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                                          accumulate_t<T>* variance, const BatchNormShape& s,
                                          ParallelFor threads) {
  (s.channels_last ? normalize_channels_last<T> : normalize_contiguous<T>)(norm, output, mean, variance, s,
                                                                           threads);
}

template <typename T>
void conv_bn_act_vectorized_grad_normalize_cpu(const T* grad_output, const BatchNorm<T>& norm,
                                               const accumulate_t<T>* mean, const accumulate_t<T>* variance,
                                               T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,
                                               accumulate_t<T>* grad_bias, const BatchNormShape& s,
                                               ParallelFor threads) {
  (s.channels_last ? grad_channels_last<T> : grad_contiguous<T>)(grad_output, norm, mean, variance,
                                                                 grad_input, grad_residual, grad_weight,
                                                                 grad_bias, s, threads);
}

#define FASTCONV_INSTANTIATE(T)                                                                             \
  template void conv_bn_act_vectorized_normalize_cpu(const BatchNorm<T>&, T*, accumulate_t<T>*,             \
                                                     accumulate_t<T>*, const BatchNormShape&, ParallelFor); \
  template void conv_bn_act_vectorized_grad_normalize_cpu(                                                  \
      const T*, const BatchNorm<T>&, const accumulate_t<T>*, const accumulate_t<T>*, T*, T*,                \
      accumulate_t<T>*, accumulate_t<T>*, const BatchNormShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

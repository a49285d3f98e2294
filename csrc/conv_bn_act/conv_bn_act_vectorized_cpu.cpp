// Batch normalisation and activation behind a convolution, C++, vectorized.
//
// Formula: conv_bn_act.h. Mean and variance come block by block; apply is given those that a convolution has
//   gathered (common/moments.h).
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
constexpr int64_t least_width = 256;  // values of a row, if there are so many

// Whether runs of so many values are stored past the caches. A channel's runs lie far apart in contiguous
// images, which makes reading their lines before they are overwritten slow, also of smaller ones.
template <typename T>
bool streams_runs(const T* images, const BatchNormShape& s, int64_t run) {
  return std::is_same_v<T, float> && run % lanes_of<float> == 0 &&
         stores_past_caches(images, s.size() * int64_t(sizeof(T)), s.channels_last ? 16 << 20 : 2 << 20);
}

// Contiguous: a channel at a time.

template <typename T>
void add_moments(Moments& moments, const T* values, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int64_t most = block_bytes / int64_t(sizeof(T));
  for (int64_t first = 0; first < count; first += most) {
    const T* block = values + first;
    const int64_t length = std::min(most, count - first);
    RunSum<A> sum, squares;
    for_vectors<A>(
        length, [&](auto zero, int64_t k, int turn) { sum.add(load_as<decltype(zero)>(block + k), turn); });
    const A mean = A(sum.total() / double(length));
    for_vectors<A>(length, [&](auto zero, int64_t k, int turn) {
      const decltype(zero) distance = load_as<decltype(zero)>(block + k) - mean;
      squares.add(distance * distance, turn);
    });
    moments.add(double(length), mean, squares.total());
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
  const bool streams = streams_runs(output, s, s.pixels);
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
                                    s.pixels, streams);
        }
      });
    }
    if (streams) stream_fence();
  });
}

template <typename T>
void apply_contiguous(const BatchNorm<T>& norm, const accumulate_t<T>* mean, const accumulate_t<T>* variance,
                      T* output, const BatchNormShape& s, ParallelFor threads) {
  const bool streams = streams_runs(output, s, s.pixels);
  parallel_for(threads, s.batch * s.channels, [&](int64_t begin, int64_t end) {
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t c = k % s.channels, plane = k * s.pixels;
        normalize_run<activation>(norm_of<T>(channel_of(norm, mean[c], variance[c], c)), norm.input + plane,
                                  at(norm.residual, plane), output + plane, s.pixels, streams);
      }
    });
    if (streams) stream_fence();
  });
}

// Whether the residual's gradient is g itself, not rounded: then it need not be computed again.
template <typename T>
bool keeps_grad(const T* grad_residual) {
  return grad_residual && std::is_same_v<T, accumulate_t<T>>;
}

template <typename T>
void grad_contiguous(const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                     const accumulate_t<T>* variance, T* grad_input, T* grad_residual,
                     accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias, const BatchNormShape& s,
                     ParallelFor threads) {
  using A = accumulate_t<T>;
  constexpr int64_t most = block_bytes / int64_t(sizeof(T));
  const bool streams = streams_runs(grad_input, s, s.pixels);
  parallel_for(threads, s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const BatchNormChannel<A> channel = channel_of(norm, mean[c], variance[c], c);
      auto same = norm_of<T>(channel);
      with_activation(norm.activation, [&](auto activation) {
        double grads = 0, products = 0;
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t first = 0; first < s.pixels; first += most) {
            const int64_t block = (n * s.channels + c) * s.pixels + first;
            RunSum<A> grad_sum, product_sum;
            for_vectors<A>(std::min(most, s.pixels - first), [&](auto zero, int64_t k, int turn) {
              using V = decltype(zero);
              const V grad = grad_at<activation, V>(same, grad_output + block, norm.input + block,
                                                    at(norm.residual, block), k);
              if (grad_residual) store_as<V>(grad_residual + block + k, grad);
              grad_sum.add(grad, turn);
              product_sum.add(V(grad * (load_as<V>(norm.input + block + k) - channel.mean)), turn);
            });
            grads += grad_sum.total();
            products += product_sum.total();
          }
        const GradSums<T> sums(channel, grads, products, s.count());
        grad_weight[c] = sums.weight;
        grad_bias[c] = sums.bias;
        same.constant.value = sums.constant;
        same.slope.value = sums.slope;
        for (int64_t n = 0; n < s.batch; ++n) {
          const int64_t plane = (n * s.channels + c) * s.pixels;
          if (keeps_grad<T>(grad_residual))
            grad_input_run<Activation::none>(same, grad_residual + plane, norm.input + plane,
                                             static_cast<const T*>(nullptr), grad_input + plane, s.pixels,
                                             streams);
          else
            grad_input_run<activation>(same, grad_output + plane, norm.input + plane,
                                       at(norm.residual, plane), grad_input + plane, s.pixels, streams);
        }
      });
    }
    if (streams) stream_fence();
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
    width_ *= std::max<int64_t>(1, std::min(least_width / width_, s.size() / width_));
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

// Mean and sum of squared distances of each value of a row, over the rows of a slice.
template <typename T>
struct RowMoments {
  std::vector<double> mean, squares;

  void gather(const T* input, const Slice& slice, int64_t block_rows) {
    mean.assign(slice.width, 0);
    squares.assign(slice.width, 0);
    for (int64_t first = 0; first < slice.rows; first += block_rows) {
      const int64_t rows = std::min(block_rows, slice.rows - first);
      const PixelRows<T> block{input + slice.first + first * slice.width, 1, 0, rows, slice.width};
      merge_block(block, slice.width, double(first), mean.data(), squares.data());
    }
  }
};

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
void apply_channels_last(const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                         const accumulate_t<T>* variance, T* output, const BatchNormShape& s,
                         const Slices<T>& slices, ParallelFor threads) {
  using A = accumulate_t<T>;
  const RowNumbers<A> numbers(norm, mean, variance, s.channels, slices.width());
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k)
        for (int64_t row = 0; row < slices[k].rows; ++row) {
          const int64_t first = slices[k].first + row * slices[k].width;
          normalize_run<activation>(numbers.norm(), norm.input + first, at(norm.residual, first),
                                    output + first, slices[k].width,
                                    streams_runs(output, s, slices[k].width));
        }
    });
    stream_fence();
  });
}

template <typename T>
void normalize_channels_last(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                             accumulate_t<T>* variance, const BatchNormShape& s, ParallelFor threads) {
  using A = accumulate_t<T>;
  const Slices<T> slices(s);
  std::vector<RowMoments<T>> moments(slices.count());
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) moments[k].gather(norm.input, slices[k], slices.block_rows());
  });
  for (int64_t c = 0; c < s.channels; ++c) {
    Moments all;
    for (int64_t k = 0; k < slices.count(); ++k)
      slices.for_places(slices[k], c, [&](int64_t place) {
        all.add(double(slices[k].rows), moments[k].mean[place], moments[k].squares[place]);
      });
    mean[c] = A(all.mean);
    variance[c] = A(all.squares / all.count);
  }
  apply_channels_last(norm, mean, variance, output, s, slices, threads);
}

// Sums of g and g * (x - mean) of each value of a row, over the rows of a slice.
template <Activation activation, typename T, typename A = accumulate_t<T>>
void add_grad_sums(const Norm<Each<A>>& numbers, const T* grad_output, const BatchNorm<T>& norm,
                   T* grad_residual, const Slice& slice, int64_t block_rows, double* grad_sums,
                   double* product_sums) {
  for (int64_t first = 0; first < slice.rows; first += block_rows) {
    const int64_t rows = std::min(block_rows, slice.rows - first);
    for_columns<A>(slice.width, [&](auto zero, auto vectors, int64_t k) {
      using V = decltype(zero);
      V mean[vectors], scale[vectors], bias[vectors], grads[vectors] = {}, products[vectors] = {};
      for (int v = 0; v < vectors; ++v) {
        mean[v] = numbers.mean.template at<V>(k + v * width_of<V>);
        scale[v] = numbers.scale.template at<V>(k + v * width_of<V>);
        bias[v] = numbers.bias.template at<V>(k + v * width_of<V>);
      }
      const int64_t start = slice.first + first * slice.width + k;
      const T *input = norm.input + start, *residual = at(norm.residual, start), *grad = grad_output + start;
      T* stored = at(grad_residual, start);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t next = row * slice.width;
        for (int v = 0; v < vectors; ++v) {
          const int64_t place = next + v * width_of<V>;
          const V distance = load_as<V>(input + place) - mean[v];
          V sum = distance * scale[v] + bias[v];
          if (residual) sum += load_as<V>(residual + place);
          const V own = activation_gradient_as<A>(load_as<V>(grad + place), sum, activation);
          if (stored) store_as<V>(stored + place, own);
          grads[v] += own;
          products[v] += own * distance;
        }
      }
      A block_grads[vectors * width_of<V>], block_products[vectors * width_of<V>];
      for (int v = 0; v < vectors; ++v) {
        store_as<V>(block_grads + v * width_of<V>, grads[v]);
        store_as<V>(block_products + v * width_of<V>, products[v]);
      }
      for (int64_t c = 0; c < vectors * width_of<V>; ++c) {
        grad_sums[k + c] += block_grads[c];
        product_sums[k + c] += block_products[c];
      }
    });
  }
}

template <typename T>
void grad_channels_last(const T* grad_output, const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                        const accumulate_t<T>* variance, T* grad_input, T* grad_residual,
                        accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias, const BatchNormShape& s,
                        ParallelFor threads) {
  using A = accumulate_t<T>;
  const Slices<T> slices(s);
  RowNumbers<A> numbers(norm, mean, variance, s.channels, slices.width());
  std::vector<double> grad_sums(slices.count() * slices.width()), product_sums(grad_sums.size());
  parallel_for(threads, slices.count(), [&](int64_t begin, int64_t end) {
    with_activation(norm.activation, [&](auto activation) {
      for (int64_t k = begin; k < end; ++k)
        add_grad_sums<activation>(numbers.norm(), grad_output, norm, grad_residual, slices[k],
                                  slices.block_rows(), grad_sums.data() + k * slices.width(),
                                  product_sums.data() + k * slices.width());
    });
  });
  std::vector<A> constants(s.channels), slopes(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    double grads = 0, products = 0;
    for (int64_t k = 0; k < slices.count(); ++k)
      slices.for_places(slices[k], c, [&](int64_t place) {
        grads += grad_sums[k * slices.width() + place];
        products += product_sums[k * slices.width() + place];
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
          const bool streams = streams_runs(grad_input, s, slices[k].width);
          if (keeps_grad<T>(grad_residual))
            grad_input_run<Activation::none>(numbers.norm(), grad_residual + value, norm.input + value,
                                             static_cast<const T*>(nullptr), grad_input + value,
                                             slices[k].width, streams);
          else
            grad_input_run<activation>(numbers.norm(), grad_output + value, norm.input + value,
                                       at(norm.residual, value), grad_input + value, slices[k].width,
                                       streams);
        }
    });
    stream_fence();
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
void conv_bn_act_vectorized_apply_cpu(const BatchNorm<T>& norm, const accumulate_t<T>* mean,
                                      const accumulate_t<T>* variance, T* output, const BatchNormShape& s,
                                      ParallelFor threads) {
  if (s.channels_last)
    apply_channels_last(norm, mean, variance, output, s, Slices<T>(s), threads);
  else
    apply_contiguous(norm, mean, variance, output, s, threads);
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
  template void conv_bn_act_vectorized_apply_cpu(const BatchNorm<T>&, const accumulate_t<T>*,               \
                                                 const accumulate_t<T>*, T*, const BatchNormShape&,         \
                                                 ParallelFor);                                              \
  template void conv_bn_act_vectorized_grad_normalize_cpu(                                                  \
      const T*, const BatchNorm<T>&, const accumulate_t<T>*, const accumulate_t<T>*, T*, T*,                \
      accumulate_t<T>*, accumulate_t<T>*, const BatchNormShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

// Batch normalisation and activation behind a convolution, as plain as C++ can say it.
//
// Formula: conv_bn_act.h, written out.
// One step: a channel: its mean, its variance, its output; backward its two sums, then the gradient.
// Bytes: an image is read three times and written once; backward, all are read twice.
// Before it: nothing; this is the first step of the ladder.
// Limits: one value at a time, and in channels_last a whole pixel from the last.
#include "conv_bn_act.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

template <typename T>
void conv_bn_act_plain_normalize_cpu(const BatchNorm<T>& norm, T* output, accumulate_t<T>* mean,
                                     accumulate_t<T>* variance, const BatchNormShape& s,
                                     ParallelFor threads) {
  using A = accumulate_t<T>;
  parallel_for(threads, s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double total = 0, squares = 0;
      for (int64_t p = 0; p < s.count(); ++p) total += load(norm.input[s.index(p, c)]);
      const double center = total / double(s.count());
      for (int64_t p = 0; p < s.count(); ++p) {
        const double distance = load(norm.input[s.index(p, c)]) - center;
        squares += distance * distance;
      }
      mean[c] = A(center);
      variance[c] = A(squares / double(s.count()));
      const BatchNormChannel<A> channel = channel_of(norm, mean[c], variance[c], c);
      for (int64_t p = 0; p < s.count(); ++p) {
        const int64_t at = s.index(p, c);
        const A residual = norm.residual ? load(norm.residual[at]) : A(0);
        store(output + at, activate(channel.sum(load(norm.input[at]), residual), norm.activation));
      }
    }
  });
}

template <typename T>
void conv_bn_act_plain_grad_normalize_cpu(const T* grad_output, const BatchNorm<T>& norm,
                                          const accumulate_t<T>* mean, const accumulate_t<T>* variance,
                                          T* grad_input, T* grad_residual, accumulate_t<T>* grad_weight,
                                          accumulate_t<T>* grad_bias, const BatchNormShape& s,
                                          ParallelFor threads) {
  using A = accumulate_t<T>;
  parallel_for(threads, s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const BatchNormChannel<A> channel = channel_of(norm, mean[c], variance[c], c);
      const auto grad_sum = [&](int64_t at) {
        const A residual = norm.residual ? load(norm.residual[at]) : A(0);
        return activation_gradient(A(load(grad_output[at])), channel.sum(load(norm.input[at]), residual),
                                   norm.activation);
      };
      double total = 0, products = 0;
      for (int64_t p = 0; p < s.count(); ++p) {
        const int64_t at = s.index(p, c);
        const A grad = grad_sum(at);
        total += grad;
        products += double(grad) * channel.normal(load(norm.input[at]));
        if (grad_residual) store(grad_residual + at, grad);
      }
      grad_bias[c] = A(total);
      grad_weight[c] = A(products);
      const A mean_grad = A(total / double(s.count())), slope = A(products / double(s.count()));
      for (int64_t p = 0; p < s.count(); ++p) {
        const int64_t at = s.index(p, c);
        const A rest = grad_sum(at) - mean_grad - channel.normal(load(norm.input[at])) * slope;
        store(grad_input + at, channel.weight * channel.inverse * rest);
      }
    }
  });
}

#define FASTCONV_INSTANTIATE(T)                                                                              \
  template void conv_bn_act_plain_normalize_cpu(const BatchNorm<T>&, T*, accumulate_t<T>*, accumulate_t<T>*, \
                                                const BatchNormShape&, ParallelFor);                         \
  template void conv_bn_act_plain_grad_normalize_cpu(const T*, const BatchNorm<T>&, const accumulate_t<T>*,  \
                                                     const accumulate_t<T>*, T*, T*, accumulate_t<T>*,       \
                                                     accumulate_t<T>*, const BatchNormShape&, ParallelFor);
FASTCONV_EACH_TYPE(FASTCONV_INSTANTIATE)

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

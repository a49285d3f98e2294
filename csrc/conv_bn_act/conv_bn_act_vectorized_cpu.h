// Runs of values that are normalised alike; see conv_bn_act_vectorized_cpu.cpp.
#pragma once

#include "../common/simd.h"
#include "conv_bn_act.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

// Every loop is written once for V = Vector<A>, and V = A, for what is left of a run.
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
template <typename A, typename V>
inline V activate_as(V x, Activation activation) {
  if constexpr (width_of<V> == 1)
    return activate(x, activation);
  else
    return activate_vector<A>(x, activation);
}
template <typename A, typename V>
inline V activation_gradient_as(V grad, V x, Activation activation) {
  if constexpr (width_of<V> == 1)
    return activation_gradient(grad, x, activation);
  else
    return activation_gradient_vector<A>(grad, x, activation);
}
template <typename V>
inline double total_of(V values) {
  if constexpr (width_of<V> == 1) return values;
  double total = 0;
  if constexpr (width_of<V> > 1)
    for (int64_t lane = 0; lane < width_of<V>; ++lane) total += values[lane];
  return total;
}

// body(V{}, begin, end): the whole vectors of a run, then the rest one by one.
template <typename A, typename Body>
inline __attribute__((always_inline)) void in_vectors(int64_t count, const Body& body) {
  const int64_t whole = count / lanes_of<A> * lanes_of<A>;
  body(Vector<A>{}, int64_t(0), whole);
  body(A{}, whole, count);
}

// body(constant): the activation as a constant, so that no loop asks for it.
template <typename Body>
inline void with_activation(Activation activation, const Body& body) {
  with_constant<0, int(Activation::silu)>(int(activation), [&](auto value) {
    body(std::integral_constant<Activation, Activation(decltype(value)::value)>{});
  });
}

// A number of each value of a run: the same for all, or its own.
template <typename A>
struct Same {
  A value;
  template <typename V>
  V at(int64_t) const {
    return V{} + value;
  }
};
template <typename A>
struct Each {
  const A* values;
  template <typename V>
  V at(int64_t k) const {
    return load_as<V>(values + k);
  }
};

// What turns a run of inputs into outputs and gradients; F: Same or Each.
template <typename F>
struct Norm {
  F mean, scale, bias;  // sum = (x - mean) * scale + bias + residual
  F constant, slope;    // grad_input = g * scale + constant + (x - mean) * slope
};

template <typename V, typename T, typename F>
inline __attribute__((always_inline)) V sum_at(const Norm<F>& norm, const T* input, const T* residual,
                                               int64_t k) {
  const V sum = (load_as<V>(input + k) - norm.mean.template at<V>(k)) * norm.scale.template at<V>(k) +
                norm.bias.template at<V>(k);
  return residual ? sum + load_as<V>(residual + k) : sum;
}

template <Activation activation, typename T, typename F>
void normalize_run(const Norm<F>& norm, const T* input, const T* residual, T* output, int64_t count) {
  using A = accumulate_t<T>;
  in_vectors<A>(count, [&](auto zero, int64_t begin, int64_t end) {
    using V = decltype(zero);
    for (int64_t k = begin; k < end; k += width_of<V>)
      store_as<V>(output + k, activate_as<A>(sum_at<V>(norm, input, residual, k), activation));
  });
}

// add(V{}, k, g, g * (x - mean)) for each vector of a run; stores g where there is a place for it.
template <Activation activation, typename T, typename F, typename Add>
inline __attribute__((always_inline)) void grad_sums_run(const Norm<F>& norm, const T* grad_output,
                                                         const T* input, const T* residual, T* grad_residual,
                                                         int64_t count, const Add& add) {
  using A = accumulate_t<T>;
  in_vectors<A>(count, [&](auto zero, int64_t begin, int64_t end) {
    using V = decltype(zero);
    for (int64_t k = begin; k < end; k += width_of<V>) {
      const V sum = sum_at<V>(norm, input, residual, k);
      const V grad = activation_gradient_as<A>(load_as<V>(grad_output + k), sum, activation);
      if (grad_residual) store_as<V>(grad_residual + k, grad);
      add(zero, k, grad, V(grad * (load_as<V>(input + k) - norm.mean.template at<V>(k))));
    }
  });
}

template <Activation activation, typename T, typename F>
void grad_input_run(const Norm<F>& norm, const T* grad_output, const T* input, const T* residual,
                    T* grad_input, int64_t count) {
  using A = accumulate_t<T>;
  in_vectors<A>(count, [&](auto zero, int64_t begin, int64_t end) {
    using V = decltype(zero);
    for (int64_t k = begin; k < end; k += width_of<V>) {
      const V sum = sum_at<V>(norm, input, residual, k);
      const V grad = activation_gradient_as<A>(load_as<V>(grad_output + k), sum, activation);
      const V distance = load_as<V>(input + k) - norm.mean.template at<V>(k);
      store_as<V>(grad_input + k, V(grad * norm.scale.template at<V>(k) + norm.constant.template at<V>(k) +
                                    distance * norm.slope.template at<V>(k)));
    }
  });
}

// Count, mean and sum of squared distances from the mean, of values that come block by block.
//
// Formula: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
//   1979.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double more, double its_mean, double its_squares) {
    if (more == 0) return;
    const double distance = its_mean - mean, part = more / (count + more);
    mean += distance * part;
    squares += its_squares + distance * distance * count * part;
    count += more;
  }
};

// The gradient's constants of a channel, from the sums of g and of g * (x - mean).
template <typename T>
struct GradSums {
  using A = accumulate_t<T>;
  A weight, bias;  // gradients of these

  A constant, slope;

  GradSums(const BatchNormChannel<A>& channel, double grads, double products, int64_t count)
      : weight(A(products * channel.inverse)), bias(A(grads)) {
    const double scale = double(channel.weight) * channel.inverse, inverse = channel.inverse;
    constant = A(-scale * grads / double(count));
    slope = A(-scale * inverse * inverse * products / double(count));
  }
};

}  // namespace fastconv::FASTCONV_CPU_CAPABILITY

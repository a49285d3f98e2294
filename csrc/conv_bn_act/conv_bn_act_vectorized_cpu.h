// Runs of values that are normalised alike; see conv_bn_act_vectorized_cpu.cpp.
#pragma once

#include "../common/moments.h"
#include "../common/tile.h"
#include "conv_bn_act.h"

namespace fastconv::FASTCONV_CPU_CAPABILITY {

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

constexpr int turns = 4;

// Sums of a run, one for each turn, and of the values that are left.
template <typename A>
struct RunSum {
  Vector<A> of_turn[turns] = {};
  A rest = 0;

  inline __attribute__((always_inline)) void add(Vector<A> values, int turn) { of_turn[turn] += values; }
  inline __attribute__((always_inline)) void add(A value, int) { rest += value; }
  double total() const {
    const Vector<A> all = (of_turn[0] + of_turn[1]) + (of_turn[2] + of_turn[3]);
    double sum = rest;
    for (int64_t lane = 0; lane < lanes_of<A>; ++lane) sum += all[lane];
    return sum;
  }
};

// body(V{}, k, turn) for each vector of a run, and then for each value that is left. Turns count from 0 to 3:
// sums that wait for none but their own turn's last.
template <typename A, typename Body>
inline __attribute__((always_inline)) void for_vectors(int64_t count, const Body& body) {
  constexpr int64_t L = lanes_of<A>;
  int64_t k = 0;
  for (; k + turns * L <= count; k += turns * L)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn) body(Vector<A>{}, k + turn * L, turn);
  for (; k + L <= count; k += L) body(Vector<A>{}, k, 0);
  for (; k < count; ++k) body(A{}, k, 0);
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
    return value - V{};  // not value + 0, which would lose the sign of -0
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

// g, the gradient of the sum.
template <Activation activation, typename V, typename T, typename F>
inline __attribute__((always_inline)) V grad_at(const Norm<F>& norm, const T* grad_output, const T* input,
                                                const T* residual, int64_t k) {
  const V sum = sum_at<V>(norm, input, residual, k);
  return activation_gradient_as<accumulate_t<T>>(load_as<V>(grad_output + k), sum, activation);
}

// Stores values, past the caches if so asked; those that are no vector of a whole line go the usual way.
template <typename V, typename T>
inline __attribute__((always_inline)) void store_as(T* target, V value, bool past_caches) {
  if constexpr (std::is_same_v<T, float> && width_of<V> > 1)
    if (past_caches) return stream_vector(target, value);
  store_as<V>(target, value);
}

template <Activation activation, typename T, typename F>
void normalize_run(Norm<F> norm, const T* input, const T* residual, T* output, int64_t count,
                   bool past_caches) {
  using A = accumulate_t<T>;
  for_vectors<A>(count, [&](auto zero, int64_t k, int) {
    using V = decltype(zero);
    store_as<V>(output + k, activate_as<A>(sum_at<V>(norm, input, residual, k), activation), past_caches);
  });
}

template <Activation activation, typename T, typename F>
void grad_input_run(Norm<F> norm, const T* grad_output, const T* input, const T* residual, T* grad_input,
                    int64_t count, bool past_caches) {
  using A = accumulate_t<T>;
  for_vectors<A>(count, [&](auto zero, int64_t k, int) {
    using V = decltype(zero);
    const V grad = grad_at<activation, V>(norm, grad_output, input, residual, k);
    const V distance = load_as<V>(input + k) - norm.mean.template at<V>(k);
    store_as<V>(grad_input + k,
                V(grad * norm.scale.template at<V>(k) + norm.constant.template at<V>(k) +
                  distance * norm.slope.template at<V>(k)),
                past_caches);
  });
}

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

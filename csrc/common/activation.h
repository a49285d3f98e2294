// The activations that every convolution can apply to its sum before it stores it.
#pragma once

#include <cmath>

#include "types.h"

namespace fastconv {

enum class Activation { none, relu, relu6, gelu, gelu_tanh, silu };

template <typename A>  // A: float or double
inline FASTCONV_HOST_DEVICE A activate(A x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < A(0) ? A(0) : x;  // this order of comparison lets NaN through
    case Activation::relu6:
      return x < A(0) ? A(0) : (x > A(6) ? A(6) : x);
    case Activation::gelu:
      return A(0.5) * x * (A(1) + erf(x * A(0.70710678118654752440)));
    case Activation::gelu_tanh:
      return A(0.5) * x * (A(1) + tanh(A(0.79788456080286535588) * (x + A(0.044715) * x * x * x)));
    case Activation::silu:
      return x / (A(1) + exp(-x));
  }
  return x;
}

// grad * activation'(x), as PyTorch has it: 0 at the kinks, and where the slope is 0 whatever grad is.
template <typename A>
inline FASTCONV_HOST_DEVICE A activation_gradient(A grad, A x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return grad;
    case Activation::relu:
      return x <= A(0) ? A(0) : grad;
    case Activation::relu6:
      return x <= A(0) || x >= A(6) ? A(0) : grad;
    case Activation::gelu: {
      const A density = A(0.39894228040143267794) * exp(A(-0.5) * x * x);
      return grad * (A(0.5) * (A(1) + erf(x * A(0.70710678118654752440))) + x * density);
    }
    case Activation::gelu_tanh: {
      const A slope = A(0.79788456080286535588) * (A(1) + A(0.134145) * x * x);
      const A t = tanh(A(0.79788456080286535588) * (x + A(0.044715) * x * x * x));
      return grad * A(0.5) * (A(1) + t + x * (A(1) - t * t) * slope);
    }
    case Activation::silu: {
      const A gate = A(1) / (A(1) + exp(-x));
      return grad * gate * (A(1) + x * (A(1) - gate));
    }
  }
  return grad;
}

}  // namespace fastconv

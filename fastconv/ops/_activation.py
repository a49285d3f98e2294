"""The activations that a convolution applies to its sum, and their derivatives.

``gelu`` is ``x * Phi(x)``, ``gelu_tanh`` its tanh form, ``silu`` is ``x * sigmoid(x)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._operator import PLAIN, is_recorded

ACTIVATIONS = (None, "relu", "relu6", "gelu", "gelu_tanh", "silu")
# Their derivative can be read off the output; the others need the sum before the activation.
FROM_OUTPUT = ("relu", "relu6")


def check_activation(activation: str | None, name: str = "activation") -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {ACTIVATIONS}, got {activation!r}")


def activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation, by PyTorch's own operators."""
    functional = torch.nn.functional
    if activation is None:
        return x
    if activation == "relu":
        return functional.relu(x)
    if activation == "relu6":
        return functional.relu6(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return functional.silu(x)


def add_and_activate(
    output: torch.Tensor, residual: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """``activate(output + residual)``; in the memory of ``output``, unless others may look at it."""
    recorded = is_recorded() or torch._C._len_torch_function_stack()
    if recorded or any(type(t) not in (*PLAIN, type(None)) for t in (output, residual)):
        return activate(output if residual is None else output + residual, activation)
    if residual is not None:
        output.add_(residual)
    if activation == "relu":
        return torch.relu_(output)
    if activation == "relu6":
        return torch.nn.functional.relu6(output, inplace=True)
    return activate(output, activation)


def activation_backward(grad: torch.Tensor, x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Gradient with respect to the sum ``x``; for ``FROM_OUTPUT``, ``x`` may be the output instead."""
    aten = torch.ops.aten
    if activation is None:
        return grad
    if activation == "relu":
        return aten.threshold_backward(grad, x, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(grad, x, 0.0, 6.0)
    if activation == "silu":
        if not torch.is_grad_enabled():
            return aten.silu_backward(grad, x)
        gate = torch.sigmoid(x)  # silu_backward itself has no derivative
        return grad * gate * (1 + x * (1 - gate))
    return aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def saved_for_sum(activation: str | None, output: torch.Tensor, *terms: torch.Tensor | None) -> tuple:
    """What the gradient of the sum needs beside the operands: the output, or terms of the sum, or neither."""
    if activation is None or activation in FROM_OUTPUT:
        return None if activation is None else output, *[None] * len(terms)
    return None, *terms


def grad_of_sum(
    grad: torch.Tensor,
    output: torch.Tensor | None,
    activation: str | None,
    compute: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Gradient of the sum before the activation. It is as large as the output, and cheap to compute again.

    So no operator keeps it; ``compute()`` gives it where it is needed.
    """
    if activation is None:
        return grad
    return activation_backward(grad, compute() if output is None else output, activation)

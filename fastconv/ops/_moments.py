"""Convolutions whose C++ kernels gather mean and variance of each channel of what they store.

They take channels_last images of float32 or float64, and have no other backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from . import _conv2d_choice, conv2d, depthwise_conv2d
from ._arguments import integer, padding_sides, pair
from ._operator import Operator, map_one_by_one, memory_format_of, new_output

ALGORITHMS = ("direct", "winograd_f2", "winograd_f4", "winograd_f6")  # of conv2d


def convolve(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: torch.Tensor | None,  # (M,)
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The convolution and ``(M,)`` means and variances; None where no kernel gathers them, or it is slower.

    Raises as :func:`fastconv.conv2d` does.
    """
    if (
        input.dtype not in (torch.float32, torch.float64)
        or memory_format_of(input) != torch.channels_last
        or input.numel() == 0
    ):
        return None
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    groups = integer("groups", groups)
    if groups == input.shape[1] > 1 and weight.shape[1] == 1:
        depthwise_conv2d.check(input, weight, bias, stride, padding, dilation, None)
        return depthwise_operator("cpu", input, weight, bias, stride, padding, dilation)
    geometry = (stride, padding, dilation, groups)
    conv2d.check(input, weight, bias, None, *geometry, None)
    found = _algorithms(input, weight, geometry, backend or backends._state.backend)
    return None if found is None else dense_operator("cpu", input, weight, bias, *geometry, *found)


def _algorithms(input, weight, geometry, backend) -> tuple[str, str | None] | None:
    """Those of conv2d for the convolution and for its gradients, None for PyTorch's."""
    stride, (top, bottom, left, right), _, groups = geometry
    algorithm = _conv2d_choice.cpu_algorithm(input, weight, *geometry)
    if algorithm is None and backend is None and top == bottom and left == right and groups == 1:
        wins = True
        return ("direct", None) if wins else None
    algorithm = algorithm or _conv2d_choice.default_for(stride)
    return (algorithm, algorithm) if algorithm in ALGORITHMS else None


def _fake_moments(input, shape):
    return new_output(input, shape), input.new_empty(shape[1]), input.new_empty(shape[1])


# Dense or grouped. `gradients`: conv2d's algorithm for these, or None for PyTorch's own.


def _dense_fake(input, weight, bias, stride, padding, dilation, groups, algorithm, gradients):
    height, width = conv2d.check(input, weight, bias, None, stride, padding, dilation, groups, None)
    return _fake_moments(input, (input.shape[0], weight.shape[0], height, width))


def _dense_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, *ctx.geometry, _, ctx.gradients = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight)


def _dense_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    input, weight = ctx.saved_tensors
    need = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    if ctx.gradients is None:
        stride, (top, _, left, _), dilation, groups = ctx.geometry
        sizes = [weight.shape[0]] if ctx.has_bias else None
        grads = torch.ops.aten.convolution_backward(
            grad, input, weight, sizes, stride, (top, left), dilation, False, (0, 0), groups, need
        )
    else:
        grads = conv2d.gradients("cpu", grad, input, weight, ctx.geometry, ctx.gradients, need)
    return *grads, *[None] * 6


dense_operator = Operator(
    "conv2d_moments",
    "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
    "SymInt groups, str algorithm, str? gradients) -> (Tensor, Tensor, Tensor)",
    fake=_dense_fake,
    setup_context=_dense_setup_context,
    backward=_dense_backward,
    vmap=map_one_by_one,
    flops=lambda input, weight, *_, out_shape: conv2d.flops(input, weight, out_shape=out_shape[0]),
    autocast=None,
)


# Depthwise.


def _depthwise_fake(input, weight, bias, stride, padding, dilation):
    height, width = depthwise_conv2d.check(input, weight, bias, stride, padding, dilation, None)
    return _fake_moments(input, (input.shape[0], weight.shape[0], height, width))


def _depthwise_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, *ctx.geometry = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight)


def _depthwise_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    input, weight = ctx.saved_tensors
    need = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    grads = depthwise_conv2d.backward_operator("cpu", grad, input, weight, *ctx.geometry, None, *need)
    return *(g if n else None for g, n in zip(grads, need)), *[None] * 3


depthwise_operator = Operator(
    "depthwise_conv2d_moments",
    "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_depthwise_fake,
    setup_context=_depthwise_setup_context,
    backward=_depthwise_backward,
    vmap=map_one_by_one,
    flops=lambda input, weight, *_, out_shape: depthwise_conv2d.flops(input, weight, out_shape=out_shape[0]),
    autocast=None,
)

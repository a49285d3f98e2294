"""Convolutions whose kernels gather mean and variance of each channel of what they store.

Triton's take what the convolution takes; C++ channels_last images of float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from . import _conv2d_choice, conv2d, depthwise_conv2d
from ._arguments import integer, padding_sides, pair
from ._convolution import check_operands
from ._operator import Operator, map_one_by_one, memory_format_of, new_output, sum_type

BACKENDS = ("cpu", "triton")
ALGORITHMS = ("direct", "winograd_f2", "winograd_f4", "winograd_f6")  # of conv2d
_LEAST = 1 << 27  # multiply-adds


def convolve(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: torch.Tensor | None,  # (M,)
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    backend: str | None,  # as it was asked for
    chosen: str,  # conv_bn_act's, for this call; one of BACKENDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The convolution and ``(M,)`` means and variances; None where no kernel gathers them, or it is slower.

    Raises as :func:`fastconv.conv2d` does.
    """
    if input.numel() == 0 or (
        chosen == "cpu"
        and (
            input.dtype not in (torch.float32, torch.float64)
            or memory_format_of(input) != torch.channels_last
        )
    ):
        return None
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    groups = integer("groups", groups)
    if groups == input.shape[1] > 1 and weight.shape[1] == 1:
        depthwise_conv2d.check(input, weight, bias, stride, padding, dilation, None)
        if depthwise_conv2d.choose(backend, None, input, weight, stride, dilation) != chosen:
            return None
        return depthwise_operator(chosen, input, weight, bias, stride, padding, dilation)
    geometry = (stride, padding, dilation, groups)
    conv2d.check(input, weight, bias, None, *geometry, None)
    algorithm = "implicit_gemm"
    if chosen == "cpu":
        algorithm = _algorithm(input, weight, geometry, backend or backends._state.backend)
        if algorithm is None:
            return None
    elif conv2d.choose(backend, None, input, weight, *geometry) != chosen:
        return None
    return dense_operator(chosen, input, weight, bias, *geometry, algorithm)


def _algorithm(input, weight, geometry, backend) -> str | None:
    """The C++ kernel of the convolution and of its gradients; None where there is none that gathers."""
    algorithm = _conv2d_choice.cpu_algorithm(input, weight, *geometry)
    if algorithm is None and (backend == "cpu" or _gathering_pays(input, weight, geometry)):
        algorithm = _conv2d_choice.default_for(geometry[0])
    return algorithm if algorithm in ALGORITHMS else None


def _gathering_pays(input, weight, geometry) -> bool:
    """Whether the pass that is saved is worth a convolution that is no faster than PyTorch's."""
    (high, wide), *_, groups = geometry
    filters, channels, *taps = weight.shape
    terms = channels * taps[0] * taps[1]
    pixels = input.shape[0] * (input.shape[2] // high) * (input.shape[3] // wide)
    enough = filters >= 64 and terms >= 64 and pixels * filters * terms >= _LEAST
    if channels < 16 and input.requires_grad:  # a gradient that PyTorch is faster at, and few stems need
        return False
    return groups == 1 and weight.dtype == torch.float32 and enough and _conv2d_choice.WIDE_VECTORS


def _fake_moments(input, shape):
    numbers = (input.new_empty(shape[1], dtype=sum_type(input.dtype)) for _ in range(2))
    return new_output(input, shape), *numbers


def _check_not_empty(input) -> None:
    if input.numel() == 0:
        raise ValueError(f"input must not be empty: no values have no mean, got shape {tuple(input.shape)}")


# Dense or grouped.


def _dense_fake(input, weight, bias, stride, padding, dilation, groups, algorithm):
    height, width = conv2d.check(input, weight, bias, None, stride, padding, dilation, groups, None)
    return _fake_moments(input, (input.shape[0], weight.shape[0], height, width))


def _check_dense(input, weight, bias, stride, padding, dilation, groups, algorithm) -> None:
    check_operands(input, weight, stride, padding, dilation, groups, sides=4)
    _conv2d_choice.choose.check_algorithm("triton", algorithm)
    conv2d.check(input, weight, bias, None, stride, padding, dilation, groups, None)
    _check_not_empty(input)


def _dense_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, *ctx.geometry, ctx.algorithm = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight)


def _dense_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    input, weight = ctx.saved_tensors
    need = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    grads = conv2d.gradients(ctx.backend, grad, input, weight, ctx.geometry, ctx.algorithm, need)
    return *grads, *[None] * 5


dense_operator = Operator(
    "conv2d_moments",
    "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
    "SymInt groups, str algorithm) -> (Tensor, Tensor, Tensor)",
    fake=_dense_fake,
    setup_context=_dense_setup_context,
    backward=_dense_backward,
    vmap=map_one_by_one,
    flops=lambda input, weight, *_, out_shape: conv2d.flops(input, weight, out_shape=out_shape[0]),
    check=_check_dense,
    triton="conv2d:conv2d_moments_triton",
    autocast=None,
)


# Depthwise.


def _depthwise_fake(input, weight, bias, stride, padding, dilation):
    height, width = depthwise_conv2d.check(input, weight, bias, stride, padding, dilation, None)
    return _fake_moments(input, (input.shape[0], weight.shape[0], height, width))


def _check_depthwise(input, weight, bias, stride, padding, dilation) -> None:
    check_operands(input, weight, stride, padding, dilation, 1, sides=4)
    depthwise_conv2d.check(input, weight, bias, stride, padding, dilation, None)
    _check_not_empty(input)


def _depthwise_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, bias, *ctx.geometry = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight)


def _depthwise_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    input, weight = ctx.saved_tensors
    need = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    grads = depthwise_conv2d.backward_operator(ctx.backend, grad, input, weight, *ctx.geometry, None, *need)
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
    check=_check_depthwise,
    triton="depthwise_conv2d:depthwise_conv2d_moments_triton",
    autocast=None,
)

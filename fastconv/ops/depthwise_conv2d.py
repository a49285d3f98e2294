"""Depthwise convolution: one filter for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from ._activation import activate, add_and_activate, check_activation, grad_of_sum, saved_for_sum
from ._arguments import check_integers, check_tensor, output_size, padding_sides, pair
from ._convolution import check_grad_output, double_backward, new_gradients, unfold_gradients
from ._operator import (
    Operator,
    as_memory_format,
    autocast,
    fold_into,
    fold_into_batch,
    is_autocast,
    memory_format_of,
    new_output,
)


def depthwise_conv2d_reference(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (O, 1, KH, KW), O a multiple of C
    bias: torch.Tensor | None = None,  # (O,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """The definition: one shifted, scaled copy of the padded input for each tap, added up."""
    (sh, sw), (dh, dw), (kh, kw) = pair("stride", stride), pair("dilation", dilation), weight.shape[2:]
    top, bottom, left, right = padding_sides(padding, (kh, kw), (sh, sw), (dh, dw))
    out_height = output_size(input.shape[2], kh, sh, top + bottom, dh)
    out_width = output_size(input.shape[3], kw, sw, left + right, dw, "width")
    multiplier = weight.shape[0] // max(input.shape[1], 1)
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    padded = padded.repeat_interleave(multiplier, dim=1)
    output = input.new_zeros(input.shape[0], weight.shape[0], out_height, out_width)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (out_height - 1) + 1, sh)
            columns = slice(j * dw, j * dw + sw * (out_width - 1) + 1, sw)
            output = output + padded[:, :, rows, columns] * weight[:, 0, i, j, None, None]
    if bias is not None:
        output = output + bias[:, None, None]
    return activate(output, activation)


def depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Depthwise 2-D convolution: one filter, or ``m`` filters, for each channel.

    ``y[n,o,e,f] = act(b[o] + sum_ij x[n, o//m, e*s + i*d - p, f*s + j*d - p] * w[o,0,i,j])``.

    The same as ``torch.nn.functional.conv2d(..., groups=C)``, with an activation folded in, and
    differentiable twice.
    The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        weight: ``(O, 1, KH, KW)``, ``O = m * C`` for a channel multiplier ``m``.
        bias: ``(O,)`` or None.
        stride: pixels between outputs, an integer or ``(height, width)``.
        padding: zeros on each side, an integer, ``(height, width)``, ``"valid"`` or ``"same"``.
        dilation: pixels between taps.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend: ``"vectorized"``, ``"row_blocked"``, ``"plain"`` on the CPU;
            ``"tiled"``, ``"plain"`` in CUDA and Triton.

    Returns:
        ``(N, O, E, F)``, ``E = floor((H + padding - dilation*(KH-1) - 1) / stride) + 1``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Howard et al., "MobileNets", 2017, arXiv:1704.04861.
    """
    check_tensor("input", input, rank=4)
    if is_autocast(input):
        input, weight, bias = autocast(input.device.type, (input, weight, bias))
    plan = make_plan(input, weight, bias, stride, padding, dilation, activation, backend, algorithm)
    return run_plan(plan, input, weight, bias, activation)


def make_plan(
    input, weight, bias, stride, padding, dilation, activation, backend=None, algorithm=None
) -> tuple[str, str | None, tuple]:
    """Checks a call; returns the backend, the algorithm and the geometry in its normal form."""
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    check_tensor("weight", weight, rank=4, like=input)
    padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    check(input, weight, bias, stride, padding, dilation, activation)
    return choose(backend, algorithm, input, weight, stride, dilation), algorithm, (stride, padding, dilation)


def run_plan(plan, input, weight, bias, activation) -> torch.Tensor:
    """What :func:`make_plan` has checked."""
    backend, algorithm, geometry = plan
    stride, padding, dilation = geometry
    arguments = (input, weight, bias, *geometry)
    if backend == "aten":
        return _aten(*arguments, activation)
    if backend == "reference":
        top, bottom, left, right = padding
        padded = torch.nn.functional.pad(input, (left, right, top, bottom))
        output = depthwise_conv2d_reference(padded, weight, bias, stride, 0, dilation, activation=activation)
        return as_memory_format(output, memory_format_of(input))
    return forward_operator(backend, *arguments, activation, algorithm)


def check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str | None,
) -> tuple[int, int]:
    """Raises on arguments that do not fit together; returns the output's height and width."""
    channels, (filters, per_group, *kernel) = input.shape[1], weight.shape
    if per_group != 1 or (filters % channels if channels else filters):
        raise ValueError(
            f"weight must have shape (m * {channels}, 1, KH, KW) for an input of {channels} channels, "
            f"got {tuple(weight.shape)}"
        )
    if kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"weight must have at least one tap, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, rank=1, like=input)
        if bias.shape[0] != filters:
            raise ValueError(f"bias must have shape ({filters},), got {tuple(bias.shape)}")
    check_activation(activation)
    top, bottom, left, right = padding
    return (
        output_size(input.shape[2], kernel[0], stride[0], top + bottom, dilation[0]),
        output_size(input.shape[3], kernel[1], stride[1], left + right, dilation[1], "width"),
    )


def _aten(input, weight, bias, stride, padding, dilation, activation):
    top, bottom, left, right = padding
    if top != bottom or left != right:
        input = torch.nn.functional.pad(input, (0, right - left, 0, bottom - top))
    output = torch.nn.functional.conv2d(
        input, weight, bias, stride, (top, left), dilation, groups=input.shape[1]
    )
    return add_and_activate(output, None, activation)


def _why_not(backend, algorithm, input, *_) -> str | None:
    if backend == "aten" and input.shape[1] == 0:
        return "PyTorch's convolution needs at least one channel"
    return None


choose = Choice(
    "depthwise_conv2d",
    algorithms={
        "cpu": ("vectorized", "row_blocked", "plain"),
        "cuda": ("tiled", "plain"),
        "emulator": ("tiled", "plain"),
        "triton": ("tiled", "plain"),
        "aten": (),
        "reference": (),
    },
    why_not=_why_not,
)


# Forward operator: fake, gradient, vmap, FLOPs.


def _fake(input, weight, bias, stride, padding, dilation, activation, algorithm):
    height, width = check(input, weight, bias, stride, padding, dilation, activation)
    return new_output(input, (input.shape[0], weight.shape[0], height, width))


def _check_forward(input, weight, bias, stride, padding, dilation, activation, algorithm) -> tuple[int, int]:
    check_tensor("input", input, rank=4)
    check_tensor("weight", weight, rank=4, like=input)
    check_integers("stride", stride, 2, least=1)
    check_integers("padding", padding, 4, least=0)
    check_integers("dilation", dilation, 2, least=1)
    choose.check_algorithm("triton", algorithm)
    return check(input, weight, bias, stride, padding, dilation, activation)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.activation, ctx.algorithm = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, *saved_for_sum(ctx.activation, output, bias))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, output, bias = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation)
    operands = (input, weight, bias, *geometry, None, ctx.algorithm)
    grad = grad_of_sum(grad, output, ctx.activation, lambda: forward_operator(ctx.backend, *operands))
    need = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    grads = backward_operator(ctx.backend, grad, input, weight, *geometry, ctx.algorithm, *need)
    return *(g if n else None for g, n in zip(grads, need)), *[None] * 5


def _vmap(op, info, in_dims, input, weight, bias, *rest):
    # A mapped weight makes more channels, an unmapped one only more images.
    if in_dims[1] is None and (bias is None or in_dims[2] is None):
        return fold_into_batch(op, info, in_dims, input, weight, bias, *rest)
    count = info.batch_size
    input = fold_into(1, input, in_dims[0], count)
    weight = fold_into(0, weight, in_dims[1], count)
    bias = None if bias is None else fold_into(0, bias, in_dims[2], count)
    return op(input, weight, bias, *rest).unflatten(1, (count, -1)), 1


def flops(input, weight, *_, out_shape):
    return 2 * out_shape[0] * out_shape[1] * out_shape[2] * out_shape[3] * weight[2] * weight[3]


forward_operator = Operator(
    "depthwise_conv2d",
    "(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str? activation, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    flops=flops,
    check=_check_forward,
    triton="depthwise_conv2d:depthwise_conv2d_forward_triton",
)


# Backward operator. Gradients that are not needed are empty tensors of size 0.


def _backward_fake(
    grad_output, input, weight, stride, padding, dilation, algorithm, need_input, need_weight, need_bias
):
    return new_gradients(input, weight, (need_input, need_weight, need_bias))


def _check_backward(grad_output, input, weight, stride, padding, dilation, algorithm, *_) -> None:
    size = _check_forward(input, weight, None, stride, padding, dilation, None, algorithm)
    check_grad_output(grad_output, input, (input.shape[0], weight.shape[0], *size))


def _backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_output, input, weight, *ctx.geometry, ctx.algorithm, _, _, _ = inputs
    ctx.need = inputs[7:]
    ctx.save_for_backward(grad_output, input, weight)


def _backward_backward(ctx: Any, *grad_grads: torch.Tensor) -> tuple:
    grad_output = ctx.saved_tensors[0]
    geometry, algorithm = ctx.geometry, ctx.algorithm

    def convolve(x, w):
        return forward_operator(ctx.backend, x, w, None, *geometry, None, algorithm)

    def transpose(x, w, need):
        return backward_operator(
            ctx.backend, grad_output, x, w, *geometry, algorithm, need == "input", need == "weight", False
        )

    return *double_backward(ctx, grad_grads, convolve, transpose), *[None] * 7


def _backward_vmap(op, info, in_dims, grad_output, input, weight, *rest):
    count = info.batch_size
    grads = op(
        fold_into(1, grad_output, in_dims[0], count),
        fold_into(1, input, in_dims[1], count),
        fold_into(0, weight, in_dims[2], count),
        *rest,
    )
    return unfold_gradients(grads, rest[-3:], count)


def _backward_flops(grad_output, input, weight, *rest, out_shape):
    taps = weight[2] * weight[3]
    passes = sum(bool(need) for need in rest[4:6])
    return 2 * passes * grad_output[0] * grad_output[1] * grad_output[2] * grad_output[3] * taps


backward_operator = Operator(
    "depthwise_conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str? algorithm, bool need_input, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
    flops=_backward_flops,
    check=_check_backward,
    triton="depthwise_conv2d:depthwise_conv2d_backward_triton",
)

DepthwiseConv2dFunction = forward_operator.function()

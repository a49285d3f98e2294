"""Shift and 1x1 convolution in one: each channel is read from where the shift would have moved it from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from . import _convolution, _plans, conv2d, shift2d
from ._activation import grad_of_sum, saved_for_sum
from ._arguments import check_tensor, pair
from ._conv2d_choice import gradients_algorithm
from ._operator import (
    Operator,
    as_memory_format,
    autocast,
    fold_images,
    is_autocast,
    map_one_by_one,
    memory_format_of,
    new_output,
)
from ._packed_weights import packed_weight


def shift_conv2d_reference(
    input: torch.Tensor,  # (N, C, H, W)
    offsets: torch.Tensor,  # (C, 2): rows (dh, dw)
    weight: torch.Tensor,  # (M, C, 1, 1)
    bias: torch.Tensor | None = None,  # (M,)
    stride: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """The definition: y[n, m, e, f] = act(b[m] + sum_c x[n, c, e*s + dh[c], f*s + dw[c]] * w[m, c])."""
    shifted = shift2d.shift2d_reference(input, offsets)
    return conv2d.conv2d_reference(shifted, weight, bias, stride, activation=activation)


def shift_conv2d(
    input: torch.Tensor,
    offsets: torch.Tensor | Sequence[Sequence[int]],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Shift, then 1x1 convolution: a spatial convolution whose window costs nothing.

    ``y[n, m, e, f] = act(b[m] + sum_c x[n, c, e*s + dh[c], f*s + dw[c]] * w[m, c])``, zero outside: the same
    as ``conv2d(shift2d(x, offsets), w, b, s)``. Each channel is read from where the shift would have moved
    it from, so no byte more is read or written than by the 1x1 convolution. Differentiable twice; in the
    gradient the shifts are passes of their own, except of channels_last images on the CPU. The output has the
    memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        offsets: ``(C, 2)`` integers, rows ``(dh, dw)`` in pixels, as in :func:`fastconv.shift2d`.
        weight: ``(M, C, 1, 1)``.
        bias: ``(M,)`` or None.
        stride: pixels between outputs, an integer or ``(height, width)``.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend: ``"direct"``, ``"im2col"``, ``"plain"`` on the
            CPU; ``"implicit_gemm"`` (float16, bfloat16), ``"im2col"``, ``"plain"`` in CUDA;
            ``"pointwise"`` in Triton.

    Returns:
        ``(N, M, E, F)``, ``E = floor((H - 1) / s) + 1``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141.
    """
    offsets = shift2d.as_offsets(offsets)
    tensors = (input, weight, bias, offsets)
    key = _plans.key_of("shift_conv2d", tensors, stride, activation, backend, algorithm)
    plan = _plans.find(key)
    if plan is None:
        check_tensor("input", input, rank=4)
        if is_autocast(input):
            input, weight, bias = autocast(input.device.type, (input, weight, bias))
        stride = pair("stride", stride)
        check_tensor("weight", weight, rank=4, like=input)
        _check(input, offsets, weight, bias, stride, activation)
        backend = choose(backend, algorithm, input, weight, stride)
        if backend == "cpu" and algorithm is None:
            algorithm = default_algorithm(input, weight, stride)
        plan = _plans.keep(key, (backend, algorithm, stride))
    backend, algorithm, stride = plan
    if backend == "reference":
        output = shift_conv2d_reference(input, offsets, weight, bias, stride, activation=activation)
        return as_memory_format(output, memory_format_of(input))
    packed = packed_weight("conv2d", weight, 1, algorithm) if backend == "cpu" else None
    return operator(backend, input, offsets, weight, bias, packed, stride, activation, algorithm)


def default_algorithm(input: torch.Tensor, weight: torch.Tensor, stride: Sequence[int]) -> str:
    """The C++ kernel where a call names none; ``csrc/shift_conv2d/shift_conv2d.cpp`` has its twin."""
    whole_pixels = memory_format_of(input) == torch.channels_last and tuple(stride) == (1, 1)
    return "direct" if whole_pixels else "im2col"


def _why_not(backend, algorithm, input, weight, stride, *_) -> str | None:
    if backend not in ("cuda", "emulator") or algorithm in (None, "plain"):
        return None
    channels, height, width = input.shape[1:]
    if channels > 4096 or max(height, width) > 32767:  # what fits in the parameters of a launch
        return (
            f"algorithm={algorithm!r} takes at most 4096 channels and images of 32767 rows and columns, got "
            f"{channels} channels of {height}x{width}; algorithm='plain' takes any"
        )
    return _convolution.why_not(backend, algorithm, input, weight, *_geometry(stride))


choose = Choice(
    "shift_conv2d",
    algorithms={
        "cpu": ("direct", "im2col", "plain"),
        "cuda": ("implicit_gemm", "im2col", "plain"),
        "emulator": ("implicit_gemm", "im2col", "plain"),
        "triton": ("pointwise",),
        "reference": (),
    },
    why_not=_why_not,
)


def _geometry(stride: Sequence[int]) -> tuple:
    """Of the convolution, as :func:`fastconv.conv2d` has it: stride, padding, dilation, groups."""
    return tuple(stride), (0, 0, 0, 0), (1, 1), 1


def _check(input, offsets, weight, bias, stride, activation) -> tuple[int, int]:
    """Raises on arguments that do not fit together; returns the output's height and width."""
    shift2d.check_offsets(offsets, input.shape[1])
    if weight.shape[2:] != (1, 1):
        raise ValueError(f"weight must have shape (M, {input.shape[1]}, 1, 1), got {tuple(weight.shape)}")
    return conv2d.check(input, weight, bias, None, *_geometry(stride), activation)


def _check_forward(input, offsets, weight, bias, packed, stride, activation, algorithm) -> None:
    _convolution.check_operands(input, weight, *_geometry(stride), sides=4)
    _convolution.check_not_packed(packed)
    shift2d.check_offsets_placed(offsets)
    choose.check_algorithm("triton", algorithm)
    _check(input, offsets, weight, bias, stride, activation)


def _fake(input, offsets, weight, bias, packed, stride, activation, algorithm):
    height, width = _check(input, offsets, weight, bias, stride, activation)
    return new_output(input, (input.shape[0], weight.shape[0], height, width))


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, offsets, weight, bias, _, ctx.stride, ctx.activation, ctx.algorithm = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, offsets, weight, *saved_for_sum(ctx.activation, output, bias))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, offsets, weight, output, bias = ctx.saved_tensors
    operands = (input, offsets, weight, bias, None, ctx.stride, None, ctx.algorithm)
    grad = grad_of_sum(grad, output, ctx.activation, lambda: operator(ctx.backend, *operands))
    need_input, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    needed = (need_input, need_weight, ctx.has_bias and need_bias)
    algorithm = gradients_algorithm(ctx.backend, ctx.algorithm, input, weight, ctx.stride, 1)
    one_value = input.shape[1:].numel() == 1  # of which a dense copy is no longer channels_last
    if algorithm == "direct" and input.device.type == "cpu" and not one_value:  # direct: channels_last
        operands = ("cpu", grad, input, weight, offsets, ctx.stride)
        grads = conv2d.needed_gradients(lambda *flags: backward_operator(*operands, *flags), grad, needed)
        return grads[0], None, *grads[1:], *[None] * 4
    shifted = shift2d.operator(ctx.backend, input, offsets, None) if need_weight else input
    grad_input, grad_weight, grad_bias = conv2d.gradients(
        ctx.backend, grad, shifted, weight, _geometry(ctx.stride), algorithm, needed
    )
    if grad_input is not None:
        grad_input = shift2d.shift_back(ctx.backend, grad_input, offsets, None)
    return grad_input, None, grad_weight, grad_bias, *[None] * 4


def _flops(input, offsets, weight, *_, out_shape):
    return conv2d.flops(input, weight, out_shape=out_shape)


operator = Operator(
    "shift_conv2d",
    "(Tensor input, Tensor offsets, Tensor weight, Tensor? bias, Tensor? packed, SymInt[2] stride, "
    "str? activation, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=fold_images,
    flops=_flops,
    check=_check_forward,
    triton="shift_conv2d:shift_conv2d_forward_triton",
    autocast=_convolution.autocast_but(4),
)


# Backward operator, of channels_last images on the CPU. Gradients that are not needed are empty tensors of
# size 0.


def _backward_fake(grad_output, input, weight, offsets, stride, need_input, need_weight, need_bias):
    return _convolution.new_gradients(input, weight, (need_input, need_weight, need_bias))


def _backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_output, input, weight, offsets, ctx.stride, *ctx.need = inputs
    ctx.save_for_backward(grad_output, input, weight, offsets)


def _backward_backward(ctx: Any, *grad_grads: torch.Tensor) -> tuple:
    grad_output, input, _, offsets = ctx.saved_tensors
    if ctx.need[0]:  # the operator serves this layout alone
        grad_grads = (as_memory_format(grad_grads[0], memory_format_of(input)), *grad_grads[1:])

    def convolve(x, w):
        return operator("cpu", x, offsets, w, None, None, ctx.stride, None, "direct")

    def transpose(x, w, need):
        flags = (need == "input", need == "weight", False)
        return backward_operator("cpu", grad_output, x, w, offsets, ctx.stride, *flags)

    return *_convolution.double_backward(ctx, grad_grads, convolve, transpose), *[None] * 5


def _backward_flops(grad_output, input, weight, offsets, stride, need_input, need_weight, *_, out_shape):
    return (bool(need_input) + bool(need_weight)) * conv2d.flops(input, weight, out_shape=grad_output)


backward_operator = Operator(
    "shift_conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor offsets, SymInt[2] stride, bool need_input, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=map_one_by_one,
    flops=_backward_flops,
)

ShiftConv2dFunction = operator.function()

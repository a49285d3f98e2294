"""Grouped convolution whose outputs are shuffled: a channel's place is chosen where it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from . import _convolution, _plans, channel_shuffle, conv2d
from ._activation import grad_of_sum, saved_for_sum
from ._arguments import check_tensor, integer, padding_sides, pair
from ._conv2d_choice import gradients_algorithm
from ._operator import (
    Operator,
    as_memory_format,
    autocast,
    fold_images,
    is_autocast,
    memory_format_of,
    new_output,
)
from ._packed_weights import packed_weight


def group_conv2d_shuffle_reference(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: torch.Tensor | None = None,  # (M,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """The definition: y[n, k*G + g] = conv2d(x)[n, g*(M/G) + k]."""
    output = conv2d.conv2d_reference(
        input, weight, bias, stride, padding, dilation, groups, activation=activation
    )
    return channel_shuffle.channel_shuffle_reference(output, groups)


def group_conv2d_shuffle(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Grouped 2-D convolution, then channel shuffle by the same groups, which costs nothing here.

    ``y[n, k*G + g] = act(conv2d(x)[n, g*(M/G) + k])``, ``k < M/G``, ``g < G``: the same as
    ``channel_shuffle(conv2d(x, ...), groups)``. Each sum is stored where the shuffle would have moved it, so
    no byte more is read or written than by the convolution. Differentiable twice; the gradient is shuffled
    back in a pass of its own. The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        weight: ``(M, C/G, KH, KW)``.
        bias: ``(M,)``, in the order of the filters, or None.
        stride, padding, dilation: as in :func:`fastconv.conv2d`.
        groups: ``G``, of the convolution and of the shuffle.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: see :mod:`fastconv.backends`; None takes the measured best. ``"aten"`` is PyTorch's
            convolution and then its shuffle.
        algorithm: a kernel of the backend: ``"im2col"``, ``"plain"`` on the CPU; ``"implicit_gemm"``
            (float16, bfloat16), ``"im2col"`` in CUDA; ``"implicit_gemm"``, ``"pointwise"`` (1x1, stride 1, no
            padding) in Triton.

    Returns:
        ``(N, M, E, F)``, of the size that the convolution has.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Zhang et al., "ShuffleNet", 2018, arXiv:1707.01083.
    """
    tensors = (input, weight, bias)
    key = _plans.key_of(
        "group_conv2d_shuffle", tensors, stride, padding, dilation, groups, activation, backend, algorithm
    )
    plan = _plans.find(key)
    if plan is None:
        check_tensor("input", input, rank=4)
        if is_autocast(input):
            input, weight, bias = autocast(input.device.type, tensors)
        stride, dilation = pair("stride", stride), pair("dilation", dilation)
        groups = integer("groups", groups)
        check_tensor("weight", weight, rank=4, like=input)
        padding = padding_sides(padding, weight.shape[2:], stride, dilation)
        geometry = (stride, padding, dilation, groups)
        conv2d.check(input, weight, bias, None, *geometry, activation)
        backend = choose(backend, algorithm, input, weight, *geometry)
        if backend == "cpu" and algorithm is None:
            algorithm = "im2col"
        plan = _plans.keep(key, (backend, algorithm, geometry))
    backend, algorithm, geometry = plan
    if backend == "aten":
        output = conv2d.aten(input, weight, bias, None, *geometry, activation, None)
        return channel_shuffle.channel_shuffle(output, geometry[-1], backend="aten")
    if backend == "reference":
        stride, (top, bottom, left, right), dilation, groups = geometry
        padded = torch.nn.functional.pad(input, (left, right, top, bottom))
        output = group_conv2d_shuffle_reference(
            padded, weight, bias, stride, 0, dilation, groups, activation=activation
        )
        return as_memory_format(output, memory_format_of(input))
    packed = packed_weight("conv2d", weight, geometry[-1], algorithm) if backend == "cpu" else None
    return operator(backend, input, weight, bias, packed, *geometry, activation, algorithm)


def _prefer(input, weight, stride, padding, dilation, groups) -> tuple[str, ...]:
    if input.device.type == "cuda":
        return "aten", "cuda", "triton"  # until ours are measured on a GPU
    return "cpu", "aten"


choose = Choice(
    "group_conv2d_shuffle",
    algorithms={
        "cpu": ("im2col", "plain"),
        "cuda": ("implicit_gemm", "im2col"),
        "emulator": ("implicit_gemm", "im2col"),
        "triton": ("implicit_gemm", "pointwise"),
        "aten": (),
        "reference": (),
    },
    prefer=_prefer,
    why_not=_convolution.why_not,
)


def _fake(input, weight, bias, packed, stride, padding, dilation, groups, activation, algorithm):
    height, width = conv2d.check(input, weight, bias, None, stride, padding, dilation, groups, activation)
    return new_output(input, (input.shape[0], weight.shape[0], height, width))


def _check(input, weight, bias, packed, stride, padding, dilation, groups, activation, algorithm) -> None:
    _convolution.check_operands(input, weight, stride, padding, dilation, groups, sides=4)
    _convolution.check_not_packed(packed)
    choose.check_algorithm("triton", algorithm)
    conv2d.check(input, weight, bias, None, stride, padding, dilation, groups, activation)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, weight, bias, _, *ctx.geometry, ctx.activation, ctx.algorithm = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight, *saved_for_sum(ctx.activation, output, bias))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, output, bias = ctx.saved_tensors
    operands = (input, weight, bias, None, *ctx.geometry, None, ctx.algorithm)
    grad = grad_of_sum(grad, output, ctx.activation, lambda: operator(ctx.backend, *operands))
    grad = channel_shuffle.operator(ctx.backend, grad, weight.shape[0] // ctx.geometry[-1], None)
    need = ctx.needs_input_grad
    needed = (need[0], need[1], ctx.has_bias and need[2])
    stride, _, _, groups = ctx.geometry
    algorithm = gradients_algorithm(ctx.backend, ctx.algorithm, input, weight, stride, groups)
    grads = conv2d.gradients(ctx.backend, grad, input, weight, ctx.geometry, algorithm, needed)
    return *grads, *[None] * 7


operator = Operator(
    "group_conv2d_shuffle",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? packed, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, SymInt groups, str? activation, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=fold_images,
    flops=conv2d.flops,
    check=_check,
    triton="group_conv2d_shuffle:group_conv2d_shuffle_forward_triton",
    autocast=_convolution.autocast_but(3),
)

GroupConv2dShuffleFunction = operator.function()

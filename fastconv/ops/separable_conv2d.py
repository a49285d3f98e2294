"""Depthwise and 1x1 convolution in one: what lies between them is never written to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from ..backends import Choice
from . import _convolution, _plans, conv2d, depthwise_conv2d
from ._activation import (
    FROM_OUTPUT,
    activate,
    activation_backward,
    check_activation,
    grad_of_sum,
    saved_for_sum,
)
from ._arguments import check_integers, check_tensor, output_size, padding_sides, pair
from ._conv2d_choice import WIDE_VECTORS, gradients_algorithm
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


def separable_conv2d_reference(
    input: torch.Tensor,  # (N, C, H, W)
    depthwise_weight: torch.Tensor,  # (O, 1, KH, KW), O a multiple of C
    pointwise_weight: torch.Tensor,  # (M, O, 1, 1)
    depthwise_bias: torch.Tensor | None = None,  # (O,)
    pointwise_bias: torch.Tensor | None = None,  # (M,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    mid_activation: str | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,  # (N, M, E, F)
) -> torch.Tensor:
    """The definition: the one convolution after the other."""
    middle = depthwise_conv2d.depthwise_conv2d_reference(
        input, depthwise_weight, depthwise_bias, stride, padding, dilation, activation=mid_activation
    )
    return conv2d.conv2d_reference(
        middle, pointwise_weight, pointwise_bias, activation=activation, residual=residual
    )


def separable_conv2d(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None = None,
    pointwise_bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    mid_activation: str | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Depthwise separable 2-D convolution: a filter for each channel, then a 1x1 convolution.

    ``t[n,o,e,f] = mid_act(db[o] + sum_ij x[n, o//m, e*s + i*d - p, f*s + j*d - p] * dw[o,0,i,j])``,
    ``y[n,q,e,f] = act(pb[q] + r[n,q,e,f] + sum_o t[n,o,e,f] * pw[q,o])``.

    The same as :func:`fastconv.depthwise_conv2d` and then :func:`fastconv.conv2d`, but ``t`` is computed some
    rows at a time, and multiplied before it leaves the cache. A batch normalisation behind either convolution
    is to be folded into its weight and bias, as :class:`fastconv.nn.SeparableConv2d` does. The output has the
    memory format of the input, contiguous or channels_last.

    Differentiable twice. The gradients are those of the two operators: they compute ``t`` again, and take
    memory for it and for its gradient while they run.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        depthwise_weight: ``(O, 1, KH, KW)``, ``O = m * C`` for a channel multiplier ``m``.
        pointwise_weight: ``(M, O, 1, 1)``.
        depthwise_bias: ``(O,)`` or None.
        pointwise_bias: ``(M,)`` or None.
        stride, padding, dilation: of the depthwise convolution, as in :func:`fastconv.depthwise_conv2d`.
        mid_activation: between the two: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or
            ``"silu"``.
        activation: after both; one of these, too.
        residual: what is added before the last activation, in the shape of the output, or None.
        backend: see :mod:`fastconv.backends`; ``"aten"`` is PyTorch's two convolutions. None takes the C++
            kernel where it is faster than the two operators, else these, each with its own measured best; so
            it does where a gradient is needed, for which ``t`` is then kept rather than computed again.
        algorithm: a kernel of the backend: ``"strips"``, ``"plain"`` on the CPU; ``"tiled"`` in CUDA and
            Triton.

    Returns:
        ``(N, M, E, F)``, ``E = floor((H + padding - dilation*(KH-1) - 1) / stride) + 1``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Howard et al., "MobileNets", 2017, arXiv:1704.04861.
    """
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    training = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
    arguments = (stride, padding, dilation, mid_activation, activation, backend, algorithm, int(training))
    key = _plans.key_of("separable_conv2d", tensors, *arguments)
    plan, cast = _plans.find(key), tensors
    if plan is None:
        check_tensor("input", input, rank=4)
        if is_autocast(input):
            cast = autocast(input.device.type, tensors)
        steps, spread = pair("stride", stride), pair("dilation", dilation)
        check_tensor("depthwise_weight", cast[1], rank=4, like=cast[0])
        geometry = (steps, padding_sides(padding, cast[1].shape[2:], steps, spread), spread)
        check(*cast, *geometry, mid_activation, activation)
        named = any(name is not None for name in (backend, algorithm, backends._state.backend))
        if named or (not training and is_faster_fused(cast[0], cast[2], steps)):
            backend = choose(backend, algorithm, cast[0])
        else:
            backend = TWO_OPERATORS
        if backend == "cpu" and algorithm is None:
            algorithm = "strips"
        plan = _plans.keep(key, (backend, algorithm, geometry))
    backend, algorithm, geometry = plan
    if backend in ("aten", TWO_OPERATORS):
        backend = None if backend == TWO_OPERATORS else backend
        window = (input, depthwise_weight, depthwise_bias, stride, padding, dilation)
        middle = depthwise_conv2d.depthwise_conv2d(*window, activation=mid_activation, backend=backend)
        return conv2d.conv2d(
            middle,
            pointwise_weight,
            pointwise_bias,
            activation=activation,
            residual=residual,
            backend=backend,
        )
    if backend == "reference":
        keywords = {"mid_activation": mid_activation, "activation": activation, "residual": cast[5]}
        output = separable_conv2d_reference(*cast[:5], stride, padding, dilation, **keywords)
        return as_memory_format(output, memory_format_of(input))
    packed = packed_weight("conv2d", cast[2], 1, PRODUCTS[algorithm]) if backend == "cpu" else None
    return operator(backend, *cast, packed, *geometry, mid_activation, activation, algorithm)


TWO_OPERATORS = "two operators"  # in the place of a backend: each takes its own measured best
PRODUCTS = {"strips": "direct", "plain": "plain"}  # the kernel of conv2d whose packed weights each one reads
POINTWISE = (1, 1), (0, 0, 0, 0), (1, 1), 1  # stride, padding, dilation and groups of the second convolution


def is_faster_fused(input: torch.Tensor, pointwise_weight: torch.Tensor, stride: Sequence[int]) -> bool:
    """Whether one pass of the C++ kernels beats the two operators; the study page has the figures."""
    if input.device.type != "cpu" or not WIDE_VECTORS:
        return False
    filters, middles = pointwise_weight.shape[:2]
    pixels = (input.shape[2] // stride[0]) * (input.shape[3] // stride[1])
    channels_last = memory_format_of(input) == torch.channels_last
    small = pixels <= 1024
    if input.dtype == torch.float32:
        served = channels_last or small
    else:
        served = input.dtype == torch.bfloat16 and channels_last and small
    # Few filters leave registers empty; of many, the weights come from beyond the L2 cache for each strip.
    return served and input.shape[1] >= 16 and filters > 16 and filters * middles < 1 << 20


choose = Choice(
    "separable_conv2d",
    algorithms={
        "cpu": ("strips", "plain"),
        "cuda": ("tiled",),
        "emulator": ("tiled",),
        "triton": ("tiled",),
        "aten": (),
        "reference": (),
    },
)


def check(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None,
    pointwise_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mid_activation: str | None,
    activation: str | None,
) -> tuple[int, int, int, int]:
    """Raises on arguments that do not fit together; returns the output's shape."""
    check_tensor("depthwise_weight", depthwise_weight, rank=4, like=input)
    check_tensor("pointwise_weight", pointwise_weight, rank=4, like=input)
    channels, (middles, per_group, *kernel) = input.shape[1], depthwise_weight.shape
    if channels == 0:
        raise ValueError(f"input must have at least one channel, got shape {tuple(input.shape)}")
    if per_group != 1 or middles == 0 or middles % channels or 0 in kernel:
        raise ValueError(
            f"depthwise_weight must have shape (m * {channels}, 1, KH, KW) for an input of {channels} "
            f"channels, with at least one tap, got {tuple(depthwise_weight.shape)}"
        )
    filters = pointwise_weight.shape[0]
    if pointwise_weight.shape[1:] != (middles, 1, 1) or filters == 0:
        raise ValueError(
            f"pointwise_weight must have shape (M, {middles}, 1, 1) for a depthwise_weight of {middles} "
            f"filters, got {tuple(pointwise_weight.shape)}"
        )
    _convolution.check_bias(depthwise_bias, input, middles, "depthwise_bias")
    _convolution.check_bias(pointwise_bias, input, filters, "pointwise_bias")
    check_activation(mid_activation, "mid_activation")
    check_activation(activation)
    top, bottom, left, right = padding
    height = output_size(input.shape[2], kernel[0], stride[0], top + bottom, dilation[0])
    width = output_size(input.shape[3], kernel[1], stride[1], left + right, dilation[1], "width")
    shape = (input.shape[0], filters, height, width)
    _convolution.check_residual(residual, input, shape)
    return shape


# The operator: fake, gradient, vmap, FLOPs. `packed` is what conv2d_pack_weight returned for the 1x1 weight
# and the algorithm's product, or None.


def _fake(
    input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual, packed, *rest
):  # fmt: skip
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    return new_output(input, check(*tensors, *rest[:-1]))


def _check_forward(*arguments: Any) -> None:
    *tensors, packed, stride, padding, dilation, mid_activation, activation, algorithm = arguments
    check_tensor("input", tensors[0], rank=4)
    check_integers("stride", stride, 2, least=1)
    check_integers("padding", padding, 4, least=0)
    check_integers("dilation", dilation, 2, least=1)
    _convolution.check_not_packed(packed)
    choose.check_algorithm("triton", algorithm)
    check(*tensors, stride, padding, dilation, mid_activation, activation)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, _, stride, padding, dilation, ctx.mid_activation, ctx.activation, ctx.algorithm = inputs
    ctx.geometry = stride, padding, dilation
    ctx.has = tuple(tensor is not None for tensor in tensors)
    *operands, pointwise_bias, residual = tensors
    ctx.save_for_backward(*operands, *saved_for_sum(ctx.activation, output, pointwise_bias, residual))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, depthwise_weight, pointwise_weight, depthwise_bias, output, *terms = ctx.saved_tensors
    operands = (input, depthwise_weight, pointwise_weight, depthwise_bias, *terms, None)
    rest = (*ctx.geometry, ctx.mid_activation, None, ctx.algorithm)
    grad = grad_of_sum(grad, output, ctx.activation, lambda: operator(ctx.backend, *operands, *rest))
    need = tuple(has and needed for has, needed in zip(ctx.has, ctx.needs_input_grad))
    need_input, need_depthwise, need_pointwise, need_mid_bias, need_bias, need_residual = need
    need_middle = need_input or need_depthwise or need_mid_bias

    algorithm = "plain" if ctx.algorithm == "plain" else None  # the other kernels here are no gradients'
    from_output = ctx.mid_activation is None or ctx.mid_activation in FROM_OUTPUT
    sums = depthwise_conv2d.forward_operator(
        ctx.backend,
        *(input, depthwise_weight, depthwise_bias, *ctx.geometry),
        ctx.mid_activation if from_output else None,
        algorithm,
    )
    middle = sums if from_output else activate(sums, ctx.mid_activation)
    product = gradients_algorithm(ctx.backend, ctx.algorithm, middle, pointwise_weight, POINTWISE[0], 1)
    grad_middle, grad_pointwise, grad_bias = conv2d.gradients(
        ctx.backend,
        *(grad, middle, pointwise_weight, POINTWISE, product),
        (need_middle, need_pointwise, need_bias),
    )
    grads = (None, None, None)
    if need_middle:
        grad_middle = activation_backward(grad_middle, sums, ctx.mid_activation)
        needed = (need_input, need_depthwise, need_mid_bias)
        grads = depthwise_conv2d.backward_operator(
            ctx.backend, grad_middle, input, depthwise_weight, *ctx.geometry, algorithm, *needed
        )
        grads = tuple(g if n else None for g, n in zip(grads, needed))
    grad_input, grad_depthwise, grad_mid_bias = grads
    first = (grad_input, grad_depthwise, grad_pointwise, grad_mid_bias, grad_bias)
    return *first, grad if need_residual else None, *[None] * 7


def _vmap(op, info, in_dims, *arguments):
    has_residual = arguments[5] is not None  # which would have to be folded, too
    return (map_one_by_one if has_residual else fold_images)(op, info, in_dims, *arguments)


def _flops(input, depthwise_weight, pointwise_weight, *_, out_shape):
    middle = (out_shape[0], depthwise_weight[0], *out_shape[2:])
    return depthwise_conv2d.flops(input, depthwise_weight, out_shape=middle) + conv2d.flops(
        middle, pointwise_weight, out_shape=out_shape
    )


operator = Operator(
    "separable_conv2d",
    "(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, "
    "Tensor? pointwise_bias, Tensor? residual, Tensor? packed, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, str? mid_activation, str? activation, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    flops=_flops,
    check=_check_forward,
    triton="separable_conv2d:separable_conv2d_forward_triton",
    autocast=_convolution.autocast_but(6),
)

SeparableConv2dFunction = operator.function()

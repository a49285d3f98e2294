"""Transposed convolution: the gradient of a convolution with respect to its input, as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from . import _convolution, _plans
from ._arguments import check_integers, check_tensor, integer, pair
from ._conv2d_choice import CPU_ALGORITHMS, CUDA_ALGORITHMS, default_for, fastest, prefer
from ._convolution import (
    autocast_but,
    check_bias,
    check_groups,
    check_not_packed,
    check_operands,
    define_pack_weight,
    serves,
)
from ._operator import (
    Operator,
    as_memory_format,
    autocast,
    fold_into,
    is_autocast,
    map_one_by_one,
    memory_format_of,
    new_output,
)
from ._packed_weights import packed_weight
from .conv2d import backward_operator as conv2d_backward
from .conv2d import forward_operator as conv2d_forward


def conv_transpose2d_reference(
    input: torch.Tensor,  # (N, C, E, F)
    weight: torch.Tensor,  # (C, M/G, KH, KW)
    bias: torch.Tensor | None = None,  # (M,)
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """The definition: pixels spread ``stride`` apart, and for each tap a shifted copy times a matrix."""
    (sh, sw), (dh, dw) = pair("stride", stride), pair("dilation", dilation)
    (ph, pw), (kh, kw) = pair("padding", padding, 0), weight.shape[2:]
    oh, ow = pair("output_padding", output_padding, 0)
    out_height = output_size(input.shape[2], kh, sh, ph, oh, dh)
    out_width = output_size(input.shape[3], kw, sw, pw, ow, dw, "width")
    functional = torch.nn.functional
    apart = functional.pad(input[..., None, :, None], (0, sw - 1, 0, 0, 0, sh - 1)).flatten(4).flatten(2, 3)
    apart = apart[:, :, : (input.shape[2] - 1) * sh + 1, : (input.shape[3] - 1) * sw + 1]
    above, left = dh * (kh - 1), dw * (kw - 1)
    below, right = out_height + ph - apart.shape[2], out_width + pw - apart.shape[3]
    padded = functional.pad(apart, (left, right, above, below)).unflatten(1, (groups, -1))
    filters = weight.unflatten(0, (groups, -1))  # (G, C/G, M/G, KH, KW)
    output = input.new_zeros(input.shape[0], groups, weight.shape[1], out_height, out_width)
    for i in range(kh):
        for j in range(kw):
            row, column = above + ph - i * dh, left + pw - j * dw
            window = padded[..., row : row + out_height, column : column + out_width]
            output = output + torch.einsum("ngchw,gcm->ngmhw", window, filters[..., i, j])
    output = output.flatten(1, 2)
    return output if bias is None else output + bias[:, None, None]


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Transposed 2-D convolution.

    ``y[n,m,h,w] = b[m] + sum_cij x[n,c,e,f] * w[c,m,i,j]`` over all e, f with ``h = e*s + i*d - p`` and
    ``w = f*s + j*d - p``; c runs through the channels of m's group.

    The same as ``torch.nn.functional.conv_transpose2d``, and differentiable twice. The output has the memory
    format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, E, F)``; float32, bfloat16, float16 (summed in float32) or float64.
        weight: ``(C, M/G, KH, KW)``.
        bias: ``(M,)`` or None.
        stride: pixels of the output between two of the input, an integer or ``(height, width)``.
        padding: pixels taken off each side of the output, an integer or ``(height, width)``.
        output_padding: pixels added below and right; less than the stride or the dilation.
        groups: ``G``; the channels of a group reach that group's outputs alone.
        dilation: pixels between taps.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend; None takes the fastest, Winograd's too unless
            :func:`fastconv.set_precision` says ``"exact"``. On the CPU ``"direct"``, ``"im2col"``
            (contiguous inputs), ``"winograd_f2"``, ``"winograd_f4"``, ``"winograd_f6"`` (3x3, stride and
            dilation 1), ``"grouped"`` (at most 32 channels in a group) or ``"plain"``; in CUDA
            ``"implicit_gemm"`` (float16, bfloat16), ``"direct"`` or ``"im2col"``; in Triton
            ``"implicit_gemm"`` or ``"pointwise"`` (1x1, stride 1, no padding).

    Returns:
        ``(N, M, H, W)``, ``H = (E - 1)*stride - 2*padding + dilation*(KH-1) + output_padding + 1``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    arXiv:1603.07285.
    """
    tensors = (input, weight, bias)
    key = _plans.key_of(
        *("conv_transpose2d", tensors, stride, padding, output_padding, groups, dilation),
        *(backend, algorithm),
    )
    plan = _plans.find(key)
    if plan is None:
        check_tensor("input", input, rank=4)
        if is_autocast(input):
            input, weight, bias = autocast(input.device.type, tensors)
        check_tensor("weight", weight, rank=4, like=input)
        stride, dilation = pair("stride", stride), pair("dilation", dilation)
        groups = integer("groups", groups)
        padding, output_padding = pair("padding", padding, 0), pair("output_padding", output_padding, 0)
        geometry = (stride, padding, output_padding, dilation, groups)
        _check(input, weight, bias, *geometry)
        backend = choose(backend, algorithm, input, weight, *geometry)
        if backend == "cpu" and algorithm is None:
            algorithm = default_algorithm(input, weight, *geometry)
        plan = _plans.keep(key, (backend, algorithm, geometry))
    backend, algorithm, geometry = plan
    stride, padding, output_padding, dilation, groups = geometry
    if backend == "aten":
        if memory_format_of(input) == torch.contiguous_format:  # or the output would be as the weight
            weight = weight.contiguous()
        return torch.nn.functional.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    if backend == "reference":
        output = conv_transpose2d_reference(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
        return as_memory_format(output, memory_format_of(input))
    packed = None
    if backend == "cpu":
        packed = packed_weight("conv_transpose2d", weight, stride, padding, dilation, groups, algorithm)
    return forward_operator(backend, input, weight, bias, packed, *geometry, algorithm)


def output_size(size, kernel, stride, padding, output_padding, dilation, axis: str = "height") -> int:
    """Outputs along one axis; ``padding`` counts one side."""
    output = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    if size < 1:
        raise ValueError(f"input must have at least one pixel of {axis}")
    if output < 1:
        raise ValueError(f"padding must leave at least one pixel of {axis}, got padding {padding}: {output}")
    return output


def _check(input, weight, bias, stride, padding, output_padding, dilation, groups) -> tuple[int, int]:
    """Raises on arguments that do not fit together; returns the output's height and width."""
    check_groups(input, weight, groups)
    if weight.shape[0] != input.shape[1]:
        raise ValueError(
            f"weight must have shape ({input.shape[1]}, M/G, KH, KW) for an input of {input.shape[1]} "
            f"channels, got {tuple(weight.shape)}"
        )
    check_bias(bias, input, weight.shape[1] * groups)
    for extra, s, d in zip(output_padding, stride, dilation):
        if extra >= s and extra >= d:
            raise ValueError(
                f"output_padding must be less than the stride or the dilation, got {tuple(output_padding)} "
                f"for stride={tuple(stride)}, dilation={tuple(dilation)}"
            )
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    height, width = (output_size(*axis, name) for axis, name in zip(sizes, ("height", "width")))
    return height, width


def _why_not(
    backend, algorithm, input, weight, stride, padding, output_padding, dilation, groups
) -> str | None:
    sides = (*padding, *output_padding)
    return _convolution.why_not(
        backend, algorithm, input, weight, stride, sides, dilation, groups, transposed=True
    )


def _prefer(input, weight, stride, padding, output_padding, dilation, groups) -> tuple[str, ...]:
    """The backends for ``backend=None``, the best first."""
    return prefer(_cpu_algorithm(input, weight, stride, padding, output_padding, dilation, groups), input)


choose = Choice(
    "conv_transpose2d",
    algorithms={
        "cpu": CPU_ALGORITHMS,
        "cuda": CUDA_ALGORITHMS,
        "emulator": CUDA_ALGORITHMS,
        "triton": ("implicit_gemm", "pointwise"),
        "aten": (),
        "reference": (),
    },
    prefer=_prefer,
    why_not=_why_not,
)


def _cpu_algorithm(input, weight, stride, padding, output_padding, dilation, groups) -> str | None:
    return fastest(
        weight.shape[0] // groups,
        weight.shape[1],
        input.shape[0] * input.shape[2] * input.shape[3],
        input,
        weight,
        stride,
        dilation,
        groups,
    )


def default_algorithm(input, weight, stride, padding, output_padding, dilation, groups) -> str:
    """The C++ kernel where a call names none."""
    algorithm = _cpu_algorithm(input, weight, stride, padding, output_padding, dilation, groups)
    return algorithm or default_for(stride)


# The operator: fake, gradient, vmap, FLOPs. `packed` is what conv_transpose2d_pack_weight returned for this
# weight, these strides, paddings, dilations and groups, and this algorithm, or None.


def _fake(input, weight, bias, packed, stride, padding, output_padding, dilation, groups, algorithm):
    height, width = _check(input, weight, bias, stride, padding, output_padding, dilation, groups)
    return new_output(input, (input.shape[0], weight.shape[1] * groups, height, width))


def _check_operator(
    input, weight, bias, packed, stride, padding, output_padding, dilation, groups, algorithm
) -> None:
    check_operands(input, weight, stride, padding, dilation, groups, sides=2)
    check_integers("output_padding", output_padding, 2, least=0)
    check_not_packed(packed)
    choose.check_algorithm("triton", algorithm)
    _check(input, weight, bias, stride, padding, output_padding, dilation, groups)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, weight, bias, _, *ctx.geometry, ctx.algorithm = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """The input's gradient is the convolution; the weight's is the convolution's with the images swapped."""
    input, weight = ctx.saved_tensors
    stride, padding, output_padding, dilation, groups = ctx.geometry
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias and need_bias else None
    # Below and right, output_padding less is padded; pixels beyond that no input has reached.
    rows, columns = (max(extra - p, 0) for extra, p in zip(output_padding, padding))
    if rows >= grad.shape[2] or columns >= grad.shape[3]:  # no input has reached any
        gradients = (
            torch.zeros_like(t) if need else None for t, need in zip((input, weight), ctx.needs_input_grad)
        )
        return *gradients, grad_bias, *[None] * 7
    grad = grad[:, :, : grad.shape[2] - rows, : grad.shape[3] - columns]
    below, right = (max(p - extra, 0) for extra, p in zip(output_padding, padding))
    geometry = (stride, (padding[0], below, padding[1], right), dilation, groups)
    grad = as_memory_format(grad, memory_format_of(input))
    grad_input = grad_weight = None
    if need_input:
        grad_input = conv2d_forward(
            ctx.backend, grad, weight, None, None, None, *geometry, None, ctx.algorithm
        )
    if need_weight:
        _, grad_weight, _ = conv2d_backward(
            ctx.backend, input, grad, weight, *geometry, ctx.algorithm, False, True, False
        )
    return grad_input, grad_weight, grad_bias, *[None] * 7


def _vmap(op, info, in_dims, input, weight, bias, packed, *rest):
    """A mapped weight makes more groups, an unmapped one more images; where the algorithm cannot, a loop."""
    count = info.batch_size
    *geometry, groups, algorithm = rest
    images = in_dims[1] is None and (bias is None or in_dims[2] is None)
    dim = 0 if images else 1
    given = (input, weight, bias, packed)
    input = fold_into(dim, input, in_dims[0], count)
    if not images:
        weight, packed, groups = fold_into(0, weight, in_dims[1], count), None, groups * count
        bias = None if bias is None else fold_into(0, bias, in_dims[2], count)
    if not serves(_why_not, op, algorithm, input, weight, *geometry, groups):
        return map_one_by_one(op, info, in_dims, *given, *rest)
    output = op(input, weight, bias, packed, *geometry, groups, algorithm)
    return output.unflatten(dim, (count, -1)), dim


def _flops(input, weight, *_, out_shape):
    return 2 * input[0] * input[1] * input[2] * input[3] * weight[1] * weight[2] * weight[3]


forward_operator = Operator(
    "conv_transpose2d",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? packed, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] output_padding, SymInt[2] dilation, SymInt groups, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    flops=_flops,
    check=_check_operator,
    triton="conv_transpose2d:conv_transpose2d_forward_triton",
    autocast=autocast_but(3),
)

define_pack_weight(
    "conv_transpose2d_pack_weight",
    "(Tensor weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "str algorithm) -> Tensor",
)

ConvTranspose2dFunction = forward_operator.function()

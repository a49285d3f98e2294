"""Convolution, dense or grouped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import _plans
from ._activation import activate, add_and_activate, check_activation, grad_of_sum, saved_for_sum
from ._arguments import check_tensor, integer, output_size, padding_sides, pair
from ._conv2d_choice import choose, default_algorithm
from ._convolution import (
    autocast_but,
    check_bias,
    check_grad_output,
    check_groups,
    check_not_packed,
    check_operands,
    check_residual,
    define_pack_weight,
    double_backward,
    new_gradients,
    serves,
    unfold_gradients,
    why_not,
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


def conv2d_reference(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: torch.Tensor | None = None,  # (M,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,  # (N, M, E, F)
) -> torch.Tensor:
    """The definition: for each tap, a shifted padded input times a matrix of channels; added up."""
    (sh, sw), (dh, dw), (kh, kw) = pair("stride", stride), pair("dilation", dilation), weight.shape[2:]
    top, bottom, left, right = padding_sides(padding, (kh, kw), (sh, sw), (dh, dw))
    out_height = output_size(input.shape[2], kh, sh, top + bottom, dh)
    out_width = output_size(input.shape[3], kw, sw, left + right, dw, "width")
    padded = torch.nn.functional.pad(input, (left, right, top, bottom)).unflatten(1, (groups, -1))
    filters = weight.unflatten(0, (groups, -1))  # (G, M/G, C/G, KH, KW)
    output = input.new_zeros(input.shape[0], *filters.shape[:2], out_height, out_width)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (out_height - 1) + 1, sh)
            columns = slice(j * dw, j * dw + sw * (out_width - 1) + 1, sw)
            window = padded[:, :, :, rows, columns]
            output = output + torch.einsum("ngchw,gmc->ngmhw", window, filters[..., i, j])
    output = output.flatten(1, 2)
    if bias is not None:
        output = output + bias[:, None, None]
    return activate(output if residual is None else output + residual, activation)


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """2-D convolution.

    ``y[n,m,e,f] = act(b[m] + r[n,m,e,f] + sum_cij
    x[n, g*C/G + c, e*s + i*d - p, f*s + j*d - p] * w[m,c,i,j])``,
    ``g = m // (M/G)``.

    The same as ``torch.nn.functional.conv2d``, with a residual and an activation folded in, and
    differentiable twice. The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        weight: ``(M, C/G, KH, KW)``.
        bias: ``(M,)`` or None.
        stride: pixels between outputs, an integer or ``(height, width)``.
        padding: zeros on each side, an integer, ``(height, width)``, ``"valid"`` or ``"same"``.
        dilation: pixels between taps.
        groups: ``G``; a filter sees the channels of its group alone.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        residual: what is added before the activation, in the shape of the output, or None.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend; None takes the fastest, Winograd's too unless
            :func:`fastconv.set_precision` says ``"exact"``. On the CPU ``"direct"``, ``"im2col"``
            (contiguous inputs), ``"winograd_f2"``, ``"winograd_f4"``, ``"winograd_f6"`` (3x3, stride and
            dilation 1), ``"grouped"`` (at most 32 channels in a group) or ``"plain"``; in CUDA
            ``"implicit_gemm"`` (float16, bfloat16), ``"direct"`` or ``"im2col"``; in Triton
            ``"implicit_gemm"`` or ``"pointwise"`` (1x1, stride 1, no padding); of ``"aten"``
            ``"convolution"`` or ``"unfold"`` (a product of matrices by BLAS).

    Returns:
        ``(N, M, E, F)``, ``E = floor((H + padding - dilation*(KH-1) - 1) / stride) + 1``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    arXiv:1603.07285.
    """
    tensors = (input, weight, bias, residual)
    key = _plans.key_of("conv2d", tensors, stride, padding, dilation, groups, activation, backend, algorithm)
    plan = _plans.find(key)
    if plan is None:
        check_tensor("input", input, rank=4)
        if is_autocast(input):
            input, weight, bias, residual = tensors = autocast(input.device.type, tensors)
        made = make_plan(*tensors, stride, padding, dilation, groups, activation, backend, algorithm)
        plan = _plans.keep(key, made)
    backend, algorithm, geometry = plan
    packed = packed_weight("conv2d", weight, geometry[-1], algorithm) if backend == "cpu" else None
    return run_plan(plan, input, weight, bias, residual, packed, activation)


def make_plan(
    input, weight, bias, residual, stride, padding, dilation, groups, activation, backend=None, algorithm=None
) -> tuple[str, str | None, tuple]:
    """Checks a call; returns the backend, the algorithm and the geometry in its normal form."""
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    groups = integer("groups", groups)
    check_tensor("weight", weight, rank=4, like=input)
    padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    geometry = (stride, padding, dilation, groups)
    check(input, weight, bias, residual, *geometry, activation)
    fused = activation is not None or residual is not None
    backend = choose(backend, algorithm, input, weight, *geometry, fused)
    if backend == "cpu" and algorithm is None:
        algorithm = default_algorithm(input, weight, *geometry, fused)
    return backend, algorithm, geometry


def run_plan(plan, input, weight, bias, residual, packed, activation) -> torch.Tensor:
    """What :func:`make_plan` has checked; ``packed`` is the weight packed for the plan, or None."""
    backend, algorithm, geometry = plan
    if backend == "aten":
        return aten(input, weight, bias, residual, *geometry, activation, algorithm)
    if backend == "reference":
        stride, (top, bottom, left, right), dilation, groups = geometry
        padded = torch.nn.functional.pad(input, (left, right, top, bottom))
        output = conv2d_reference(
            padded, weight, bias, stride, 0, dilation, groups, activation=activation, residual=residual
        )
        return as_memory_format(output, memory_format_of(input))
    return forward_operator(backend, input, weight, bias, residual, packed, *geometry, activation, algorithm)


def check(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
) -> tuple[int, int]:
    """Raises on arguments that do not fit together; returns the output's height and width."""
    check_groups(input, weight, groups)
    if weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"weight must have shape (M, {input.shape[1] // groups}, KH, KW) for an input of "
            f"{input.shape[1]} channels and groups={groups}, got {tuple(weight.shape)}"
        )
    check_bias(bias, input, weight.shape[0])
    check_activation(activation)
    top, bottom, left, right = padding
    height = output_size(input.shape[2], weight.shape[2], stride[0], top + bottom, dilation[0])
    width = output_size(input.shape[3], weight.shape[3], stride[1], left + right, dilation[1], "width")
    check_residual(residual, input, (input.shape[0], weight.shape[0], height, width))
    return height, width


def aten(input, weight, bias, residual, stride, padding, dilation, groups, activation, algorithm):
    top, bottom, left, right = padding
    memory_format = memory_format_of(input)
    if top != bottom or left != right:
        input = torch.nn.functional.pad(input, (0, right - left, 0, bottom - top))
    if algorithm == "unfold":
        output = _unfold(input, weight, bias, stride, (top, left), dilation, groups)
        output = as_memory_format(output, memory_format)
    else:
        if memory_format == torch.contiguous_format:  # or the output would be laid out as the weight
            weight = weight.contiguous()
        output = torch.nn.functional.conv2d(input, weight, bias, stride, (top, left), dilation, groups)
    return add_and_activate(output, residual, activation)


def _unfold(input, weight, bias, stride, padding, dilation, groups):
    """Windows side by side as a matrix, and a product of matrices for each group."""
    kernel = weight.shape[2:]
    columns = torch.nn.functional.unfold(input, kernel, dilation, padding, stride)
    sums = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns.unflatten(1, (groups, -1))
    sizes = (
        output_size(size, k, s, 2 * p, d)
        for size, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation)
    )
    output = sums.flatten(1, 2).unflatten(2, tuple(sizes))
    return output if bias is None else output + bias[:, None, None]


# Forward operator: fake, gradient, vmap, FLOPs. `packed` is what conv2d_pack_weight returned for this weight,
# these groups and this algorithm, or None.


def _fake(input, weight, bias, residual, packed, stride, padding, dilation, groups, activation, algorithm):
    height, width = check(input, weight, bias, residual, stride, padding, dilation, groups, activation)
    return new_output(input, (input.shape[0], weight.shape[0], height, width))


def _check_forward(
    input, weight, bias, residual, packed, stride, padding, dilation, groups, activation, algorithm
) -> tuple[int, int]:
    check_operands(input, weight, stride, padding, dilation, groups, sides=4)
    check_not_packed(packed)
    choose.check_algorithm("triton", algorithm)
    return check(input, weight, bias, residual, stride, padding, dilation, groups, activation)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, weight, bias, residual, _, *ctx.geometry, ctx.activation, ctx.algorithm = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(input, weight, *saved_for_sum(ctx.activation, output, bias, residual))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    input, weight, output, bias, residual = ctx.saved_tensors
    operands = (input, weight, bias, residual, None, *ctx.geometry, None, ctx.algorithm)
    grad = grad_of_sum(grad, output, ctx.activation, lambda: forward_operator(ctx.backend, *operands))
    need = ctx.needs_input_grad
    needed = (need[0], need[1], ctx.has_bias and need[2])
    grads = gradients(ctx.backend, grad, input, weight, ctx.geometry, ctx.algorithm, needed)
    return (*grads, grad if ctx.has_residual and need[3] else None, *[None] * 7)


def gradients(
    backend: str,
    grad: torch.Tensor,  # (N, M, E, F), of the sums
    input: torch.Tensor,
    weight: torch.Tensor,
    geometry: Sequence[Any],
    algorithm: str | None,
    need: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of input, weight and bias; None where one is not needed."""
    operands = (backend, grad, input, weight, *geometry, algorithm)
    return needed_gradients(lambda *flags: backward_operator(*operands, *flags), grad, need)


def needed_gradients(
    compute: Callable[..., Sequence[torch.Tensor]], grad: torch.Tensor, need: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The same from a backward operator: ``compute(need_input, need_weight, need_bias)``."""
    need_input, need_weight, need_bias = need
    grads = (None, None, None)
    if need_input or need_weight:
        flags = (need_input, need_weight, need_bias and need_weight)
        found = compute(*flags)
        grads = tuple(g if n else None for g, n in zip(found, flags))
    if need_bias and not need_weight:  # a sum alone, without the kernel that gathers the weight's gradient
        grads = (*grads[:2], grad.sum((0, 2, 3)))
    return grads


def _vmap(op, info, in_dims, input, weight, bias, residual, packed, *rest):
    """A mapped weight makes more groups, an unmapped one more images; where the algorithm cannot, a loop."""
    count = info.batch_size
    *geometry, groups, activation, algorithm = rest
    images = in_dims[1] is None and (bias is None or in_dims[2] is None)
    dim = 0 if images else 1
    given = (input, weight, bias, residual, packed)
    input = fold_into(dim, input, in_dims[0], count)
    residual = None if residual is None else fold_into(dim, residual, in_dims[3], count)
    if not images:
        weight, packed, groups = fold_into(0, weight, in_dims[1], count), None, groups * count
        bias = None if bias is None else fold_into(0, bias, in_dims[2], count)
    if not serves(why_not, op, algorithm, input, weight, *geometry, groups):
        return map_one_by_one(op, info, in_dims, *given, *rest)
    output = op(input, weight, bias, residual, packed, *geometry, groups, activation, algorithm)
    return output.unflatten(dim, (count, -1)), dim


def flops(input, weight, *_, out_shape):
    return 2 * out_shape[0] * out_shape[1] * out_shape[2] * out_shape[3] * weight[1] * weight[2] * weight[3]


forward_operator = Operator(
    "conv2d",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? packed, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? activation, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    flops=flops,
    check=_check_forward,
    triton="conv2d:conv2d_forward_triton",
    autocast=autocast_but(4),
)


# Backward operator. Gradients that are not needed are empty tensors of size 0.


def _backward_fake(
    grad_output,
    input,
    weight,
    stride,
    padding,
    dilation,
    groups,
    algorithm,
    need_input,
    need_weight,
    need_bias,
):
    return new_gradients(input, weight, (need_input, need_weight, need_bias))


def _check_backward(grad_output, input, weight, stride, padding, dilation, groups, algorithm, *_) -> None:
    size = _check_forward(input, weight, None, None, None, stride, padding, dilation, groups, None, algorithm)
    check_grad_output(grad_output, input, (input.shape[0], weight.shape[0], *size))


def _backward_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_output, input, weight, *ctx.geometry, ctx.algorithm, _, _, _ = inputs
    ctx.need = inputs[-3:]
    ctx.save_for_backward(grad_output, input, weight)


def _backward_backward(ctx: Any, *grad_grads: torch.Tensor) -> tuple:
    geometry, algorithm = ctx.geometry, ctx.algorithm
    grad_output, input, _ = ctx.saved_tensors
    if ctx.need[0]:  # an algorithm may serve the input's layout alone
        grad_grads = (as_memory_format(grad_grads[0], memory_format_of(input)), *grad_grads[1:])

    def convolve(x, w):
        return forward_operator(ctx.backend, x, w, None, None, None, *geometry, None, algorithm)

    def transpose(x, w, need):
        return backward_operator(
            ctx.backend, grad_output, x, w, *geometry, algorithm, need == "input", need == "weight", False
        )

    return *double_backward(ctx, grad_grads, convolve, transpose), *[None] * 8


def _backward_vmap(op, info, in_dims, grad_output, input, weight, *rest):
    count = info.batch_size
    *geometry, groups, algorithm, _, _, _ = rest
    folded = (
        fold_into(1, grad_output, in_dims[0], count),
        fold_into(1, input, in_dims[1], count),
        fold_into(0, weight, in_dims[2], count),
    )
    geometry = (*geometry, groups * count)
    if not serves(why_not, op, algorithm, *folded[1:], *geometry):
        return map_one_by_one(op, info, in_dims, grad_output, input, weight, *rest)
    grads = op(*folded, *geometry, algorithm, *rest[-3:])
    return unfold_gradients(grads, rest[-3:], count)


def _backward_flops(grad_output, input, weight, *rest, out_shape):
    passes = sum(bool(need) for need in rest[5:7])
    return passes * flops(input, weight, out_shape=grad_output)


backward_operator = Operator(
    "conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] stride, SymInt[4] padding, "
    "SymInt[2] dilation, SymInt groups, str? algorithm, bool need_input, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
    flops=_backward_flops,
    check=_check_backward,
    triton="conv2d:conv2d_backward_triton",
)


# The order in which a C++ kernel reads its weights, for callers that keep it.

define_pack_weight("conv2d_pack_weight", "(Tensor weight, SymInt groups, str algorithm) -> Tensor")

Conv2dFunction = forward_operator.function()

"""What the convolutions share: checks, gradients, packed weights, algorithms that have conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._arguments import check_integers, check_tensor, integer
from ._operator import autocast, library, new_output

MOST_PHASES = 4096  # each of which costs time and memory, even where the image has no pixel of it
NARROW = 32  # channels of a group that algorithm="grouped" is made for


def check_groups(input: torch.Tensor, weight: torch.Tensor, groups: int) -> None:
    """Raises unless the groups divide input and weight, and neither is empty."""
    channels = input.shape[1]
    if channels == 0 or 0 in weight.shape:
        raise ValueError(
            "input and weight must have at least one channel, and weight one filter and one tap, "
            f"got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if channels % groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide input's {channels} channels and weight's size of {weight.shape[0]}, "
            f"got {groups}"
        )


def check_bias(bias: torch.Tensor | None, input: torch.Tensor, channels: int, name: str = "bias") -> None:
    if bias is not None:
        check_tensor(name, bias, rank=1, like=input)
        if bias.shape[0] != channels:
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(bias.shape)}")


def check_residual(residual: torch.Tensor | None, input: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless it is as the output, of this shape."""
    if residual is not None:
        check_tensor("residual", residual, rank=4, like=input)
        if residual.shape != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")


def check_operands(input, weight, stride, padding, dilation, groups, sides) -> None:
    """Raises on what the public function's normal forms rule out, for operators called by themselves."""
    check_tensor("input", input, rank=4)
    check_tensor("weight", weight, rank=4, like=input)
    check_integers("stride", stride, 2, least=1)
    check_integers("padding", padding, sides, least=0)
    check_integers("dilation", dilation, 2, least=1)
    integer("groups", groups)


def check_not_packed(packed: torch.Tensor | None) -> None:
    if packed is not None:
        raise ValueError("packed must be None: only the C++ kernels read packed weights")


def format_of_weight(weight: torch.Tensor) -> torch.memory_format:
    """The layout of a weight's gradient: channels_last if the weight is that and not contiguous too."""
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def new_gradients(input: torch.Tensor, weight: torch.Tensor, need: Sequence[bool]) -> tuple:
    """Uninitialised gradients of input, weight and bias; those that are not needed have size 0."""
    need_input, need_weight, need_bias = need
    grad_weight = input.new_empty(0)
    if need_weight:
        memory_format = format_of_weight(weight)
        grad_weight = torch.empty(
            weight.shape, dtype=input.dtype, device=input.device, memory_format=memory_format
        )
    return (
        new_output(input, input.shape) if need_input else input.new_empty(0),
        grad_weight,
        input.new_empty(weight.shape[0] if need_bias else 0),
    )


def check_grad_output(grad_output: torch.Tensor, input: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless it is as the output."""
    check_tensor("grad_output", grad_output, rank=4, like=input)
    if grad_output.shape != shape:
        raise ValueError(f"grad_output must have shape {shape}, got {tuple(grad_output.shape)}")


def unfold_gradients(grads: Sequence[torch.Tensor], need: Sequence[bool], count: int) -> tuple:
    """The result of ``vmap`` from gradients with ``count`` maps folded into channels and filters."""
    dims = (1 if need[0] else 0, 0, 0)
    # A gradient that is not needed has no dimension to map; give it one.
    return tuple(
        grad.unflatten(dim, (count, -1)) if needed else grad.expand(count, 0)
        for grad, needed, dim in zip(grads, need, dims)
    ), dims


def double_backward(
    ctx: Any, grad_grads: Sequence[torch.Tensor], convolve: Callable, transpose: Callable
) -> tuple:
    """Gradients of a convolution's gradients with respect to grad_output, input and weight.

    They are linear in each of the three: convolutions again. ``convolve(x, w)`` is the convolution,
    ``transpose(x, w, need)`` its gradients for ``ctx``'s grad_output, of which ``need`` names one.
    """
    grad_output, input, weight, *_ = ctx.saved_tensors
    grad_grad_input, grad_grad_weight, grad_grad_bias = grad_grads
    need_input, need_weight, need_bias = ctx.need
    for_grad_output = for_input = for_weight = None
    if ctx.needs_input_grad[0]:
        terms = []
        if need_input:
            terms.append(convolve(grad_grad_input, weight))
        if need_weight:
            terms.append(convolve(input, grad_grad_weight))
        if need_bias:
            terms.append(grad_grad_bias[:, None, None].expand_as(grad_output))
        for_grad_output = sum(terms[1:], terms[0])
    if ctx.needs_input_grad[1] and need_weight:
        for_input = transpose(input, grad_grad_weight, "input")[0]
    if ctx.needs_input_grad[2] and need_input:
        for_weight = transpose(grad_grad_input, weight, "weight")[1]
    return for_grad_output, for_input, for_weight


def why_not(
    backend, algorithm, input, weight, stride, padding, dilation, groups, fused=False, *, transposed=False
) -> str | None:
    """Which condition of an algorithm a convolution, or a transposed one, fails; None if none."""
    channels, filters = weight.shape[1], weight.shape[0] // groups
    if transposed:
        channels, filters = filters, channels
    kernel = f"a {weight.shape[2]}x{weight.shape[3]} weight"
    phases = stride[0] * stride[1]
    by_phase = {"cpu": ("direct", "im2col", "grouped"), "triton": ("implicit_gemm", None)}
    if phases > MOST_PHASES and algorithm in by_phase.get(backend, ()):
        which = f"algorithm={algorithm!r}" if algorithm else f"backend={backend!r}"
        return (
            f"{which} splits the input's gradient into stride[0] * stride[1] phases, "
            f"at most {MOST_PHASES}, got stride={tuple(stride)}"
        )
    winograd = algorithm is not None and algorithm.startswith("winograd")
    if winograd and (*weight.shape[2:], *stride, *dilation) != (3, 3, 1, 1, 1, 1):
        return (
            f"algorithm={algorithm!r} needs a 3x3 weight, stride 1 and dilation 1, got {kernel}, "
            f"stride={tuple(stride)}, dilation={tuple(dilation)}"
        )
    if algorithm == "grouped" and (channels > NARROW or filters > NARROW):
        return (
            f"algorithm='grouped' needs at most {NARROW} channels and filters in a group, got "
            f"{channels} and {filters}"
        )
    if algorithm == "implicit_gemm" and backend in ("cuda", "emulator"):
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"algorithm='implicit_gemm' multiplies float16 and bfloat16, got {weight.dtype}"
        if channels % 8 or filters % 8:
            return (
                "algorithm='implicit_gemm' needs a multiple of 8 channels and of 8 filters in a group, got "
                f"{channels} and {filters}"
            )
    if algorithm == "pointwise" and (
        any(value != 1 for value in (*weight.shape[2:], *stride)) or any(value != 0 for value in padding)
    ):
        return (
            f"algorithm='pointwise' needs a 1x1 weight, stride 1 and no padding, got {kernel}, "
            f"stride={tuple(stride)}, padding={tuple(padding)}"
        )
    return None


def serves(
    why_not: Callable[..., str | None], op: Any, algorithm: str | None, input: Any, *rest: Any
) -> bool:
    """Whether an operator's overload can run an algorithm on these arguments."""
    backend = input.device.type if op._overloadname == "default" else op._overloadname
    return algorithm is None or why_not(backend, algorithm, input, *rest) is None


def autocast_but(position: int) -> Callable[[str, Sequence[Any]], list[Any]]:
    """``torch.autocast`` for arguments of which one is packed weights.

    Packed for another type than the weight will have, they are of no use; packed again, of the right one.
    """

    def cast(device_type: str, arguments: Sequence[Any]) -> list[Any]:
        values = autocast(device_type, arguments)
        values[position] = arguments[position] if values[1].dtype == arguments[1].dtype else None
        return values

    return cast


def define_pack_weight(name: str, schema: str) -> None:
    """Defines ``torch.ops.fastconv.<name>``, which returns packed weights: 1-D, without a gradient."""
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastconv, name).default

    def fake(weight, *_):
        size = torch.library.get_ctx().new_dynamic_size()  # the kernel's own business
        return weight.new_empty(size, dtype=torch.promote_types(weight.dtype, torch.float32))

    def no_gradient(weight, *rest):
        with torch._C._AutoDispatchBelowAutograd():
            return op(weight, *rest)

    torch.library.register_fake(f"fastconv::{name}", fake, lib=library)
    library.impl(name, no_gradient, "Autograd")

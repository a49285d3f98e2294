"""Shift: each channel moves by whole pixels of its own; what comes from outside is zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from ._arguments import check_tensor, integer
from ._operator import (
    Operator,
    as_memory_format,
    fold_images,
    memory_format_of,
    new_output,
)

# Beyond every image, and so like every larger number.
FAR = (1 << 63) - 1


def shift2d_reference(
    input: torch.Tensor,  # (N, C, H, W)
    offsets: torch.Tensor,  # (C, 2): rows (dh, dw)
) -> torch.Tensor:
    """The definition: y[n, c, h, w] = x[n, c, h + dh[c], w + dw[c]], zero outside."""
    height, width = input.shape[2:]
    # Channels, rows and columns that are read, as (C, H, W).
    channels = torch.arange(input.shape[1], device=input.device)[:, None, None]
    dh, dw = offsets.to(input.device, torch.int64)[:, :, None, None].unbind(1)
    rows = torch.arange(height, device=input.device)[:, None] + dh.clamp(-height, height)
    columns = torch.arange(width, device=input.device) + dw.clamp(-width, width)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    values = input[:, channels, rows.clamp(0, max(height - 1, 0)), columns.clamp(0, max(width - 1, 0))]
    return torch.where(inside, values, 0)


def shift2d(
    input: torch.Tensor,
    offsets: torch.Tensor | Sequence[Sequence[int]],
    *,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Shift: each channel's image is read from a place ``(dh, dw)`` pixels away.

    ``y[n, c, h, w] = x[n, c, h + dh[c], w + dw[c]]``, zero where that is outside.

    Equal to a depthwise convolution with one 1 in each filter, without its arithmetic. The gradient is the
    shift by the opposite offsets; ``torch.autocast`` leaves the type alone.
    The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 or float64.
        offsets: ``(C, 2)``, rows ``(dh, dw)`` in pixels, of any size and sign: a tensor of integers, best
            of int64 on the CPU, where the kernels want it; or a sequence of pairs. They get no gradient.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend: ``"vectorized"``, ``"plain"`` on the CPU; ``"tiled"``,
            ``"plain"`` in CUDA; ``"plain"`` in Triton.

    Returns:
        ``(N, C, H, W)``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141.
    """
    check_tensor("input", input, rank=4)
    offsets = as_offsets(offsets)
    check_offsets(offsets, input.shape[1])
    backend = choose(backend, algorithm, input, offsets)
    if backend == "reference":
        return as_memory_format(shift2d_reference(input, offsets), memory_format_of(input))
    return operator(backend, input, offsets, algorithm)


def as_offsets(offsets: object) -> torch.Tensor:
    """Offsets as int64 on the CPU."""
    if isinstance(offsets, torch.Tensor):
        if offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
            raise TypeError(f"offsets must be integers, got a tensor of {offsets.dtype}")
        if offsets.layout != torch.strided or offsets.is_nested or offsets.device.type == "meta":
            kind = "nested" if offsets.is_nested else f"{offsets.layout} on {offsets.device}"
            raise TypeError(f"offsets must be a strided tensor with values, got one that is {kind}")
        whole = offsets.to("cpu", torch.int64)
        if offsets.dtype == torch.uint64:  # what did not fit has become negative
            whole = whole.masked_fill(whole < 0, FAR)
        return whole
    try:
        rows = [tuple(row) for row in offsets]
    except TypeError:
        raise TypeError(
            f"offsets must be a tensor of integers or a sequence of pairs (dh, dw), got {offsets!r}"
        ) from None
    for channel, row in enumerate(rows):
        if len(row) != 2:
            raise ValueError(f"offsets must have a pair (dh, dw) for each channel, got {row} at {channel}")
        if any(isinstance(v, bool) or isinstance(v, torch.Tensor) and v.dtype == torch.bool for v in row):
            raise TypeError(f"offsets[{channel}] must be integers (dh, dw), got {row}")
    pairs = [
        [max(-FAR, min(FAR, integer(f"offsets[{channel}]", value, least=-(10**99)))) for value in row]
        for channel, row in enumerate(rows)
    ]
    return torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)


def check_offsets(offsets: torch.Tensor, channels: int) -> None:
    if offsets.dim() != 2 or offsets.shape[0] != channels or offsets.shape[1] != 2:
        raise ValueError(
            f"offsets must have shape ({channels}, 2), a pair for each of input's channels, "
            f"got {tuple(offsets.shape)}"
        )


def check_offsets_placed(offsets: torch.Tensor) -> None:
    """Raises unless offsets are as :func:`as_offsets` returns them, for operators called by themselves."""
    if offsets.dtype != torch.int64 or offsets.device.type != "cpu":
        raise TypeError(f"offsets must be int64 on the CPU, got {offsets.dtype} on {offsets.device}")


def _check(input: torch.Tensor, offsets: torch.Tensor, algorithm: str | None) -> None:
    check_tensor("input", input, rank=4)
    check_offsets(offsets, input.shape[1])
    check_offsets_placed(offsets)
    choose.check_algorithm("triton", algorithm)


choose = Choice(
    "shift2d",
    algorithms={
        "cpu": ("vectorized", "plain"),
        "cuda": ("tiled", "plain"),
        "emulator": ("tiled", "plain"),
        "triton": ("plain",),
        "reference": (),
    },
)


def _fake(input, offsets, algorithm):
    return new_output(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, offsets, ctx.algorithm = inputs
    ctx.save_for_backward(offsets)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (offsets,) = ctx.saved_tensors
    return shift_back(ctx.backend, grad, offsets, ctx.algorithm), None, None


def shift_back(
    backend: str, grad: torch.Tensor, offsets: torch.Tensor, algorithm: str | None
) -> torch.Tensor:
    """The gradient of a shift: the shift by the opposite offsets."""
    # The least integer has no opposite in 64 bits; itself is as far outside.
    return operator(backend, grad, -offsets, algorithm)


operator = Operator(
    "shift2d",
    "(Tensor input, Tensor offsets, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=fold_images,
    flops=lambda *_, out_shape: 0,
    check=_check,
    triton="shift2d:shift2d_forward_triton",
    autocast=None,
)

Shift2dFunction = operator.function()

"""Temporal shift: some channels of each frame of a clip change places with the next frame and the last."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import Choice
from ._arguments import check_tensor, integer
from ._operator import (
    InplaceOperator,
    Operator,
    as_memory_format,
    fold_into_batch,
    memory_format_of,
    new_output,
)


def temporal_shift_reference(
    input: torch.Tensor,  # (B*T, C, H, W)
    segments: int,  # T
    fold_div: int = 8,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """The definition: C // fold_div channels of the next frame, as many of the one before, the rest stay."""
    fold = input.shape[1] // fold_div
    clips = input.unflatten(0, (input.shape[0] // segments, segments))  # (B, T, C, H, W)
    nothing = torch.zeros_like(clips[:, :1])
    before = torch.cat([nothing, clips[:, :-1]], 1)
    after = torch.cat([clips[:, 1:], nothing], 1)
    if causal:
        parts = [before[:, :, :fold], clips[:, :, fold:]]
    else:
        parts = [after[:, :, :fold], before[:, :, fold : 2 * fold], clips[:, :, 2 * fold :]]
    return torch.cat(parts, 2).flatten(0, 1)


def temporal_shift(
    input: torch.Tensor,
    segments: int,
    fold_div: int = 8,
    *,
    causal: bool = False,
    inplace: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Temporal shift: frames of a video exchange some of their channels.

    With ``x[t]`` frame t of a clip of T, and ``fold = C // fold_div``:
    ``y[t, c] = x[t + 1, c]`` for the first fold of channels, ``x[t - 1, c]`` for the second,
    ``x[t, c]`` for the others; zero where a clip has no such frame.
    Causal, nothing comes from the future: ``y[t, c] = x[t - 1, c]`` for the first fold, ``x[t, c]`` for the
    others.

    The gradient is the shift by the opposite steps; ``torch.autocast`` leaves the type alone.
    The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(B*T, C, H, W)``, the frames of a clip one after the other; float32, bfloat16, float16 or
            float64.
        segments: T, the frames of a clip; a divisor of ``B*T``.
        fold_div: one of so many channels moves, in each direction; at least 2, or 1 if causal. Where it is
            more than C, nothing moves.
        causal: whether channels come from the frame before only.
        inplace: whether the input is overwritten; only the channels that move are touched, where it is dense.
            Not where it requires a gradient.
        backend: see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend: ``"vectorized"``, ``"plain"`` on the CPU and in CUDA;
            ``"plain"`` in Triton.

    Returns:
        ``(B*T, C, H, W)``; the input itself, if ``inplace``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        RuntimeError: ``inplace``, and the input requires a gradient, or its elements share memory (expand).
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Lin, Gan, Han, "TSM: Temporal Shift Module for Efficient Video Understanding", 2019,
    arXiv:1811.08383.
    """
    check_tensor("input", input, rank=4)
    segments, fold_div = check_shift(segments, fold_div, causal, inplace)
    _check_segments(input, segments)
    if inplace:
        _check_overwritable(input)
    backend = choose(backend, algorithm, input)
    if backend == "reference":
        output = temporal_shift_reference(input, segments, fold_div, causal=causal)
        return input.copy_(output) if inplace else as_memory_format(output, memory_format_of(input))
    fold, step = input.shape[1] // fold_div, -1 if causal else 1
    if inplace:
        inplace_operator(backend, input, segments, fold, step, not causal, algorithm)
        return input
    return operator(backend, input, segments, fold, step, not causal, algorithm)


def check_shift(segments: int, fold_div: int, causal: bool, inplace: bool) -> tuple[int, int]:
    """``segments`` and ``fold_div`` as integers; raises where an argument is wrong for any input."""
    for name, value in (("causal", causal), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    segments, fold_div = integer("segments", segments), integer("fold_div", fold_div)
    if fold_div == 1 and not causal:
        raise ValueError("fold_div must be at least 2 where channels move both ways (causal=False), got 1")
    return segments, fold_div


def _check_segments(input: torch.Tensor, segments: int) -> None:
    if segments < 1 or input.shape[0] % segments:
        raise ValueError(f"segments must divide input's {input.shape[0]} frames, got {segments}")


def _check_overwritable(input: torch.Tensor) -> None:
    if input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("inplace must be False where input requires a gradient, got True")
    compiling = torch.compiler.is_compiling()
    if not compiling and input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("inplace must be False for an inference tensor outside inference_mode, got True")
    if _may_share_memory(input):
        raise RuntimeError("inplace must be False where input's elements share memory (expand), got True")


def _may_share_memory(input: torch.Tensor) -> bool:
    """Whether its strides do not prove that every element has a place of its own."""
    steps = [(stride, size) for stride, size in zip(input.stride(), input.shape) if size > 1]
    if torch.compiler.is_compiling():  # sorting would make a graph for each order of the sizes
        return any(stride == 0 for stride, _ in steps)
    reach = 0
    for stride, size in sorted(steps):
        if stride <= reach:
            return input.numel() > 0
        reach += stride * (size - 1)
    return False


def _check(
    input: torch.Tensor, segments: int, fold: int, step: int, both: bool, algorithm: str | None
) -> None:
    check_tensor("input", input, rank=4)
    _check_segments(input, segments)
    most = input.shape[1] // (2 if both else 1)
    if not 0 <= fold <= most:
        raise ValueError(f"fold must be from 0 to {most}, got {fold}")
    if step not in (1, -1):
        raise ValueError(f"step must be 1 or -1, got {step}")
    choose.check_algorithm("triton", algorithm)


choose = Choice(
    "temporal_shift",
    algorithms={
        "cpu": ("vectorized", "plain"),
        "cuda": ("vectorized", "plain"),
        "emulator": ("vectorized", "plain"),
        "triton": ("plain",),
        "reference": (),
    },
)


def _fake(input, segments, fold, step, both, algorithm):
    return new_output(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.segments, ctx.fold, ctx.step, ctx.both, ctx.algorithm = inputs


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    shifted = operator(ctx.backend, grad, ctx.segments, ctx.fold, -ctx.step, ctx.both, ctx.algorithm)
    return shifted, None, None, None, None, None


# The first `fold` channels come from frame t + step, the next ones, where both folds move, from t - step.
operator = Operator(
    "temporal_shift",
    "(Tensor input, SymInt segments, SymInt fold, int step, bool both, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=fold_into_batch,
    flops=lambda *_, out_shape: 0,
    check=_check,
    triton="temporal_shift:temporal_shift_forward_triton",
    autocast=None,
)

inplace_operator = InplaceOperator(
    "temporal_shift_",
    "(Tensor(a!) input, SymInt segments, SymInt fold, int step, bool both, str? algorithm) -> ()",
    check=_check,
    triton="temporal_shift:temporal_shift_in_place_triton",
)

TemporalShiftFunction = operator.function()

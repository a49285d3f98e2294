"""Channel shuffle: after it, each group of channels holds some of every group before."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import Choice
from . import _plans
from ._arguments import DTYPES, check_tensor, integer
from ._operator import Operator, as_memory_format, fold_into_batch, memory_format_of, new_output


def channel_shuffle_reference(
    input: torch.Tensor,  # (N, C, H, W)
    groups: int,  # G, a divisor of C
) -> torch.Tensor:
    """The definition: the channels as a matrix of G rows, read by its columns."""
    channels = torch.arange(input.shape[1], device=input.device)
    return input[:, channels.view(groups, input.shape[1] // groups).t().flatten()]


def channel_shuffle(
    input: torch.Tensor,
    groups: int,
    *,
    backend: str | None = None,
    algorithm: str | None = None,
) -> torch.Tensor:
    """Channel shuffle: channels seen as ``(G, C/G)``, transposed, and flattened again.

    ``y[n, k*G + g, h, w] = x[n, g*(C/G) + k, h, w]``.

    The same as ``torch.nn.functional.channel_shuffle`` on images, bit for bit. The gradient is the shuffle
    with C/G groups; ``torch.autocast`` leaves the type alone.
    The output has the memory format of the input, contiguous or channels_last.

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 or float64.
        groups: G, a divisor of C.
        backend: see :mod:`fastconv.backends`; None takes the measured best; on the CPU that is PyTorch's
            own, but for channels_last with 3 groups, or 3 channels in each, and 2, 4 or 8 if not float32.
        algorithm: a kernel of the backend: ``"vectorized"``, ``"plain"`` on the CPU; ``"tiled"``,
            ``"plain"`` in CUDA; ``"plain"`` in Triton.

    Returns:
        ``(N, C, H, W)``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend or algorithm cannot run this call; the message says why.

    Reference: Zhang et al., "ShuffleNet", 2017, arXiv:1707.01083.
    """
    key = _plans.key_of("channel_shuffle", (input, None), groups, backend, algorithm)
    plan = _plans.find(key)
    if plan is None:
        groups = integer("groups", groups)
        _check(input, groups)
        plan = _plans.keep(key, (choose(backend, algorithm, input, groups), groups))
    backend, groups = plan
    if backend == "aten":
        return torch.nn.functional.channel_shuffle(input, groups)
    if backend == "reference":
        return as_memory_format(channel_shuffle_reference(input, groups), memory_format_of(input))
    return operator(backend, input, groups, algorithm)


def _check(input: torch.Tensor, groups: int, algorithm: str | None = None) -> None:
    check_tensor("input", input, rank=4)
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(f"groups must divide input's {input.shape[1]} channels, got {groups}")
    choose.check_algorithm("triton", algorithm)


def _prefer(input: torch.Tensor, groups: int) -> tuple[str, ...]:
    if input.device.type == "cuda":
        return "cuda", "triton"
    if memory_format_of(input) == torch.channels_last:
        # Of the groups that the vectorized kernel interleaves, those where PyTorch's transpose is slower.
        sizes = (3,) if input.dtype == torch.float32 else (2, 3, 4, 8)
        if groups in sizes or input.shape[1] in [groups * size for size in sizes]:
            return ("cpu",)
    return "aten", "cpu"


def _why_not(backend: str, algorithm: str | None, input: torch.Tensor, groups: int) -> str | None:
    if backend != "aten" and input.dtype not in DTYPES:
        return f"no kernel for {str(input.dtype).removeprefix('torch.')}"
    if backend == "aten" and input.shape[1] == 0:
        return "the gradient of PyTorch's shuffle needs at least one channel"
    return None


choose = Choice(
    "channel_shuffle",
    algorithms={
        "cpu": ("vectorized", "plain"),
        "cuda": ("tiled", "plain"),
        "emulator": ("tiled", "plain"),
        "triton": ("plain",),
        "aten": (),
        "reference": (),
    },
    prefer=_prefer,
    why_not=_why_not,
)


def _fake(input, groups, algorithm):
    return new_output(input, input.shape)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, groups, ctx.algorithm = inputs
    ctx.per_group = max(input.shape[1] // groups, 1)  # without channels, any number of groups


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return operator(ctx.backend, grad, ctx.per_group, ctx.algorithm), None, None


operator = Operator(
    "channel_shuffle",
    "(Tensor input, SymInt groups, str? algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=fold_into_batch,
    flops=lambda *_, out_shape: 0,
    check=_check,
    triton="channel_shuffle:channel_shuffle_forward_triton",
    autocast=None,
)

ChannelShuffleFunction = operator.function()

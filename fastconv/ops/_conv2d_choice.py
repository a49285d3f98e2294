"""Which kernel runs a convolution: the conditions of each, and the one that is taken where none is named.

Arguments are those of ``torch.ops.fastconv.conv2d``, in their normal forms: pairs, and four sides of padding.
The rule of the C++ kernels was measured against PyTorch's own; ``docs/conv2d.md`` has the figures.
"""

from __future__ import annotations

import torch

from .. import _library
from ..backends import Choice
from ..precision import get_precision
from . import _convolution
from ._operator import memory_format_of

CPU_ALGORITHMS = ("direct", "im2col", "winograd_f2", "winograd_f4", "winograd_f6", "grouped", "plain")
CUDA_ALGORITHMS = ("implicit_gemm", "direct", "im2col")

# Multiply-adds from which on a call is worth the microseconds that it takes before it computes.
_LEAST, _LEAST_CHANNELS_LAST = 1 << 20, 1 << 22


def _has_wide_vectors() -> bool:
    host = _library.host()
    try:
        return host is not None and host.cpu_capability() != "portable"
    except RuntimeError:  # FASTCONV_CPU_CAPABILITY names none; the kernels will say so
        return True


WIDE_VECTORS = _has_wide_vectors()  # a constant, for torch.compile to trace

# Winograd's weights, four times as many, are made in each call of training: worth it from so many pixels,
# with many channels from fewer.
_TRAINING_PIXELS, _TRAINING_PIXELS_OF_MANY, _MANY = 512, 192, 128


def fastest(source, target, pixels, input, weight, stride, dilation, groups, fused=False) -> str | None:
    """The fastest C++ kernel of a pass, or None where PyTorch's own is faster.

    Args:
        source, target: channels of a group that the pass reads, and that it writes.
        pixels: of all images, on the side of the convolution's output.
        fused: an activation or a residual follows, for which PyTorch takes another pass over the output.
    """
    if not WIDE_VECTORS or stride[0] * stride[1] > _convolution.MOST_PHASES:
        return None
    taps, plane = weight.shape[2] * weight.shape[3], input.shape[2] * input.shape[3]
    channels_last = memory_format_of(input) == torch.channels_last
    training = weight.requires_grad and torch.is_grad_enabled()
    if pixels * weight.shape[0] * source * taps < (_LEAST_CHANNELS_LAST if channels_last else _LEAST):
        return None
    rival = weight.dtype in (torch.float32, torch.bfloat16)  # for others PyTorch has no fast kernels
    if groups > 1 and source <= _convolution.NARROW and target <= _convolution.NARROW:
        narrow = source <= 8 and target <= 8 and (channels_last or pixels >= 2048)
        return "grouped" if narrow or not rival else None
    if (
        get_precision() == "fast"
        and weight.dtype != torch.float64
        and (weight.shape[2], weight.shape[3]) == (3, 3)
        and tuple(stride) == tuple(dilation) == (1, 1)
        and source >= 16
        and target >= 16
        and (
            not training
            or pixels >= _TRAINING_PIXELS
            or (pixels >= _TRAINING_PIXELS_OF_MANY and min(source, target) >= _MANY)
        )
    ):
        return "winograd_f4"
    if groups > 1 and taps == 1 and not channels_last and weight.dtype == torch.float32:
        return "im2col" if plane > 100 else "direct"
    algorithm = "im2col" if _lanes_are_pixels(channels_last, taps, source, target) else "direct"
    if not rival:
        return algorithm
    if taps > 1:
        wins = source * taps >= 64
    elif channels_last and training:
        wins = plane <= 100 and min(source, target) >= 512
    elif channels_last:
        wins = source >= 1024 or plane <= 100
        if weight.dtype == torch.float32 and min(source, target) >= 64:
            wins = wins or fused or source >= 256 or plane <= 196
    else:
        wins = plane >= (3136 if training else 784)
    if channels_last:
        wins = wins and target >= 16 and (source >= 16 or weight.dtype != torch.bfloat16)
    else:
        wins = wins and weight.dtype != torch.bfloat16
    if training and algorithm == "direct" and taps > 1:
        wins = False  # packing in each call takes what the kernel gains
    return algorithm if wins else None


def _lanes_are_pixels(channels_last: bool, taps: int, source: int, target: int) -> bool:
    """Whether vectors of pixels beat vectors of filters."""
    return not channels_last and (taps == 1 or target < 32 or source < 16)


def gradients_algorithm(backend: str, algorithm: str | None, input, weight, stride, groups) -> str | None:
    """conv2d's kernel for the gradients of group_conv2d_shuffle and shift_conv2d, which are conv2d's."""
    if backend != "cpu":
        return None
    if algorithm == "plain" or default_for(stride) == "plain":
        return "plain"
    channels_last = memory_format_of(input) == torch.channels_last
    source, target = weight.shape[1], weight.shape[0] // groups
    taps = weight.shape[2] * weight.shape[3]
    return "im2col" if _lanes_are_pixels(channels_last, taps, source, target) else "direct"


def default_for(stride) -> str:
    """The kernel for ``backend="cpu"`` where PyTorch's own would be faster."""
    return "direct" if stride[0] * stride[1] <= _convolution.MOST_PHASES else "plain"


def prefer(cpu_algorithm: str | None, input: torch.Tensor) -> tuple[str, ...]:
    """The backends for ``backend=None``, the best first."""
    if input.device.type == "cuda":
        return "aten", "cuda", "triton"  # until ours are measured on a GPU
    return ("aten", "cpu") if cpu_algorithm is None else ("cpu", "aten")


def cpu_algorithm(input, weight, stride, padding, dilation, groups, fused=False) -> str | None:
    pixels = input.shape[0] * (input.shape[2] // stride[0]) * (input.shape[3] // stride[1])
    source, target = weight.shape[1], weight.shape[0] // groups
    return fastest(source, target, pixels, input, weight, stride, dilation, groups, fused)


def _prefer(input, weight, stride, padding, dilation, groups, fused=False) -> tuple[str, ...]:
    return prefer(cpu_algorithm(input, weight, stride, padding, dilation, groups, fused), input)


choose = Choice(
    "conv2d",
    algorithms={
        "cpu": CPU_ALGORITHMS,
        "cuda": CUDA_ALGORITHMS,
        "emulator": CUDA_ALGORITHMS,
        "triton": ("implicit_gemm", "pointwise"),
        "aten": ("convolution", "unfold"),
        "reference": (),
    },
    prefer=_prefer,
    why_not=_convolution.why_not,
)


def default_algorithm(input, weight, stride, padding, dilation, groups, fused=False) -> str:
    """The C++ kernel where a call names none."""
    return cpu_algorithm(input, weight, stride, padding, dilation, groups, fused) or default_for(stride)

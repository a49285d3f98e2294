"""The block of shift networks: a 1x1 convolution, a shift and a 1x1 convolution, added to the input."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import relu

from ..ops._arguments import integer, pair
from ._rules import check_backend
from .conv2d import Conv2d
from .shift_conv2d import ShiftConv2d


class CSC(nn.Module):
    """Conv-shift-conv: what shift networks have in place of 3x3 convolutions.

    ``y = relu(bn2(conv2(shift(relu(bn1(conv1(x))))))) + shortcut(x)``. Both convolutions are 1x1; pixels meet
    their neighbours in the shift alone, which has no parameters and no multiplications. The shortcut is the
    input, or where the shape changes a 1x1 convolution of that stride and a batch normalization.

    Args:
        in_channels: C of the input.
        out_channels: M.
        stride: of ``conv2``, after the shift; one integer or two.
        expansion: ``int(expansion * M)`` channels are shifted.
        kernel_size, dilation: the shift's window, see :class:`Shift2d`.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Shape: ``(N, C, H, W)`` to ``(N, M, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141; in the form of the authors' networks for CIFAR.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        expansion: float = 1,
        kernel_size: int | tuple[int, int] = 3,
        dilation: int | tuple[int, int] = 1,
        *,
        backend: str | None = None,
    ) -> None:
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        stride = pair("stride", stride)
        check_backend(backend)
        shifted = expanded(out_channels, expansion)
        super().__init__()
        self.conv1 = Conv2d(in_channels, shifted, 1, bias=False, backend=backend)
        self.bn1 = nn.BatchNorm2d(shifted)
        self.conv2 = ShiftConv2d(
            shifted, out_channels, kernel_size, stride, dilation, bias=False, backend=backend
        )
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != (1, 1) or in_channels != out_channels:
            self.shortcut.append(Conv2d(in_channels, out_channels, 1, stride, bias=False, backend=backend))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = relu(self.bn1(self.conv1(input)), inplace=True)
        output = relu(self.bn2(self.conv2(output)), inplace=True)
        return output + self.shortcut(input)


def expanded(channels: int, expansion: float) -> int:
    """``int(expansion * channels)``, the channels that a block shifts."""
    if not isinstance(expansion, (int, float)) or not math.isfinite(expansion) or expansion * channels < 1:
        raise ValueError(
            f"expansion must be a number that leaves a channel to shift, got {expansion!r} for {channels} "
            "channels"
        )
    return int(expansion * channels)

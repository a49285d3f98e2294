"""Shift as a module: the paper's assignment of channels to directions, or offsets of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..ops._arguments import integer, pair
from ..ops.shift2d import as_offsets, check_offsets, shift2d
from ._rules import check_backend


class Shift2d(nn.Module):
    """Shift: each channel's image moves by whole pixels of its own. No parameters, and no multiplications.

    ``y[n, c, h, w] = x[n, c, h + dh[c], w + dw[c]]``, zero outside. Without ``offsets`` as in the paper: a
    run of ``C // (KH * KW)`` channels for each place of a window, row by row; those that are left over join
    the middle, which does not move.

    Args:
        channels: C.
        kernel_size: the window, KH x KW, odd; one integer or two.
        dilation: pixels between its places; one integer or two.
        offsets: ``(C, 2)`` integers, rows ``(dh, dw)`` in pixels, in place of a window's. They are settings,
            like the window: neither moved by ``to()`` nor in the state_dict.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Shape: ``(N, C, H, W)`` to the same; float32, bfloat16, float16 or float64.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        dilation: int | tuple[int, int] = 1,
        *,
        offsets: torch.Tensor | Sequence[Sequence[int]] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels)
        self.kernel_size, self.dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
        check_backend(backend)
        self.backend = backend
        self.has_own_offsets = offsets is not None
        self.offsets = offsets_of(self.channels, self.kernel_size, self.dilation, offsets)
        self.extent = extent_of(self.offsets)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return shift2d(input, self.offsets, backend=self.backend)

    def extra_repr(self) -> str:
        if self.has_own_offsets:
            own = [f"{self.channels}", "offsets=..."]
        else:
            own = [f"{self.channels}", f"kernel_size={self.kernel_size}"]
            own += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        own += [f"backend={self.backend!r}"] if self.backend else []
        return ", ".join(own)


def offsets_of(
    channels: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    offsets: torch.Tensor | Sequence[Sequence[int]] | None,
) -> torch.Tensor:
    """The given offsets, checked, or those of a window, as :class:`Shift2d` has them."""
    if offsets is not None:
        own = as_offsets(offsets).clone()
        check_offsets(own, channels)
        return own
    (height, width), (dh, dw) = kernel_size, dilation
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"kernel_size must be odd, or its window has no middle; got {kernel_size}")
    places = height * width
    if channels < places:
        raise ValueError(
            f"channels must be at least {places}, one for each place of a {height}x{width} window, "
            f"got {channels}: take a smaller kernel_size, or give offsets"
        )
    run, rest = divmod(channels, places)
    pairs = []
    for place in range(places):
        row, column = place // width - height // 2, place % width - width // 2
        pairs += [(row * dh, column * dw)] * (run + (rest if place == places // 2 else 0))
    return as_offsets(pairs)


def extent_of(offsets: torch.Tensor) -> tuple[int, int]:
    """The rows and columns that an output's channels come from, all together."""
    rows, columns = zip(*offsets.tolist())
    return max(rows) - min(rows) + 1, max(columns) - min(columns) + 1

"""Channel shuffle as a module, and what takes its place in models written for PyTorch alone."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._arguments import DTYPES, integer
from ..ops._operator import PLAIN
from ..ops.channel_shuffle import channel_shuffle, choose
from ._rules import check_backend, no_kernel, replaces, serves


@replaces(nn.ChannelShuffle, op="channel_shuffle")
class ChannelShuffle(nn.ChannelShuffle):
    """Channel shuffle: ``torch.nn.ChannelShuffle``, bit for bit. It has no parameters.

    ``y[n, k*G + g, ...] = x[n, g*(C/G) + k, ...]``: the channels as ``(G, C/G)``, transposed.
    Input and output are ``(N, C, *)`` with at least one more dimension: images, sequences or volumes. Kernels
    serve float32, bfloat16, float16 and float64; other types run on ``"aten"`` alone.

    Args:
        groups: G, a divisor of C.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Zhang et al., "ShuffleNet", 2018, arXiv:1707.01083.
    """

    # On the class, so that a torch.nn.ChannelShuffle whose class is changed has it too.
    backend: str | None = None

    def __init__(self, groups: int, *, backend: str | None = None) -> None:
        groups = integer("groups", groups)
        check_backend(backend)
        super().__init__(groups)
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype not in DTYPES:
            self.kernel(input)  # raises if a backend is named that is not aten
            return super().forward(input)
        if input.dim() != 4:
            images = _as_images(input)
            return channel_shuffle(images, self.groups, backend=self.backend).view(input.shape)
        return channel_shuffle(input, self.groups, backend=self.backend)

    def why_not(self) -> str | None:
        """Why no kernel serves this module, whatever its input; None if one does."""
        return no_kernel("channel_shuffle", self.backend)

    def kernel(self, input: torch.Tensor) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        backend = choose(self.backend, None, _as_images(input), self.groups)
        return backend, next(iter(choose.algorithms[backend]), None)

    def extra_repr(self) -> str:
        own = [f"backend={self.backend!r}"] if self.backend else []
        return ", ".join([super().extra_repr(), *own])


def _as_images(input: torch.Tensor) -> torch.Tensor:
    """``(N, C, *)`` as ``(N, C, H, W)``; a view where the input is dense."""
    if input.dim() == 4:
        return input
    if input.dim() < 3:
        raise ValueError(f"input must have at least 3 dimensions (N, C, *), got shape {tuple(input.shape)}")
    return input.unsqueeze(-1).flatten(3)


@serves(torch.nn.functional.channel_shuffle)
def _serve(backend: str | None, input: torch.Tensor, groups: int):
    if type(input) not in PLAIN or input.layout != torch.strided:
        return None
    if input.dim() != 4 or input.dtype not in DTYPES:
        return None
    return lambda: channel_shuffle(input, groups, backend=backend)

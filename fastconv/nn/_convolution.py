"""What the convolution modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..backends import CHOICES
from ..ops._arguments import DTYPES
from ..ops._operator import PLAIN, autocast, is_autocast
from ._rules import no_kernel


class Convolution(_ConvNd):
    """A convolution of :mod:`torch.nn` with keywords of its own.

    These stand on the class too, so that a module of PyTorch whose class is changed has them.
    """

    op: str
    keywords: tuple[str, ...] = ("backend", "algorithm")
    backend: str | None = None
    algorithm: str | None = None

    def why_not(self) -> str | None:
        """Why no kernel serves this module, whatever its input; None if one does."""
        if self.weight.dtype not in DTYPES:
            return f"no kernel for {str(self.weight.dtype).removeprefix('torch.')} weights"
        if self.weight.numel() == 0:
            return f"no kernel for empty weights, of shape {tuple(self.weight.shape)}"
        return no_kernel(self.op, self.backend, self.weight)

    def extra_repr(self) -> str:
        own = [f"{name}={value!r}" for name in self.keywords if (value := getattr(self, name))]
        return ", ".join([super().extra_repr(), *own])

    def _images(self, input: torch.Tensor) -> tuple[torch.Tensor, int | str | tuple[int, ...]]:
        """The input as ``(N, C, H, W)``, and the zeros that are left to pad."""
        if input.dim() == 3:
            input = input.unsqueeze(0)
        if self.padding_mode == "zeros":
            return input, self.padding
        return nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def _kernel(
        self, images: torch.Tensor, *geometry: Any, default: Callable[..., str] | None = None
    ) -> tuple[str, str | None]:
        """The backend and the algorithm that run; ``default`` gives the C++ one, if it is not always one."""
        choose, weight = CHOICES[self.op], self.weight
        if is_autocast(images):
            images, weight = autocast(images.device.type, (images, weight))
        backend = choose(self.backend, self.algorithm, images, weight, *geometry)
        if self.algorithm is not None:
            return backend, self.algorithm
        if backend == "cpu" and default is not None:
            return backend, default(images, weight, *geometry)
        arguments = (images, weight, *geometry)
        serving = (a for a in choose.algorithms[backend] if choose.why_not(backend, a, *arguments) is None)
        return backend, next(serving, None)


def check_algorithm(op: str, backend: str | None, algorithm: str | None) -> None:
    """Raises unless the backend, or some backend if it is None, has the algorithm."""
    known = CHOICES[op].algorithms
    names = [name for own in ([backend] if backend in known else known) for name in known[own]]
    if algorithm is not None and algorithm not in names:
        raise ValueError(f"algorithm must be None or one of {tuple(names)}, got {algorithm!r}")


def is_depthwise(weight: torch.Tensor, groups: int) -> bool:
    """Whether a filter sees one channel of several."""
    return groups > 1 and weight.shape[1] == 1


def takes(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the tensors of a functional call are such as the kernels serve."""
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if not all(type(t) in PLAIN and t.layout == torch.strided for t in tensors):
        return False
    if input.device.type not in ("cpu", "cuda") or input.dim() != 4 or weight.dim() != 4:
        return False
    if weight.numel() == 0 or input.shape[1] == 0:
        return False
    same_dtype = is_autocast(input) or all(t.dtype == input.dtype for t in tensors)
    return same_dtype and all(t.dtype in DTYPES and t.device == input.device for t in tensors)

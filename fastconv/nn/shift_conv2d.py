"""Shift and 1x1 convolution as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops._arguments import pair
from ..ops.shift_conv2d import default_algorithm, shift_conv2d
from ._convolution import Convolution, check_algorithm
from ._rules import check_backend
from .shift2d import extent_of, offsets_of


class ShiftConv2d(Convolution, nn.Conv2d):
    """Shift, then 1x1 convolution: in place of a ``KH x KW`` one, with ``1 / (KH * KW)`` of its weights.

    ``y[n, m, e, f] = act(b[m] + sum_c x[n, c, e*s + dh[c], f*s + dw[c]] * w[m, c])``, zero outside: a
    :class:`Shift2d` and then a 1x1 :class:`Conv2d`, without the bytes that a shift moves. Parameters are
    those of the 1x1 convolution: ``weight`` ``(out_channels, in_channels, 1, 1)`` and ``bias``.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)`` or ``(C, H, W)``.
        out_channels: filters.
        kernel_size: of the window, KH x KW, odd; one integer or two. Channels go to its places as in
            :class:`Shift2d`. The module's own ``kernel_size`` is the weight's, 1x1.
        stride: pixels between outputs; one integer or two.
        dilation: pixels between the window's places; one integer or two.
        bias, device, dtype: as in ``torch.nn.Conv2d``.
        offsets: ``(C, 2)`` integers, rows ``(dh, dw)`` in pixels, in place of a window's. They are settings,
            like the window: neither moved by ``to()`` nor in the state_dict.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend, see :func:`fastconv.shift_conv2d`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: later, if the named backend or algorithm cannot run on an input.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141.
    """

    op = "shift_conv2d"
    keywords = ("activation", "backend", "algorithm")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        offsets: torch.Tensor | Sequence[Sequence[int]] | None = None,
        activation: str | None = None,
        backend: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        check_activation(activation)
        check_backend(backend)
        check_algorithm(self.op, backend, algorithm)
        super().__init__(
            in_channels, out_channels, 1, pair("stride", stride), bias=bias, device=device, dtype=dtype
        )
        self.window, self.dilated = pair("kernel_size", kernel_size), pair("dilation", dilation)
        self.has_own_offsets = offsets is not None
        self.offsets = offsets_of(self.in_channels, self.window, self.dilated, offsets)
        self.extent = extent_of(self.offsets)
        self.activation = activation
        self.backend = backend
        self.algorithm = algorithm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        images, _ = self._images(input)
        output = shift_conv2d(
            images,
            self.offsets,
            self.weight,
            self.bias,
            self.stride,
            activation=self.activation,
            backend=self.backend,
            algorithm=self.algorithm,
        )
        return output if input.dim() == 4 else output.squeeze(0)

    def kernel(self, input: torch.Tensor) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        images, _ = self._images(input)
        return self._kernel(images, self.stride, default=default_algorithm)

    def extra_repr(self) -> str:
        own = ["offsets=..."] if self.has_own_offsets else [f"window={self.window}"]
        if not self.has_own_offsets and self.dilated != (1, 1):
            own.append(f"dilated={self.dilated}")
        return ", ".join([super().extra_repr(), *own])

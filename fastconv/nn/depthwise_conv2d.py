"""Depthwise convolution as a module, and what takes its place in models written for PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops._arguments import DTYPES
from ..ops.depthwise_conv2d import choose, depthwise_conv2d
from ._rules import check_backend, no_kernel, replaces, serves


@replaces(nn.Conv2d, op="depthwise_conv2d", where=lambda module: module.groups == module.in_channels > 1)
class DepthwiseConv2d(nn.Conv2d):
    """Depthwise 2-D convolution: ``torch.nn.Conv2d(..., groups=in_channels)`` with an activation folded in.

    Parameters, initial values and state_dict keys are those of ``torch.nn.Conv2d``: ``weight``
    ``(out_channels, 1, KH, KW)`` and ``bias`` ``(out_channels,)``.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)`` or ``(C, H, W)``.
        out_channels: a multiple of ``in_channels``; None: as many.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as in ``torch.nn.Conv2d``.
            A ``padding_mode`` other than ``"zeros"`` pads in a step of its own.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Raises:
        ValueError: an argument is wrong; the message names it and says what is allowed.

    Reference: Howard et al., "MobileNets", 2017, arXiv:1704.04861.
    """

    # On the class, so that a torch.nn.Conv2d whose class is changed has them too.
    activation: str | None = None
    backend: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if out_channels is None:
            out_channels = in_channels
        if out_channels < 1 or out_channels % in_channels:
            raise ValueError(
                f"out_channels must be a multiple of in_channels={in_channels}, got {out_channels}"
            )
        check_activation(activation)
        check_backend(backend)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.backend = backend

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # torch.nn.Conv2d.forward calls this with self.weight and self.bias.
        if input.dim() == 3:
            return self._conv_forward(input.unsqueeze(0), weight, bias).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            sides = self._reversed_padding_repeated_twice
            input, padding = nn.functional.pad(input, sides, mode=self.padding_mode), 0
        return depthwise_conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            activation=self.activation,
            backend=self.backend,
        )

    def why_not(self) -> str | None:
        """Why no kernel serves this module, whatever its input; None if one does."""
        if self.weight.dtype not in DTYPES:
            return f"no kernel for {str(self.weight.dtype).removeprefix('torch.')} weights"
        return no_kernel("depthwise_conv2d", self.backend, self.weight)

    def kernel(self, input: torch.Tensor) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        backend = choose(self.backend, None, input, self.weight, self.stride, self.dilation)
        return backend, next(iter(choose.algorithms[backend]), None)

    def extra_repr(self) -> str:
        own = [f"{name}={value!r}" for name in ("activation", "backend") if (value := getattr(self, name))]
        return ", ".join([super().extra_repr(), *own])


@serves(torch.nn.functional.conv2d)
def _serve(
    backend: str | None,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
):
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if not all(type(t) in (torch.Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors):
        return None
    if input.dim() != 4 or weight.dim() != 4 or not groups == input.shape[1] > 1 or weight.shape[1] != 1:
        return None
    same_dtype = torch.is_autocast_enabled(input.device.type) or all(t.dtype == input.dtype for t in tensors)
    if not same_dtype or not all(t.dtype in DTYPES and t.device == input.device for t in tensors):
        return None
    return lambda: depthwise_conv2d(input, weight, bias, stride, padding, dilation, backend=backend)

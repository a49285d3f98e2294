"""Depthwise convolution as a module, and what takes its place in models written for PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops.depthwise_conv2d import depthwise_conv2d
from ._convolution import Convolution, is_depthwise, takes
from ._rules import check_backend, replaces, serves


@replaces(nn.Conv2d, op="depthwise_conv2d", where=lambda module: module.groups == module.in_channels > 1)
class DepthwiseConv2d(Convolution, nn.Conv2d):
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

    op = "depthwise_conv2d"
    keywords = ("activation", "backend")
    activation: str | None = None

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
        images, padding = self._images(input)
        output = depthwise_conv2d(
            images,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            activation=self.activation,
            backend=self.backend,
        )
        return output if input.dim() == 4 else output.squeeze(0)

    def kernel(self, input: torch.Tensor) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        return self._kernel(self._images(input)[0], self.stride, self.dilation)


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
    if not takes(input, weight, bias) or groups != input.shape[1] or not is_depthwise(weight, groups):
        return None
    return lambda: depthwise_conv2d(input, weight, bias, stride, padding, dilation, backend=backend)

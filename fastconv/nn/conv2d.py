"""Convolution as a module, and what takes its place in models written for PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops._arguments import padding_sides
from ..ops._conv2d_choice import default_algorithm
from ..ops.conv2d import conv2d
from ._convolution import Convolution, check_algorithm, is_depthwise, takes
from ._rules import check_backend, replaces, serves


@replaces(nn.Conv2d, op="conv2d", where=lambda module: not module.groups == module.in_channels > 1)
class Conv2d(Convolution, nn.Conv2d):
    """2-D convolution: ``torch.nn.Conv2d`` with an activation folded in.

    Parameters, initial values and state_dict keys are those of ``torch.nn.Conv2d``: ``weight``
    ``(out_channels, in_channels / groups, KH, KW)`` and ``bias`` ``(out_channels,)``.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)`` or ``(C, H, W)``.
        out_channels: filters.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in
            ``torch.nn.Conv2d``. A ``padding_mode`` other than ``"zeros"`` pads in a step of its own.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend, see :func:`fastconv.conv2d`; None takes the measured best.

    Raises:
        ValueError: an argument is wrong; the message names it and says what is allowed.
        BackendError: later, if the named backend or algorithm cannot run on an input.

    Reference: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    arXiv:1603.07285.
    """

    op = "conv2d"
    keywords = ("activation", "backend", "algorithm")
    activation: str | None = None
    convolve = staticmethod(conv2d)
    default_algorithm = staticmethod(default_algorithm)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        check_activation(activation)
        check_backend(backend)
        check_algorithm(self.op, backend, algorithm)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation = activation
        self.backend = backend
        self.algorithm = algorithm

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # torch.nn.Conv2d.forward calls this with self.weight and self.bias.
        images, padding = self._images(input)
        output = self.convolve(
            images,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            backend=self.backend,
            algorithm=self.algorithm,
        )
        return output if input.dim() == 4 else output.squeeze(0)

    def kernel(self, input: torch.Tensor) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        images, padding = self._images(input)
        sides = padding_sides(padding, self.kernel_size, self.stride, self.dilation)
        geometry = (self.stride, sides, self.dilation, self.groups)
        return self._kernel(images, *geometry, default=self.default_algorithm)


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
    if not takes(input, weight, bias) or is_depthwise(weight, groups):
        return None
    return lambda: conv2d(input, weight, bias, stride, padding, dilation, groups, backend=backend)

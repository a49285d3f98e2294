"""Transposed convolution as a module, and what takes its place in models written for PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.conv_transpose2d import conv_transpose2d, default_algorithm
from ._convolution import Convolution, check_algorithm, takes
from ._rules import check_backend, replaces, serves


@replaces(nn.ConvTranspose2d, op="conv_transpose2d")
class ConvTranspose2d(Convolution, nn.ConvTranspose2d):
    """Transposed 2-D convolution: ``torch.nn.ConvTranspose2d``.

    Parameters, initial values and state_dict keys are those of ``torch.nn.ConvTranspose2d``: ``weight``
    ``(in_channels, out_channels / groups, KH, KW)`` and ``bias`` ``(out_channels,)``.

    Args:
        in_channels: channels C of the input ``(N, C, E, F)`` or ``(C, E, F)``.
        out_channels: channels M of the output ``(N, M, H, W)``.
        kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype: as
            in ``torch.nn.ConvTranspose2d``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend, see :func:`fastconv.conv_transpose2d`; None takes the measured
            best.

    Raises:
        ValueError: an argument is wrong; the message names it and says what is allowed.
        BackendError: later, if the named backend or algorithm cannot run on an input.

    Reference: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    arXiv:1603.07285.
    """

    op = "conv_transpose2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        check_backend(backend)
        check_algorithm(self.op, backend, algorithm)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self.backend = backend
        self.algorithm = algorithm

    def forward(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        images, geometry = self._geometry(input, output_size)
        stride, padding, output_padding, dilation, groups = geometry
        output = conv_transpose2d(
            images,
            self.weight,
            self.bias,
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            backend=self.backend,
            algorithm=self.algorithm,
        )
        return output if input.dim() == 4 else output.squeeze(0)

    def kernel(self, input: torch.Tensor, output_size: Sequence[int] | None = None) -> tuple[str, str | None]:
        """The backend and the algorithm that run on an input; raises BackendError if a named one cannot."""
        images, geometry = self._geometry(input, output_size)
        return self._kernel(images, *geometry, default=default_algorithm)

    def _geometry(self, input: torch.Tensor, output_size: Sequence[int] | None) -> tuple[torch.Tensor, tuple]:
        images, padding = self._images(input)
        output_padding = self._output_padding(
            input, output_size, self.stride, padding, self.kernel_size, 2, self.dilation
        )
        return images, (self.stride, padding, tuple(output_padding), self.dilation, self.groups)


@serves(torch.nn.functional.conv_transpose2d)
def _serve(
    backend: str | None,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
):
    if not takes(input, weight, bias):
        return None
    arguments = (stride, padding, output_padding, groups, dilation)
    return lambda: conv_transpose2d(input, weight, bias, *arguments, backend=backend)

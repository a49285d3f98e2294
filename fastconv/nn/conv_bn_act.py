"""Convolution, batch normalisation and activation as one module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops._arguments import pair
from ._chains import ACTIVATION_LAYERS, activation_of, run_chain
from ._rules import check_backend


class ConvBNAct(nn.Sequential):
    """``nn.Sequential(nn.Conv2d, nn.BatchNorm2d, activation)`` in one call, with a residual if there is one.

    ``y = act(bn(conv(x)) + residual)``, see :func:`fastconv.conv_bn_act`. Parameters, buffers and state_dict
    keys are the container's: ``0.weight``, ``0.bias``, ``1.weight``, ``1.bias``, ``1.running_mean``,
    ``1.running_var``, ``1.num_batches_tracked``. Its layers are PyTorch's own. If one of them is watched by
    hooks or has changed its type, they are called one after the other.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)``.
        out_channels: filters M.
        kernel_size, stride, dilation, groups, bias: as in ``torch.nn.Conv2d``, but no bias by default.
        padding: as in ``torch.nn.Conv2d``; None is ``(kernel_size - 1) // 2 * dilation``, which keeps the
            size of the image at stride 1 and odd kernel sizes.
        eps, momentum, affine, track_running_stats: as in ``torch.nn.BatchNorm2d``.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Shape: ``(N, C, H, W)`` to ``(N, M, E, F)``.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = "relu",
        backend: str | None = None,
    ) -> None:
        check_activation(activation)
        check_backend(backend)
        if padding is None:
            sides = zip(pair("kernel_size", kernel_size), pair("dilation", dilation))
            padding = tuple((kernel - 1) // 2 * step for kernel, step in sides)
        layers = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats),
        ]
        if activation is not None:
            layers.append(nn.GELU("tanh") if activation == "gelu_tanh" else ACTIVATION_LAYERS[activation]())
        super().__init__(*layers)
        self.backend = backend

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or some of them as a plain container."""
        layers = list(self._modules.values())[index]
        return nn.Sequential(*layers) if isinstance(index, slice) else layers

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        conv, norm, *rest = self
        layer = rest.pop(0) if rest and activation_of(rest[0]) is not None else None
        output = run_chain(conv, norm, layer, input, residual, self.backend)
        for other in rest:
            output = other(output)
        return output

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"

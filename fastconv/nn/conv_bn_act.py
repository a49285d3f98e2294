"""Convolution, batch normalisation and activation as one module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops.conv_bn_act import conv_bn_act
from ._rules import check_backend, is_watched

_ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


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
            size of the image at stride 1.
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
            kernel, step = (v if isinstance(v, tuple) else (v, v) for v in (kernel_size, dilation))
            padding = tuple((k - 1) // 2 * d for k, d in zip(kernel, step))
        layers = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias),
            nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats),
        ]
        if activation is not None:
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers)
        self.activation = activation
        self.backend = backend

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A layer, or some of them as a plain container."""
        layers = list(self._modules.values())[index]
        return nn.Sequential(*layers) if isinstance(index, slice) else layers

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        conv, norm, *rest = self
        if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d or any(map(is_watched, self)):
            output = norm(conv(input))
            output = output if residual is None else output + residual
            return rest[0](output) if rest else output
        return conv_norm_act(conv, norm, self.activation, input, residual, self.backend)

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    activation: str | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What two layers of PyTorch, an addition and an activation do, ``norm``'s counter of batches too."""
    if conv.padding_mode != "zeros":
        input = nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    training = norm.training or norm.running_mean is None
    tracks = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    running = (None, None) if training and not tracks else (norm.running_mean, norm.running_var)
    return conv_bn_act(
        input,
        conv.weight,
        conv.bias,
        *running,
        norm.weight,
        norm.bias,
        training=training,
        momentum=momentum,
        eps=norm.eps,
        stride=conv.stride,
        padding=conv.padding if conv.padding_mode == "zeros" else 0,
        dilation=conv.dilation,
        groups=conv.groups,
        activation=activation,
        residual=residual,
        backend=backend,
    )

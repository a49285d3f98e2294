"""Convolution, batch normalisation and activation as one module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._activation import check_activation
from ..ops._arguments import output_size, padding_sides, pair
from ..ops._operator import PLAIN, is_autocast
from ..ops.conv_bn_act import conv_bn_act
from ._convolution import takes
from ._rules import check_backend, is_watched
from .conv2d import Conv2d
from .depthwise_conv2d import DepthwiseConv2d

CONVOLUTIONS = (nn.Conv2d, Conv2d, DepthwiseConv2d)
_LAYERS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}


def activation_of(layer: nn.Module) -> str | None:
    """The name of a layer of PyTorch's that a convolution can apply; None if it is none."""
    name = next((name for name, kind in _LAYERS.items() if type(layer) is kind), None)
    return "gelu_tanh" if name == "gelu" and layer.approximate == "tanh" else name


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
            layers.append(nn.GELU("tanh") if activation == "gelu_tanh" else _LAYERS[activation]())
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


def run_chain(
    conv: nn.Module,
    norm: nn.Module,
    layer: nn.Module | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``layer(norm(conv(input)) + residual)`` in one call; layer by layer where something is unusual.

    That is a layer of another type, with hooks or a forward of its own, or a tensor that no kernel serves, or
    that would be broadcast or converted.
    """
    activation = None if layer is None else activation_of(layer)
    if (
        type(conv) in CONVOLUTIONS
        and type(norm) is nn.BatchNorm2d
        and (layer is None) == (activation is None)
        and getattr(conv, "activation", None) is None
        and not any(is_watched(each) for each in (conv, norm, layer) if each is not None)
        and type(input) in PLAIN
        and takes(input, conv.weight, conv.bias)
        and _is_ordinary(conv, norm, input)
        and (residual is None or _fits(conv, input, residual))
    ):
        return conv_norm_act(
            conv, norm, activation, input, residual, backend or getattr(conv, "backend", None)
        )
    output = norm(conv(input))
    output = output if residual is None else output + residual
    return output if layer is None else layer(output)


def _is_ordinary(conv: nn.Module, norm: nn.BatchNorm2d, input: torch.Tensor) -> bool:
    """Else PyTorch's layers raise errors of their own."""
    numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        input.shape[1] == conv.in_channels
        and norm.num_features == conv.out_channels
        and norm.eps > 0
        and (norm.running_mean is not None or not norm.track_running_stats)
        and all(t is None or (type(t) in PLAIN and t.device == input.device) for t in numbers)
        and (not norm.training or input.shape[0] * input.shape[2] * input.shape[3] > 1)
    )


def _fits(conv: nn.Module, input: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether a residual has the shape, type and device of what is normalised."""
    dtype = torch.get_autocast_dtype(input.device.type) if is_autocast(input) else input.dtype
    if type(residual) not in PLAIN or residual.dtype != dtype or residual.device != input.device:
        return False
    geometry = (conv.kernel_size, conv.stride, conv.dilation)
    if conv.padding_mode == "zeros":
        top, bottom, left, right = padding_sides(conv.padding, *geometry)
    else:
        left, right, top, bottom = conv._reversed_padding_repeated_twice
    sizes = (
        output_size(size, kernel, stride, padding, dilation)
        for size, kernel, stride, dilation, padding in zip(
            input.shape[2:], *geometry, (top + bottom, left + right)
        )
    )
    return residual.shape == (input.shape[0], conv.out_channels, *sizes)


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
    counts = tracks and norm.num_batches_tracked is not None
    if counts and norm.momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked + 1)
    running = (None, None) if training and not tracks else (norm.running_mean, norm.running_var)
    output = conv_bn_act(
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
    if counts:
        norm.num_batches_tracked.add_(1)
    return output

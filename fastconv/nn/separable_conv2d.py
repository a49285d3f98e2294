"""Depthwise separable convolution, with batch normalisation and activations, as one module."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._arguments import output_size, padding_sides
from ..ops._folded_weights import folded_weight
from ..ops._operator import PLAIN
from ..ops.separable_conv2d import separable_conv2d
from ._chains import CONVOLUTIONS, activation_of
from ._convolution import takes
from ._rules import check_backend, is_watched
from .conv_bn_act import ConvBNAct


class SeparableConv2d(nn.Sequential):
    """A depthwise and a 1x1 convolution, each with its batch normalisation and activation.

    ``y = act(bn(conv1x1(mid_act(bn(depthwise(x))))) + residual)``: the block of MobileNet V1, and the end of
    V2's. It is a container of two :class:`ConvBNAct`, with their parameters, buffers and state_dict keys:
    ``0.0.weight``, ``0.1.running_mean``, ``1.0.weight``. The layers in these are PyTorch's own.

    In evaluation, where no gradient is needed, both normalisations are folded into weights that are kept from
    call to call, and :func:`fastconv.separable_conv2d` runs the whole. Else the two are called one after the
    other; so they are if one of them or a layer is watched by hooks or has changed its type.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)``.
        out_channels: filters M of the 1x1 convolution.
        kernel_size, stride, dilation: of the depthwise convolution, as in ``torch.nn.Conv2d``.
        padding: the same; None is ``(kernel_size - 1) // 2 * dilation``, which keeps the size of the image at
            stride 1 and odd kernel sizes.
        bias: whether both convolutions have one.
        mid_activation: behind the depthwise convolution: None, ``"relu"``, ``"relu6"``, ``"gelu"``,
            ``"gelu_tanh"`` or ``"silu"``.
        activation: behind the 1x1 convolution; one of these, too.
        norm: whether there are normalisations; without, the two parts are plain containers.
        eps, momentum: of both, as in ``torch.nn.BatchNorm2d``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.

    Shape: ``(N, C, H, W)`` to ``(N, M, E, F)``.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Howard et al., "MobileNets", 2017, arXiv:1704.04861.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        *,
        mid_activation: str | None = "relu",
        activation: str | None = "relu",
        norm: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        numbers = {"bias": bias, "eps": eps, "momentum": momentum, "backend": backend}
        window = (kernel_size, stride, padding, dilation, in_channels)
        parts: list[nn.Module] = [
            ConvBNAct(in_channels, in_channels, *window, activation=mid_activation, **numbers),
            ConvBNAct(in_channels, out_channels, 1, activation=activation, **numbers),
        ]
        if not norm:
            parts = [nn.Sequential(part[0], *part[2:]) for part in parts]
        super().__init__(*parts)
        self.backend = backend

    __getitem__ = ConvBNAct.__getitem__  # a slice is a plain container

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        first, second = self
        if not is_watched(first) and not is_watched(second):
            layers = (*_layers(first), *_layers(second))
            if len(layers) == 6 and fuses(*layers, input, residual):
                return run_separable(*layers, input, residual, self.backend)
        middle = first(input)
        if residual is None:
            return second(middle)
        if isinstance(second, ConvBNAct):
            return second(middle, residual)
        convolution, *rest = second
        return nn.Sequential(*rest)(convolution(middle) + residual)

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


def _layers(part: nn.Module) -> tuple[nn.Module | None, ...]:
    """Convolution, normalisation and activation, None for one that is missing; and whatever follows."""
    convolution, *rest = part
    norm = rest.pop(0) if rest and type(rest[0]) is nn.BatchNorm2d else None
    layer = rest.pop(0) if rest and activation_of(rest[0]) is not None else None
    return convolution, norm, layer, *rest


def fuses(
    depthwise: nn.Module,
    norm1: nn.Module | None,
    layer1: nn.Module | None,
    pointwise: nn.Module,
    norm2: nn.Module | None,
    layer2: nn.Module | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> bool:
    """Whether :func:`run_separable` does what these layers do, one after the other.

    All must be of the types that it knows and watched by nobody; the normalisations in evaluation, where no
    gradient is needed; and the tensors such as the kernels serve.
    """
    convolutions, norms = (depthwise, pointwise), (norm1, norm2)
    layers = [layer for layer in (*convolutions, *norms, layer1, layer2) if layer is not None]
    return (
        all(type(each) in CONVOLUTIONS and getattr(each, "activation", None) is None for each in convolutions)
        and depthwise.groups == depthwise.in_channels
        and depthwise.padding_mode == "zeros"
        and pointwise.kernel_size == pointwise.stride == (1, 1)
        and pointwise.padding in ((0, 0), "valid", "same")
        and pointwise.groups == 1
        and pointwise.in_channels == depthwise.out_channels
        and all(norm is None or _folds(norm, each) for norm, each in zip(norms, convolutions))
        and all(layer is None or activation_of(layer) is not None for layer in (layer1, layer2))
        and not any(is_watched(layer) for layer in layers)
        and all(takes(input, each.weight, each.bias) for each in convolutions)
        and input.shape[1] == depthwise.in_channels
        and (residual is None or _fits(depthwise, pointwise, input, residual))
        and (norm1 is norm2 is None or not _needs_gradient(layers, input, residual))
    )


def _folds(norm: nn.Module, convolution: nn.Module) -> bool:
    """Whether a normalisation is by running averages of this convolution's channels."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.running_mean is not None
        and norm.num_features == convolution.out_channels
        and norm.eps > 0
        and all(
            t is None or (type(t) in PLAIN and t.device == convolution.weight.device)
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
    )


def _fits(depthwise: nn.Module, pointwise: nn.Module, input: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether a residual is as the output."""
    if type(residual) not in PLAIN or residual.dtype != input.dtype or residual.device != input.device:
        return False
    geometry = (depthwise.kernel_size, depthwise.stride, depthwise.dilation)
    top, bottom, left, right = padding_sides(depthwise.padding, *geometry)
    sizes = map(
        lambda size, kernel, stride, dilation, padding: output_size(size, kernel, stride, padding, dilation),
        *(input.shape[2:], *geometry, (top + bottom, left + right)),
    )
    return residual.shape == (input.shape[0], pointwise.out_channels, *sizes)


def _needs_gradient(layers: list[nn.Module], *tensors: torch.Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    parameters = (t for layer in layers for t in layer.parameters())
    return any(t is not None and t.requires_grad for t in (*tensors, *parameters))


def run_separable(
    depthwise: nn.Module,
    norm1: nn.BatchNorm2d | None,
    layer1: nn.Module | None,
    pointwise: nn.Module,
    norm2: nn.BatchNorm2d | None,
    layer2: nn.Module | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``layer2(norm2(pointwise(layer1(norm1(depthwise(input))))) + residual)`` in one call.

    Only where :func:`fuses` says so. A normalisation or an activation may be None.
    """
    depthwise_weight, depthwise_bias = _folded(depthwise, norm1)
    pointwise_weight, pointwise_bias = _folded(pointwise, norm2)
    return separable_conv2d(
        *(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias),
        *(depthwise.stride, depthwise.padding, depthwise.dilation),
        mid_activation=None if layer1 is None else activation_of(layer1),
        activation=None if layer2 is None else activation_of(layer2),
        residual=residual,
        backend=backend,
    )


def _folded(convolution: nn.Module, norm: nn.BatchNorm2d | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = convolution.weight, convolution.bias
    if norm is None:
        return weight, bias
    numbers = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return folded_weight(weight, bias, *numbers, norm.eps)

"""What the networks share."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..nn import Conv2d, DepthwiseConv2d


def conv_type(plain: bool) -> type[nn.Conv2d]:
    """The class of a network's convolutions, PyTorch's or this library's; the constructor is the same."""
    return nn.Conv2d if plain else Conv2d


def depthwise(channels: int, stride: int, plain: bool) -> nn.Conv2d:
    """A 3x3 filter for each channel."""
    if plain:
        return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return DepthwiseConv2d(channels, kernel_size=3, stride=stride, padding=1, bias=False)


def stage(
    unit: Callable[[int, int, int], nn.Module], channels: int, filters: int, units: int, stride: int
) -> nn.Sequential:
    """Units ``unit(channels, filters, stride)``; the first one has the stride and changes the channels."""
    return nn.Sequential(
        unit(channels, filters, stride), *[unit(filters, filters, 1) for _ in range(units - 1)]
    )


def initialize(model: nn.Module) -> None:
    """Fresh weights, under which a convolution and its ReLU keep the size of what they are given.

    A filter's fan is that of its group; with a dense layer's, depthwise activations would shrink by sqrt(C).

    Reference: He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

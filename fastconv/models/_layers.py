"""What the networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..nn import Conv2d, DepthwiseConv2d


def conv_type(plain: bool) -> type[nn.Conv2d]:
    """The class of a network's convolutions, PyTorch's or this library's; the constructor is the same."""
    return nn.Conv2d if plain else Conv2d


def depthwise(channels: int, stride: int, plain: bool, kernel_size: int = 3, bias: bool = False) -> nn.Conv2d:
    """A filter for each channel; with stride 1 the output has the input's size."""
    padding = kernel_size // 2
    if plain:
        return nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=bias)
    return DepthwiseConv2d(channels, None, kernel_size, stride, padding, bias=bias)


def conv_norm_act(
    conv: nn.Conv2d,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Sequential:
    """A convolution, its normalisation and an activation in place."""
    layers = [conv, norm(conv.out_channels)]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def stage(
    unit: Callable[[int, int, int], nn.Module], channels: int, filters: int, units: int, stride: int
) -> nn.Sequential:
    """Units ``unit(channels, filters, stride)``; the first one has the stride and changes the channels."""
    return nn.Sequential(
        unit(channels, filters, stride), *[unit(filters, filters, 1) for _ in range(units - 1)]
    )


def divisible(channels: float, by: int = 8) -> int:
    """The nearest multiple, but at least one, and not below nine tenths of what is asked for."""
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest + by if nearest < 0.9 * channels else nearest


class SqueezeExcite(nn.Module):
    """Weighs each channel by what all channels' means say.

    Args:
        channels: of the input and the output.
        between: of what is between the two 1x1 convolutions.
        conv: their class.
        activation: of the first one.

    Reference: Hu et al., "Squeeze-and-Excitation Networks", 2017, arXiv:1709.01507.
    """

    def __init__(
        self,
        channels: int,
        between: int,
        conv: type[nn.Conv2d],
        activation: Callable[..., nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.fc1 = conv(channels, between, 1)
        self.activation = activation(inplace=True)
        self.fc2 = conv(between, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.activation(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(weights).sigmoid()


class StochasticDepth(nn.Module):
    """In training, zeros for some of the images, and the others larger, so that the mean stays.

    Args:
        probability: of an image to be dropped, from 0 to below 1.

    Reference: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv:1603.09382.
    """

    _fastconv_passes_in_evaluation = True  # optimize may look through it there

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        return f"{self.probability:g}"


def depth_probabilities(stochastic_depth: float, blocks: int, steps: int) -> list[float]:
    """For each block's :class:`StochasticDepth`: 0 at first, ``stochastic_depth`` after so many steps.

    Raises:
        ValueError: ``stochastic_depth`` is not at least 0 and below 1.
    """
    if not 0 <= stochastic_depth < 1:
        raise ValueError(f"stochastic_depth must be at least 0 and below 1, got {stochastic_depth!r}")
    return [stochastic_depth * block / steps for block in range(blocks)]


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

"""SqueezeNet: few channels into each 3x3 convolution, and those beside a 1x1 one."""

from __future__ import annotations

import torch
from torch import nn

from ._layers import conv_type, initialize
from ._registry import register


class Fire(nn.Module):
    """A 1x1 convolution to few channels; of these a 1x1 and a 3x3 convolution, put side by side.

    Args:
        channels: of the input.
        squeezed: between.
        filters: of each of the two; the output has twice as many.
        conv: the convolutions' class.
    """

    def __init__(self, channels: int, squeezed: int, filters: int, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.squeeze = conv(channels, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = conv(squeezed, filters, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = conv(squeezed, filters, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        pointwise = self.expand1x1_activation(self.expand1x1(x))
        return torch.cat([pointwise, self.expand3x3_activation(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`squeezenet1_0`."""

    def __init__(self, num_classes: int, in_channels: int, dropout: float, plain: bool) -> None:
        super().__init__()
        conv = conv_type(plain)

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.features = nn.Sequential(
            conv(in_channels, 96, 7, stride=2),
            nn.ReLU(inplace=True),
            pool(),
            Fire(96, 16, 64, conv),
            Fire(128, 16, 64, conv),
            Fire(128, 32, 128, conv),
            pool(),
            Fire(256, 32, 128, conv),
            Fire(256, 48, 192, conv),
            Fire(384, 48, 192, conv),
            Fire(384, 64, 256, conv),
            pool(),
            Fire(512, 64, 256, conv),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), conv(512, num_classes, 1), nn.ReLU(inplace=True))
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


@register
def squeezenet1_0(
    num_classes: int = 1000, in_channels: int = 3, *, dropout: float = 0.5, plain: bool = False
) -> SqueezeNet:
    """SqueezeNet 1.0 with fresh weights: 1.2 M parameters, 0.82 G MACs of a 224x224 image.

    Parameters are named as torchvision's, whose checkpoints load.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``; H and W at least 21.
        dropout: probability of dropping a feature before the classifier, in training.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Reference: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
    size", 2016, arXiv:1602.07360.
    """
    return SqueezeNet(num_classes, in_channels, dropout, plain)

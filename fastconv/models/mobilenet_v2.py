"""MobileNet V2: blocks that widen, filter each channel and narrow; the links are between the narrow ends."""

from __future__ import annotations

import torch
from torch import nn

from ._layers import conv_norm_act, conv_type, depthwise, divisible, initialize
from ._registry import register

# (expansion, filters, blocks, stride of the first) of each stage, at width 1.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the channels, 3x3 depthwise, 1x1 without activation; added where it fits.

    Args:
        channels, filters: of the input and the output.
        stride: of the depthwise convolution.
        expansion: 1 leaves the first convolution out.
        plain: from ``torch.nn`` alone.
    """

    def __init__(self, channels: int, filters: int, stride: int, expansion: int, plain: bool) -> None:
        super().__init__()
        conv, wide = conv_type(plain), channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(conv_norm_act(conv(channels, wide, 1, bias=False), nn.ReLU6))
        layers.append(conv_norm_act(depthwise(wide, stride, plain), nn.ReLU6))
        layers += conv_norm_act(conv(wide, filters, 1, bias=False), None)
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == filters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`mobilenet_v2`."""

    def __init__(self, width: float, num_classes: int, in_channels: int, dropout: float, plain: bool) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        conv = conv_type(plain)
        channels = divisible(32 * width)
        stem = conv(in_channels, channels, 3, stride=2, padding=1, bias=False)
        layers: list[nn.Module] = [conv_norm_act(stem, nn.ReLU6)]
        for expansion, filters, blocks, stride in STAGES:
            filters = divisible(filters * width)
            for index in range(blocks):
                first = stride if index == 0 else 1
                layers.append(InvertedResidual(channels, filters, first, expansion, plain))
                channels = filters
        features = divisible(1280 * max(1.0, width))
        layers.append(conv_norm_act(conv(channels, features, 1, bias=False), nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_classes))
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@register
def mobilenet_v2(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    dropout: float = 0.2,
    plain: bool = False,
) -> MobileNetV2:
    """MobileNet V2 with fresh weights: 3.5 M parameters, 301 M MACs of a 224x224 image at width 1.

    Parameters are named as torchvision's, whose checkpoints load.

    Args:
        width: scales the channels of every layer, to multiples of 8.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        dropout: probability of dropping a feature before the classifier, in training.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: ``width`` is not above 0.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018,
    arXiv:1801.04381.
    """
    return MobileNetV2(width, num_classes, in_channels, dropout, plain)

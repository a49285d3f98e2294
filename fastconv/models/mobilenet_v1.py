"""MobileNet V1: a 3x3 filter for each channel, and then a 1x1 convolution to mix the channels."""

from __future__ import annotations

import torch
from torch import nn

from ._layers import conv_norm_act, depthwise, initialize
from ._registry import register

# (filters, stride) of each separable block, at width 1.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`mobilenet_v1`."""

    def __init__(self, width: float, num_classes: int, in_channels: int, dropout: float, plain: bool) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be above 0, got {width}")
        channels = max(1, int(32 * width))
        layers = [conv_norm_act(nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False))]
        for filters, stride in BLOCKS:
            filters = max(1, int(filters * width))
            layers.append(_separable(channels, filters, stride, plain))
            channels = filters
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(x.mean((2, 3)))


def _separable(channels: int, filters: int, stride: int, plain: bool) -> nn.Sequential:
    return nn.Sequential(
        conv_norm_act(depthwise(channels, stride, plain)),
        conv_norm_act(nn.Conv2d(channels, filters, 1, bias=False)),
    )


@register
def mobilenet_v1(
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    dropout: float = 0.0,
    plain: bool = False,
) -> MobileNetV1:
    """MobileNet V1 with fresh weights: 569, 325, 149, 41 M MACs at width 1, 0.75, 0.5, 0.25 (224x224 images).

    Args:
        width: scales the channels of every layer.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        dropout: probability of dropping a feature before the classifier, in training.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: ``width`` is not above 0.

    Reference: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications", 2017, arXiv:1704.04861.
    """
    return MobileNetV1(width, num_classes, in_channels, dropout, plain)

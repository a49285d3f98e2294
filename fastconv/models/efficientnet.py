"""EfficientNet: MobileNet V2's blocks with squeeze-and-excitation; depth, width and image grow together."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import nn

from ._layers import (
    SqueezeExcite,
    StochasticDepth,
    conv_norm_act,
    conv_type,
    depth_probabilities,
    depthwise,
    divisible,
    initialize,
)
from ._registry import register_variants


class Variant(NamedTuple):
    """One of the family: factors of channels and blocks, dropout, and the image that it is made for."""

    width: float
    depth: float
    dropout: float
    image: int


VARIANTS = {
    "b0": Variant(1.0, 1.0, 0.2, 224),
    "b1": Variant(1.0, 1.1, 0.2, 240),
    "b2": Variant(1.1, 1.2, 0.3, 288),
    "b3": Variant(1.2, 1.4, 0.3, 300),
    "b4": Variant(1.4, 1.8, 0.4, 380),
    "b5": Variant(1.6, 2.2, 0.4, 456),
    "b6": Variant(1.8, 2.6, 0.5, 528),
    "b7": Variant(2.0, 3.1, 0.5, 600),
}
# (expansion, kernel size, stride of the first, channels, filters, blocks) of each stage of B0.
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
# The large ones' batch norms, as their published weights were trained.
LARGE = ("b5", "b6", "b7")
LARGE_NORM = functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)


class MBConv(nn.Module):
    """1x1 to ``expansion`` times the channels, depthwise, squeeze and excite, 1x1; added where it fits.

    Args:
        channels, filters: of the input and the output.
        kernel_size, stride: of the depthwise convolution.
        expansion: 1 leaves the first convolution out.
        drop: probability of an image to skip the block, in training.
        norm: makes the batch norms.
        plain: from ``torch.nn`` alone.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        drop: float,
        norm: type[nn.BatchNorm2d],
        plain: bool,
    ) -> None:
        super().__init__()
        conv, wide = conv_type(plain), divisible(channels * expansion)
        layers: list[nn.Module] = []
        if wide != channels:
            layers.append(conv_norm_act(conv(channels, wide, 1, bias=False), nn.SiLU, norm))
        layers += [
            conv_norm_act(depthwise(wide, stride, plain, kernel_size), nn.SiLU, norm),
            SqueezeExcite(wide, max(1, channels // 4), conv, nn.SiLU),
            conv_norm_act(conv(wide, filters, 1, bias=False), None, norm),
        ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(drop)
        self.residual = stride == 1 and channels == filters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if self.residual:
            y = self.stochastic_depth(y)
            y += x
        return y


class EfficientNet(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`efficientnet`."""

    def __init__(
        self,
        variant: str,
        num_classes: int,
        in_channels: int,
        dropout: float | None,
        stochastic_depth: float,
        plain: bool,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {tuple(VARIANTS)}, got {variant!r}")
        width, depth, usual_dropout, _ = VARIANTS[variant]
        conv = conv_type(plain)
        norm = LARGE_NORM if variant in LARGE else nn.BatchNorm2d
        counts = [math.ceil(blocks * depth) for *_, blocks in STAGES]
        first, last = divisible(STAGES[0][3] * width), divisible(STAGES[-1][4] * width)
        stem = conv(in_channels, first, 3, stride=2, padding=1, bias=False)
        stages: list[nn.Module] = [conv_norm_act(stem, nn.SiLU, norm)]
        drops = iter(depth_probabilities(stochastic_depth, sum(counts), steps=sum(counts)))
        for (expansion, kernel_size, stride, channels, filters, _), count in zip(STAGES, counts):
            channels, filters = divisible(channels * width), divisible(filters * width)
            blocks = []
            for index in range(count):
                first = (channels, filters, kernel_size, stride)
                ends = (filters, filters, kernel_size, 1) if index else first
                blocks.append(MBConv(*ends, expansion, next(drops), norm, plain))
            stages.append(nn.Sequential(*blocks))
        stages.append(conv_norm_act(conv(last, 4 * last, 1, bias=False), nn.SiLU, norm))
        self.features = nn.Sequential(*stages)
        dropout = usual_dropout if dropout is None else dropout
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(4 * last, num_classes))
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def efficientnet(
    variant: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    dropout: float | None = None,
    stochastic_depth: float = 0.2,
    plain: bool = False,
) -> EfficientNet:
    """EfficientNet with fresh weights. Parameters are named as torchvision's, whose checkpoints load.

    In the table of networks these are ``efficientnet_b0`` to ``efficientnet_b7``: 5.3 to 66 M parameters,
    0.39 to 38 G MACs of an image of each one's own size, ``VARIANTS[variant].image``.

    Args:
        variant: ``"b0"`` to ``"b7"``.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        dropout: probability of dropping a feature before the classifier, in training; None: the variant's.
        stochastic_depth: probability of an image to skip a block, in training; from 0 at the first block it
            grows to this.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: there is no such variant, or ``stochastic_depth`` is not at least 0 and below 1.

    Reference: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019,
    arXiv:1905.11946.
    """
    return EfficientNet(variant, num_classes, in_channels, dropout, stochastic_depth, plain)


register_variants("efficientnet_", efficientnet, VARIANTS)

"""DenseNet: each layer reads what all layers before it in its block have written, put side by side."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.functional import relu

from ._layers import conv_type, initialize
from ._registry import register_variants

# New channels of each layer, layers of the four blocks, channels before the first.
DEPTHS: dict[int, tuple[int, tuple[int, ...], int]] = {
    121: (32, (6, 12, 24, 16), 64),
    161: (48, (6, 12, 36, 24), 96),
    169: (32, (6, 12, 32, 32), 64),
    201: (32, (6, 12, 48, 32), 64),
}


class DenseBlock(nn.ModuleDict):
    """``denselayer1``, ``denselayer2``, ...: each adds ``growth`` channels to those that it reads."""

    def __init__(
        self, channels: int, growth: int, layers: int, dropout: float, conv: type[nn.Conv2d]
    ) -> None:
        super().__init__()
        for index in range(layers):
            self[f"denselayer{index + 1}"] = _layer(channels + index * growth, growth, dropout, conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x


def _layer(channels: int, growth: int, dropout: float, conv: type[nn.Conv2d]) -> nn.Sequential:
    """1x1 to four times the new channels, then 3x3; normalisation and ReLU come before each."""
    layers: dict[str, nn.Module] = {
        "norm1": nn.BatchNorm2d(channels),
        "relu1": nn.ReLU(inplace=True),
        "conv1": conv(channels, 4 * growth, 1, bias=False),
        "norm2": nn.BatchNorm2d(4 * growth),
        "relu2": nn.ReLU(inplace=True),
        "conv2": conv(4 * growth, growth, 3, padding=1, bias=False),
    }
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(OrderedDict(layers))


def _transition(channels: int, conv: type[nn.Conv2d]) -> nn.Sequential:
    """Half the channels, half the size."""
    layers = {
        "norm": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(inplace=True),
        "conv": conv(channels, channels // 2, 1, bias=False),
        "pool": nn.AvgPool2d(2),
    }
    return nn.Sequential(OrderedDict(layers))


class DenseNet(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`densenet`."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, dropout: float, plain: bool) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {tuple(DEPTHS)}, got {depth!r}")
        conv = conv_type(plain)
        growth, blocks, channels = DEPTHS[depth]
        layers: dict[str, nn.Module] = {
            "conv0": conv(in_channels, channels, 7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(channels),
            "relu0": nn.ReLU(inplace=True),
            "pool0": nn.MaxPool2d(3, stride=2, padding=1),
        }
        for index, count in enumerate(blocks, 1):
            if index > 1:
                layers[f"transition{index - 1}"] = _transition(channels, conv)
                channels //= 2
            layers[f"denseblock{index}"] = DenseBlock(channels, growth, count, dropout, conv)
            channels += count * growth
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(OrderedDict(layers))
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(relu(self.features(x), inplace=True).mean((2, 3)))


def _rename(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """torchvision's published files have ``norm.1`` where its networks have ``norm1``."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)] = state.pop(name)


def densenet(
    depth: int,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    dropout: float = 0.0,
    plain: bool = False,
) -> DenseNet:
    """DenseNet with fresh weights. Parameters are named as torchvision's, whose checkpoints load.

    In the table of networks these are ``densenet121``, ``densenet161``, ``densenet169`` and ``densenet201``:
    8.0, 28.7, 14.1 and 20.0 M parameters.

    Args:
        depth: layers: 121, 161, 169 or 201.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        dropout: probability of dropping a value that a layer adds, in training.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: there is no such depth.

    Reference: Huang et al., "Densely Connected Convolutional Networks", 2016, arXiv:1608.06993.
    """
    return DenseNet(depth, num_classes, in_channels, dropout, plain)


register_variants("densenet", densenet, DEPTHS)

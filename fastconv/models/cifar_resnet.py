"""ResNets for CIFAR's 32x32 images: three stages of blocks, whose links have no parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import pad, relu

from ._layers import conv_type, initialize, stage
from ._registry import register_variants
from .resnet import BasicBlock


class CifarResNet(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`cifar_resnet`.

    Args:
        depth: layers, 6n + 2 for n blocks in each stage.
        unit: ``unit(channels, filters, stride)`` builds a block.
        num_classes, in_channels: outputs, and channels of the input.
        conv: the class of the first convolution.
    """

    def __init__(
        self,
        depth: int,
        unit: Callable[[int, int, int], nn.Module],
        num_classes: int,
        in_channels: int,
        conv: type[nn.Conv2d],
    ) -> None:
        super().__init__()
        repeats, rest = divmod(depth - 2, 6)
        if repeats < 1 or rest:
            raise ValueError(f"depth must be 6n + 2 with n at least 1, such as 20 or 56, got {depth!r}")
        self.conv1 = conv(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(unit, 16, 16, repeats, 1)
        self.layer2 = stage(unit, 16, 32, repeats, 2)
        self.layer3 = stage(unit, 32, 64, repeats, 2)
        self.fc = nn.Linear(64, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class _PaddedIdentity(nn.Module):
    """Every other pixel, and zeros for the channels that are new."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, residual: bool = True, plain: bool = False
) -> CifarResNet:
    """ResNet for CIFAR with fresh weights: 0.27, 0.46, 0.66, 0.85, 1.7 M parameters at 20, 32, 44, 56, 110.

    In the table of networks these are ``resnet20`` to ``resnet1202``, and ``plain20`` and ``plain56`` without
    residual links.

    Args:
        depth: layers, 6n + 2.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        residual: whether blocks add to their input; the link pads new channels with zeros.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: ``depth`` is not 6n + 2.

    Reference: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
    """
    conv = conv_type(plain)

    def unit(channels: int, filters: int, stride: int) -> BasicBlock:
        same = stride == 1 and channels == filters
        link = None if same or not residual else _PaddedIdentity(stride, filters - channels)
        return BasicBlock(channels, filters, stride, link, conv, residual)

    return CifarResNet(depth, unit, num_classes, in_channels, conv)


register_variants("resnet", cifar_resnet, (20, 32, 44, 56, 110, 1202))
register_variants("plain", cifar_resnet, (20, 56), residual=False)

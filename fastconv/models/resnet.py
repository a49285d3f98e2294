"""ResNets for ImageNet: blocks that add to their input. And the same networks without that link."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu

from ._layers import conv_type, initialize, stage
from ._registry import register_variants


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the input.

    Args:
        channels, filters: of the input and of both convolutions.
        stride: of the first convolution.
        downsample: what gives the input the output's shape; None: it has that shape.
        conv: the convolution's class.
        residual: whether there is a link from the input at all.
    """

    expansion = 1

    def __init__(
        self,
        channels: int,
        filters: int,
        stride: int,
        downsample: nn.Module | None,
        conv: type[nn.Conv2d],
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.shift: nn.Module = nn.Identity()  # TSM's place: in the branch, not in the link
        self.conv1 = conv(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = downsample
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = relu(self.bn1(self.conv1(self.shift(x))), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.residual:
            y += x if self.downsample is None else self.downsample(x)
        return relu(y, inplace=True)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution to four times the filters, added to the input.

    The stride is the 3x3 convolution's, as in torchvision, and not the first one's, as in the paper.

    Args: as :class:`BasicBlock`'s.
    """

    expansion = 4

    def __init__(
        self, channels: int, filters: int, stride: int, downsample: nn.Module | None, conv: type[nn.Conv2d]
    ) -> None:
        super().__init__()
        self.shift: nn.Module = nn.Identity()
        self.conv1 = conv(channels, filters, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv(filters, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv3 = conv(filters, 4 * filters, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * filters)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = relu(self.bn1(self.conv1(self.shift(x))), inplace=True)
        y = relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return relu(y, inplace=True)


# Block, and blocks in each of the four stages.
DEPTHS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
UNLINKED = (18, 34)


class ResNet(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`resnet`."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, residual: bool, plain: bool) -> None:
        super().__init__()
        depths = tuple(DEPTHS) if residual else UNLINKED
        if depth not in depths:
            raise ValueError(f"depth must be one of {depths}, got {depth!r}")
        conv = conv_type(plain)
        block, repeats = DEPTHS[depth]
        self.conv1 = conv(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def unit(channels: int, out_channels: int, stride: int) -> nn.Module:
            filters = out_channels // block.expansion
            if not residual:
                return block(channels, filters, stride, None, conv, residual=False)
            downsample = None
            if stride != 1 or channels != out_channels:
                projection = conv(channels, out_channels, 1, stride, bias=False)
                downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
            return block(channels, filters, stride, downsample, conv)

        outputs = [filters * block.expansion for filters in (64, 128, 256, 512)]
        self.layer1 = stage(unit, 64, outputs[0], repeats[0], 1)
        self.layer2 = stage(unit, outputs[0], outputs[1], repeats[1], 2)
        self.layer3 = stage(unit, outputs[1], outputs[2], repeats[2], 2)
        self.layer4 = stage(unit, outputs[2], outputs[3], repeats[3], 2)
        self.fc = nn.Linear(outputs[3], num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet(
    depth: int, num_classes: int = 1000, in_channels: int = 3, *, residual: bool = True, plain: bool = False
) -> ResNet:
    """ResNet for ImageNet with fresh weights. Parameters are named as torchvision's, whose checkpoints load.

    In the table of networks these are ``resnet18`` to ``resnet152``, and ``plain18`` and ``plain34`` without
    residual links.

    Args:
        depth: layers: 18, 34, 50, 101 or 152.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        residual: whether blocks add to their input; depths 18 and 34 can do without.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: there is no such depth.

    Reference: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
    """
    return ResNet(depth, num_classes, in_channels, residual, plain)


register_variants("resnet", resnet, DEPTHS)
register_variants("plain", resnet, UNLINKED, residual=False)

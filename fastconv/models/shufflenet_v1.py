"""ShuffleNet V1: 1x1 convolutions in groups, and a shuffle so that every group reads from all of them."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, relu

from ..nn import ChannelShuffle, GroupConv2dShuffle
from ._layers import SqueezeExcite, conv_type, depthwise, initialize, stage
from ._registry import register

# Groups, and the channels of the first stage at scale 1; each stage doubles them.
CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
UNITS = (4, 8, 4)  # of each stage; the first has stride 2
# The paper tells the layers of the shallow network (half the units) and its MACs (40 M), not its channels:
# so many times more have these MACs.
SHALLOW = 1.45


class ShuffleUnit(nn.Module):
    """1x1 in groups, shuffle, 3x3 depthwise, 1x1 in groups; added to the input.

    With stride 2 the input, averaged 3x3, and the branch are put side by side.

    Args:
        channels, filters: of the input and the output.
        stride: 1 or 2.
        groups: of both 1x1 convolutions, and of the shuffle between them.
        dense: whether the first convolution is not grouped after all, as in the network's first unit.
        shuffle: whether channels are shuffled.
        se: whether the output's channels are weighed, see :class:`SqueezeExcite`.
        plain: from ``torch.nn`` alone.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        stride: int,
        groups: int,
        dense: bool,
        shuffle: bool,
        se: bool,
        plain: bool,
    ) -> None:
        super().__init__()
        self.stride = stride
        narrow = _multiple(filters // 4, groups)
        branch = filters - channels if stride == 2 else filters
        self.conv1, self.shuffle = _conv_shuffle(
            channels, narrow, 1 if dense else groups, groups if shuffle else 1, plain
        )
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = depthwise(narrow, stride, plain)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = conv_type(plain)(narrow, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.se = SqueezeExcite(filters, max(1, filters // 16), conv_type(plain)) if se else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = relu(self.bn1(self.shuffle(self.conv1(x))), inplace=True)
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        if self.stride == 2:
            y = self.se(torch.cat([avg_pool2d(x, 3, stride=2, padding=1), y], 1))
        else:
            y = x + self.se(y)
        return relu(y, inplace=True)


def _conv_shuffle(
    channels: int, filters: int, groups: int, shuffle_groups: int, plain: bool
) -> tuple[nn.Module, nn.Module]:
    """A 1x1 convolution, and the shuffle that comes next."""
    if not plain and groups == shuffle_groups > 1:
        return GroupConv2dShuffle(channels, filters, 1, groups=groups, bias=False), nn.Identity()
    conv = conv_type(plain)(channels, filters, 1, groups=groups, bias=False)
    if shuffle_groups == 1:
        return conv, nn.Identity()
    return conv, nn.ChannelShuffle(shuffle_groups) if plain else ChannelShuffle(shuffle_groups)


class ShuffleNetV1(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`shufflenet_v1`."""

    def __init__(
        self,
        scale: float,
        groups: int,
        num_classes: int,
        in_channels: int,
        shallow: bool,
        shuffle: bool,
        se: bool,
        plain: bool,
    ) -> None:
        super().__init__()
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale must be a number above 0, got {scale!r}")
        if type(groups) is not int or groups not in CHANNELS:
            raise ValueError(f"groups must be one of {tuple(CHANNELS)}, got {groups!r}")
        # As the published MACs have it: 24 filters from scale 1 to below 2.
        stem = _multiple(24 * 2 ** math.floor(math.log2(scale)), groups)
        filters = _multiple(CHANNELS[groups] * scale * (SHALLOW if shallow else 1), groups)
        if filters <= stem:
            raise ValueError(f"scale leaves no channels to the units, got {scale!r}; give a larger one")
        self.conv1 = conv_type(plain)(in_channels, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def unit(channels: int, filters: int, stride: int) -> ShuffleUnit:
            return ShuffleUnit(channels, filters, stride, groups, channels == stem, shuffle, se, plain)

        units = [count // 2 if shallow else count for count in UNITS]
        self.stage2 = stage(unit, stem, filters, units[0], 2)
        self.stage3 = stage(unit, filters, 2 * filters, units[1], 2)
        self.stage4 = stage(unit, 2 * filters, 4 * filters, units[2], 2)
        self.fc = nn.Linear(4 * filters, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.stage4(self.stage3(self.stage2(x)))
        return self.fc(x.mean((2, 3)))


def _multiple(number: float, of: int) -> int:
    """The next multiple, at least one."""
    return max(1, math.ceil(int(number) / of)) * of


@register
def shufflenet_v1(
    scale: float = 1.0,
    groups: int = 3,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    shallow: bool = False,
    shuffle: bool = True,
    se: bool = False,
    plain: bool = False,
) -> ShuffleNetV1:
    """ShuffleNet V1 with fresh weights: 524, 292 M MACs at scale 2, 1.5 in 3 groups, 138 M at scale 1 in 8.

    Args:
        scale: scales the channels of every unit.
        groups: of the 1x1 convolutions: 1, 2, 3, 4 or 8; the more, the more channels for about as many MACs.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        shallow: half as many units, with more channels for about as many MACs: 26 layers in place of 50.
        shuffle: whether channels are shuffled; without, the groups keep apart.
        se: whether every unit has a squeeze-and-excitation block.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: ``scale`` or ``groups`` is none of these.

    Reference: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
    Devices", 2017, arXiv:1707.01083.
    """
    return ShuffleNetV1(scale, groups, num_classes, in_channels, shallow, shuffle, se, plain)

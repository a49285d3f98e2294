"""ShiftResNet: CIFAR's ResNet with shifts and 1x1 convolutions in place of its 3x3 convolutions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad, relu

from ..nn import CSC, Shift2d
from ..nn.csc import expanded
from ._layers import conv_type
from ._registry import register_variants
from .cifar_resnet import CifarResNet


class _PlainShift2d(Shift2d):
    """The shift in PyTorch's own functions: a slice for each place of the window."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        places, counts = torch.unique_consecutive(self.offsets, dim=0, return_counts=True)
        self.places, self.counts = places.tolist(), counts.tolist()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        height, width = input.shape[2:]
        runs = pad(input, (1, 1, 1, 1)).split(self.counts, 1)
        moved = [
            run[:, :, 1 + dh : 1 + dh + height, 1 + dw : 1 + dw + width]
            for run, (dh, dw) in zip(runs, self.places)
        ]
        return torch.cat(moved, 1)


class _PlainCSC(CSC):
    """The block from ``torch.nn`` alone: the shift is a layer of its own."""

    def __init__(self, channels: int, filters: int, stride: int, expansion: float) -> None:
        super().__init__(channels, filters, stride, expansion)
        self.shift = _PlainShift2d(self.conv2.in_channels)
        self.conv1, self.conv2 = _plain(self.conv1), _plain(self.conv2)
        if self.shortcut:
            self.shortcut[0] = _plain(self.shortcut[0])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = relu(self.bn1(self.conv1(input)), inplace=True)
        output = relu(self.bn2(self.conv2(self.shift(output))), inplace=True)
        return output + self.shortcut(input)


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """A 1x1 convolution of PyTorch's class, with the weights of one of this library's."""
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=False, device="meta")
    plain.weight = layer.weight
    return plain


def shift_resnet(
    depth: int, expansion: float = 1, num_classes: int = 100, in_channels: int = 3, *, plain: bool = False
) -> CifarResNet:
    """ShiftResNet for CIFAR with fresh weights: 0.03 M parameters at depth 20 and expansion 1.

    In the table of networks these are ``shift_resnet20``, ``shift_resnet56`` and ``shift_resnet110``. At the
    expansions 1, 3 and 6 they have fewer parameters and MACs than their ResNets; at 9, as published, 2 or 3 %
    more parameters.

    Args:
        depth: layers of the ResNet that it stands for, 6n + 2.
        expansion: channels that are shifted, for each channel of a block's output.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: ``depth`` is not 6n + 2, or ``expansion`` leaves fewer than 9 channels to shift.

    Reference: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", 2017,
    arXiv:1711.08141.
    """
    if expanded(16, expansion) < 9:
        raise ValueError(f"expansion must be at least 9/16, a channel for each place, got {expansion!r}")

    def unit(channels: int, filters: int, stride: int) -> nn.Module:
        return (_PlainCSC if plain else CSC)(channels, filters, stride, expansion)

    return CifarResNet(depth, unit, num_classes, in_channels, conv_type(plain))


register_variants("shift_resnet", shift_resnet, (20, 56, 110))

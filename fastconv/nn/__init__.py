"""Modules with the constructors and state_dict keys of :mod:`torch.nn`, on this library's kernels."""

from ._rules import Rule, rule_for, rules
from .channel_shuffle import ChannelShuffle
from .conv2d import Conv2d
from .conv_bn_act import ConvBNAct
from .conv_transpose2d import ConvTranspose2d
from .csc import CSC
from .depthwise_conv2d import DepthwiseConv2d
from .group_conv2d_shuffle import GroupConv2dShuffle
from .separable_conv2d import SeparableConv2d
from .shift2d import Shift2d
from .shift_conv2d import ShiftConv2d
from .temporal_shift import TemporalShift

__all__ = [
    "CSC",
    "ChannelShuffle",
    "Conv2d",
    "ConvBNAct",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "GroupConv2dShuffle",
    "Rule",
    "SeparableConv2d",
    "Shift2d",
    "ShiftConv2d",
    "TemporalShift",
    "rule_for",
    "rules",
]

"""Modules with the constructors and state_dict keys of :mod:`torch.nn`, on this library's kernels."""

from ._rules import Rule, rule_for, rules
from .channel_shuffle import ChannelShuffle
from .conv2d import Conv2d
from .conv_transpose2d import ConvTranspose2d
from .depthwise_conv2d import DepthwiseConv2d
from .shift2d import Shift2d
from .temporal_shift import TemporalShift

__all__ = [
    "ChannelShuffle",
    "Conv2d",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "Rule",
    "Shift2d",
    "TemporalShift",
    "rule_for",
    "rules",
]

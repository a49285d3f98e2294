"""Modules with the constructors and state_dict keys of :mod:`torch.nn`, on this library's kernels."""

from ._rules import Rule, rule_for, rules
from .channel_shuffle import ChannelShuffle
from .depthwise_conv2d import DepthwiseConv2d

__all__ = ["ChannelShuffle", "DepthwiseConv2d", "Rule", "rule_for", "rules"]

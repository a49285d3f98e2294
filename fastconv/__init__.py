"""fastconv: hand-written convolution kernels for PyTorch."""

from . import _library, ceilings, emulator, models, nn
from .backends import BackendError, available, use_backend
from .cost import cost
from .ops._packed_weights import clear_packed_weights, set_packed_weights_limit
from .ops.channel_shuffle import channel_shuffle, channel_shuffle_reference
from .ops.conv2d import conv2d, conv2d_reference
from .ops.conv_bn_act import conv_bn_act, conv_bn_act_reference
from .ops.conv_transpose2d import conv_transpose2d, conv_transpose2d_reference
from .ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from .ops.group_conv2d_shuffle import group_conv2d_shuffle, group_conv2d_shuffle_reference
from .ops.separable_conv2d import separable_conv2d, separable_conv2d_reference
from .ops.shift2d import shift2d, shift2d_reference
from .ops.shift_conv2d import shift_conv2d, shift_conv2d_reference
from .ops.temporal_shift import temporal_shift, temporal_shift_reference
from .optimize import OptimizeError, enable, optimize, optimize_graph, report, restore
from .precision import get_precision, set_precision

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "OptimizeError",
    "available",
    "ceilings",
    "channel_shuffle",
    "channel_shuffle_reference",
    "clear_packed_weights",
    "conv2d",
    "conv2d_reference",
    "conv_bn_act",
    "conv_bn_act_reference",
    "conv_transpose2d",
    "conv_transpose2d_reference",
    "cost",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "emulator",
    "enable",
    "get_precision",
    "group_conv2d_shuffle",
    "group_conv2d_shuffle_reference",
    "models",
    "nn",
    "optimize",
    "optimize_graph",
    "report",
    "restore",
    "separable_conv2d",
    "separable_conv2d_reference",
    "set_packed_weights_limit",
    "set_precision",
    "shift2d",
    "shift2d_reference",
    "shift_conv2d",
    "shift_conv2d_reference",
    "temporal_shift",
    "temporal_shift_reference",
    "use_backend",
]

# So that torch.ops.fastconv serves whoever calls it, and torch.compile finds the answer known;
# what cannot load says so when it is asked for.
for _backend in ("cpu", "cuda", "emulator"):
    _library.problem(_backend)

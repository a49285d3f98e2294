"""Grouped convolution with channel shuffle as a module."""

from __future__ import annotations

from ..ops.group_conv2d_shuffle import group_conv2d_shuffle
from .conv2d import Conv2d


class GroupConv2dShuffle(Conv2d):
    """Grouped 2-D convolution, then channel shuffle by the same groups, which costs nothing here.

    ``y[n, k*G + g] = act(conv2d(x)[n, g*(M/G) + k])``: ``torch.nn.Conv2d`` and then
    ``torch.nn.ChannelShuffle(groups)``. Parameters, initial values and state_dict keys are those of
    ``torch.nn.Conv2d``; ``bias`` is in the order of the filters. A batch normalisation after it sees the
    channels in the shuffled order.

    Args:
        in_channels: channels C of the input ``(N, C, H, W)`` or ``(C, H, W)``.
        out_channels: filters M.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as in ``torch.nn.Conv2d``.
        groups: G, of the convolution and of the shuffle.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best.
        algorithm: a kernel of the backend, see :func:`fastconv.group_conv2d_shuffle`.

    Raises:
        ValueError: an argument is wrong; the message names it and says what is allowed.
        BackendError: later, if the named backend or algorithm cannot run on an input.

    Reference: Zhang et al., "ShuffleNet", 2018, arXiv:1707.01083.
    """

    op = "group_conv2d_shuffle"
    convolve = staticmethod(group_conv2d_shuffle)
    default_algorithm = None

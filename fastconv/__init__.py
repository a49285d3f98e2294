"""fastconv: hand-written convolution kernels for PyTorch."""

from .backends import BackendError, available, use_backend
from .ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "available",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "use_backend",
]

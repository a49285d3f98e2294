"""What the Triton kernels of every operator share: activations, sum types, launch helpers."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

SUM_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

INTERPRETED = triton.knobs.runtime.interpret

# Products are added in one rounding, whatever TRITON_DEFAULT_FP_FUSION says.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# Arguments for whose value 1, or a multiple of 16, Triton shall not compile a kernel of its own. Strides and
# channels are not among them: only a kernel that knows them for multiples loads several values at once.
SIZES = (
    *("batch", "in_height", "in_width", "out_height", "out_width", "top", "left"),
    *("pixel_blocks", "strips", "slices", "slice_length"),
)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def in_memory_format(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The tensor itself if the format's last dimension is the fastest in memory, else a copy.

    Kernels take any strides; only the lanes of a warp must not each touch a cache line of their own.
    """
    last = 1 if memory_format == torch.channels_last else 3
    if tensor.stride(last) in (0, 1) or tensor.shape[last] == 1:
        return tensor
    return tensor.contiguous(memory_format=memory_format)


if INTERPRETED:

    def loop_bound(value):
        """A kernel's scalar as a bound of ``tl.range``.

        The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for integers.
        """
        return int(value.handle.data.item()) if isinstance(value, tl.tensor) else value

else:

    @triton.jit
    def loop_bound(value):
        return value


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation named, of a float32 or float64 tile; NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u); Triton has no tanh of its own.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return x


@triton.jit
def activation_gradient(grad, x, ACTIVATION: tl.constexpr):
    """grad * activation'(x): 0 at the kinks, and where the slope is 0 whatever grad is."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad = grad * (0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density)
    elif ACTIVATION == "gelu_tanh":
        # gate is (1 + tanh(u)) / 2, so 2 * gate * (1 - gate) is (1 - tanh(u)^2) / 2.
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        grad = grad * (gate + 2.0 * x * gate * (1.0 - gate) * slope)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        grad = grad * (gate * (1.0 + x * (1.0 - gate)))
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return grad

"""What the Triton compile gate launches of depthwise with 1x1 convolution: layers of MobileNets."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    filters: int
    kernel: int = 3
    stride: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        place = f"{self.shape[1]}@{self.shape[2]} to {self.filters}"
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} {place}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        channels = self.shape[1]
        launchers.separable_conv2d_forward_triton(
            torch.empty(self.shape, memory_format=memory_format, **options),
            torch.empty((channels, 1, self.kernel, self.kernel), **options),
            torch.empty((self.filters, channels, 1, 1), **options),
            torch.empty(channels, **options),
            torch.empty(self.filters, **options),
            *(None, None, (self.stride,) * 2, (self.kernel // 2,) * 4, (1, 1), "relu6", "silu", None),
        )


EARLY, LATE = (64, 144, 56, 56), (64, 1024, 7, 7)
LAUNCHES = [
    Layer(EARLY, 24),
    Layer(EARLY, 24, channels_last=False),
    Layer(EARLY, 24, dtype="float32"),
    Layer(EARLY, 32, stride=2, dtype="float16"),
    Layer(EARLY, 24, 5, capability=80),
    Layer(EARLY, 24, dtype="float64"),
    Layer(LATE, 1024),
    Layer(LATE, 1024, channels_last=False, dtype="float32"),
]

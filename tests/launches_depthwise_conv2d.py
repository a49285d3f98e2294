"""What the Triton compile gate launches of depthwise convolution: forward and backward of some layers."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer of a real network, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    kernel: int
    stride: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90
    algorithm: str = "tiled"
    moments: bool = False  # forward alone, with mean and variance

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        place = f"{self.shape[1]}@{self.shape[2]}"
        what = self.algorithm + (" moments" if self.moments else "")
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} on {place}, {what}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        input = torch.empty(self.shape, memory_format=memory_format, **options)
        weight = torch.empty(self.shape[1], 1, self.kernel, self.kernel, **options)
        bias = torch.empty(self.shape[1], **options)
        geometry = (self.stride,) * 2, ((self.kernel - 1) // 2,) * 4, (1, 1)
        if self.moments:
            launchers.depthwise_conv2d_moments_triton(input, weight, bias, *geometry)
            return
        output = launchers.depthwise_conv2d_forward_triton(
            input, weight, bias, *geometry, "gelu", self.algorithm
        )
        launchers.depthwise_conv2d_backward_triton(
            output, input, weight, *geometry, self.algorithm, True, True, True
        )


EARLY, LATE = (64, 96, 56, 56), (64, 768, 7, 7)
LAUNCHES = [
    Layer(EARLY, 7, 1, True, "float32"),  # the slowest to compile come first
    Layer(EARLY, 7, 1, True),
    Layer((64, 384, 14, 14), 31),
    Layer(EARLY, 7, 1, False, "float32"),
    Layer(EARLY, 7, 1, False),
    Layer(EARLY, 3, 1, True, "float32"),
    Layer(EARLY, 3, 1, True),
    Layer(EARLY, 3, 1, False, "float32"),
    Layer(EARLY, 3, 1, False),
    Layer(EARLY, 3, 2, True),
    Layer(EARLY, 3, 2, False),
    Layer(LATE, 3, 1, True, "float16"),
    Layer(EARLY, 3, 1, True, capability=80),
    Layer(EARLY, 3, 1, False, capability=80),
    Layer(EARLY, 3, 1, True, algorithm="plain"),
    Layer(EARLY, 3, 1, False, algorithm="plain"),
    Layer(EARLY, 3, 1, True, capability=80, algorithm="plain"),
    Layer(EARLY, 7, 1, True, "float32", moments=True),
    Layer(EARLY, 7, 1, False, moments=True),
    Layer(EARLY, 3, 1, True, moments=True),
    Layer(EARLY, 3, 1, False, "float32", moments=True),
    Layer(EARLY, 3, 2, True, moments=True),
    Layer(LATE, 3, 1, True, "float16", moments=True),
    Layer(EARLY, 3, 1, True, capability=80, moments=True),
]

"""What the Triton compile gate launches of convolution: forward and backward of some layers."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer of a real network, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    filters: int
    kernel: int
    stride: int = 1
    groups: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90
    algorithm: str = "implicit_gemm"
    moments: bool = False  # forward alone, with mean and variance

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        place = f"{self.shape[1]}@{self.shape[2]}, batch {self.shape[0]}, to {self.filters}{groups}"
        what = self.algorithm + (" moments" if self.moments else "")
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} on {place}, {what}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        input = torch.empty(self.shape, memory_format=memory_format, **options)
        weight = (self.filters, self.shape[1] // self.groups, self.kernel, self.kernel)
        weight = torch.empty(weight, memory_format=memory_format, **options)
        bias = torch.empty(self.filters, **options)
        geometry = (self.stride,) * 2, ((self.kernel - 1) // 2,) * 4, (1, 1), self.groups
        if self.moments:
            launchers.conv2d_moments_triton(input, weight, bias, *geometry, self.algorithm)
            return
        side = (self.shape[2] - 1) // self.stride + 1
        residual = (self.shape[0], self.filters, side, side)
        residual = torch.empty(residual, memory_format=memory_format, **options)
        output = launchers.conv2d_forward_triton(
            input, weight, bias, residual, None, *geometry, "gelu", self.algorithm
        )
        launchers.conv2d_backward_triton(output, input, weight, *geometry, self.algorithm, True, True, True)


EARLY, MIDDLE, LATE = (64, 64, 56, 56), (64, 256, 14, 14), (64, 512, 7, 7)
LAUNCHES = [
    Layer(EARLY, 64, 3),
    Layer(EARLY, 64, 3, channels_last=False),
    Layer(EARLY, 64, 3, dtype="float32"),
    Layer(EARLY, 64, 3, channels_last=False, dtype="float32"),
    Layer(EARLY, 64, 3, dtype="float64"),
    Layer(EARLY, 64, 3, capability=80),
    Layer(EARLY, 64, 3, channels_last=False, capability=80),
    Layer(EARLY, 64, 3, dtype="float32", capability=80),
    Layer(MIDDLE, 256, 3, dtype="float16"),
    Layer(MIDDLE, 256, 3, capability=80),
    Layer((64, 128, 56, 56), 128, 3, 2),
    Layer((64, 128, 56, 56), 128, 3, 2, channels_last=False),
    Layer((1, 512, 7, 7), 512, 3),
    Layer((64, 3, 224, 224), 64, 7, 2),
    Layer((64, 3, 224, 224), 64, 7, 2, channels_last=False),
    Layer((64, 128, 56, 56), 128, 3, groups=32),
    Layer((64, 128, 56, 56), 128, 3, groups=32, channels_last=False),
    Layer((64, 128, 28, 28), 128, 3, groups=4, channels_last=False),
    Layer(LATE, 2048, 1, algorithm="pointwise"),
    Layer(LATE, 2048, 1, channels_last=False, algorithm="pointwise"),
    Layer(MIDDLE, 1024, 1, dtype="float32", algorithm="pointwise"),
    Layer(EARLY, 256, 1, capability=80, algorithm="pointwise"),
    Layer(EARLY, 64, 3, moments=True),
    Layer(EARLY, 64, 3, channels_last=False, moments=True),
    Layer(EARLY, 64, 3, dtype="float32", moments=True),
    Layer(EARLY, 64, 3, channels_last=False, dtype="float32", moments=True),
    Layer(EARLY, 64, 3, dtype="float64", moments=True),
    Layer(MIDDLE, 256, 3, dtype="float16", moments=True),
    Layer(MIDDLE, 256, 3, capability=80, moments=True),
    Layer((64, 3, 224, 224), 64, 7, 2, moments=True),
    Layer((64, 128, 56, 56), 128, 3, groups=32, moments=True),
    Layer(EARLY, 256, 1, algorithm="pointwise", moments=True),
    Layer(LATE, 2048, 1, channels_last=False, algorithm="pointwise", moments=True),
]

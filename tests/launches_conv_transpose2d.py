"""What the Triton compile gate launches of transposed convolution: layers that double an image's sides."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    filters: int
    kernel: int = 4
    stride: int = 2
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90
    algorithm: str = "implicit_gemm"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        place = f"{self.shape[1]}@{self.shape[2]} to {self.filters}"
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} on {place}, {self.algorithm}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        launchers.conv_transpose2d_forward_triton(
            torch.empty(self.shape, memory_format=memory_format, **options),
            torch.empty((self.shape[1], self.filters, self.kernel, self.kernel), **options),
            torch.empty(self.filters, **options),
            None,
            *((self.stride,) * 2, ((self.kernel - self.stride) // 2,) * 2, (0, 0), (1, 1)),
            *(1, self.algorithm),
        )


MIDDLE = (16, 256, 32, 32)
LAUNCHES = [
    Layer(MIDDLE, 128),
    Layer(MIDDLE, 128, channels_last=False),
    Layer(MIDDLE, 128, dtype="float32"),
    Layer(MIDDLE, 128, capability=80),
    Layer(MIDDLE, 128, 2),
    Layer(MIDDLE, 128, 1, 1, algorithm="pointwise"),
]

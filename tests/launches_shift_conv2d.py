"""What the Triton compile gate launches of shift with 1x1 convolution: layers of ShiftNet."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    filters: int
    stride: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        place = f"{self.shape[1]}@{self.shape[2]} to {self.filters}"
        return f"sm_{self.capability} {self.dtype} {layout}{stride} {place}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        launchers.shift_conv2d_forward_triton(
            torch.empty(self.shape, memory_format=memory_format, **options),
            torch.empty((self.shape[1], 2), dtype=torch.int64, device="meta"),
            torch.empty((self.filters, self.shape[1], 1, 1), **options),
            torch.empty(self.filters, **options),
            None,
            *((self.stride,) * 2, "relu", None),
        )


EARLY, LATE = (64, 128, 28, 28), (64, 512, 7, 7)
LAUNCHES = [
    Layer(EARLY, 128),
    Layer(EARLY, 128, channels_last=False),
    Layer(EARLY, 128, dtype="float32"),
    Layer(EARLY, 128, channels_last=False, dtype="float32"),
    Layer(EARLY, 128, capability=80),
    Layer(EARLY, 128, dtype="float64"),
    Layer(EARLY, 256, 2, dtype="float16"),
    Layer(LATE, 512),
    Layer(LATE, 512, channels_last=False),
]

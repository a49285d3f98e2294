"""What the Triton compile gate launches of grouped convolution with shuffle: layers of ShuffleNet."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """A layer, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    filters: int
    groups: int
    kernel: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90
    algorithm: str = "pointwise"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        place = f"{self.shape[1]}@{self.shape[2]} to {self.filters}, {self.groups} groups"
        kernel = f"{self.kernel}x{self.kernel}"
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} on {place}, {self.algorithm}, shuffled"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        launchers.group_conv2d_shuffle_forward_triton(
            torch.empty(self.shape, memory_format=memory_format, **options),
            torch.empty(
                (self.filters, self.shape[1] // self.groups, self.kernel, self.kernel),
                memory_format=memory_format, **options,
            ),
            torch.empty(self.filters, **options),
            None,
            *((1, 1), ((self.kernel - 1) // 2,) * 4, (1, 1), self.groups),
            *("relu", self.algorithm),
        )  # fmt: skip


STAGE = (64, 240, 28, 28)
LAUNCHES = [
    Layer(STAGE, 60, 3),
    Layer(STAGE, 60, 3, channels_last=False),
    Layer(STAGE, 60, 3, dtype="float32"),
    Layer(STAGE, 60, 3, capability=80),
    Layer((64, 24, 56, 56), 48, 8),  # a bundle of groups in a tile
    Layer((64, 512, 14, 14), 512, 4),
    Layer((64, 128, 28, 28), 128, 4, 3, algorithm="implicit_gemm"),
    Layer((64, 128, 28, 28), 128, 4, 3, channels_last=False, algorithm="implicit_gemm"),
    Layer((64, 128, 28, 28), 128, 4, 3, dtype="float32", algorithm="implicit_gemm"),
]

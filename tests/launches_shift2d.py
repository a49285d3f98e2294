"""What the Triton compile gate launches of shift: a layer of ShiftNet."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    channels_last: bool
    dtype: str
    capability: int

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"sm_{self.capability} {self.dtype} {layout} 256@56"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta", "memory_format": memory_format}
        offsets = torch.empty((256, 2), dtype=torch.int64, device="meta")
        launchers.shift2d_forward_triton(torch.empty((64, 256, 56, 56), **options), offsets, None)


LAUNCHES = [
    Layer(channels_last, dtype, capability)
    for channels_last in (False, True)
    for dtype, capability in (("bfloat16", 90), ("float32", 90), ("bfloat16", 80))
]

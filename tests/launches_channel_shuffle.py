"""What the Triton compile gate launches of channel shuffle: a layer of ShuffleNet."""

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
        return f"sm_{self.capability} {self.dtype} {layout} 240@28"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta", "memory_format": memory_format}
        launchers.channel_shuffle_forward_triton(torch.empty((64, 240, 28, 28), **options), 3, None)


LAUNCHES = [
    Layer(channels_last, dtype, capability)
    for channels_last in (False, True)
    for dtype, capability in (("bfloat16", 90), ("float32", 90), ("bfloat16", 80))
]

"""What the Triton compile gate launches of temporal shift: a layer of TSM-ResNet-50."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    channels_last: bool
    causal: bool
    dtype: str
    capability: int

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"sm_{self.capability} {self.dtype} {layout}{' causal' if self.causal else ''} 256@56"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta", "memory_format": memory_format}
        input = torch.empty((64, 256, 56, 56), **options)
        step = -1 if self.causal else 1
        launchers.temporal_shift_forward_triton(input, 8, 32, step, not self.causal, None)
        launchers.temporal_shift_in_place_triton(input, 8, 32, step, not self.causal, None)


LAUNCHES = [
    Layer(channels_last, causal, dtype, capability)
    for channels_last in (False, True)
    for causal in (False, True)
    for dtype, capability in (("bfloat16", 90), ("float32", 90), ("bfloat16", 80))
]

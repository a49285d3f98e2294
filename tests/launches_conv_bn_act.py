"""What the Triton compile gate launches of conv_bn_act: normalisation and its gradients."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """The result of a convolution of a real network, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    channels_last: bool = True
    dtype: str = "bfloat16"
    activation: str | None = "relu"
    residual: bool = True
    capability: int = 90

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        what = f"{self.activation}{', residual' if self.residual else ''}"
        return f"sm_{self.capability} {self.dtype} {layout} {self.shape[1]}@{self.shape[2]} {what}"

    def run(self, launchers: ModuleType) -> None:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        input = torch.empty(self.shape, memory_format=memory_format, **options)
        residual = input if self.residual else None
        exact = torch.float64 if self.dtype == "float64" else torch.float32
        number = torch.empty(self.shape[1], dtype=exact, device="meta")
        constants = (1e-5, self.activation, None)
        launchers.conv_bn_act_normalize_triton(input, residual, number, number, *constants)
        launchers.conv_bn_act_normalize_backward_triton(
            input, input, residual, number, number, number, number, *constants, self.residual
        )


EARLY, LATE = (64, 256, 56, 56), (64, 512, 7, 7)
LAUNCHES = [
    Layer(shape, channels_last, dtype, capability=capability)
    for shape in (EARLY, LATE)
    for channels_last in (True, False)
    for dtype, capability in (("bfloat16", 90), ("float32", 90), ("bfloat16", 80))
] + [
    Layer(EARLY, True, "float16", None),
    Layer(EARLY, True, "bfloat16", "relu6", False),
    Layer(EARLY, True, "float32", "gelu"),
    Layer(EARLY, False, "float32", "gelu_tanh"),
    Layer(EARLY, False, "bfloat16", "silu", False),
    Layer(EARLY, True, "float64", "gelu"),
    Layer(EARLY, False, "float64", "silu"),
    Layer((64, 24, 56, 56), True, "bfloat16", "relu6"),
    Layer((64, 1, 224, 224), False, "float32", "gelu"),
    Layer((64, 64, 1120, 1120), True, "bfloat16", "relu"),  # more than 32 bits count
    Layer((64, 64, 1120, 1120), False, "bfloat16", "relu"),
]

"""ConvNeXt: 7x7 depthwise filters, then two linear layers on each pixel; one norm, one activation a block."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import layer_norm

from ._layers import StochasticDepth, conv_type, depth_probabilities, depthwise
from ._registry import register_variants

# Channels and blocks of the four stages, and the usual stochastic depth.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "t": ((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "s": ((96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "b": ((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "l": ((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
}
EPS = 1e-6


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of ``(N, C, H, W)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """The axes in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.order)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.order))


class CNBlock(nn.Module):
    """7x7 depthwise, layer norm, to four times the channels, GELU, and back; scaled, and added to the input.

    Args:
        channels: of the input and the output.
        layer_scale: the scales of the channels at first.
        drop: probability of an image to skip the block, in training.
        plain: from ``torch.nn`` alone.
    """

    def __init__(self, channels: int, layer_scale: float, drop: float, plain: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            depthwise(channels, 1, plain, kernel_size=7, bias=True),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.stochastic_depth = StochasticDepth(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stochastic_depth(self.layer_scale * self.block(x)).add_(x)


class ConvNeXt(nn.Module):
    """Image classifier, ``(N, in_channels, H, W) -> (N, num_classes)``; see :func:`convnext`."""

    def __init__(
        self,
        size: str,
        num_classes: int,
        in_channels: int,
        layer_scale: float,
        stochastic_depth: float | None,
        plain: bool,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {tuple(SIZES)}, got {size!r}")
        channels, counts, usual = SIZES[size]
        largest = usual if stochastic_depth is None else stochastic_depth
        drops = iter(depth_probabilities(largest, sum(counts), steps=sum(counts) - 1))
        conv = conv_type(plain)
        stem = conv(in_channels, channels[0], 4, stride=4)
        stages: list[nn.Module] = [nn.Sequential(stem, LayerNorm2d(channels[0], eps=EPS))]
        for index, (filters, count) in enumerate(zip(channels, counts)):
            if index:
                before = channels[index - 1]
                halve = conv(before, filters, 2, stride=2)
                stages.append(nn.Sequential(LayerNorm2d(before, eps=EPS), halve))
            blocks = [CNBlock(filters, layer_scale, next(drops), plain) for _ in range(count)]
            stages.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            LayerNorm2d(channels[-1], eps=EPS), nn.Flatten(1), nn.Linear(channels[-1], num_classes)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3), keepdim=True))


def convnext(
    size: str,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    layer_scale: float = 1e-6,
    stochastic_depth: float | None = None,
    plain: bool = False,
) -> ConvNeXt:
    """ConvNeXt with fresh weights. Parameters are named as torchvision's, whose checkpoints load.

    In the table of networks these are ``convnext_t``, ``convnext_s``, ``convnext_b`` and ``convnext_l``:
    28.6, 50.2, 88.6 and 198 M parameters; 4.5, 8.7, 15.4 and 34.4 G MACs of a 224x224 image.

    Args:
        size: ``"t"``, ``"s"``, ``"b"`` or ``"l"``.
        num_classes: outputs of the classifier.
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        layer_scale: by which each block's output is scaled at first.
        stochastic_depth: probability of an image to skip a block, in training; from 0 at the first block it
            grows to this at the last; None: the size's.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError: there is no such size, or ``stochastic_depth`` is not at least 0 and below 1.

    Reference: Liu et al., "A ConvNet for the 2020s", 2022, arXiv:2201.03545.
    """
    return ConvNeXt(size, num_classes, in_channels, layer_scale, stochastic_depth, plain)


register_variants("convnext_", convnext, SIZES)

"""Video by two-dimensional networks: frames that exchange channels (TSM), and frames stacked as channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..nn import TemporalShift
from ..ops._arguments import integer
from ._registry import register_variants
from .resnet import BasicBlock, Bottleneck, ResNet

DEPTHS = (18, 50)


class _PlainTemporalShift(nn.Module):
    """In PyTorch's own functions: of the channels, a fold comes from the next frame, one from the last."""

    def __init__(self, segments: int, fold_div: int) -> None:
        super().__init__()
        self.segments = segments
        self.fold_div = fold_div

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N*T, C, H, W)
        clips = _by_clip(x, self.segments)
        fold = x.shape[1] // self.fold_div
        following = pad(clips[:, 1:, :fold], (0, 0, 0, 0, 0, 0, 0, 1))  # zeros after the last frame
        previous = pad(clips[:, :-1, fold : 2 * fold], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([following, previous, clips[:, :, 2 * fold :]], 2).flatten(0, 1)


def _temporal_shift(segments: int, fold_div: int, plain: bool) -> nn.Module:
    if plain:
        return _PlainTemporalShift(segments, fold_div)
    return TemporalShift(nn.Identity(), segments, fold_div)


class TSMResNet(ResNet):
    """Video classifier; see :func:`tsm_resnet`."""

    def __init__(
        self, depth: int, segments: int, num_classes: int, in_channels: int, fold_div: int, plain: bool
    ) -> None:
        segments, fold_div = integer("segments", segments), integer("fold_div", fold_div, least=2)
        super().__init__(_depth(depth), num_classes, in_channels, residual=True, plain=plain)
        self.segments = segments
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.shift = _temporal_shift(segments, fold_div, plain)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(_clips(x, self.segments).flatten(0, 1))
        return _by_clip(logits, self.segments).mean(1)


class StackedResNet(ResNet):
    """Video classifier; see :func:`stacked_resnet`."""

    def __init__(self, depth: int, segments: int, num_classes: int, in_channels: int, plain: bool) -> None:
        segments, in_channels = integer("segments", segments), integer("in_channels", in_channels)
        super().__init__(_depth(depth), num_classes, segments * in_channels, residual=True, plain=plain)
        self.segments = segments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(_clips(x, self.segments).flatten(1, 2))


def _depth(depth: int) -> int:
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {DEPTHS}, got {depth!r}")
    return depth


def _clips(x: torch.Tensor, segments: int) -> torch.Tensor:
    """Either form of the input as ``(N, T, C, H, W)``."""
    if x.dim() == 4 and x.shape[0] % segments == 0:
        return _by_clip(x, segments)
    if x.dim() == 5 and x.shape[1] == segments:
        return x
    raise ValueError(
        f"input must be (N*{segments}, C, H, W) or (N, {segments}, C, H, W), got shape {tuple(x.shape)}"
    )


def _by_clip(x: torch.Tensor, segments: int) -> torch.Tensor:
    """``(N*T, ...)`` as ``(N, T, ...)``."""
    return x.unflatten(0, (x.shape[0] // segments, segments))


def _rename(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The names of the authors' checkpoints, as torchvision's."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix).removeprefix("module.").removeprefix("base_model.")
        own = own.replace(".conv1.net.", ".conv1.").replace("new_fc.", "fc.")
        state[prefix + own] = state.pop(name)


def tsm_resnet(
    depth: int,
    segments: int = 8,
    num_classes: int = 400,
    in_channels: int = 3,
    *,
    fold_div: int = 8,
    plain: bool = False,
) -> TSMResNet:
    """ResNet for video with fresh weights: in each block's branch, frames exchange channels.

    Parameters, and MACs of a frame, are the ResNet's. The logits are the mean over the frames. Parameters are
    named as torchvision's ResNets', so that checkpoints trained on images load (with their ``num_classes``);
    the authors' own load, too. In the table of networks these are ``tsm_resnet18`` and ``tsm_resnet50``.

    Args:
        depth: layers: 18 or 50.
        segments: T, the frames of a clip.
        num_classes: outputs of the classifier; the default is that of Kinetics-400.
        in_channels: channels of the input, ``(N*T, in_channels, H, W)`` or ``(N, T, in_channels, H, W)``.
        fold_div: one of so many channels comes from the next frame, and one from the last.
        plain: from ``torch.nn`` alone; parameters and state_dict keys are the same.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.

    Reference: Lin, Gan, Han, "TSM: Temporal Shift Module for Efficient Video Understanding", 2019,
    arXiv:1811.08383.
    """
    return TSMResNet(depth, segments, num_classes, in_channels, fold_div, plain)


def stacked_resnet(
    depth: int, segments: int = 8, num_classes: int = 400, in_channels: int = 3, *, plain: bool = False
) -> StackedResNet:
    """What TSM is held against: the frames of a clip as the channels of one image, into a ResNet.

    In the table of networks these are ``stacked_resnet18`` and ``stacked_resnet50``.

    Args: as :func:`tsm_resnet`'s.

    Raises: as :func:`tsm_resnet`.
    """
    return StackedResNet(depth, segments, num_classes, in_channels, plain)


register_variants("tsm_resnet", tsm_resnet, DEPTHS)
register_variants("stacked_resnet", stacked_resnet, DEPTHS)

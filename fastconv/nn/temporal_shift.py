"""Temporal shift in front of any 2-D block; for whole clips, or for one frame after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops._arguments import check_tensor
from ..ops._operator import as_memory_format, memory_format_of
from ..ops.temporal_shift import check_shift, temporal_shift
from ._rules import check_backend


class ClipShift(nn.Module):
    """The shift of whole clips in :class:`TemporalShift`, whose arguments it takes."""

    def __init__(
        self, segments: int, fold_div: int, *, causal: bool, inplace: bool, backend: str | None
    ) -> None:
        super().__init__()
        self.segments, self.fold_div = check_shift(segments, fold_div, causal, inplace)
        check_backend(backend)
        self.causal = causal
        self.inplace = inplace
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return temporal_shift(
            input,
            self.segments,
            self.fold_div,
            causal=self.causal,
            inplace=self.inplace,
            backend=self.backend,
        )

    def moved(self, channels: int) -> int:
        """How many of the channels move."""
        return channels // self.fold_div * (1 if self.causal else 2)

    def extra_repr(self) -> str:
        parts = [f"segments={self.segments}", f"fold_div={self.fold_div}"]
        parts += ["causal=True"] if self.causal else []
        parts += ["inplace=True"] if self.inplace else []
        parts += [f"backend={self.backend!r}"] if self.backend else []
        return ", ".join(parts)


class TemporalShift(nn.Module):
    """A block that sees some channels of the frames before and after: ``block(temporal_shift(x, segments))``.

    The state_dict is the block's, under ``block.``; the shift, a layer of its own, has no parameters.

    A causal shift also runs online, one frame of each clip at a time. It remembers the first
    ``C // fold_div`` channels of the last frame, and gives for each frame what it gives for that frame of the
    whole clip, gradients included::

        with torch.no_grad(), shift.online():
            outputs = [shift(frame) for frame in frames]  # of (B, C, H, W) each

    Args:
        block: any module that takes images ``(N, C, H, W)``.
        segments: T, the frames of a clip; whole clips come as ``(B*T, C, H, W)``, each clip's frames one
            after the other.
        fold_div: one of so many channels moves, in each direction; at least 2, or 1 if causal.
        causal: whether channels come from the frame before only.
        inplace: whether whole clips are overwritten by their shift. Not where they require a gradient, or
            where something else reads them, such as a shortcut around the block.
        backend: which kernels shift whole clips, see :mod:`fastconv.backends`; None takes the measured best.

    Raises:
        ValueError, TypeError: an argument is wrong, or later an input; the message says what is allowed.
        BackendError: later, if the named backend cannot run on an input.

    Reference: Lin, Gan, Han, "TSM: Temporal Shift Module for Efficient Video Understanding", 2019,
    arXiv:1811.08383.
    """

    def __init__(
        self,
        block: nn.Module,
        segments: int,
        fold_div: int = 8,
        *,
        causal: bool = False,
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        if not isinstance(block, nn.Module):
            raise TypeError(f"block must be a torch.nn.Module, got {type(block).__name__}")
        super().__init__()
        self.shift = ClipShift(segments, fold_div, causal=causal, inplace=inplace, backend=backend)
        self.block = block
        self._is_online = False
        # Moves with the module, and is no part of its state.
        self.register_buffer("_last", None, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._is_online:
            return self.step(input)
        return self.block(self.shift(input))

    @contextlib.contextmanager
    def online(self) -> Iterator[TemporalShift]:
        """Within the block a call is a :meth:`step`; nothing is remembered before it or after it."""
        self._check_causal()
        before, self._is_online = self._is_online, True
        self.reset()
        try:
            yield self
        finally:
            self._is_online = before
            self.reset()

    def step(self, frame: torch.Tensor) -> torch.Tensor:
        """The block's output for the next frame of each clip.

        Args:
            frame: ``(B, C, H, W)``; the first after :meth:`reset` has no frame before it.

        Raises:
            ValueError: the shift is not causal, or the frame is not like the last one.
        """
        self._check_causal()
        check_tensor("frame", frame, rank=4)
        fold = frame.shape[1] // self.shift.fold_div
        mine, others = frame[:, :fold], frame[:, fold:]
        last = torch.zeros_like(mine) if self._last is None else self._last
        if (last.shape, last.dtype, last.device) != (mine.shape, mine.dtype, mine.device):
            raise ValueError(
                f"frame's first {fold} channels must be like the last frame's, which are "
                f"{tuple(last.shape)} of {last.dtype} on {last.device}, got {tuple(mine.shape)} of "
                f"{mine.dtype} on {mine.device}; reset() forgets the last frame"
            )
        shifted = as_memory_format(torch.cat([last, others], 1), memory_format_of(frame))
        following = mine.clone()  # the frame itself may be overwritten by the next
        output = self.block(shifted)
        self._last = following
        return output

    def reset(self) -> None:
        """Forgets the last frame: the next one is the first of its clip."""
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy remembers the last frame, not the graph that it came from: PyTorch copies leaves alone."""
        state = super().__getstate__()
        if self._last is not None:
            state["_buffers"] = {**self._buffers, "_last": self._last.detach()}
        return state

    def _check_causal(self) -> None:
        if not self.shift.causal:
            raise ValueError(
                "causal must be True to run frame by frame: else a frame needs channels of the next one"
            )

"""Mean and variance of each channel of what a kernel has at hand, part by part, and the merge of the parts.

Formula   a part has a count n, a mean m and the squares S = sum of (x - m)^2. Parts merge to n = sum of n_i,
          m = sum of n_i * m_i / n, S = sum of S_i + n_i * (m_i - m)^2 (Chan, Golub and LeVeque 1979).
Program   a part: a tile's values, or several tiles' (their pixels lie along AXIS); or the merge of up to
          PARTS parts of BLOCK channels, in a fixed order, again and again until one part is left.
Bytes     three numbers of each channel and part are written and read again.
Trick     squares are of distances from a mean: a mean far from zero costs no digits. Nothing is atomic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import sum_type

from ._common import COMPILE_OPTIONS, SUM_TYPES

MERGED_PARTS, MERGED_CHANNELS = 128, 16  # at once, by one program


@triton.jit
def store_part(part_ptr, part, channel, channels, count, mean, squares):
    """Moments of channels as a part's: row ``part`` of (parts, 3, C)."""
    at = part_ptr + part * (3 * channels) + channel
    tl.store(at, count, mask=channel < channels)
    tl.store(at + channels, mean, mask=channel < channels)
    tl.store(at + 2 * channels, squares, mask=channel < channels)


@triton.jit
def store_moments(
    part_ptr, part, channel, channels,  # channel: a tile of one pixel
    tiles, masks,  # COUNT tiles, as they are stored, pixels along AXIS; whether each pixel exists
    COUNT: tl.constexpr, AXIS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The moments of the tiles' values, as one part: their mean, and then their squared distances from it."""
    count = tl.sum(masks[0].to(SUM))
    total = tl.where(masks[0], tiles[0].to(SUM), 0.0)
    for k in tl.static_range(1, COUNT):
        count += tl.sum(masks[k].to(SUM))
        total += tl.where(masks[k], tiles[k].to(SUM), 0.0)
    mean = tl.sum(total, axis=AXIS, keep_dims=True) / count

    squares = tl.zeros(tiles[0].shape, SUM)
    for k in tl.static_range(COUNT):
        distance = tl.where(masks[k], tiles[k].to(SUM) - mean, 0.0)
        squares += distance * distance
    squares = tl.sum(squares, axis=AXIS, keep_dims=True)
    store_part(part_ptr, part, channel, channels, count, mean, squares)


@triton.jit(do_not_specialize=("parts",))
def moments_merge_kernel(
    part_ptr,  # (parts, 3, C)
    merged_ptr,  # (ceil(parts / PARTS), 3, C), or None: then there are at most PARTS parts
    mean_ptr,  # (C,), or None
    variance_ptr,  # (C,), or None
    channels, parts,
    SUM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    exists = (part < parts)[:, None] & (c < channels)[None, :]
    at = part_ptr + part[:, None] * (3 * channels) + c[None, :]
    count = tl.load(at, mask=exists, other=0.0)
    mean = tl.load(at + channels, mask=exists, other=0.0)
    squares = tl.load(at + 2 * channels, mask=exists, other=0.0)

    # Means are taken from one of theirs: far from zero, a sum of them has fewer digits than their distances.
    first = part_ptr + tl.program_id(1).to(tl.int64) * PARTS * (3 * channels) + channels + c
    pivot = tl.load(first, mask=c < channels, other=0.0)
    distance = tl.where(exists, mean - pivot[None, :], 0.0)
    total = tl.sum(count, axis=0)
    divisor = tl.maximum(total, 1.0)
    shift = tl.sum(distance * count, axis=0) / divisor
    distance -= shift[None, :]
    squares = tl.sum(squares + distance * distance * count, axis=0)
    if merged_ptr is not None:
        store_part(merged_ptr, tl.program_id(1).to(tl.int64), c, channels, total, pivot + shift, squares)
    else:
        tl.store(mean_ptr + c, pivot + shift, mask=c < channels)
        tl.store(variance_ptr + c, squares / divisor, mask=c < channels)


def new_parts(parts: int, output: torch.Tensor) -> torch.Tensor:
    """Memory for the moments of an output's channels, in parts: (parts, 3, C)."""
    return torch.empty((parts, 3, output.shape[1]), dtype=sum_type(output.dtype), device=output.device)


def merge_parts(
    kernel: Any,  # moments_merge_kernel
    partial: torch.Tensor,  # (parts, 3, C), each part of one value or more
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel; launched where the parts are."""
    parts, _, channels = partial.shape
    mean, variance = partial.new_empty(channels), partial.new_empty(channels)
    block = min(MERGED_CHANNELS, triton.next_power_of_2(channels))
    while True:
        slices = triton.cdiv(parts, MERGED_PARTS)
        last = slices == 1
        merged = None if last else partial.new_empty((slices, 3, channels))
        kernel[(triton.cdiv(channels, block), slices)](
            partial, merged, *((mean, variance) if last else (None, None)), channels, parts,
            SUM=SUM_TYPES[partial.dtype], BLOCK=block,
            PARTS=min(MERGED_PARTS, triton.next_power_of_2(parts)), num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
        if last:
            return mean, variance
        partial, parts = merged, slices

"""Temporal shift in Triton.

Formula   y[t, c] = x[t + step, c] in the first fold of channels, x[t - step, c] in the second, where both
          folds move, x[t, c] in the others; zero outside the clip.
Program   a block of outputs that are neighbours in memory; in place a block of one fold's columns, each lane
          walking its own from the frame whose value leaves the clip.
Bytes     read N*C*H*W, write N*C*H*W; in place the folds alone.
Trick     each of the three places a value may come from is a load of its own, whose lanes are neighbours and
          of which a mask leaves some: so a load takes 16 bytes a lane where folds are multiples of them. What
          the mask leaves out is not read.
Limits    divisions for each value; in place each frame's load waits for the one before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import as_memory_format, memory_format_of, new_output

from ._common import COMPILE_OPTIONS, loop_bound, on_device_of

BLOCK = 1024


@triton.jit(do_not_specialize=["segments"])
def temporal_shift_plain_forward_kernel(
    input_ptr,  # (frames, rows, length)
    output_ptr,  # (frames, rows, length)
    count, segments,
    size, length, fold,  # values: of a frame; of a row; of a row's first fold
    STEP: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = flat < count
    place, time = flat % length, flat // size % segments
    first, second = place < fold, (place >= fold) & (place < 2 * fold) & BOTH
    ahead = (time + STEP >= 0) & (time + STEP < segments)
    back = (time - STEP >= 0) & (time - STEP < segments)
    distance = tl.cast(size, tl.int64) * STEP
    values = tl.load(input_ptr + flat, mask=exists & ~first & ~second, other=0)
    moved = tl.load(input_ptr + distance + flat, mask=exists & first & ahead, other=0)
    values = tl.where(first, moved, values)
    if BOTH:
        moved = tl.load(input_ptr - distance + flat, mask=exists & second & back, other=0)
        values = tl.where(second, moved, values)
    tl.store(output_ptr + flat, values, mask=exists)


@triton.jit(do_not_specialize=["segments"])
def temporal_shift_plain_in_place_kernel(
    values_ptr,  # (frames, rows, length)
    columns, segments,  # columns: of one fold in all clips
    rows, length, fold,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = flat < columns
    row = flat // fold  # of all clips
    size = tl.cast(rows, tl.int64) * length
    step = tl.where(tl.program_id(1) == 0, STEP, -STEP)
    first = tl.where(step > 0, 0, segments - 1)
    place = tl.program_id(1).to(tl.int64) * fold + flat % fold
    at = values_ptr + (row // rows * segments + first) * size + row % rows * length + place
    for _ in range(1, loop_bound(segments)):
        tl.store(at, tl.load(at + step * size, mask=exists, other=0), mask=exists)
        at += step * size
    tl.store(at, 0.0, mask=exists)


def temporal_shift_forward_triton(
    input: torch.Tensor,  # (B*T, C, H, W)
    segments: int,  # T
    fold: int,  # channels
    step: int,  # 1 or -1
    both: bool,  # whether a second fold moves the other way
    algorithm: str | None,  # "plain" (None is that)
) -> torch.Tensor:
    """``fastconv::temporal_shift.triton``: (B*T, C, H, W) in the input's memory format."""
    output = new_output(input, input.shape)
    if output.numel() == 0:
        return output
    memory_format = memory_format_of(input)
    channels, height, width = input.shape[1:]
    run = 1 if memory_format == torch.channels_last else height * width
    with on_device_of(input):
        temporal_shift_plain_forward_kernel[(triton.cdiv(input.numel(), BLOCK),)](
            input.contiguous(memory_format=memory_format), output,
            input.numel(), segments, channels * height * width, channels * run, fold * run,
            STEP=step, BOTH=both, BLOCK=BLOCK, num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
    return output


def temporal_shift_in_place_triton(
    input: torch.Tensor,  # (B*T, C, H, W), overwritten
    segments: int,  # T
    fold: int,  # channels
    step: int,  # 1 or -1
    both: bool,  # whether a second fold moves the other way
    algorithm: str | None,  # "plain" (None is that)
) -> None:
    """``fastconv::temporal_shift_.triton``."""
    if input.numel() == 0 or fold == 0:
        return
    memory_format = memory_format_of(input)
    dense = as_memory_format(input, memory_format)
    frames, channels, height, width = input.shape
    rows, run = (height * width, 1) if memory_format == torch.channels_last else (1, height * width)
    columns = frames // segments * rows * fold * run
    with on_device_of(input):
        temporal_shift_plain_in_place_kernel[(triton.cdiv(columns, BLOCK), 2 if both else 1)](
            dense, columns, segments, rows, channels * run, fold * run,
            STEP=step, BLOCK=BLOCK, num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
    if dense is not input:
        input.copy_(dense)

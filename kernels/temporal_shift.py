"""Temporal shift in Triton.

Formula   y[t, c] = x[t + step, c] in the first fold of channels, x[t - step, c] in the second, where both
          folds move, x[t, c] in the others; zero outside the clip.
Program   a block of outputs that are neighbours in memory.
Bytes     read N*C*H*W, write N*C*H*W.
Trick     each of the three places a value may come from is a load of its own, whose lanes are neighbours and
          of which a mask leaves some: so a load takes 16 bytes a lane where folds are multiples of them. What
          the mask leaves out is not read.
Limits    divisions for each value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import memory_format_of, new_output

from ._common import COMPILE_OPTIONS, on_device_of

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
    distance = size.to(tl.int64) * STEP
    values = tl.load(input_ptr + flat, mask=exists & ~first & ~second, other=0)
    moved = tl.load(input_ptr + distance + flat, mask=exists & first & ahead, other=0)
    values = tl.where(first, moved, values)
    if BOTH:
        moved = tl.load(input_ptr - distance + flat, mask=exists & second & back, other=0)
        values = tl.where(second, moved, values)
    tl.store(output_ptr + flat, values, mask=exists)


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

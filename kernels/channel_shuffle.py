"""Channel shuffle in Triton.

Formula   y[n, k*G + g, h, w] = x[n, g*(C/G) + k, h, w].
Program   a block of outputs that are neighbours in memory, one a lane, each fetching its value.
Bytes     read N*C*H*W, write N*C*H*W.
Layouts   both are (images, C, run) in memory: contiguous with N images and runs of H*W values, channels_last
          with N*H*W images and runs of one, for which Triton compiles a kernel without that division.
Limits    divisions for each value; in channels_last a warp reads from every group, and leaves it to the cache
          that the rest of each sector is not read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import memory_format_of, new_output

from ._common import COMPILE_OPTIONS, on_device_of

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def channel_shuffle_plain_forward_kernel(
    input_ptr,  # (images, C, run), dense
    output_ptr,  # (images, C, run), dense
    count, groups, per_group, run,
    BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place, plane = flat % run, flat // run
    channel = plane % (groups * per_group)
    source = plane - channel + channel % groups * per_group + channel // groups
    exists = flat < count
    tl.store(output_ptr + flat, tl.load(input_ptr + source * run + place, mask=exists), mask=exists)


def channel_shuffle_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    groups: int,
    algorithm: str | None,  # "plain" (None is that)
) -> torch.Tensor:
    """``fastconv::channel_shuffle.triton``: (N, C, H, W) in the input's memory format."""
    output = new_output(input, input.shape)
    if output.numel() == 0:
        return output
    memory_format = memory_format_of(input)
    run = 1 if memory_format == torch.channels_last else input.shape[2] * input.shape[3]
    with on_device_of(input):
        channel_shuffle_plain_forward_kernel[(triton.cdiv(input.numel(), BLOCK),)](
            input.contiguous(memory_format=memory_format), output,
            input.numel(), groups, input.shape[1] // groups, run,
            BLOCK=BLOCK, num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
    return output

"""Shift in Triton.

Formula   y[n, c, h, w] = x[n, c, h + dh[c], w + dw[c]], zero outside.
Program   a block of outputs that are neighbours in memory, one a lane, each fetching its value.
Bytes     read N*C*H*W, write N*C*H*W, and the offsets, which the cache serves.
Layouts   contiguous and channels_last, each by a kernel of its own: a constant says which number of a pixel
          or channel changes fastest.
Limits    divisions for each value. The offsets lie on the CPU and are copied to the GPU at each call, so that
          a CUDA graph must not capture it; the kernels in CUDA take them as parameters of the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import memory_format_of, new_output

from ._common import COMPILE_OPTIONS, on_device_of

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def shift2d_plain_forward_kernel(
    input_ptr,  # (N, C, H, W) or (N, H, W, C), dense
    offsets_ptr,  # (C, 2) of int64, at most max(H, W) and at least its opposite
    output_ptr,  # (N, C, H, W) or (N, H, W, C), dense
    count, channels, height, width,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        channel, pixel, step = flat % channels, flat // channels, channels
    else:
        channel, pixel, step = flat // (height * width) % channels, flat, 1
    row, column = pixel // width % height, pixel % width
    exists = flat < count
    dh = tl.load(offsets_ptr + 2 * channel, mask=exists, other=0)
    dw = tl.load(offsets_ptr + 2 * channel + 1, mask=exists, other=0)
    inside = exists & (row + dh >= 0) & (row + dh < height) & (column + dw >= 0) & (column + dw < width)
    values = tl.load(input_ptr + flat + (dh * width + dw) * step, mask=inside, other=0)
    tl.store(output_ptr + flat, values, mask=exists)


def offsets_beside(input: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The offsets on the input's device; those beyond the image are all alike."""
    far = max(input.shape[2:])
    return offsets.clamp(-far, far).contiguous().to(input.device)


def shift2d_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    offsets: torch.Tensor,  # (C, 2), int64 on the CPU
    algorithm: str | None,  # "plain" (None is that)
) -> torch.Tensor:
    """``fastconv::shift2d.triton``: (N, C, H, W) in the input's memory format."""
    output = new_output(input, input.shape)
    if output.numel() == 0:
        return output
    memory_format = memory_format_of(input)
    channels, height, width = input.shape[1:]
    with on_device_of(input):
        shift2d_plain_forward_kernel[(triton.cdiv(input.numel(), BLOCK),)](
            input.contiguous(memory_format=memory_format),
            offsets_beside(input, offsets), output, input.numel(), channels, height, width,
            CHANNELS_LAST=memory_format == torch.channels_last, BLOCK=BLOCK, num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
    return output

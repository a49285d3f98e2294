"""Depthwise convolution in Triton: the launchers, and how they divide the work.

Formula   y[n,o,e,f] = act(b[o] + sum_ij x[n,o//m,e*sh+i*dh-top,f*sw+j*dw-left] * w[o,i,j]), zero outside.
Program   see depthwise_conv2d_plain.py and depthwise_conv2d_tiled.py.
Bytes     read N*C*H*W, write N*O*E*F; grad_weight reads both and adds its slices' sums in a second kernel.
Differs   tile sizes are closed forms of the shape: a first call compiles, and searches nothing.
Limits    a launch has at most 2^31-1 programs; sums in float32 (float64 for float64), in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastconv.ops._arguments import output_size
from fastconv.ops._operator import memory_format_of, new_output, sum_type

from ._common import COMPILE_OPTIONS, SIZES, SUM_TYPES, in_memory_format, loop_bound, on_device_of
from ._moments import merge_parts, moments_merge_kernel, new_parts
from .depthwise_conv2d_plain import (
    depthwise_conv2d_plain_forward_kernel,
    depthwise_conv2d_plain_grad_input_kernel,
    depthwise_conv2d_plain_grad_weight_kernel,
)
from .depthwise_conv2d_tiled import (
    depthwise_conv2d_tiled_forward_kernel,
    depthwise_conv2d_tiled_grad_input_kernel,
    depthwise_conv2d_tiled_grad_weight_kernel,
)

PLAIN_BLOCK = 256
CHANNELS_PER_THREAD = 2  # in channels_last: the 32-bit words that a warp loads cover whole cache lines
MOST_LOADS = 84  # in the unrolled code of a tiled kernel; the time to compile it grows with their square
GRAD_WEIGHT_PROGRAMS = 512  # a few for each multiprocessor of a large GPU


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_grad_weight_sum_kernel(
    partial_ptr,  # (slices, TAPS + 1, O); the last tap is the bias
    grad_weight_ptr,  # (O, TAPS) or None
    grad_bias_ptr,  # (O,) or None
    slices, out_channels,
    TAPS: tl.constexpr, SUM: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage of both variants: adds up the slices, always in the same order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap, o = column // out_channels, column % out_channels
    columns = (TAPS + 1) * out_channels
    total = tl.zeros((SLICES, BLOCK), SUM)
    for start in tl.range(0, loop_bound(slices), SLICES):
        row = start + tl.arange(0, SLICES)
        exists = (row < slices)[:, None] & (column < columns)[None, :]
        partial = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial, mask=exists, other=0.0)
    total = tl.sum(total, axis=0)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + o * TAPS + tap, total, mask=tap < TAPS)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + o, total, mask=tap == TAPS)


def depthwise_conv2d_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (O, 1, KH, KW)
    bias: torch.Tensor | None,  # (O,)
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    activation: str | None,
    algorithm: str | None,  # "tiled" (None is that) or "plain"
) -> torch.Tensor:
    """``fastconv::depthwise_conv2d.triton``: (N, O, E, F) in the input's memory format."""
    return _forward(input, weight, bias, stride, padding, dilation, activation, algorithm)[0]


def depthwise_conv2d_moments_triton(
    input: torch.Tensor,  # (N, C, H, W), not empty
    weight: torch.Tensor,  # (O, 1, KH, KW)
    bias: torch.Tensor | None,  # (O,)
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::depthwise_conv2d_moments.triton``: the convolution, mean and variance of its channels."""
    operands = (input, weight, bias, stride, padding, dilation, None, "tiled")
    output, partial = _forward(*operands, gathers=True)
    with on_device_of(input):
        return output, *merge_parts(moments_merge_kernel, partial)


def _forward(input, weight, bias, stride, padding, dilation, activation, algorithm, gathers=False):
    """The output, and where the tiled kernel gathers them the moments of its tiles."""
    batch, in_channels, in_height, in_width = input.shape
    out_channels, memory_format = weight.shape[0], memory_format_of(input)
    out_height, out_width = _output_size(input, weight, stride, padding, dilation)
    output = new_output(input, (batch, out_channels, out_height, out_width))
    if output.numel() == 0:
        return output, None
    input = in_memory_format(input, memory_format)
    bias = None if bias is None else bias.contiguous()
    geometry = _geometry(input, weight, stride, dilation)
    sizes = (batch, in_height, in_width, out_channels, out_height, out_width, padding[0], padding[2])
    channels_last = memory_format == torch.channels_last
    options = {"CHANNELS_LAST": channels_last, "ACTIVATION": activation, **geometry}
    partial = None
    with on_device_of(input):
        if algorithm == "plain":
            depthwise_conv2d_plain_forward_kernel[(triton.cdiv(output.numel(), PLAIN_BLOCK),)](
                input, weight.contiguous(), bias, output, *input.stride(), *sizes,
                BLOCK=PLAIN_BLOCK, num_warps=4, **options, **COMPILE_OPTIONS,
            )  # fmt: skip
        else:
            unrolled = _unrolled(input, weight)
            tiling = _tiling(output, weight, weight.shape[2] if unrolled else 1, stride)
            grid, blocks = _grid(output, tiling)
            taps = _taps(weight, channels_last)
            partial = new_parts(batch * blocks[0] * blocks[1], output) if gathers else None
            depthwise_conv2d_tiled_forward_kernel[grid](
                input, taps, bias, output, partial,
                *input.stride(), *output.stride(), *taps.stride(), *sizes, *blocks,
                UNROLLED=unrolled, **tiling, **options, **COMPILE_OPTIONS,
            )  # fmt: skip
    return output, partial


def depthwise_conv2d_backward_triton(
    grad_output: torch.Tensor,  # (N, O, E, F)
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (O, 1, KH, KW)
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    algorithm: str | None,  # "tiled" (None is that) or "plain"
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::depthwise_conv2d_backward.triton``: the gradients; one not needed is an empty tensor."""
    grad_input, grad_weight, grad_bias = (input.new_empty(0) for _ in range(3))  # outputs must not alias
    arguments = (grad_output, input, weight, stride, padding, dilation, algorithm)
    with on_device_of(input):
        if need_input:
            grad_input = _grad_input(*arguments)
        if need_weight or need_bias:
            grad_weight, grad_bias = _grad_weight(*arguments, need_weight, need_bias)
    return grad_input, grad_weight, grad_bias


def _grad_input(grad_output, input, weight, stride, padding, dilation, algorithm):
    memory_format = memory_format_of(input)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    if grad_input.numel() == 0:
        return grad_input
    if weight.shape[0] == 0:
        return grad_input.zero_()
    grad_output = in_memory_format(grad_output, memory_format)
    sizes = (*input.shape, *grad_output.shape[2:], padding[0], padding[2])
    channels_last = memory_format == torch.channels_last
    options = {
        "CHANNELS_LAST": channels_last,
        **_geometry(input, weight, stride, dilation),
        **COMPILE_OPTIONS,
    }
    if algorithm == "plain":
        depthwise_conv2d_plain_grad_input_kernel[(triton.cdiv(grad_input.numel(), PLAIN_BLOCK),)](
            grad_output, weight.contiguous(), grad_input, *grad_output.stride(), *sizes,
            BLOCK=PLAIN_BLOCK, num_warps=4, **options,
        )  # fmt: skip
    else:
        unrolled = _unrolled(input, weight)
        # Rows that meet the same rows of taps are together: all of a strip, or every stride-th.
        tap_rows, phases = (weight.shape[2], stride) if unrolled else (1, (1, stride[1]))
        tiling = _tiling(grad_input, weight, tap_rows, phases=phases)
        grid, blocks = _grid(grad_input, tiling, spacing=1 if unrolled else stride[0])
        taps = _taps(weight, channels_last)
        depthwise_conv2d_tiled_grad_input_kernel[grid](
            grad_output, taps, grad_input, *grad_output.stride(), *grad_input.stride(), *taps.stride(),
            *sizes, *blocks, PHASE_H=padding[0] % stride[0], PHASE_W=padding[2] % stride[1],
            UNROLLED=unrolled, **tiling, **options,
        )  # fmt: skip
    return grad_input


def _grad_weight(grad_output, input, weight, stride, padding, dilation, algorithm, need_weight, need_bias):
    nothing = input.new_empty(0)
    if not need_weight:
        return nothing, grad_output.sum((0, 2, 3), dtype=sum_type(input.dtype)).to(input.dtype)
    batch, out_channels, out_height, out_width = grad_output.shape
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(out_channels) if need_bias else None
    if grad_output.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_() if need_bias else nothing
    memory_format = memory_format_of(input)
    input, grad_output = (in_memory_format(tensor, memory_format) for tensor in (input, grad_output))
    strides = (*grad_output.stride(), *input.stride())
    sizes = (batch, *input.shape[2:], out_channels, out_height, out_width, padding[0], padding[2])
    options = {**_geometry(input, weight, stride, dilation), **COMPILE_OPTIONS}
    kernel_height, kernel_width = weight.shape[2:]
    taps = kernel_height * kernel_width

    # One program adds up a slice; there are enough programs to fill a GPU, and no more to save workspace.
    if algorithm == "plain":
        length = batch * out_height * out_width
        programs = out_channels * (taps + 1)
    else:
        tap_rows = kernel_height if taps <= (25 if input.dtype == torch.float64 else 49) else 1
        # One warp holds all pixels of a channel where they are lanes, and adds them up in registers.
        tiling = _tiling(
            grad_output, weight, tap_rows, stride,
            most_rows=4 if taps <= 25 else max(1, 4 // input.itemsize), most_pixels=32, across_images=False,
        )  # fmt: skip
        blocks = _blocks(grad_output, tiling)
        length = batch * blocks[0] * blocks[1]
        programs = triton.cdiv(out_channels, tiling["CHANNELS"]) * (kernel_height // tap_rows)
    slice_length = triton.cdiv(length, min(length, max(1, GRAD_WEIGHT_PROGRAMS // programs)))
    if algorithm == "plain":
        slice_length = triton.cdiv(slice_length, PLAIN_BLOCK) * PLAIN_BLOCK
    slices = triton.cdiv(length, slice_length)
    partial = torch.empty((slices, taps + 1, out_channels), dtype=sum_type(input.dtype), device=input.device)
    if algorithm == "plain":
        depthwise_conv2d_plain_grad_weight_kernel[(programs, slices)](
            grad_output, input, partial, *strides, *sizes, slice_length,
            BLOCK=PLAIN_BLOCK, num_warps=4, **options,
        )  # fmt: skip
    else:
        depthwise_conv2d_tiled_grad_weight_kernel[(programs, slices)](
            grad_output, input, partial, *strides, *sizes, *blocks, slice_length,
            TAP_ROWS=tap_rows, **tiling, **options,
        )  # fmt: skip
    block = min(32, triton.next_power_of_2((taps + 1) * out_channels))
    depthwise_conv2d_grad_weight_sum_kernel[(triton.cdiv((taps + 1) * out_channels, block),)](
        partial, grad_weight, grad_bias, slices, out_channels,
        TAPS=taps, SUM=options["SUM"], SLICES=min(128, triton.next_power_of_2(slices)), BLOCK=block,
        num_warps=4, **COMPILE_OPTIONS,
    )  # fmt: skip
    return grad_weight, grad_bias if need_bias else nothing


def _output_size(input, weight, stride, padding, dilation) -> tuple[int, int]:
    (height, width), (kernel_height, kernel_width) = input.shape[2:], weight.shape[2:]
    return (
        output_size(height, kernel_height, stride[0], padding[0] + padding[1], dilation[0]),
        output_size(width, kernel_width, stride[1], padding[2] + padding[3], dilation[1], "width"),
    )


def _geometry(input, weight, stride, dilation) -> dict[str, Any]:
    return {
        "MULTIPLIER": weight.shape[0] // input.shape[1],
        "KH": weight.shape[2], "KW": weight.shape[3],
        "SH": stride[0], "SW": stride[1], "DH": dilation[0], "DW": dilation[1],
        "SUM": SUM_TYPES[sum_type(input.dtype)],
    }  # fmt: skip


def _taps(weight: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The weight as (O, KH * KW); with neighbouring channels neighbours in memory if those are the lanes."""
    taps = weight.reshape(weight.shape[0], -1)
    return taps.t().contiguous().t() if channels_last else taps


def _unrolled(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a thread keeps all taps of its filters, in at most 50 registers; otherwise one row of them."""
    channels_last = memory_format_of(input) == torch.channels_last
    words = sum_type(input.dtype).itemsize // 4 * (CHANNELS_PER_THREAD if channels_last else 1)
    return weight.shape[2] * weight.shape[3] * words <= 50


def _tiling(
    target: torch.Tensor,  # (N, C, H, W): what the kernel writes, or for grad_weight walks over
    weight: torch.Tensor,  # (O, 1, KH, KW)
    tap_rows: int,  # rows of taps that are unrolled
    stride: Sequence[int] = (1, 1),  # source pixels between targets
    phases: Sequence[int] = (1, 1),  # targets between source pixels; ROWS and COLUMNS are multiples
    most_rows: int = 8,
    most_pixels: int = 128,
    across_images: bool = True,
) -> dict[str, int]:
    """A tile of PIXELS x CHANNELS lanes with ROWS x COLUMNS targets each, in closed form: no search."""
    batch, channels, height, width = target.shape
    width = triton.cdiv(width, phases[1])
    if memory_format_of(target) == torch.channels_last:
        lanes_per_thread, most_rows, most_columns = CHANNELS_PER_THREAD, min(most_rows, 4), 4
        channel_lanes = _block(channels, 16, 64)
        pixel_lanes = min(256 // channel_lanes, triton.next_power_of_2(width))
    else:
        # Neighbouring lanes read neighbouring columns, so a lane owns only one (of each phase).
        lanes_per_thread, most_columns = 1, 1
        pixel_lanes = _block(width, 16, most_pixels)
        planes = batch * channels if across_images else channels
        channel_lanes = min(128 // pixel_lanes, triton.next_power_of_2(planes))
    columns = min(most_columns, triton.next_power_of_2(triton.cdiv(width, pixel_lanes)))
    columns = triton.cdiv(columns, phases[1]) * phases[1]
    rows = min(most_rows, triton.next_power_of_2(height))
    source_columns = (columns - 1) * stride[1] + weight.shape[3]
    while rows > 1 and ((rows - 1) * min(stride[0], tap_rows) + tap_rows) * source_columns > MOST_LOADS:
        rows //= 2
    warps = pixel_lanes * channel_lanes // (32 * lanes_per_thread)
    return {
        "ROWS": triton.cdiv(rows, phases[0]) * phases[0],
        "COLUMNS": columns,
        "PIXELS": pixel_lanes,
        "CHANNELS": channel_lanes,
        "num_warps": min(4, max(1, warps)),
    }


def _block(size: int, least: int, most: int) -> int:
    """The largest power of two, up to ``most``, that pads ``size`` hardly more than ``least`` does."""
    block = most
    while block > least and -size % block > -size % least + size // 8:
        block //= 2
    return min(block, triton.next_power_of_2(size))


def _blocks(target: torch.Tensor, tiling: dict[str, int], spacing: int = 1) -> tuple[int, int]:
    """Blocks along the width, and strips of rows, ``spacing`` apart within a strip."""
    height, width = target.shape[2:]
    strips = triton.cdiv(height, tiling["ROWS"] * spacing) * spacing
    return triton.cdiv(width, tiling["PIXELS"] * tiling["COLUMNS"]), strips


def _grid(
    target: torch.Tensor, tiling: dict[str, int], spacing: int = 1
) -> tuple[tuple[int], tuple[int, int]]:
    batch, channels = target.shape[:2]
    blocks = _blocks(target, tiling, spacing)
    if memory_format_of(target) == torch.channels_last:
        channel_blocks = batch * triton.cdiv(channels, tiling["CHANNELS"])
    else:
        channel_blocks = triton.cdiv(batch * channels, tiling["CHANNELS"])
    return (channel_blocks * blocks[0] * blocks[1],), blocks

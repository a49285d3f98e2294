"""How the Triton kernels of convolution divide their work, and the launches that several operators share.

Tile sizes are closed forms of the shape and the type: a first call compiles, and searches nothing. They are
chosen for sm_90: 128 x 128 sums in eight warps keep its tensor cores busy, with three steps of operands in
shared memory (96 KiB); smaller where there would be too few programs.

A launcher passes its kernel in, so that what stands in for the kernel in its module is what is launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import memory_format_of, sum_type

from ._common import COMPILE_OPTIONS, SUM_TYPES, in_memory_format
from ._moments import new_parts

MULTIPROCESSORS = 132  # of an H100 or H200
BAND = 8  # neighbouring blocks of pixels that take one block of filters after another
LEAST = 16  # the shortest side of a tile that tl.dot takes


def require(obstacle: str | None) -> None:
    """Raises on what ``Choice.why_not`` says, for operators called by themselves."""
    if obstacle is not None:
        raise ValueError(obstacle)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The sums' type, and how float32 is multiplied: in full, unless the caller allows TF32.

    By ``torch.backends.cuda.matmul.allow_tf32``, or by ``fp32_precision`` beside it, which knows both.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"SUM": SUM_TYPES[sum_type(dtype)], "PRECISION": "tf32" if tf32 else "ieee"}


def shape_of_taps(weight: torch.Tensor, stride: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    return {
        "KH": weight.shape[2], "KW": weight.shape[3],
        "SH": stride[0], "SW": stride[1], "DH": dilation[0], "DW": dilation[1],
    }  # fmt: skip


def index_type(*tensors: torch.Tensor | None) -> tl.dtype:
    """The type of offsets into the tensors: half the registers while 32 bits do."""
    spans = [
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        for tensor in tensors
        if tensor is not None
    ]
    return tl.int32 if max(spans) < 2**31 else tl.int64


def bundle_size(groups: int, in_group: int, out_group: int) -> int:
    """How many narrow groups share a tile: as many as fill tl.dot's least side, and divide the groups."""
    most = LEAST // max(in_group, out_group, 1)
    return max(size for size in range(1, max(most, 1) + 1) if groups % size == 0)


def tile_side(size: int, most: int) -> int:
    """The largest power of two from LEAST to ``most`` that pads ``size`` by at most a third."""
    side = most
    while side > LEAST and -size % side > size // 3:
        side //= 2
    return side


class Limits(NamedTuple):
    """What registers and shared memory hold of one program."""

    side: int  # longest side of a tile of sums
    area: int  # of a tile of sums
    step: int  # values of the long axis, along which is summed, at a time
    stages: int  # steps whose loads are under way
    sums: int  # of a thread, in a tile of 4 or 8 warps

    def tile(self, rows: int, columns: int, copies: int, programs: int) -> tuple[int, int]:
        """Sides of a tile, smaller where ``copies`` of rows x columns would make fewer than ``programs``."""
        tile = [tile_side(rows, self.side), tile_side(columns, self.side)]
        while tile[0] * tile[1] > self.area or (
            max(tile) > 32 and triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) * copies < programs
        ):
            tile[tile[1] > tile[0]] //= 2
        return tile[0], tile[1]

    def options(self, tile: tuple[int, int]) -> dict[str, int]:
        return {"num_warps": 8 if tile[0] * tile[1] > 128 * self.sums else 4, "num_stages": self.stages}


def limits(dtype: torch.dtype, precision: str, channels_last: bool, channels: int, filters: int) -> Limits:
    """By what multiplies: FMA or tensor cores; and by how it is loaded: 16 bytes at a time, or one value."""
    wide = channels_last and channels % 16 == 0 and filters % 16 == 0
    if dtype == torch.float64:
        return Limits(64, 4096, 16, 2, 16)
    if dtype == torch.float32 and precision != "tf32":
        return Limits(64, 4096, 16, 3, 32 if wide else 16)
    if wide:
        return Limits(128, 16384, 128 // dtype.itemsize, 3, 32)
    return Limits(128, 8192, 64 // dtype.itemsize, 3, 16)  # each value's address takes registers, too


def tiling(limit: Limits, pixels: int, filters: int, copies: int, length: int) -> dict[str, int]:
    """PIXELS x FILTERS sums a program, REDUCTION of ``length`` at a time; ``copies``: bundles, phases."""
    tile = limit.tile(pixels, filters, copies, MULTIPROCESSORS)
    return {
        "PIXELS": tile[0], "FILTERS": tile[1], "REDUCTION": tile_side(length, limit.step),
        **limit.options(tile),
    }  # fmt: skip


def taps_in_memory_order(weight: torch.Tensor) -> torch.Tensor:
    """The weight with neighbouring channels neighbours in memory; a channels_last weight is not copied."""
    return weight.contiguous(memory_format=torch.channels_last)


def launch_implicit_gemm(
    kernel: Any,  # conv2d_implicit_gemm_forward_kernel
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (M,)
    residual: torch.Tensor | None,  # (N, M, E, F)
    output: torch.Tensor,  # (N, M, E, F), written
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    shuffled: bool = False,
    gathers: bool = False,
) -> torch.Tensor | None:
    """A convolution; if ``shuffled``, its channels are shuffled by the groups.

    If it ``gathers``, it returns the moments of its tiles, (tiles, 3, M).
    """
    memory_format = memory_format_of(output)
    channels_last = memory_format == torch.channels_last
    input, weight = in_memory_format(input, memory_format), taps_in_memory_order(weight)
    batch, out_channels, *out_size = output.shape
    bundle = bundle_size(groups, weight.shape[1], out_channels // groups)
    bundles = groups // bundle
    channels, filters = input.shape[1] // bundles, out_channels // bundles
    pixels = batch * out_size[0] * out_size[1]
    factors = arithmetic(input.dtype)
    length = weight.shape[2] * weight.shape[3] * channels
    limit = limits(input.dtype, factors["PRECISION"], channels_last, channels, filters)
    tile = tiling(limit, pixels, filters, bundles, length)
    pixel_blocks = triton.cdiv(pixels, tile["PIXELS"])
    partial = new_parts(pixel_blocks, output) if gathers else None
    kernel[(pixel_blocks * triton.cdiv(filters, tile["FILTERS"]) * bundles,)](
        input, weight, None if bias is None else bias.contiguous(), residual, output, partial,
        *input.stride(), *weight.stride(), *(output if residual is None else residual).stride(),
        *_strides(output, groups if shuffled else None),
        batch, *input.shape[2:], *out_size, padding[0], padding[2], pixel_blocks,
        bundles, channels, filters, CHANNELS_LAST=channels_last,
        ACTIVATION=activation, BUNDLE=bundle, BAND=BAND, INDEX=index_type(input, weight, residual, output),
        **shape_of_taps(weight, stride, dilation), **factors, **tile, **COMPILE_OPTIONS,
    )  # fmt: skip
    return partial


def launch_grad_input(
    kernel: Any,  # conv2d_implicit_gemm_grad_input_kernel
    grad_output: torch.Tensor,  # (N, M, E, F)
    weight: torch.Tensor,  # (M, C / G, KH, KW)
    bias: torch.Tensor | None,  # (C,)
    grad_input: torch.Tensor,  # (N, C, H, W), written
    stride: Sequence[int],
    top: int,
    left: int,
    dilation: Sequence[int],
    groups: int,
) -> None:
    """The gradient of a convolution's input, which is a transposed convolution's output."""
    memory_format = memory_format_of(grad_input)
    channels_last = memory_format == torch.channels_last
    grad_output, weight = in_memory_format(grad_output, memory_format), taps_in_memory_order(weight)
    batch, in_channels, in_height, in_width = grad_input.shape
    bundle = bundle_size(groups, in_channels // groups, weight.shape[0] // groups)
    bundles = groups // bundle
    channels, filters = weight.shape[0] // bundles, in_channels // bundles
    phases = stride[0] * stride[1]
    pixels = batch * triton.cdiv(in_height, stride[0]) * triton.cdiv(in_width, stride[1])
    factors = arithmetic(grad_output.dtype)
    length = max(1, weight.shape[2] * weight.shape[3] // phases) * channels
    limit = limits(grad_output.dtype, factors["PRECISION"], channels_last, channels, filters)
    tile = tiling(limit, pixels, filters, bundles * phases, length)
    pixel_blocks = triton.cdiv(pixels, tile["PIXELS"]) * phases
    kernel[(pixel_blocks * triton.cdiv(filters, tile["FILTERS"]) * bundles,)](
        grad_output, weight, None if bias is None else bias.contiguous(), grad_input,
        *grad_output.stride(), *weight.stride(), *grad_input.stride(),
        batch, in_height, in_width, *grad_output.shape[2:], top, left, pixel_blocks,
        bundles, channels, filters,
        CHANNELS_LAST=channels_last, BUNDLE=bundle, BAND=BAND,
        INDEX=index_type(grad_output, weight, grad_input),
        **shape_of_taps(weight, stride, dilation), **factors, **tile, **COMPILE_OPTIONS,
    )  # fmt: skip


def launch_pointwise(
    kernel: Any,  # conv2d_pointwise_forward_kernel
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C / G, 1, 1); if transposed (C, M / G, 1, 1)
    bias: torch.Tensor | None,  # (M,)
    residual: torch.Tensor | None,  # (N, M, H, W)
    output: torch.Tensor,  # (N, M, H, W), written
    groups: int,
    activation: str | None,
    transposed: bool,
    shuffled: bool = False,
    gathers: bool = False,
) -> torch.Tensor | None:
    """A matrix product for each group; tensors whose pixels are not evenly apart are copied first.

    If ``shuffled``, the output's channels are shuffled by the groups. If it ``gathers``, it returns the
    moments of its tiles, (tiles, 3, M).
    """
    channels_last = memory_format_of(output) == torch.channels_last
    input, target = _runs_of_pixels(input, channels_last), _runs_of_pixels(output, channels_last)
    residual = None if residual is None else _runs_of_pixels(residual, channels_last)
    weight = weight.contiguous()
    bundle = bundle_size(groups, input.shape[1] // groups, target.shape[1] // groups)
    bundles = groups // bundle
    channels, filters = input.shape[1] // bundles, target.shape[1] // bundles
    images, _, pixels = target.shape
    factors = arithmetic(input.dtype)
    limit = limits(input.dtype, factors["PRECISION"], channels_last, channels, filters)
    tile = tiling(limit, pixels, filters, bundles * images, channels)
    pixel_blocks = triton.cdiv(pixels, tile["PIXELS"])
    partial = new_parts(images * pixel_blocks, output) if gathers else None
    kernel[(images * pixel_blocks * triton.cdiv(filters, tile["FILTERS"]) * bundles,)](
        input, weight, None if bias is None else bias.contiguous(), residual, target, partial,
        *input.stride(), *(reversed(weight.stride()[:2]) if transposed else weight.stride()[:2]),
        *(target if residual is None else residual).stride(),
        *_strides(target, groups if shuffled else None),
        images, pixels, pixel_blocks, bundles, channels, filters,
        CHANNELS_LAST=channels_last, ACTIVATION=activation, TRANSPOSED=transposed, BUNDLE=bundle, BAND=BAND,
        INDEX=index_type(input, weight, residual, target),
        **factors, **tile, **COMPILE_OPTIONS,
    )  # fmt: skip
    return partial


def _strides(output: torch.Tensor, shuffled_by: int | None) -> tuple[int | None, ...]:
    """Those of an output, and then what ``store`` takes as stride from group to group.

    Shuffled, filter k of group g is channel k * G + g: seen as (N, M / G, G, ...), no stride is irregular.
    """
    image, channel, *rest = output.stride()
    if shuffled_by is None:
        return image, channel, *rest, None
    return image, shuffled_by * channel, *rest, channel


def _runs_of_pixels(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """(images, C, pixels): each image's pixels in a row, or in channels_last those of all images."""
    if not channels_last:
        return tensor.flatten(2)
    return tensor.permute(0, 2, 3, 1).flatten(0, 2).t().unsqueeze(0)

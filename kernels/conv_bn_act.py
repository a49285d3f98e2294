"""The normalisation behind a convolution in training, in Triton: kernels and launchers.

Formula   csrc/conv_bn_act/conv_bn_act.h: mean and variance of each channel, the output, the gradients.
Program   CHANNELS channels over a slice of the pixels, a tile of PIXELS at a time, to the moments (or
          two sums) of a channel; then a merge of slices (_moments.py); then a tile of what is returned.
Bytes     forward: input twice, residual and output once; backward: all operands twice, each gradient once.
Trick     distances are from the mean of a slice's first tile: lanes add their squares on their own, and a
          mean far from zero costs no digits. Of k tiles, squares are rounded at most k times as much.
Limits    contiguous images of few pixels and few channels fill a tile badly; a launch has at most 2^31-1
          programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import as_memory_format, memory_format_of, new_output, sum_type
from fastconv.ops.conv_bn_act import new_numbers

from ._common import COMPILE_OPTIONS, SUM_TYPES, activate, activation_gradient, loop_bound, on_device_of
from ._moments import merge_parts, moments_merge_kernel, new_parts, store_part
from .conv2d_launch import tile_side
from .depthwise_conv2d import depthwise_conv2d_grad_weight_sum_kernel

TILE = 2048  # values, or half as many where they take more registers
MOST_CHANNELS = 64  # of a tile in channels_last, where they are neighbours in memory
MOST_PIXELS = 512  # of a tile else
PROGRAMS = 1024  # that sum: a few for each multiprocessor of a large GPU
MERGED_SLICES, MERGED_CHANNELS = 128, 16  # at once, by one program that sums
SHORT = 2**30  # values of an image that 32 bits count, to the end of the last tile as well

COUNTS = ("tiles", "slice_length", "count")  # Triton shall not compile a kernel for each


@triton.jit
def _tile(tile, c, channels, pixels, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr):
    """Where a tile's values lie, (PIXELS, CHANNELS), and whether they exist; no tile is of two images.

    Images are (images, C, pixels) in memory, or one image (pixels, C) where CHANNELS_LAST is set.
    """
    blocks = tl.cdiv(pixels, PIXELS)
    p = (tile % blocks).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    exists = (p < pixels)[:, None] & (c < channels)[None, :]
    if CHANNELS_LAST:
        return p[:, None] * channels + c[None, :], exists
    plane = (tile // blocks).to(INDEX) * channels + c
    return p[:, None] + (plane * pixels)[None, :], exists


@triton.jit
def _values_before(tile, pixels, PIXELS: tl.constexpr):
    """How many values of a channel are in the tiles before this one."""
    blocks = tl.cdiv(pixels, PIXELS)
    here = (tile % blocks).to(tl.int64) * PIXELS
    return (tile // blocks).to(tl.int64) * pixels + here


@triton.jit
def _channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, channels, EPS: tl.constexpr):
    """Of channels: mean, inverse of the standard deviation, that times the weight, bias."""
    exists = c < channels
    mean = tl.load(mean_ptr + c, mask=exists, other=0.0)
    inverse = tl.rsqrt(tl.load(variance_ptr + c, mask=exists, other=1.0) + EPS)
    scale, bias = inverse, tl.zeros_like(mean)
    if weight_ptr is not None:
        scale = inverse * tl.load(weight_ptr + c, mask=exists, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=exists, other=0.0)
    return mean, inverse, scale, bias


@triton.jit
def _sum(input_ptr, residual_ptr, at, exists, mean, scale, bias, SUM: tl.constexpr):
    """Distances of a tile from the mean, and what is activated."""
    distance = tl.load(input_ptr + at, mask=exists, other=0.0).to(SUM) - mean[None, :]
    total = distance * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=exists, other=0.0).to(SUM)
    return distance, total


@triton.jit(do_not_specialize=COUNTS)
def conv_bn_act_sliced_statistics_kernel(
    input_ptr,  # (images, C, pixels) or (pixels, C)
    partial_ptr,  # (slices, 3, C)
    channels, pixels, tiles, slice_length,  # slice_length: tiles
    SUM: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * slice_length
    last = tl.minimum(first + slice_length, tiles)
    at, exists = _tile(first, c, channels, pixels, CHANNELS_LAST, PIXELS, INDEX)
    x = tl.load(input_ptr + at, mask=exists, other=0.0).to(SUM)
    begin = _values_before(first, pixels, PIXELS)
    pivot = tl.sum(x, axis=0) / (_values_before(first + 1, pixels, PIXELS) - begin).to(SUM)
    distance = tl.where(exists, x - pivot[None, :], 0.0)
    total, squares = distance, distance * distance
    for tile in tl.range(loop_bound(first) + 1, loop_bound(last)):
        at, exists = _tile(tile, c, channels, pixels, CHANNELS_LAST, PIXELS, INDEX)
        x = tl.load(input_ptr + at, mask=exists, other=0.0).to(SUM)
        distance = tl.where(exists, x - pivot[None, :], 0.0)
        total += distance
        squares += distance * distance

    total, squares = tl.sum(total, axis=0), tl.sum(squares, axis=0)
    count = (_values_before(last, pixels, PIXELS) - begin).to(SUM)
    shift = total / count
    squares -= total * shift
    store_part(partial_ptr, tl.program_id(1).to(tl.int64), c, channels, count, pivot + shift, squares)


@triton.jit
def conv_bn_act_sliced_normalize_kernel(
    input_ptr,  # (images, C, pixels) or (pixels, C), and so are residual and output
    residual_ptr,  # or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    mean_ptr,  # (C,)
    variance_ptr,  # (C,)
    output_ptr,
    channels, pixels,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel_blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    mean, _, scale, bias = _channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, channels, EPS)
    tile = tl.program_id(0) // channel_blocks
    at, exists = _tile(tile, c, channels, pixels, CHANNELS_LAST, PIXELS, INDEX)
    _, total = _sum(input_ptr, residual_ptr, at, exists, mean, scale, bias, SUM)
    tl.store(output_ptr + at, activate(total, ACTIVATION), mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def conv_bn_act_sliced_grad_weight_kernel(
    grad_output_ptr,  # (images, C, pixels) or (pixels, C), and so are input, residual, grad_residual
    input_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    mean_ptr,  # (C,)
    variance_ptr,  # (C,)
    grad_residual_ptr,  # or None
    partial_ptr,  # (slices, 2, C): the gradients of weight and bias
    channels, pixels, tiles, slice_length,  # slice_length: tiles
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean, inverse, scale, bias = _channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, channels, EPS)
    first = tl.program_id(1) * slice_length
    last = tl.minimum(first + slice_length, tiles)
    total, products = tl.zeros((PIXELS, CHANNELS), SUM), tl.zeros((PIXELS, CHANNELS), SUM)
    for tile in tl.range(loop_bound(first), loop_bound(last)):
        at, exists = _tile(tile, c, channels, pixels, CHANNELS_LAST, PIXELS, INDEX)
        distance, x = _sum(input_ptr, residual_ptr, at, exists, mean, scale, bias, SUM)
        grad = tl.load(grad_output_ptr + at, mask=exists, other=0.0).to(SUM)
        grad = activation_gradient(grad, x, ACTIVATION)
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + at, grad, mask=exists)
        total += grad
        products += grad * distance
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * channels + c
    tl.store(partial, tl.sum(products, axis=0) * inverse, mask=c < channels)
    tl.store(partial + channels, tl.sum(total, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=COUNTS)
def conv_bn_act_sliced_grad_input_kernel(
    grad_output_ptr,  # (images, C, pixels) or (pixels, C), and so are input, residual, grad_input
    input_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    mean_ptr,  # (C,)
    variance_ptr,  # (C,)
    grad_weight_ptr,  # (C,)
    grad_bias_ptr,  # (C,)
    grad_input_ptr,
    channels, pixels, count,  # count: values of a channel
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    SUM: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel_blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    mean, inverse, scale, bias = _channel(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, channels, EPS)
    slope = tl.load(grad_weight_ptr + c, mask=c < channels, other=0.0) / count * inverse
    mean_grad = tl.load(grad_bias_ptr + c, mask=c < channels, other=0.0) / count

    tile = tl.program_id(0) // channel_blocks
    at, exists = _tile(tile, c, channels, pixels, CHANNELS_LAST, PIXELS, INDEX)
    distance, x = _sum(input_ptr, residual_ptr, at, exists, mean, scale, bias, SUM)
    grad = tl.load(grad_output_ptr + at, mask=exists, other=0.0).to(SUM)
    rest = activation_gradient(grad, x, ACTIVATION) - mean_grad[None, :] - distance * slope[None, :]
    tl.store(grad_input_ptr + at, scale[None, :] * rest, mask=exists)


def conv_bn_act_normalize_triton(
    input: torch.Tensor,  # (N, C, H, W)
    residual: torch.Tensor | None,  # (N, C, H, W)
    weight: torch.Tensor | None,  # (C,), in the type of sums, as all numbers of channels
    bias: torch.Tensor | None,  # (C,)
    eps: float,
    activation: str | None,
    algorithm: str | None,  # "sliced" (None is that)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::conv_bn_act_normalize.triton``: output in the input's memory format, mean, variance."""
    if input.numel() == 0:
        mean, variance = new_numbers(input).zero_(), new_numbers(input).zero_()
    else:
        (input,) = _dense_images(input)
        channels, pixels, tiles, channel_blocks, tiling = _division(input)
        slices, slice_length = _slice(tiles, channel_blocks)
        partial = new_parts(slices, input)
        with on_device_of(input):
            conv_bn_act_sliced_statistics_kernel[(channel_blocks, slices)](
                input, partial, channels, pixels, tiles, slice_length, **tiling, **COMPILE_OPTIONS
            )
            mean, variance = merge_parts(moments_merge_kernel, partial)
    output = conv_bn_act_apply_triton(input, residual, weight, bias, mean, variance, eps, activation)
    return output, mean, variance


def conv_bn_act_apply_triton(
    input: torch.Tensor,  # (N, C, H, W)
    residual: torch.Tensor | None,  # (N, C, H, W)
    weight: torch.Tensor | None,  # (C,), in the type of sums, as all numbers of channels
    bias: torch.Tensor | None,  # (C,)
    mean: torch.Tensor,  # (C,)
    variance: torch.Tensor,  # (C,)
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``fastconv::conv_bn_act_apply.triton``: the output alone, where mean and variance are known."""
    output = new_output(input, input.shape)
    if input.numel() == 0:
        return output
    operands = (*_dense_images(input, residual), *_dense_numbers(weight, bias, mean, variance))
    channels, pixels, tiles, channel_blocks, tiling = _division(operands[0])
    with on_device_of(input):
        conv_bn_act_sliced_normalize_kernel[(channel_blocks * tiles,)](
            *operands, output, channels, pixels, EPS=eps, ACTIVATION=activation, **tiling, **COMPILE_OPTIONS
        )
    return output


def conv_bn_act_normalize_backward_triton(
    grad_output: torch.Tensor,  # (N, C, H, W)
    input: torch.Tensor,  # (N, C, H, W)
    residual: torch.Tensor | None,  # (N, C, H, W)
    weight: torch.Tensor | None,  # (C,), in the type of sums, as all numbers of channels
    bias: torch.Tensor | None,  # (C,)
    mean: torch.Tensor,  # (C,)
    variance: torch.Tensor,  # (C,)
    eps: float,
    activation: str | None,
    algorithm: str | None,  # "sliced" (None is that)
    need_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fastconv::conv_bn_act_normalize_backward.triton``: the gradients of input, residual, weight, bias.

    The residual's is an empty tensor unless it is needed.
    """
    grad_input, grad_weight, grad_bias = (
        new_output(input, input.shape),
        new_numbers(input),
        new_numbers(input),
    )
    grad_residual = new_output(input, input.shape) if need_residual else input.new_empty(0)
    if input.numel() == 0:
        return grad_input, grad_residual, grad_weight.zero_(), grad_bias.zero_()
    input, grad_output, residual = _dense_images(input, grad_output, residual)
    operands = (grad_output, input, residual, *_dense_numbers(weight, bias, mean, variance))
    channels, pixels, tiles, channel_blocks, tiling = _division(input)
    slices, slice_length = _slice(tiles, channel_blocks)
    partial = grad_bias.new_empty((slices, 2, channels))
    block = min(MERGED_CHANNELS, triton.next_power_of_2(2 * channels))
    options = {"EPS": eps, "ACTIVATION": activation, **tiling, **COMPILE_OPTIONS}
    with on_device_of(input):
        conv_bn_act_sliced_grad_weight_kernel[(channel_blocks, slices)](
            *operands, grad_residual if need_residual else None, partial,
            channels, pixels, tiles, slice_length, **options,
        )  # fmt: skip
        depthwise_conv2d_grad_weight_sum_kernel[(triton.cdiv(2 * channels, block),)](
            partial, grad_weight, grad_bias, slices, channels, TAPS=1, SUM=tiling["SUM"], BLOCK=block,
            SLICES=min(MERGED_SLICES, triton.next_power_of_2(slices)), num_warps=4, **COMPILE_OPTIONS,
        )  # fmt: skip
        conv_bn_act_sliced_grad_input_kernel[(channel_blocks * tiles,)](
            *operands, grad_weight, grad_bias, grad_input,
            channels, pixels, input.numel() // channels, **options,
        )  # fmt: skip
    return grad_input, grad_residual, grad_weight, grad_bias


def _dense_images(*images: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In the memory format of the first."""
    memory_format = memory_format_of(images[0])
    return [None if image is None else as_memory_format(image, memory_format) for image in images]


def _dense_numbers(*numbers: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if values is None else values.contiguous() for values in numbers]


def _division(input: torch.Tensor) -> tuple[int, int, int, int, dict[str, Any]]:
    """Channels; pixels of an image, as the kernels see it; tiles and blocks of channels; sizes of a tile."""
    images, channels, height, width = input.shape
    pixels = height * width
    # Of one channel, or of one pixel, both layouts are the same.
    channels_last = memory_format_of(input) == torch.channels_last or 1 in (channels, pixels)
    # Values that Triton does not know to lie on 16 bytes are loaded one by one; addresses take registers.
    one_by_one = (channels if channels_last else pixels) % 16 != 0
    size = TILE // 2 if input.dtype == torch.float64 or one_by_one else TILE
    if channels_last:
        images, pixels = 1, images * pixels
        own_channels = _side(channels, MOST_CHANNELS)
        own_pixels = min(size // own_channels, triton.next_power_of_2(pixels))
    else:
        own_pixels = _side(pixels, MOST_PIXELS)
        own_channels = min(size // own_pixels, triton.next_power_of_2(channels))
    tiling = {
        "SUM": SUM_TYPES[sum_type(input.dtype)],
        "INDEX": tl.int32 if input.numel() < SHORT else tl.int64,
        "CHANNELS_LAST": channels_last, "PIXELS": own_pixels, "CHANNELS": own_channels, "num_warps": 4,
    }  # fmt: skip
    tiles = images * triton.cdiv(pixels, own_pixels)
    return channels, pixels, tiles, triton.cdiv(channels, own_channels), tiling


def _side(size: int, most: int) -> int:
    return min(tile_side(size, most), triton.next_power_of_2(size))


def _slice(tiles: int, channel_blocks: int) -> tuple[int, int]:
    """Slices, and tiles of each."""
    length = triton.cdiv(tiles, max(1, PROGRAMS // channel_blocks))
    return triton.cdiv(tiles, length), length

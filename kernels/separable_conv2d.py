"""Depthwise and 1x1 convolution in Triton: what lies between them stays in a program's registers.

Formula   t[n,o,e,f] = mid(db[o] + sum_ij x[n,o//m,e*sh+i*dh-top,f*sw+j*dw-left] * dw[o,i,j]), zero outside;
          y[n,q,e,f] = act(pb[q] + r[n,q,e,f] + sum_o t[n,o,e,f] * pw[q,o]).
Program   PIXELS x FILTERS sums; REDUCTION channels of t at its pixels at a time, tap by tap, then tl.dot.
Bytes     read N*C*H*W, write N*M*E*F, if the cache serves KH*KW - 1 of the KH*KW times a pixel is loaded.
Differs   conv2d_pointwise.py loads what is computed here.
Limits    t is computed again for every FILTERS filters, and rounded to the input's type, as two passes do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastconv.ops._operator import memory_format_of, new_output
from fastconv.ops.separable_conv2d import check

from ._common import COMPILE_OPTIONS, activate, in_memory_format, loop_bound, on_device_of
from .conv2d_implicit_gemm import (
    COUNTS,
    block_of_program,
    by_channel,
    by_pixel,
    places,
    store,
    zeros,
)
from .conv2d_launch import BAND, arithmetic, index_type, limits, shape_of_taps, tiling


@triton.jit(do_not_specialize=COUNTS)
def separable_conv2d_tiled_forward_kernel(
    input_ptr,  # (N, C, H, W), any strides
    taps_ptr,  # (O, KH, KW), contiguous
    mid_bias_ptr,  # (O,) or None
    weight_ptr,  # (M, O), contiguous
    bias_ptr,  # (M,) or None
    residual_ptr,  # (N, M, E, F), any strides, or None
    output_ptr,  # (N, M, E, F), any strides
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
    output_stride_n, output_stride_c, output_stride_h, output_stride_w,
    batch, in_height, in_width, out_height, out_width, top, left, pixel_blocks, channels, filters,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    MID_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    BAND: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    pixel_block, filter_block = block_of_program(pixel_blocks, tl.cdiv(filters, FILTERS), BAND)
    filter = filter_block * FILTERS + tl.arange(0, FILTERS)
    n, e, f = places(pixel_block.to(tl.int64) * PIXELS, out_height, out_width, PIXELS)
    exists = n < batch
    row, column = e * SH - top, f * SW - left
    n, e, f = n.to(INDEX), e.to(INDEX), f.to(INDEX)
    sums = zeros(SUM, CHANNELS_LAST, PIXELS, FILTERS)
    for start in tl.range(0, loop_bound(channels), REDUCTION):
        o = start + tl.arange(0, REDUCTION)
        is_channel = o < channels
        middle = zeros(SUM, CHANNELS_LAST, PIXELS, REDUCTION)
        if mid_bias_ptr is not None:
            mid_bias = tl.load(mid_bias_ptr + o, mask=is_channel, other=0.0)
            middle += by_channel(mid_bias, CHANNELS_LAST).to(SUM)
        source = by_channel((o // MULTIPLIER).to(INDEX) * input_stride_c, CHANNELS_LAST)
        source += by_pixel(n * input_stride_n, CHANNELS_LAST)
        for i in tl.range(KH):
            for j in tl.range(KW):
                h, w = row + i * DH, column + j * DW
                inside = exists & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
                pixel = h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
                mask = by_pixel(inside, CHANNELS_LAST) & by_channel(is_channel, CHANNELS_LAST)
                x = tl.load(input_ptr + source + by_pixel(pixel, CHANNELS_LAST), mask=mask, other=0.0)
                tap = tl.load(taps_ptr + (o * KH + i) * KW + j, mask=is_channel, other=0.0)
                middle += x.to(SUM) * by_channel(tap, CHANNELS_LAST).to(SUM)
        middle = activate(middle, MID_ACTIVATION).to(weight_ptr.dtype.element_ty)
        # The weight lies across: its channels are where the tile has pixels.
        place = by_channel(filter.to(INDEX) * channels, CHANNELS_LAST) + by_pixel(o, CHANNELS_LAST)
        mask = by_channel(filter < filters, CHANNELS_LAST) & by_pixel(is_channel, CHANNELS_LAST)
        weight = tl.load(weight_ptr + place, mask=mask, other=0.0)
        if CHANNELS_LAST:
            sums = tl.dot(middle, weight, sums, input_precision=PRECISION, out_dtype=sums.dtype)
        else:
            sums = tl.dot(weight, middle, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    residual = n * residual_stride_n + e * residual_stride_h + f * residual_stride_w
    output = n * output_stride_n + e * output_stride_h + f * output_stride_w
    store(
        sums, bias_ptr, residual_ptr, output_ptr, residual, output, residual_stride_c, output_stride_c,
        None, exists, filter, filters, 0, 1, ACTIVATION, CHANNELS_LAST, INDEX,
    )  # fmt: skip


def separable_conv2d_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    depthwise_weight: torch.Tensor,  # (O, 1, KH, KW)
    pointwise_weight: torch.Tensor,  # (M, O, 1, 1)
    depthwise_bias: torch.Tensor | None,  # (O,)
    pointwise_bias: torch.Tensor | None,  # (M,)
    residual: torch.Tensor | None,  # (N, M, E, F)
    packed: torch.Tensor | None,  # None: the kernel reads the weight itself
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    mid_activation: str | None,
    activation: str | None,
    algorithm: str | None,  # "tiled" (None is that)
) -> torch.Tensor:
    """``fastconv::separable_conv2d.triton``: (N, M, E, F) in the input's memory format."""
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    shape = check(*tensors, stride, padding, dilation, mid_activation, activation)
    output = new_output(input, shape)
    if output.numel() == 0:
        return output
    memory_format = memory_format_of(output)
    channels_last = memory_format == torch.channels_last
    input = in_memory_format(input, memory_format)
    filters, channels = pointwise_weight.shape[:2]
    pixels = shape[0] * shape[2] * shape[3]
    factors = arithmetic(input.dtype)
    limit = limits(input.dtype, factors["PRECISION"], False, channels, filters)
    tile = tiling(limit, pixels, filters, 1, channels)
    pixel_blocks = triton.cdiv(pixels, tile["PIXELS"])
    with on_device_of(input):
        separable_conv2d_tiled_forward_kernel[(pixel_blocks * triton.cdiv(filters, tile["FILTERS"]),)](
            input, depthwise_weight.contiguous(),
            None if depthwise_bias is None else depthwise_bias.contiguous(), pointwise_weight.contiguous(),
            None if pointwise_bias is None else pointwise_bias.contiguous(), residual, output,
            *input.stride(), *(output if residual is None else residual).stride(), *output.stride(),
            shape[0], *input.shape[2:], *shape[2:], padding[0], padding[2], pixel_blocks, channels, filters,
            MULTIPLIER=channels // input.shape[1], MID_ACTIVATION=mid_activation, ACTIVATION=activation,
            CHANNELS_LAST=channels_last, BAND=BAND, INDEX=index_type(input, residual, output),
            **shape_of_taps(depthwise_weight, stride, dilation), **factors, **tile, **COMPILE_OPTIONS,
        )  # fmt: skip
    return output

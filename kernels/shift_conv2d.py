"""Shift with 1x1 convolution in Triton: each channel is loaded from where its offset says.

Formula   y[n,m,e,f] = act(b[m] + sum_c x[n,c,e*sh+dh[c],f*sw+dw[c]] * w[m,c]), zero outside.
Program   PIXELS x FILTERS sums, in the loop of conv2d_implicit_gemm.py, with offsets in place of taps.
Bytes     read N*C*H*W + M*C, write N*M*E*F: no byte more than the 1x1 convolution, but for the offsets.
Differs   conv2d_pointwise.py has no borders to test for, and numbers pixels without a division.
Limits    one value a lane and load: neighbouring channels come from different pixels. The offsets are copied
          to the GPU at each call, so that a CUDA graph must not capture it; the kernels in CUDA can be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastconv.ops._arguments import output_size
from fastconv.ops._operator import memory_format_of, new_output

from ._common import COMPILE_OPTIONS, in_memory_format, on_device_of
from .conv2d_implicit_gemm import COUNTS, add_products, block_of_program, places, store, zeros
from .conv2d_launch import BAND, arithmetic, index_type, limits, tiling
from .shift2d import offsets_beside


@triton.jit(do_not_specialize=COUNTS)
def shift_conv2d_pointwise_forward_kernel(
    input_ptr,  # (N, C, H, W), any strides
    offsets_ptr,  # (C, 2) of int64, at most max(H, W) and at least its opposite
    weight_ptr,  # (M, C), any strides
    bias_ptr,  # (M,) or None
    output_ptr,  # (N, M, E, F), any strides
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    weight_stride_m, weight_stride_c,
    output_stride_n, output_stride_c, output_stride_h, output_stride_w,
    batch, in_height, in_width, out_height, out_width, pixel_blocks, channels, filters,
    SH: tl.constexpr, SW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BAND: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    pixel_block, filter_block = block_of_program(pixel_blocks, tl.cdiv(filters, FILTERS), BAND)
    filter = filter_block * FILTERS + tl.arange(0, FILTERS)
    n, e, f = places(pixel_block.to(tl.int64) * PIXELS, out_height, out_width, PIXELS)
    exists = n < batch
    row, column, n = e * SH, f * SW, n.to(INDEX)
    source = n * input_stride_n + row.to(INDEX) * input_stride_h + column.to(INDEX) * input_stride_w
    sums = add_products(
        zeros(SUM, CHANNELS_LAST, PIXELS, FILTERS), input_ptr, source, row, column, exists,
        in_height, in_width, input_stride_c, input_stride_h, input_stride_w, 0, 0, offsets_ptr,
        weight_ptr, filter.to(INDEX) * weight_stride_m, filter, filters, channels, weight_stride_c, 0, 0,
        1, 1, True, False, 1, PRECISION, CHANNELS_LAST, INDEX, REDUCTION,
    )  # fmt: skip
    output = n * output_stride_n + e.to(INDEX) * output_stride_h + f.to(INDEX) * output_stride_w
    store(
        sums, bias_ptr, None, output_ptr, output, output, output_stride_c, output_stride_c,
        None, exists, filter, filters, 0, 1, ACTIVATION, CHANNELS_LAST, INDEX,
    )  # fmt: skip


def shift_conv2d_forward_triton(
    input: torch.Tensor,  # (N, C, H, W)
    offsets: torch.Tensor,  # (C, 2), int64 on the CPU
    weight: torch.Tensor,  # (M, C, 1, 1)
    bias: torch.Tensor | None,  # (M,)
    packed: torch.Tensor | None,  # None: the kernel reads the weight itself
    stride: Sequence[int],
    activation: str | None,
    algorithm: str | None,  # "pointwise" (None is that)
) -> torch.Tensor:
    """``fastconv::shift_conv2d.triton``: (N, M, E, F) in the input's memory format."""
    out_height = output_size(input.shape[2], 1, stride[0], 0, 1)
    out_width = output_size(input.shape[3], 1, stride[1], 0, 1, "width")
    batch, channels, filters = *input.shape[:2], weight.shape[0]
    output = new_output(input, (batch, filters, out_height, out_width))
    if output.numel() == 0:
        return output
    memory_format = memory_format_of(output)
    channels_last = memory_format == torch.channels_last
    input, weight = in_memory_format(input, memory_format), weight.contiguous()
    pixels = batch * out_height * out_width
    factors = arithmetic(input.dtype)
    limit = limits(
        input.dtype, factors["PRECISION"], False, channels, filters
    )  # in no layout 16 bytes at once
    tile = tiling(limit, pixels, filters, 1, channels)
    pixel_blocks = triton.cdiv(pixels, tile["PIXELS"])
    with on_device_of(input):
        shift_conv2d_pointwise_forward_kernel[(pixel_blocks * triton.cdiv(filters, tile["FILTERS"]),)](
            input, offsets_beside(input, offsets), weight, None if bias is None else bias.contiguous(),
            output, *input.stride(), *weight.stride()[:2], *output.stride(),
            batch, *input.shape[2:], out_height, out_width, pixel_blocks, channels, filters,
            SH=stride[0], SW=stride[1], CHANNELS_LAST=channels_last, ACTIVATION=activation, BAND=BAND,
            INDEX=index_type(input, weight, output), **factors, **tile, **COMPILE_OPTIONS,
        )  # fmt: skip
    return output

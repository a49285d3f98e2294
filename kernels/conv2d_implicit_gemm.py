"""Convolution in Triton as an implicit GEMM: a matrix product whose left factor is never written out.

Formula   y[n,m,e,f] = act(b[m] + r[n,m,e,f] + sum_ijc x[n,c,e*sh+i*dh-top,f*sw+j*dw-left] * w[m,c,i,j]);
          its transpose x[n,c,h,w] = b[c] + sum_ijm y[n,m,e,f] * w[m,c,i,j], over taps that fit: grad_input.
Program   PIXELS x FILTERS sums, fed by tl.dot with REDUCTION of a group's (tap, channel) at a time.
          grad_input: the pixels of one stride phase, where every pixel meets the same taps and wastes none.
Bytes     read N*C*H*W, write N*M*E*F, if the cache serves KH*KW - 1 of the KH*KW times a pixel is loaded.
Differs   bundles of narrow groups share a tile, block-diagonal: tl.dot's least side is 16.
Limits    channels_last loads 16 bytes at a time if channels are multiples of 16; contiguous one value a lane.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._common import SIZES, activate, loop_bound
from ._moments import store_moments

# Loops over these counts, or masks with them, gain nothing from a kernel of their own (see SIZES).
COUNTS = (*SIZES, "bundles", "images", "pixels")


@triton.jit
def by_pixel(values, CHANNELS_LAST: tl.constexpr):
    """One value a pixel, as a column or row of a tile: what is last in the tile is last in memory."""
    return values[:, None] if CHANNELS_LAST else values[None, :]


@triton.jit
def by_channel(values, CHANNELS_LAST: tl.constexpr):
    """One value a channel (or filter), across ``by_pixel``."""
    return by_pixel(values, not CHANNELS_LAST)


@triton.jit
def block_of_program(pixel_blocks, filter_blocks, BAND: tl.constexpr):
    """(block of pixels, block of filters): BAND neighbouring blocks of pixels go through all filters.

    Programs that run at the same time then read the same few pixels and weights, from the cache.
    """
    program = tl.program_id(0)
    first = program // (BAND * filter_blocks) * BAND
    rest = program % (BAND * filter_blocks)
    height = tl.minimum(pixel_blocks - first, BAND)
    return first + rest % height, rest // height


@triton.jit
def places(first, height, width, BLOCK: tl.constexpr):
    """(image, row, column) of BLOCK pixels from the first-th on; only scalars are divided in 64 bits."""
    column = (first % width).to(tl.int32) + tl.arange(0, BLOCK)
    row = (first // width % height).to(tl.int32) + column // width
    image = (first // width // height).to(tl.int32) + row // height
    return image, row % height, column % width


@triton.jit
def first_tap(place, dilation: tl.constexpr, stride: tl.constexpr, taps: tl.constexpr):
    """The first tap that fits target pixels at ``place`` (padding included); ``taps`` if none does."""
    first = tl.full((), taps, tl.int32)
    for tap in tl.static_range(taps):
        first = tl.where((first == taps) & ((place - tap * dilation) % stride == 0), tap, first)
    return first


@triton.constexpr_function
def taps_apart(stride, dilation):
    """A target pixel of a transposed convolution meets every how-manieth tap."""
    return stride // math.gcd(stride, dilation)


@triton.jit
def add_products(
    sums,  # (PIXELS, FILTERS), or (FILTERS, PIXELS) if not CHANNELS_LAST
    source_ptr,
    source,  # each pixel's offset of the source pixel of its first tap, first channel
    row, column, exists,  # of that source pixel; whether there is such a target
    source_height, source_width, stride_c, stride_h, stride_w,
    row_step, column_step,  # source pixels from tap to tap
    offsets_ptr,  # (channels, 2): where each channel is read instead, if ONE_TAP; or None
    weight_ptr,
    weight,  # each filter's offset of its first tap, first channel
    filter, filters, channels,  # of a bundle; ``channels`` are what is summed over
    weight_stride_c, weight_stride_h, weight_stride_w,  # from channel to channel, tap to tap
    taps, tap_columns,
    ONE_TAP: tl.constexpr, TRANSPOSED: tl.constexpr, BUNDLE: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Adds the products of all taps and channels to the sums of a tile."""
    length = taps * channels
    for start in tl.range(0, loop_bound(length), REDUCTION):
        k = start + tl.arange(0, REDUCTION)
        channel = k % channels
        source_offset = channel.to(INDEX) * stride_c
        inside = by_pixel(exists, CHANNELS_LAST) & by_channel(k < length, CHANNELS_LAST)
        if not ONE_TAP:
            i, j = k // channels // tap_columns, k // channels % tap_columns
            down, right = i * row_step, j * column_step
        elif offsets_ptr is not None:
            down = tl.load(offsets_ptr + 2 * channel, mask=k < length, other=0).to(tl.int32)
            right = tl.load(offsets_ptr + 2 * channel + 1, mask=k < length, other=0).to(tl.int32)
        if not ONE_TAP or offsets_ptr is not None:
            h = by_pixel(row, CHANNELS_LAST) + by_channel(down, CHANNELS_LAST)
            w = by_pixel(column, CHANNELS_LAST) + by_channel(right, CHANNELS_LAST)
            inside = inside & (h >= 0) & (h < source_height) & (w >= 0) & (w < source_width)
            source_offset += down.to(INDEX) * stride_h + right.to(INDEX) * stride_w
        x = by_pixel(source, CHANNELS_LAST) + by_channel(source_offset, CHANNELS_LAST)
        x = tl.load(source_ptr + x, mask=inside, other=0.0)

        # The weight lies across: its channels are where the tile has pixels.
        group_channels = channels // BUNDLE
        if BUNDLE > 1 and not TRANSPOSED:
            weight_offset = (channel % group_channels).to(INDEX) * weight_stride_c
        else:
            weight_offset = channel.to(INDEX) * weight_stride_c
        exists_weight = by_pixel(k < length, CHANNELS_LAST) & by_channel(filter < filters, CHANNELS_LAST)
        if BUNDLE > 1:
            group, filter_group = channel // group_channels, filter // (filters // BUNDLE)
            same = by_pixel(group, CHANNELS_LAST) == by_channel(filter_group, CHANNELS_LAST)
            exists_weight = exists_weight & same
        if not ONE_TAP:
            weight_offset += i.to(INDEX) * weight_stride_h + j.to(INDEX) * weight_stride_w
        w = by_channel(weight, CHANNELS_LAST) + by_pixel(weight_offset, CHANNELS_LAST)
        w = tl.load(weight_ptr + w, mask=exists_weight, other=0.0)
        if CHANNELS_LAST:
            sums = tl.dot(x, w, sums, input_precision=PRECISION, out_dtype=sums.dtype)
        else:
            sums = tl.dot(w, x, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit
def zeros(SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, FILTERS: tl.constexpr):
    return tl.zeros((PIXELS, FILTERS) if CHANNELS_LAST else (FILTERS, PIXELS), SUM)


@triton.jit
def store(
    sums,
    bias_ptr, residual_ptr, output_ptr,  # bias: (M,) or None; residual: or None
    residual, output,  # each pixel's offset
    residual_stride_c, output_stride_c,
    output_stride_g,  # from group to group, then output_stride_c is from filter to filter of a group; or None
    exists, filter, filters, bundle,
    BUNDLE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """output = activation(sums + bias + residual); returns it as it is stored."""
    channel = (bundle * filters + filter).to(INDEX)
    mask = by_pixel(exists, CHANNELS_LAST) & by_channel(filter < filters, CHANNELS_LAST)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=filter < filters, other=0.0)
        sums += by_channel(bias, CHANNELS_LAST).to(sums.dtype)
    if residual_ptr is not None:
        offset = by_pixel(residual, CHANNELS_LAST) + by_channel(channel * residual_stride_c, CHANNELS_LAST)
        sums += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(sums.dtype)
    if output_stride_g is None:
        place = channel * output_stride_c
    else:
        filter_of_group = (filter % (filters // BUNDLE)).to(INDEX)
        group = (bundle * BUNDLE + filter // (filters // BUNDLE)).to(INDEX)
        place = filter_of_group * output_stride_c + group * output_stride_g
    offset = by_pixel(output, CHANNELS_LAST) + by_channel(place, CHANNELS_LAST)
    stored = activate(sums, ACTIVATION).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offset, stored, mask=mask)
    return stored


@triton.jit
def store_moments_of_tile(
    part_ptr,  # (parts, 3, M), or None: nothing is stored
    part, stored, exists, filter, filters, bundle, bundles,
    SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The moments of a tile that ``store`` has stored."""
    if part_ptr is not None:
        channels = bundles * filters
        channel = tl.where(filter < filters, bundle * filters + filter, channels)
        store_moments(
            part_ptr, part.to(tl.int64), by_channel(channel, CHANNELS_LAST), channels,
            (stored,), (by_pixel(exists, CHANNELS_LAST),), 1, 0 if CHANNELS_LAST else 1, SUM,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def conv2d_implicit_gemm_forward_kernel(
    input_ptr,  # (N, C, H, W), any strides
    weight_ptr,  # (M, C / G, KH, KW), any strides
    bias_ptr,  # (M,) or None
    residual_ptr,  # (N, M, E, F), any strides, or None
    output_ptr,  # (N, M, E, F), any strides
    part_ptr,  # (pixel_blocks, 3, M): moments of the output; or None
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    weight_stride_m, weight_stride_c, weight_stride_h, weight_stride_w,
    residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
    output_stride_n, output_stride_c, output_stride_h, output_stride_w,
    output_stride_g,  # see store
    batch, in_height, in_width, out_height, out_width, top, left, pixel_blocks,
    bundles, channels, filters,  # channels and filters of a bundle of groups
    KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    BUNDLE: tl.constexpr, BAND: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    filter_blocks = tl.cdiv(filters, FILTERS)
    pixel_block, filter_block = block_of_program(pixel_blocks, bundles * filter_blocks, BAND)
    bundle = filter_block // filter_blocks
    filter = filter_block % filter_blocks * FILTERS + tl.arange(0, FILTERS)
    n, e, f = places(pixel_block.to(tl.int64) * PIXELS, out_height, out_width, PIXELS)
    exists = n < batch
    row, column = e * SH - top, f * SW - left
    source = n.to(INDEX) * input_stride_n + row.to(INDEX) * input_stride_h + column.to(INDEX) * input_stride_w
    source += (bundle * channels).to(INDEX) * input_stride_c
    weight = (bundle * filters + filter).to(INDEX) * weight_stride_m
    sums = add_products(
        zeros(SUM, CHANNELS_LAST, PIXELS, FILTERS), input_ptr, source, row, column, exists,
        in_height, in_width, input_stride_c, input_stride_h, input_stride_w, DH, DW, None,
        weight_ptr, weight, filter, filters, channels, weight_stride_c, weight_stride_h, weight_stride_w,
        KH * KW, KW, False, False, BUNDLE, PRECISION, CHANNELS_LAST, INDEX, REDUCTION,
    )  # fmt: skip
    n, e, f = n.to(INDEX), e.to(INDEX), f.to(INDEX)
    residual = n * residual_stride_n + e * residual_stride_h + f * residual_stride_w
    output = n * output_stride_n + e * output_stride_h + f * output_stride_w
    stored = store(
        sums, bias_ptr, residual_ptr, output_ptr, residual, output, residual_stride_c, output_stride_c,
        output_stride_g, exists, filter, filters, bundle, BUNDLE, ACTIVATION, CHANNELS_LAST, INDEX,
    )  # fmt: skip
    store_moments_of_tile(
        part_ptr, pixel_block, stored, exists, filter, filters, bundle, bundles, SUM, CHANNELS_LAST
    )


@triton.jit(do_not_specialize=COUNTS)
def conv2d_implicit_gemm_grad_input_kernel(
    grad_output_ptr,  # (N, M, E, F), any strides
    weight_ptr,  # (M, C / G, KH, KW), any strides
    bias_ptr,  # (C,) or None: of a transposed convolution
    grad_input_ptr,  # (N, C, H, W), any strides
    grad_stride_n, grad_stride_m, grad_stride_h, grad_stride_w,
    weight_stride_m, weight_stride_c, weight_stride_h, weight_stride_w,
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    batch, in_height, in_width, out_height, out_width, top, left, pixel_blocks,
    bundles, channels, filters,  # channels (M, summed over) and filters (C) of a bundle of groups
    KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BUNDLE: tl.constexpr, BAND: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Output (e, f) meets pixel (h, w) in tap (i, j) if e*SH = h + top - i*DH, and so for f.

    Which taps fit depends on h % SH and w % SW alone, the phase. In one phase, STEP_H taps on, e is less by a
    constant: a dense convolution of the phase's own taps. Blocks of pixels of all phases alternate.
    """
    STEP_H: tl.constexpr = taps_apart(SH, DH)
    STEP_W: tl.constexpr = taps_apart(SW, DW)
    filter_blocks = tl.cdiv(filters, FILTERS)
    pixel_block, filter_block = block_of_program(pixel_blocks, bundles * filter_blocks, BAND)
    bundle = filter_block // filter_blocks
    filter = filter_block % filter_blocks * FILTERS + tl.arange(0, FILTERS)
    phase_h, phase_w = pixel_block // SW % SH, pixel_block % SW
    i, j = first_tap(phase_h + top, DH, SH, KH), first_tap(phase_w + left, DW, SW, KW)
    tap_rows, tap_columns = tl.cdiv(KH - i, STEP_H), tl.cdiv(KW - j, STEP_W)

    first = (pixel_block // (SH * SW)).to(tl.int64) * PIXELS
    n, h, w = places(first, tl.cdiv(in_height, SH), tl.cdiv(in_width, SW), PIXELS)
    h, w = h * SH + phase_h, w * SW + phase_w
    exists = (n < batch) & (h < in_height) & (w < in_width)
    row, column = (h + top - i * DH) // SH, (w + left - j * DW) // SW
    source = n.to(INDEX) * grad_stride_n + row.to(INDEX) * grad_stride_h + column.to(INDEX) * grad_stride_w
    source += (bundle * channels).to(INDEX) * grad_stride_m
    weight = (filter % (filters // BUNDLE)).to(INDEX) * weight_stride_c + i * weight_stride_h
    weight += (bundle * channels).to(INDEX) * weight_stride_m + j * weight_stride_w
    sums = add_products(
        zeros(SUM, CHANNELS_LAST, PIXELS, FILTERS), grad_output_ptr, source, row, column, exists,
        out_height, out_width, grad_stride_m, grad_stride_h, grad_stride_w,
        -(STEP_H * DH // SH), -(STEP_W * DW // SW), None,
        weight_ptr, weight, filter, filters, channels,
        weight_stride_m, weight_stride_h * STEP_H, weight_stride_w * STEP_W,
        tap_rows * tap_columns, tap_columns, False, True, BUNDLE, PRECISION, CHANNELS_LAST, INDEX, REDUCTION,
    )  # fmt: skip
    target = n.to(INDEX) * input_stride_n + h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
    store(
        sums, bias_ptr, None, grad_input_ptr, target, target, input_stride_c, input_stride_c,
        None, exists, filter, filters, bundle, BUNDLE, None, CHANNELS_LAST, INDEX,
    )  # fmt: skip

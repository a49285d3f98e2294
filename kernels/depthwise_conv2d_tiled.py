"""Depthwise convolution in Triton, made for speed: each lane keeps ROWS x COLUMNS results in registers.

Formula   y[n,o,e,f] = act(b[o] + sum_ij x[n,o//m,e*sh+i*dh-top,f*sw+j*dw-left] * w[o,i,j]), zero outside.
Program   a tile of lanes, channels x pixels (neighbours: channels in channels_last, else columns); each lane
          loads the source pixels of its results once. grad_weight: all taps over a slice of the outputs.
Bytes     read N*C*H*W, write N*O*E*F; the pixels that lanes share come from the cache.
Differs   plain loads KH*KW pixels a result, tiled (1+(KH-1)/ROWS)*(1+(KW-1)/COLUMNS), and a strided
          grad_input wastes no tap.
Limits    of large filters one row of taps is in registers at a time, and results share fewer loads.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ._common import SIZES, activate, loop_bound
from ._moments import store_moments

#
# Everything below is unrolled when the kernel is compiled, so that sums, taps and pixels live in registers.
# Forward and grad_input share it. Along one axis, source pixel s meets target pixel t (both counted from the
# lane's first) in the tap that solves
#     forward     s = t * stride + tap * dilation
#     transposed  s * stride + tap * dilation = t + phase,  phase = padding % stride
# Where no tap solves it nothing is emitted: a strided grad_input has no wasted multiplications.


@triton.constexpr_function
def _tap(source, target, stride, dilation, taps, phase, transposed):
    """The tap in which a source pixel meets a target pixel, or -1."""
    distance = target + phase - source * stride if transposed else source - target * stride
    tap = distance // dilation
    return tap if tap * dilation == distance and 0 <= tap < taps else -1


@triton.constexpr_function
def _first_source(stride, dilation, taps, phase, transposed):
    return -((dilation * (taps - 1) - phase) // stride) if transposed else 0


@triton.constexpr_function
def _last_source(targets, stride, dilation, taps, phase, transposed):
    last = targets - 1
    return (last + phase) // stride if transposed else last * stride + (taps - 1) * dilation


@triton.constexpr_function
def _is_met(source, targets, stride, dilation, taps, phase, transposed):
    """Whether any target pixel needs the source pixel."""
    rule = (stride, dilation, taps, phase, transposed)
    return any(_tap(source, target, *rule) >= 0 for target in range(targets))


@triton.constexpr_function
def _rows_between_taps(stride, dilation):
    """A row of a strided grad_input meets every how-manieth row of taps."""
    return stride // math.gcd(stride, dilation)


@triton.jit
def _tile(
    batch, channels, pixel_blocks, strips,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(image, channel, lane's place along the width, strip of rows) of a program's lanes.

    A tile is PIXELS x CHANNELS: channels of one image in channels_last, else planes, of several images where
    there are few channels. Programs that share cache lines are neighbours.
    """
    program = tl.program_id(0)
    if CHANNELS_LAST:
        blocks = tl.cdiv(channels, CHANNELS)
        channel = ((program % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]).to(tl.int64)
        program = program // blocks
        image = (program // pixel_blocks // strips).to(tl.int64)
    else:
        plane = (program // pixel_blocks // strips).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        image, channel = plane // channels, plane % channels
        channel = tl.where(image < batch, channel, channels)
    pixel = (program % pixel_blocks) * PIXELS + tl.arange(0, PIXELS)[:, None]
    return image, channel, pixel, program // pixel_blocks % strips


@triton.jit
def _zeros(COUNT: tl.constexpr, tile, SUM: tl.constexpr):
    """COUNT tiles of zeros, of the shape of a tile."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros += (tl.zeros(tile.shape, SUM),)
    return zeros


@triton.jit
def _inside_columns(inside, column, width, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """For each lane, whether its columns FIRST ... FIRST + COUNT - 1 lie in the image."""
    masks = ()
    for b in tl.static_range(FIRST, FIRST + COUNT):
        masks += (inside & (column + b >= 0) & (column + b < width),)
    return masks


@triton.jit
def _row(pointer, stride_w, exists, masks, FIRST: tl.constexpr, COUNT: tl.constexpr, SUM: tl.constexpr):
    """Each lane's pixels FIRST ... FIRST + COUNT - 1 of one row, zero outside the image."""
    pixels = ()
    for b in tl.static_range(COUNT):
        pixels += (tl.load(pointer + (FIRST + b) * stride_w, mask=exists & masks[b], other=0.0).to(SUM),)
    return pixels


@triton.jit
def _add_taps(
    sums,  # ROWS * COLUMNS tiles
    source,  # each lane's pointer to its source pixel (row, column)
    weight,  # each lane's pointer to the first of its TAP_ROWS x KW taps
    inside, row, column, height, width, stride_h, stride_w, stride_tap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAP_ROWS: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PHASE_H: tl.constexpr, PHASE_W: tl.constexpr, TRANSPOSED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Adds the products of TAP_ROWS x KW taps to the sums; each source pixel is loaded once."""
    taps = ()
    for k in tl.static_range(TAP_ROWS * KW):
        taps += (tl.load(weight + k * stride_tap, mask=inside, other=0.0).to(SUM),)
    first_a: tl.constexpr = _first_source(SH, DH, TAP_ROWS, PHASE_H, TRANSPOSED)
    last_a: tl.constexpr = _last_source(ROWS, SH, DH, TAP_ROWS, PHASE_H, TRANSPOSED)
    first_b: tl.constexpr = _first_source(SW, DW, KW, PHASE_W, TRANSPOSED)
    last_b: tl.constexpr = _last_source(COLUMNS, SW, DW, KW, PHASE_W, TRANSPOSED)
    masks = _inside_columns(inside, column, width, first_b, last_b - first_b + 1)
    for a in tl.static_range(first_a, last_a + 1):
        if _is_met(a, ROWS, SH, DH, TAP_ROWS, PHASE_H, TRANSPOSED):
            exists = (row + a >= 0) & (row + a < height)
            pixels = _row(source + a * stride_h, stride_w, exists, masks, first_b, last_b - first_b + 1, SUM)
            added = ()
            for r in tl.static_range(ROWS):
                for p in tl.static_range(COLUMNS):
                    total = sums[r * COLUMNS + p]
                    if _tap(a, r, SH, DH, TAP_ROWS, PHASE_H, TRANSPOSED) >= 0:
                        for b in tl.static_range(first_b, last_b + 1):
                            if _tap(b, p, SW, DW, KW, PHASE_W, TRANSPOSED) >= 0:
                                tap = taps[
                                    _tap(a, r, SH, DH, TAP_ROWS, PHASE_H, TRANSPOSED) * KW
                                    + _tap(b, p, SW, DW, KW, PHASE_W, TRANSPOSED)
                                ]
                                total = tl.fma(pixels[b - first_b], tap, total)
                    added += (total,)
            sums = added
    return sums


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_tiled_forward_kernel(
    input_ptr,  # (N, C, H, W), any strides
    weight_ptr,  # (O, KH * KW), any strides
    bias_ptr,  # (O,) or None
    output_ptr,  # (N, O, E, F), any strides
    part_ptr,  # (N * strips * pixel_blocks, 3, O): moments of the output; or None
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    output_stride_n, output_stride_c, output_stride_h, output_stride_w,
    weight_stride_o, weight_stride_tap,
    batch, in_height, in_width, out_channels, out_height, out_width,
    top, left, pixel_blocks, strips,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, UNROLLED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, channel, pixel, strip = _tile(
        batch, out_channels, pixel_blocks, strips, PIXELS, CHANNELS, CHANNELS_LAST
    )
    inside = (channel < out_channels) & (pixel >= 0)  # the second half only gives it the tile's full shape
    row, column = strip * ROWS * SH - top, pixel * COLUMNS * SW - left
    stride_h, stride_w = tl.cast(input_stride_h, tl.int64), tl.cast(input_stride_w, tl.int64)
    stride_tap = tl.cast(weight_stride_tap, tl.int64)
    source = input_ptr + image * input_stride_n + (channel // MULTIPLIER) * input_stride_c
    source = source + row * stride_h + column * stride_w
    weight = tl.broadcast_to(weight_ptr + channel * weight_stride_o, inside.shape)
    sums = _zeros(ROWS * COLUMNS, inside, SUM)
    if UNROLLED:
        sums = _add_taps(
            sums, source, weight, inside, row, column, in_height, in_width, stride_h, stride_w, stride_tap,
            ROWS, COLUMNS, KH, KW, SH, SW, DH, DW, 0, 0, False, SUM,
        )  # fmt: skip
    else:
        for i in tl.range(KH):
            sums = _add_taps(
                sums, source + i * DH * stride_h, weight + i * KW * stride_tap, inside, row + i * DH, column,
                in_height, in_width, stride_h, stride_w, stride_tap,
                ROWS, COLUMNS, 1, KW, SH, SW, DH, DW, 0, 0, False, SUM,
            )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.broadcast_to(bias_ptr + channel, inside.shape)
        bias = tl.load(bias, mask=inside, other=0.0).to(SUM)
    output = output_ptr + image * output_stride_n + channel * output_stride_c
    tiles, masks = (), ()
    for r in tl.static_range(ROWS):
        for p in tl.static_range(COLUMNS):
            total = sums[r * COLUMNS + p]
            if bias_ptr is not None:
                total += bias
            e, f = tl.cast(strip, tl.int64) * ROWS + r, pixel.to(tl.int64) * COLUMNS + p
            exists = inside & (e < out_height) & (f < out_width)
            target = output + e * output_stride_h + f * output_stride_w
            stored = activate(total, ACTIVATION).to(output_ptr.dtype.element_ty)
            tl.store(target, stored, mask=exists)
            tiles += (stored,)
            masks += ((e < out_height) & (f < out_width),)
    if part_ptr is not None:
        program = tl.program_id(0) // (tl.cdiv(out_channels, CHANNELS) if CHANNELS_LAST else 1)
        blocks = strips * pixel_blocks  # of an image
        part = image * blocks + program % blocks
        store_moments(part_ptr, part, channel, out_channels, tiles, masks, ROWS * COLUMNS, 0, SUM)


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_tiled_grad_input_kernel(
    grad_output_ptr,  # (N, O, E, F), any strides
    weight_ptr,  # (O, KH * KW), any strides
    grad_input_ptr,  # (N, C, H, W), any strides
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    weight_stride_o, weight_stride_tap,
    batch, in_channels, in_height, in_width, out_height, out_width,
    top, left, pixel_blocks, strips,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PHASE_H: tl.constexpr, PHASE_W: tl.constexpr,
    SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNROLLED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS (if unrolled) and COLUMNS are multiples of the stride, so that phases are known when compiled."""
    image, channel, pixel, strip = _tile(
        batch, in_channels, pixel_blocks, strips, PIXELS, CHANNELS, CHANNELS_LAST
    )
    inside = (channel < in_channels) & (pixel >= 0)
    column = pixel * (COLUMNS // SW) + left // SW
    stride_h, stride_w = tl.cast(grad_stride_h, tl.int64), tl.cast(grad_stride_w, tl.int64)
    stride_tap = tl.cast(weight_stride_tap, tl.int64)
    sums = _zeros(ROWS * COLUMNS, inside, SUM)
    # A lane's rows: neighbours, or of one phase (SH apart) where only that keeps the rows of taps the same.
    SPACING: tl.constexpr = 1 if UNROLLED else SH
    first_row = strip // SPACING * (ROWS * SPACING) + strip % SPACING
    for o in tl.range(MULTIPLIER):
        filter = channel * MULTIPLIER + o
        source = grad_output_ptr + image * grad_stride_n + filter * grad_stride_c + column * stride_w
        weight = tl.broadcast_to(weight_ptr + filter * weight_stride_o, inside.shape)
        if UNROLLED:
            row = strip * (ROWS // SH) + top // SH
            sums = _add_taps(
                sums, source + row * stride_h, weight, inside, row, column, out_height, out_width,
                stride_h, stride_w, stride_tap,
                ROWS, COLUMNS, KH, KW, SH, SW, DH, DW, PHASE_H, PHASE_W, True, SUM,
            )  # fmt: skip
        else:
            # Every STEP-th row of taps meets them, from the first whose phase is theirs.
            STEP: tl.constexpr = _rows_between_taps(SH, DH)
            first = KH
            for i in tl.static_range(STEP):
                first = tl.where((first_row + top - i * DH) % SH == 0, i, first)
            for i in tl.range(loop_bound(first), KH, STEP):
                row = (first_row + top - i * DH) // SH
                sums = _add_taps(
                    sums, source + row * stride_h, weight + i * KW * stride_tap, inside, row, column,
                    out_height, out_width, stride_h, stride_w, stride_tap,
                    ROWS, COLUMNS, 1, KW, 1, SW, 1, DW, 0, PHASE_W, True, SUM,
                )  # fmt: skip
    grad_input = grad_input_ptr + image * input_stride_n + channel * input_stride_c
    for r in tl.static_range(ROWS):
        for p in tl.static_range(COLUMNS):
            h = tl.cast(first_row, tl.int64) + r * SPACING
            w = pixel.to(tl.int64) * COLUMNS + p
            exists = inside & (h < in_height) & (w < in_width)
            tl.store(grad_input + h * input_stride_h + w * input_stride_w, sums[r * COLUMNS + p], mask=exists)


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_tiled_grad_weight_kernel(
    grad_output_ptr,  # (N, O, E, F), any strides
    input_ptr,  # (N, C, H, W), any strides
    partial_ptr,  # (slices, KH * KW + 1, O); the last tap is the bias
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    batch, in_height, in_width, out_channels, out_height, out_width,
    top, left, pixel_blocks, strips, slice_length,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, TAP_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: a block of filters, TAP_ROWS rows of their taps, one slice of (image, strip, pixels)."""
    blocks = tl.cdiv(out_channels, CHANNELS)
    channel = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]).to(tl.int64)
    first_tap_row = tl.program_id(0) // blocks * TAP_ROWS
    lane = tl.arange(0, PIXELS)[:, None]
    inside = (channel < out_channels) & (lane >= 0)
    stride_h, stride_w = tl.cast(input_stride_h, tl.int64), tl.cast(input_stride_w, tl.int64)
    grad_h, grad_w = tl.cast(grad_stride_h, tl.int64), tl.cast(grad_stride_w, tl.int64)
    rows: tl.constexpr = (ROWS - 1) * SH + (TAP_ROWS - 1) * DH + 1
    columns: tl.constexpr = (COLUMNS - 1) * SW + (KW - 1) * DW + 1

    sums = _zeros(TAP_ROWS * KW, inside, SUM)
    bias = tl.zeros(inside.shape, SUM)
    begin = tl.program_id(1) * slice_length
    end = tl.minimum(begin + slice_length, batch * strips * pixel_blocks)
    for index in tl.range(loop_bound(begin), loop_bound(end)):
        pixel = index % pixel_blocks * PIXELS + lane
        strip = index // pixel_blocks % strips
        image = tl.cast(index // pixel_blocks // strips, tl.int64)
        e, f = strip * ROWS, pixel * COLUMNS
        grads = ()
        pointer = grad_output_ptr + image * grad_stride_n + channel * grad_stride_c + f * grad_w
        masks = _inside_columns(inside, f, out_width, 0, COLUMNS)
        for r in tl.static_range(ROWS):
            grads += _row(pointer + (e + r) * grad_h, grad_w, e + r < out_height, masks, 0, COLUMNS, SUM)
        for k in tl.static_range(ROWS * COLUMNS):
            bias += grads[k]
        row, column = e * SH + first_tap_row * DH - top, f * SW - left
        pointer = input_ptr + image * input_stride_n + (channel // MULTIPLIER) * input_stride_c
        pointer = pointer + row * stride_h + column * stride_w
        masks = _inside_columns(inside, column, in_width, 0, columns)
        for a in tl.static_range(rows):
            if _is_met(a, ROWS, SH, DH, TAP_ROWS, 0, False):
                exists = (row + a >= 0) & (row + a < in_height)
                pixels = _row(pointer + a * stride_h, stride_w, exists, masks, 0, columns, SUM)
                added = ()
                for k in tl.static_range(TAP_ROWS * KW):
                    total = sums[k]
                    for r in tl.static_range(ROWS):
                        if _tap(a, r, SH, DH, TAP_ROWS, 0, False) == k // KW:
                            for p in tl.static_range(COLUMNS):
                                total = tl.fma(grads[r * COLUMNS + p], pixels[p * SW + k % KW * DW], total)
                    added += (total,)
                sums = added

    # Lanes of the same channel, and then (in the second kernel) slices, are added up.
    o = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    partial = partial_ptr + tl.cast(tl.program_id(1), tl.int64) * (KH * KW + 1) * out_channels + o
    for k in tl.static_range(TAP_ROWS * KW):
        tap = tl.cast(first_tap_row * KW + k, tl.int64)
        tl.store(partial + tap * out_channels, tl.sum(sums[k], axis=0), mask=o < out_channels)
    if first_tap_row == 0:
        tl.store(partial + KH * KW * out_channels, tl.sum(bias, axis=0), mask=o < out_channels)

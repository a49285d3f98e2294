"""The gradient of a convolution's weight in Triton, as an implicit GEMM over the pixels.

Formula   dw[m,c,i,j] = sum_nef dy[n,m,e,f] * x[n,c,e*sh+i*dh-top,f*sw+j*dw-left], x zero outside.
Program   FILTERS x COLUMNS sums (a column is a tap and a channel) over a slice of the pixels, PIXELS at a
          time; then, in a second kernel, a block of the gradient: its slices added up in a fixed order.
Bytes     read N*M*E*F + N*C*H*W, if the cache serves the taps; the slices' sums once written and once read.
Differs   the forward pass sums over taps and channels; here pixels are what is summed, so there are slices.
Limits    lanes know their pixel without a division, but load one by one where the input is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import loop_bound
from .conv2d_implicit_gemm import COUNTS, by_channel, by_pixel, places


@triton.jit(do_not_specialize=COUNTS)
def conv2d_implicit_gemm_grad_weight_kernel(
    grad_output_ptr,  # (N, M, E, F), any strides
    input_ptr,  # (N, C, H, W), any strides
    partial_ptr,  # (slices, M, KH, KW, C / G)
    grad_stride_n, grad_stride_m, grad_stride_h, grad_stride_w,
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    batch, in_height, in_width, out_height, out_width, top, left, slice_length,  # a multiple of PIXELS
    bundles, channels, filters,  # channels and filters of a bundle of groups
    KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BUNDLE: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Blocks of columns are neighbours: they read the same gradients, and almost the same pixels.
    column_blocks, filter_blocks = tl.cdiv(KH * KW * channels, COLUMNS), tl.cdiv(filters, FILTERS)
    program = tl.program_id(0)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    filter = program // column_blocks % filter_blocks * FILTERS + tl.arange(0, FILTERS)
    bundle = program // column_blocks // filter_blocks
    channel, tap = column % channels, column // channels
    is_column, is_filter = column < KH * KW * channels, filter < filters
    rows, columns = tap // KW * DH - top, tap % KW * DW - left  # from an output's first to this tap

    grad = (bundle * filters + filter).to(INDEX) * grad_stride_m
    input = (bundle * channels + channel).to(INDEX) * input_stride_c
    input += rows.to(INDEX) * input_stride_h + columns.to(INDEX) * input_stride_w

    # n, e, f are counted up by PIXELS as by a clock: more cheaply than divided at each step.
    step_f, step_e = PIXELS % out_width, PIXELS // out_width % out_height
    step_n = PIXELS // out_width // out_height
    begin = tl.program_id(1).to(tl.int64) * slice_length
    n, e, f = places(begin, out_height, out_width, PIXELS)
    sums = tl.zeros((FILTERS, COLUMNS), SUM)
    for _ in tl.range(0, loop_bound(slice_length), PIXELS):
        exists = n < batch
        pixel = n.to(INDEX) * grad_stride_n + e.to(INDEX) * grad_stride_h + f.to(INDEX) * grad_stride_w
        mask = is_filter[:, None] & exists[None, :]
        dy = tl.load(grad_output_ptr + (grad[:, None] + pixel[None, :]), mask=mask, other=0.0)

        h, w = e * SH, f * SW
        pixel = n.to(INDEX) * input_stride_n + h.to(INDEX) * input_stride_h + w.to(INDEX) * input_stride_w
        h = by_pixel(h, CHANNELS_LAST) + by_channel(rows, CHANNELS_LAST)
        w = by_pixel(w, CHANNELS_LAST) + by_channel(columns, CHANNELS_LAST)
        mask = by_pixel(exists, CHANNELS_LAST) & by_channel(is_column, CHANNELS_LAST)
        mask = mask & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
        x = by_pixel(pixel, CHANNELS_LAST) + by_channel(input, CHANNELS_LAST)
        x = tl.load(input_ptr + x, mask=mask, other=0.0)
        x = x if CHANNELS_LAST else tl.trans(x)
        sums = tl.dot(dy, x, sums, input_precision=PRECISION, out_dtype=SUM)

        f += step_f
        e += step_e + (f >= out_width)
        f = tl.where(f >= out_width, f - out_width, f)
        n += step_n + (e >= out_height)
        e = tl.where(e >= out_height, e - out_height, e)

    group_channels, group_filters = channels // BUNDLE, filters // BUNDLE
    mask = is_filter[:, None] & is_column[None, :]
    if BUNDLE > 1:
        mask = mask & ((filter // group_filters)[:, None] == (channel // group_channels)[None, :])
    row = (tl.program_id(1).to(tl.int64) * bundles + bundle) * filters + filter
    place = tap * group_channels + channel % group_channels
    partial = partial_ptr + row[:, None] * (KH * KW * group_channels) + place[None, :]
    tl.store(partial, sums, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def conv2d_implicit_gemm_grad_weight_sum_kernel(
    partial_ptr,  # (slices, M, TAPS, C / G)
    grad_weight_ptr,  # (M, C / G, TAPS)
    slices, values, channels,  # values of a slice; channels of a group
    TAPS: tl.constexpr, SUM: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage: adds up the slices, always in the same order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((SLICES, BLOCK), SUM)
    for start in tl.range(0, loop_bound(slices), SLICES):
        row = start + tl.arange(0, SLICES)
        exists = (row < slices)[:, None] & (place < values)[None, :]
        partial = partial_ptr + row.to(tl.int64)[:, None] * values + place[None, :]
        total += tl.load(partial, mask=exists, other=0.0)
    channel, tap = place % channels, place // channels % TAPS
    target = (place // channels // TAPS * channels + channel) * TAPS + tap
    tl.store(grad_weight_ptr + target, tl.sum(total, axis=0), mask=place < values)

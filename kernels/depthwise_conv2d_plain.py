"""Depthwise convolution in Triton, the simplest reading: no program keeps anything.

Formula   y[n,o,e,f] = act(b[o] + sum_ij x[n,o//m,e*sh+i*dh-top,f*sw+j*dw-left] * w[o,i,j]), zero outside.
Program   a block of results that are neighbours in memory, one a lane, each gathering its taps; grad_weight:
          one tap of one filter over one slice of the outputs.
Bytes     read N*C*H*W, write N*O*E*F, if the cache serves KH*KW - 1 of the KH*KW times a pixel is loaded.
Limits    every tap costs two loads and four comparisons for one multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import SIZES, activate, loop_bound


@triton.jit
def _position(flat, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """(n, c, h, w) of the flat-th element in memory of a dense (N, C, H, W) tensor."""
    if CHANNELS_LAST:
        c, flat = flat % channels, flat // channels
        w, flat = flat % width, flat // width
        h, n = flat % height, flat // height
    else:
        w, flat = flat % width, flat // width
        h, flat = flat % height, flat // height
        c, n = flat % channels, flat // channels
    return n, c, h, w


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_plain_forward_kernel(
    input_ptr,  # (N, C, H, W), any strides
    weight_ptr,  # (O, KH, KW), contiguous
    bias_ptr,  # (O,) or None
    output_ptr,  # (N, O, E, F), dense
    stride_n, stride_c, stride_h, stride_w,  # of input
    batch, in_height, in_width, out_channels, out_height, out_width,
    top, left,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, o, e, f = _position(flat, out_channels, out_height, out_width, CHANNELS_LAST)
    exists = n < batch
    total = tl.zeros((BLOCK,), SUM)
    for i in tl.range(KH):
        for j in tl.range(KW):
            h = e * SH + i * DH - top
            w = f * SW + j * DW - left
            inside = exists & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
            pixel = input_ptr + n * stride_n + (o // MULTIPLIER) * stride_c + h * stride_h + w * stride_w
            x = tl.load(pixel, mask=inside, other=0.0).to(SUM)
            total += x * tl.load(weight_ptr + (o * KH + i) * KW + j, mask=exists, other=0.0).to(SUM)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=exists, other=0.0).to(SUM)
    tl.store(output_ptr + flat, activate(total, ACTIVATION), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_plain_grad_input_kernel(
    grad_output_ptr,  # (N, O, E, F), any strides
    weight_ptr,  # (O, KH, KW), contiguous
    grad_input_ptr,  # (N, C, H, W), dense
    stride_n, stride_c, stride_h, stride_w,  # of grad_output
    batch, in_channels, in_height, in_width, out_height, out_width,
    top, left,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, c, h, w = _position(flat, in_channels, in_height, in_width, CHANNELS_LAST)
    exists = n < batch
    total = tl.zeros((BLOCK,), SUM)
    for o in tl.range(MULTIPLIER):
        for i in tl.range(KH):
            for j in tl.range(KW):
                # Output (e, f) met this pixel at tap (i, j) if e * SH = h + top - i * DH, and so for f.
                e, e_rest = (h + top - i * DH) // SH, (h + top - i * DH) % SH
                f, f_rest = (w + left - j * DW) // SW, (w + left - j * DW) % SW
                met = exists & (e_rest == 0) & (f_rest == 0)
                met = met & (e >= 0) & (e < out_height) & (f >= 0) & (f < out_width)
                channel = c * MULTIPLIER + o
                pixel = grad_output_ptr + n * stride_n + channel * stride_c + e * stride_h + f * stride_w
                grad = tl.load(pixel, mask=met, other=0.0).to(SUM)
                tap = tl.load(weight_ptr + (channel * KH + i) * KW + j, mask=met, other=0.0).to(SUM)
                total += grad * tap
    tl.store(grad_input_ptr + flat, total, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def depthwise_conv2d_plain_grad_weight_kernel(
    grad_output_ptr,  # (N, O, E, F), any strides
    input_ptr,  # (N, C, H, W), any strides
    partial_ptr,  # (slices, KH * KW + 1, O): sums over each slice of the outputs; the last tap is the bias
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    input_stride_n, input_stride_c, input_stride_h, input_stride_w,
    batch, in_height, in_width, out_channels, out_height, out_width,
    top, left, slice_length,
    MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one filter's one tap, over one slice of the (n, e, f)."""
    o = tl.program_id(0) % out_channels
    tap = tl.program_id(0) // out_channels
    i, j = tap // KW, tap % KW
    first = tl.program_id(1).to(tl.int64) * slice_length
    total = tl.zeros((BLOCK,), SUM)
    for start in tl.range(0, loop_bound(slice_length), BLOCK):
        index = start + tl.arange(0, BLOCK)
        n, _, e, f = _position(first + index, 1, out_height, out_width, False)
        exists = (n < batch) & (index < slice_length)
        pixel = grad_output_ptr + n * grad_stride_n + o.to(tl.int64) * grad_stride_c
        grad = tl.load(pixel + e * grad_stride_h + f * grad_stride_w, mask=exists, other=0.0).to(SUM)
        if tap < KH * KW:
            h = e * SH + i * DH - top
            w = f * SW + j * DW - left
            inside = exists & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
            pixel = input_ptr + n * input_stride_n + (o // MULTIPLIER).to(tl.int64) * input_stride_c
            grad *= tl.load(pixel + h * input_stride_h + w * input_stride_w, mask=inside, other=0.0).to(SUM)
        total += grad
    row = tl.program_id(1) * (KH * KW + 1) + tap
    tl.store(partial_ptr + row.to(tl.int64) * out_channels + o, tl.sum(total))

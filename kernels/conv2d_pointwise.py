"""1x1 convolution in Triton: the implicit GEMM without taps, so a plain matrix product.

Formula   y[n,m,p] = act(b[m] + r[n,m,p] + sum_c x[n,c,p] * w[m,c]), p a pixel.
Program   PIXELS x FILTERS sums; neighbouring pixels are neighbours in memory, across images in channels_last.
Bytes     read N*C*H*W + M*C, write N*M*H*W.
Differs   implicit_gemm divides to find each pixel's place, and compares for each tap whether it is inside.
Limits    stride 1 and no padding; with the weight transposed, grad_input and conv_transpose2d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv2d_implicit_gemm import COUNTS, add_products, block_of_program, store, store_moments_of_tile, zeros


@triton.jit(do_not_specialize=COUNTS)
def conv2d_pointwise_forward_kernel(
    input_ptr,  # (images, C, pixels), any strides
    weight_ptr,  # (M, C / G), any strides; (C, M / G) if TRANSPOSED
    bias_ptr,  # (M,) or None
    residual_ptr,  # (images, M, pixels), any strides, or None
    output_ptr,  # (images, M, pixels), any strides
    part_ptr,  # (images * pixel_blocks, 3, M): moments of the output; or None
    input_stride_n, input_stride_c, input_stride_p,
    weight_stride_m, weight_stride_c,
    residual_stride_n, residual_stride_c, residual_stride_p,
    output_stride_n, output_stride_c, output_stride_p,
    output_stride_g,  # see store
    images, pixels, pixel_blocks,  # pixels of an image, and their blocks
    bundles, channels, filters,  # channels and filters of a bundle of groups
    SUM: tl.constexpr, PRECISION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr, BUNDLE: tl.constexpr, BAND: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, FILTERS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    filter_blocks = tl.cdiv(filters, FILTERS)
    pixel_block, filter_block = block_of_program(images * pixel_blocks, bundles * filter_blocks, BAND)
    bundle = filter_block // filter_blocks
    filter = filter_block % filter_blocks * FILTERS + tl.arange(0, FILTERS)
    n = (pixel_block // pixel_blocks).to(INDEX)
    pixel = (pixel_block % pixel_blocks).to(INDEX) * PIXELS + tl.arange(0, PIXELS)
    exists = (pixel >= 0) & (pixel < pixels)  # the last block can pass 2^31
    source = n * input_stride_n + (bundle * channels).to(INDEX) * input_stride_c + pixel * input_stride_p
    if TRANSPOSED:
        weight = (bundle * channels).to(INDEX) * weight_stride_c
        weight += (filter % (filters // BUNDLE)).to(INDEX) * weight_stride_m
    else:
        weight = (bundle * filters + filter).to(INDEX) * weight_stride_m
    sums = add_products(
        zeros(SUM, CHANNELS_LAST, PIXELS, FILTERS), input_ptr, source, 0, 0, exists,
        0, 0, input_stride_c, 0, 0, 0, 0, None,
        weight_ptr, weight, filter, filters, channels, weight_stride_c, 0, 0,
        1, 1, True, TRANSPOSED, BUNDLE, PRECISION, CHANNELS_LAST, INDEX, REDUCTION,
    )  # fmt: skip
    residual = n * residual_stride_n + pixel * residual_stride_p
    output = n * output_stride_n + pixel * output_stride_p
    stored = store(
        sums, bias_ptr, residual_ptr, output_ptr, residual, output, residual_stride_c, output_stride_c,
        output_stride_g, exists, filter, filters, bundle, BUNDLE, ACTIVATION, CHANNELS_LAST, INDEX,
    )  # fmt: skip
    store_moments_of_tile(
        part_ptr, pixel_block, stored, exists, filter, filters, bundle, bundles, SUM, CHANNELS_LAST
    )

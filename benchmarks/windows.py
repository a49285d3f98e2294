"""How windows slide over an image: what the convolutions' benchmarks count."""

from __future__ import annotations


def outputs(size: int, kernel: int, stride: int, padding: int) -> int:
    """Places of a window along one axis."""
    return (size + 2 * padding - kernel) // stride + 1


def taps_inside(places: int, size: int, kernel: int, stride: int, padding: int) -> int:
    """Pairs of a place and a tap, along one axis, that meet a pixel of the image, not its padding."""
    starts = (place * stride - padding for place in range(places))
    return sum(max(0, min(start + kernel, size) - max(start, 0)) for start in starts)

"""Checks and normal forms of the arguments that the operators share.

Every error names the argument, what it was, and what is allowed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Of a stride, a padding or a dilation. Kernels add up a few products of one with a size, in 64 bits.
LARGEST = (1 << 31) - 1


def integer(name: str, value: int, least: int = 1) -> int:
    """An argument that is one integer of at least ``least``."""
    value = _integer(name, value, "an integer")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return value


def pair(name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """(height, width) of an argument given as one integer or as two; from ``least`` to ``LARGEST``."""
    if type(value) is int:
        first = second = value
    elif isinstance(value, (tuple, list)) and len(value) in (1, 2):
        first, second = _integer(name, value[0]), _integer(name, value[-1])
    else:
        first = second = _integer(name, value)
    _check_range(name, (first, second), least, value)
    return first, second


def _check_range(name: str, numbers: Sequence[int], least: int, given: object) -> None:
    if any(number < least for number in numbers):
        raise ValueError(f"{name} must be at least {least}, got {given!r}")
    # A number that torch.compile does not know stays free: the kernels check it themselves.
    if any(type(number) is int and number > LARGEST for number in numbers):
        raise ValueError(f"{name} must be at most {LARGEST}, got {given!r}")


def _integer(name: str, value: object, allowed: str = "an integer or a pair of integers") -> int:
    if isinstance(value, torch.SymInt):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None


def padding_sides(
    padding: int | str | Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) zeros for ``padding`` as in ``torch.nn.functional.conv2d``."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(f"padding must be 'same', 'valid', an integer or a pair, got {padding!r}")
        if stride[0] != 1 or stride[1] != 1:
            raise ValueError(f"padding='same' needs stride 1, got stride={tuple(stride)}")
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel))
        return height // 2, height - height // 2, width // 2, width - width // 2
    height, width = pair("padding", padding, least=0)
    return height, height, width, width


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, axis: str = "height"
) -> int:
    """Outputs along one axis; ``padding`` counts both sides. Spec: ``floor((H + P - D(K-1) - 1)/S) + 1``."""
    span = dilation * (kernel - 1) + 1
    if size + padding < span:
        raise ValueError(
            f"weight spans {span} pixels of {axis} (kernel {kernel}, dilation {dilation}), more than "
            f"the padded input's {size + padding}; give more padding or a larger input"
        )
    return (size + padding - span) // stride + 1


def check_integers(name: str, values: Sequence[int], count: int, least: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} must have {count} values, got {tuple(values)}")
    _check_range(name, values, least, tuple(values))


def check_tensor(name: str, tensor: object, rank: int, like: torch.Tensor | None = None) -> None:
    """Raises unless ``tensor`` is dense, has this rank, a type we serve, and ``like``'s type and device."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, of layout torch.strided, got {layout}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")
    if like is not None:
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, but input is on {like.device}; move one")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but input is {like.dtype}; convert one")

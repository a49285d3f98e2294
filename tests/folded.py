"""Cases of convolutions with something folded in: a shuffle, a shift, a depthwise convolution before it."""

from __future__ import annotations

from typing import NamedTuple

from convolutions import Convolution, Separable, Shifted, Shuffled


class Cases(NamedTuple):
    geometry: list[Convolution]
    edges: list[Convolution]  # around the widths of vectors, blocks and tiles
    large: list[Convolution]  # several tiles each way
    mixed: list[Convolution]  # of each kind one, for the tests of everything but the geometry
    small: list[Convolution]  # the same for interpreted kernels, which take a second for a dozen programs
    few: list[Convolution]  # their geometry


_ONE_BY_ONE = [
    Shuffled((2, 6, 5, 7), 9, (1, 1), groups=3),
    Shuffled((1, 8, 4, 3), 4, (1, 1), groups=2, bias=False),
    Shuffled((1, 8, 3, 3), 8, (1, 1), groups=8),  # a channel and a filter each: the shuffle is the identity
    Shuffled((1, 5, 3, 4), 7, (1, 1)),  # one group: nothing to shuffle
    Shuffled((2, 12, 1, 1), 20, (1, 1), groups=4),
    Shuffled((1, 16, 9, 8), 48, (1, 1), groups=2, activation="relu"),
    Shuffled((0, 4, 3, 3), 8, (1, 1), groups=2),
    Shuffled((1, 6, 7, 9), 6, (1, 1), stride=2, groups=2),
    Shuffled((1, 6, 4, 3), 9, (1, 1), padding=1, groups=3),
]
_SMALL = [
    Shuffled((1, 4, 3, 4), 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
    Shuffled((1, 6, 2, 3), 9, (1, 1), groups=3),
]
SHUFFLED = Cases(
    geometry=[
        *_ONE_BY_ONE,
        Shuffled((2, 6, 5, 6), 9, padding=1, groups=3),
        Shuffled((1, 4, 7, 8), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
        Shuffled((1, 8, 6, 5), 12, (1, 3), (1, 2), (0, 1), groups=4, activation="silu"),
        Shuffled((2, 6, 7, 6), 4, (4, 2), padding="same", groups=2),
        Shuffled((1, 16, 5, 6), 32, padding=1, groups=2),
        Shuffled((1, 24, 4, 5), 48, (1, 1), groups=3, bias=False),
        Shuffled((2, 16, 3, 4), 16, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
    ],
    edges=[
        *(
            Shuffled((1, 3 * c, 3, 5), 3 * m, (1, 1), groups=3)
            for c, m in ((1, 5), (7, 6), (16, 7), (17, 12), (33, 13))
        ),
        *(
            Shuffled((1, 2 * c, 4, 4), 2 * m, (1, 1), groups=2)
            for c, m in ((15, 8), (8, 15), (31, 16), (16, 33))
        ),
        *(Shuffled((1, 4, 1, w), 6, (1, 1), groups=2) for w in (7, 15, 16, 17, 31, 63, 64, 65, 129)),
        *(Shuffled((2, 9, 7, w), 15, (1, 1), groups=3) for w in (8, 9, 10)),
        Shuffled((1, 5120, 2, 3), 4, (1, 1), groups=1),
    ],
    large=[
        Shuffled((2, 240, 14, 15), 60, (1, 1), groups=3),
        Shuffled((1, 384, 9, 11), 96, (1, 1), groups=8, activation="silu"),
        Shuffled((2, 64, 29, 33), 96, padding=1, groups=4),
    ],
    mixed=[
        Shuffled((2, 6, 9, 7), 4, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
        Shuffled((2, 6, 4, 6), 9, (1, 1), groups=3),
        Shuffled((2, 16, 5, 4), 32, (1, 1), groups=2),
    ],
    small=_SMALL,
    few=[*_SMALL, *_ONE_BY_ONE[:5], Shuffled((1, 64, 2, 2), 64, (1, 1), groups=2)],
)

_GEOMETRY = [
    *(Shifted((2, 9, 5, 7), 4, offsets=offsets) for offsets in ("window", "scattered", "far")),
    *(Shifted((1, 18, 6, 5), 5, stride=stride) for stride in (2, (1, 2), (3, 1), (7, 9))),
    Shifted((2, 20, 7, 4), 9, stride=(2, 3), offsets="scattered", bias=False),
    Shifted((1, 1, 1, 1), 1),
    Shifted((3, 9, 1, 1), 2),
    Shifted((1, 7, 1, 9), 3, offsets="scattered"),
    Shifted((1, 7, 9, 1), 3, offsets="scattered", activation="relu"),
    Shifted((0, 9, 3, 3), 2),
    Shifted((1, 27, 8, 8), 16, activation="silu"),
    # channels and filters are multiples of 8, as tensor cores read them
    Shifted((1, 16, 5, 6), 8),
    Shifted((2, 72, 4, 5), 16, stride=2, offsets="scattered"),
    Shifted((1, 24, 3, 4), 40, activation="silu"),
    Shifted((1, 8, 7, 3), 8, stride=(1, 2), offsets="far"),
]
_CHANNELS = (1, 8, 15, 16, 17, 31, 33, 72, 135, 144, 153)  # runs of channels with one offset, and none
_FEW_SHIFTS = [Shifted((1, 9, 3, 4), 3), Shifted((1, 6, 5, 3), 2, stride=(2, 1), offsets="far")]
SHIFTED = Cases(
    geometry=_GEOMETRY,
    edges=[
        *(
            Shifted((1, c, 3, 5), 7 + c % 13, offsets=offsets)
            for c in _CHANNELS
            for offsets in ("window", "scattered")
        ),
        *(Shifted((1, 9, 1, w), m) for w, m in zip((15, 16, 17, 63, 64, 65, 129), (1, 5, 6, 7, 12, 13, 17))),
        *(Shifted((2, 18, 7, w), 6, offsets="scattered") for w in (8, 9, 10)),
        *(Shifted((1, 18, 16, w), 6, stride=2) for w in (31, 32, 33)),
        Shifted((1, 2700, 2, 3), 4),
    ],
    large=[
        Shifted((2, 144, 29, 33), 70, activation="silu"),
        Shifted((1, 70, 23, 40), 130, stride=2, offsets="scattered"),
        Shifted((1, 300, 9, 11), 33, offsets="far"),
    ],
    mixed=[
        Shifted((2, 9, 5, 6), 7),
        Shifted((2, 20, 7, 8), 16, stride=(2, 1), offsets="scattered"),
        Shifted((1, 12, 4, 9), 6, stride=2, offsets="far"),
        Shifted((1, 16, 4, 5), 24, stride=(1, 2), offsets="scattered"),
    ],
    small=_FEW_SHIFTS,
    few=[*_FEW_SHIFTS, *_GEOMETRY[:4], _GEOMETRY[8], Shifted((1, 17, 4, 3), 18, offsets="scattered")],
)

_FEW_SEPARABLE = [
    Separable((1, 3, 3, 4), 5, padding=1),
    Separable((1, 2, 4, 3), 3, (3, 2), (2, 1), (1, 0), (1, 2), multiplier=2),
]
_SEPARABLE = [
    Separable((2, 6, 5, 7), 9, padding=1),
    Separable((1, 18, 7, 8), 6, (3, 2), (2, 1), (1, 2), (1, 2), bias=False),
    Separable((1, 8, 6, 5), 12, (1, 3), (1, 2), (0, 1), mid_activation="silu", residual=False),
    Separable((2, 5, 7, 6), 4, (4, 2), padding="same", mid_activation=None),
    Separable((1, 5, 6, 6), 7, (5, 5), stride=2, padding=2, multiplier=3),
    Separable((2, 16, 4, 5), 24, padding=1, activation="silu", mid_activation="gelu"),
    Separable((3, 16, 1, 1), 2, (1, 1)),
    Separable((1, 1, 1, 9), 1, (1, 3), bias=False, residual=False),
    Separable((0, 4, 3, 3), 8),
    Separable((1, 20, 9, 8), 48, padding=1, activation="relu", mid_activation="relu6"),
    Separable((1, 6, 3, 3), 5, padding=4),  # some windows meet padding alone
    Separable((1, 17, 8, 8), 3, (7, 7), padding=3, mid_activation="gelu_tanh"),
    Separable((2, 9, 8, 5), 3, stride=7, mid_activation=None),
]
SEPARABLE = Cases(
    geometry=_SEPARABLE,
    edges=[
        *(Separable((1, c, 3, 5), 5, padding=1) for c in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65)),
        *(Separable((1, 16, 3, 3), m, padding=1) for m in (1, 4, 6, 15, 16, 17, 63, 64, 65, 130)),
        *(Separable((2, 16, 3, w), 6, padding=1) for w in (1, 2, 7, 8, 9, 15, 16, 17, 33)),
        *(Separable((2, 20, h, 6), 6, padding=1, stride=2) for h in (2, 3, 14, 15)),
        Separable((1, 1100, 3, 4), 4, padding=1),
    ],
    large=[
        Separable((2, 64, 40, 41), 70, padding=1),
        Separable((3, 40, 37, 36), 24, (5, 5), stride=2, padding=2, activation="silu"),
        Separable((2, 300, 9, 11), 130, padding=1, mid_activation="silu"),
    ],
    mixed=[
        Separable((2, 18, 5, 6), 7, padding=1),
        Separable((2, 10, 9, 7), 16, (3, 2), (2, 1), (1, 2), multiplier=2),
        Separable((1, 32, 6, 7), 65, (5, 5), padding=2, mid_activation="silu"),
    ],
    small=_FEW_SEPARABLE,
    few=[*_FEW_SEPARABLE, *_SEPARABLE[:4], _SEPARABLE[8]],
)

"""What the tests of every operator share: where they run, which kernels, how tensors lie in memory."""

from __future__ import annotations

import collections
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

DEVICE = os.environ.get("FASTCONV_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE == "cpu":
    assert "triton" not in sys.modules, "too late: Triton reads TRITON_INTERPRET when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"

from fastconv import emulator  # noqa: E402
from fastconv.backends import CHOICES, available, why_not  # noqa: E402
from fastconv.ops._operator import OVERLOADS  # noqa: E402

# Backends of an operator that no tensor on this device can reach.
ELSEWHERE = {"cpu": {"cuda"}, "cuda": {"cpu", "emulator"}}[DEVICE]


class Run(NamedTuple):
    """One way to run an operator: a backend, and one of its algorithms."""

    backend: str
    algorithm: str | None

    def __str__(self) -> str:
        return f"{self.backend}-{self.algorithm}" if self.algorithm else self.backend

    @property
    def keywords(self) -> dict[str, str | None]:
        return {"backend": self.backend, "algorithm": self.algorithm}

    @property
    def slow(self) -> bool:
        """Triton interpreted: 10 to 100 ms a program."""
        return DEVICE == "cpu" and self.backend == "triton"

    @property
    def stands_in(self) -> bool:
        """A GPU's kernel on the CPU: right, and slow where there is much to compute."""
        return DEVICE == "cpu" and self.backend in ("emulator", "triton")

    def serves(self, dtype: torch.dtype) -> bool:
        return why_not(self.backend, DEVICE, dtype) is None

    def operator(self, name: str) -> torch._ops.OpOverload:
        """The overload of ``torch.ops.fastconv.<name>`` behind this backend."""
        return getattr(getattr(torch.ops.fastconv, name), OVERLOADS[self.backend] or "default")


def runs(op: str, *, own: bool = False) -> list[Run]:
    """Every backend and algorithm of an operator that can run here; ``own`` leaves out what PyTorch computes.

    ``test_backends.py`` fails if a backend is missing that this device should have.
    """
    algorithms = CHOICES[op].algorithms
    return [
        Run(backend, algorithm)
        for backend in available(op, DEVICE)
        if backend in OVERLOADS or not own
        for algorithm in algorithms[backend] or (None,)
    ]


def of_each_backend(which: list[Run]) -> list[Run]:
    """The first run of each: for what an algorithm has no part in."""
    return list({run.backend: run for run in reversed(which)}.values())


def points(
    which: list[Run],
    *,
    where: Callable[..., bool] = lambda run, **_: True,
    cover: Sequence[str] | None = None,
    **axes: tuple[Iterable, Iterable],
) -> list[tuple]:
    """The arguments of a test: for each run those of a grid that there are, see :func:`for_runs`."""
    found = []
    for number, run in enumerate(which):
        grid = itertools.product(*(few if run.slow else many for many, few in axes.values()))
        served = [point for point in grid if where(run, **dict(zip(axes, point)))]
        if cover is not None:
            start = number * len(served) // len(which)  # so that runs differ in what they combine
            served = _covering(served[start:] + served[:start], list(axes), cover)
        found += [(run, *point) for point in served]
    return found


def _covering(grid: list[tuple], names: list[str], cover: Sequence[str]) -> list[tuple]:
    """The next point is always the one with the most that is new, then with what was seen least often."""

    def parts(point: tuple, covered: Iterable[str]) -> set[tuple]:
        return {(axes, *(point[names.index(name)] for name in axes.split())) for axes in covered}

    left = set().union(*(parts(point, cover) for point in grid))
    seen, chosen = collections.Counter(), []
    while left:
        best = max(grid, key=lambda p: (len(parts(p, cover) & left), -sum(seen[v] for v in parts(p, names))))
        chosen.append(best)
        left -= parts(best, cover)
        seen.update(parts(best, names))
    return chosen


def for_runs(which: list[Run], **keywords) -> pytest.MarkDecorator:
    """Parametrises a test by ``run`` and further arguments, each given as (values, values for slow runs).

    ``where(run, **arguments)`` says which points of this grid there are. With ``cover`` not all are
    taken, but for each run a few in which every combination of the named arguments is found: of
    ``cover=["dtype layout", "case"]``, all types in all layouts, and all cases, in one or another of these.
    """
    return parametrized(
        [name for name in keywords if name not in ("where", "cover")], points(which, **keywords)
    )


def parametrized(names: Iterable[str], found: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(["run", *names], found, ids=lambda v: str(v).removeprefix("torch."))


# How an (N, C, H, W) tensor may lie in memory: layout(make, shape), where make(shape) gives the values.
LAYOUTS: dict[str, Callable[[Callable[..., torch.Tensor], tuple[int, ...]], torch.Tensor]] = {
    "contiguous": lambda make, shape: make(shape),
    "channels_last": lambda make, shape: make(shape).contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda make, shape: make((shape[0], shape[1] + 3, *shape[2:]))[:, 1:-2],
    "channels_last_channel_slice": lambda make, shape: make((shape[0], shape[1] + 3, *shape[2:])).contiguous(
        memory_format=torch.channels_last
    )[:, 1:-2],
    "spatial_slice": lambda make, shape: make((*shape[:2], shape[2] + 2, shape[3] + 3))[:, :, 1:-1, 2:-1],
    "channels_last_spatial_slice": lambda make, shape: make(
        (*shape[:2], shape[2] + 2, shape[3] + 3)
    ).contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 2:-1],
    "stepped": lambda make, shape: make((*shape[:2], 2 * shape[2], 3 * shape[3]))[:, :, ::2, 1::3],
    "expanded_batch": lambda make, shape: make((1, *shape[1:])).expand(shape),
    "expanded_channels": lambda make, shape: make((shape[0], 1, *shape[2:])).expand(shape),
    "expanded_pixels": lambda make, shape: make((*shape[:2], 1, 1)).expand(shape),
    "transposed_pixels": lambda make, shape: make((*shape[:2], shape[3], shape[2])).transpose(2, 3),
    "transposed_batch": lambda make, shape: make((shape[1], shape[0], *shape[2:])).transpose(0, 1),
}


def global_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of global memory that the emulated kernels of a call read, and wrote."""
    with emulator.count() as counters:
        call()
    return tuple(
        sum(kernel[f"global_{kind}_bytes"] for kernel in counters.values()) for kind in ("load", "store")
    )


def zeros_beyond_32_bits(layout: str) -> torch.Tensor:
    """(1, 6, H, W) of float16 in either layout, beyond 2^31 elements; pages of zeros take no memory."""
    shape = (1, 6, 2**15, 2**15 // 3 + 1)
    shape = shape if layout == "contiguous" else (shape[0], *shape[2:], shape[1])
    image = torch.from_numpy(np.zeros(shape, dtype=np.float16)).to(DEVICE)
    assert image.numel() > 2**31
    return image if layout == "contiguous" else image.permute(0, 3, 1, 2)

"""Loads the compiled libraries, and says why one is not there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_BUILD = "build it with: pip install --no-build-isolation -e ."


@functools.cache
def load(name: str) -> str | None:
    """Loads ``fastconv/lib<name>.so``, which registers its kernels; returns what went wrong, or None."""
    path = Path(__file__).parent / f"libfastconv_{name}.so"
    if not path.exists():
        return f"{path.name} is not built; {_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}); {_BUILD}"
    return None


@functools.cache
def host():
    """The torch-free extension module ``fastconv._host``, or None if it is not built."""
    try:
        from . import _host
    except ImportError:
        return None
    return _host


# A plain dictionary: torch.compile looks through functools.cache, and cannot trace what is behind it.
_problems: dict[str, str | None] = {}


def problem(backend: str) -> str | None:
    """Why a compiled backend (``"cpu"``, ``"cuda"``, ``"emulator"``) cannot run here, or None."""
    if backend not in _problems:
        _problems[backend] = _find_problem(backend)
    return _problems[backend]


def _find_problem(backend: str) -> str | None:
    if backend == "emulator":
        return load("emulator")
    error = load("kernels")
    if error is not None or backend == "cpu":
        return error
    if host() is None or not host().built_with_cuda():
        needs = f"nvcc {torch.version.cuda}" if torch.version.cuda else "nvcc and a CUDA PyTorch"
        return f"the library was built without CUDA; with {needs} at hand, {_BUILD}"
    return None

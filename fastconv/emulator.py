"""What the CUDA kernels ask of a GPU's memory, counted by the emulator.

>>> with fastconv.emulator.count() as counters:
...     fastconv.depthwise_conv2d(x, weight, backend="emulator")
>>> counters["depthwise_conv2d_tiled_forward_kernel<float, 3, 1, false>"]["load_efficiency"]
0.81

The emulator (``csrc/emulator``) runs the kernels on CPU tensors. It counts by the warp, as a GPU works:

=====================================  ==============================================================
``launches``, ``blocks``, ``threads``  how often the kernel ran, and with how many
``barriers``                           ``__syncthreads()``, once for a block
``global_load_requests``               loads by a warp
``global_load_sectors``                32-byte pieces of memory that these touch
``global_load_bytes``                  bytes that the threads asked for
``load_efficiency``                    ``bytes / (32 * sectors)``; above 1: threads share bytes
``global_store_*``                     the same for stores, with ``store_efficiency``
``shared_requests``                    loads and stores of shared memory by a warp
``shared_wavefronts``                  turns that they took; one serves 4 bytes from each of 32 banks
``bank_conflicts``                     turns beyond those needed by a warp's bytes
=====================================  ==============================================================

Caches are not modelled: a sector counts each time that a warp asks for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator
from pathlib import Path

SECTOR_BYTES = 32


@functools.cache
def _library() -> ctypes.CDLL:
    from . import _library
    from .backends import BackendError

    problem = _library.problem("emulator")
    if problem is not None:
        raise BackendError(f"emulator: {problem}")
    return _bind(Path(__file__).parent / "libfastconv_emulator.so")


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.fastconv_emulator_count.argtypes = [ctypes.c_int]
    library.fastconv_emulator_count.restype = None
    library.fastconv_emulator_reset.argtypes = []
    library.fastconv_emulator_reset.restype = None
    library.fastconv_emulator_counters.argtypes = []
    library.fastconv_emulator_counters.restype = ctypes.c_char_p
    return library


def _read(library: ctypes.CDLL) -> dict[str, dict[str, float]]:
    result = json.loads(library.fastconv_emulator_counters())
    for values in result.values():
        for kind in ("load", "store"):
            moved = SECTOR_BYTES * values[f"global_{kind}_sectors"]
            values[f"{kind}_efficiency"] = values[f"global_{kind}_bytes"] / moved if moved else 1.0
    return result


def counters() -> dict[str, dict[str, float]]:
    """The counters of each kernel that ran while counting, since the last :func:`reset`.

    Raises:
        BackendError: the emulator is not built.
    """
    return _read(_library())


def reset() -> None:
    """Sets all counters to zero."""
    _library().fastconv_emulator_reset()


@contextlib.contextmanager
def count() -> Iterator[dict[str, dict[str, float]]]:
    """Within the block, counts what kernels do, from zero; the dictionary is filled when the block ends.

    Counting is slow (some hundred times), so use small tensors. Blocks do not nest.
    """
    library = _library()
    library.fastconv_emulator_reset()
    library.fastconv_emulator_count(1)
    result: dict[str, dict[str, float]] = {}
    try:
        yield result
    finally:
        library.fastconv_emulator_count(0)
        result.update(_read(library))

"""Which kernel runs, and why not another.

Backends: ``"cpu"`` (C++), ``"cuda"``, ``"triton"``, ``"aten"`` (PyTorch's own operator), ``"reference"``
(the definition in plain PyTorch), and ``"emulator"`` (the CUDA kernels run on CPU tensors, for study).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("cpu", "cuda", "triton", "aten", "reference", "emulator")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says which condition failed."""


def _own_kernels(tensor: torch.Tensor, *_: object) -> tuple[str, ...]:
    return ("cuda", "triton") if tensor.device.type == "cuda" else ("cpu",)


@dataclass(frozen=True)
class Choice:
    """What an operator offers to the choice of a kernel.

    Attributes:
        op: the operator's stem.
        algorithms: the algorithms of each backend, the default first.
        prefer: ``prefer(*arguments) -> backends``, the measured best first, for ``backend=None``; left out
            where our own kernels win.
        why_not: ``why_not(backend, algorithm, *arguments)`` says which condition of the operator's own
            fails, or None.
    """

    op: str
    algorithms: dict[str, tuple[str, ...]]
    prefer: Callable[..., tuple[str, ...]] = _own_kernels
    why_not: Callable[..., str | None] = lambda *_: None

    def __post_init__(self) -> None:
        CHOICES[self.op] = self

    def __call__(
        self, backend: str | None, algorithm: str | None, tensor: torch.Tensor, *arguments: object
    ) -> str:
        """The backend that runs this call; raises BackendError if a named one cannot."""
        if backend is None:
            backend = _state.backend
        if backend is None:
            for candidate in (*self.prefer(tensor, *arguments), "aten", "reference"):
                if algorithm is not None and algorithm not in self.algorithms.get(candidate, ()):
                    continue
                if self.obstacle(candidate, algorithm, tensor, *arguments) is None:
                    return candidate
            known = {name: names for name, names in self.algorithms.items() if names}
            raise BackendError(
                f"{self.op}: no backend here runs algorithm={algorithm!r} on this input; known are {known}"
            )
        if backend not in BACKENDS:
            raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
        obstacle = self.obstacle(backend, algorithm, tensor, *arguments)
        if obstacle is not None:
            raise BackendError(f"{self.op}: backend={backend!r} cannot run here: {obstacle}")
        return backend

    def obstacle(
        self, backend: str, algorithm: str | None, tensor: torch.Tensor, *arguments: object
    ) -> str | None:
        """Why a backend cannot run this call, or None if it can."""
        if backend not in self.algorithms:
            return f"the operator has none; it has {tuple(self.algorithms)}"
        return (
            self.unknown(backend, algorithm)
            or why_not(backend, tensor.device.type, tensor.dtype)
            or self.why_not(backend, algorithm, tensor, *arguments)
        )

    def unknown(self, backend: str, algorithm: str | None) -> str | None:
        """Which algorithms a backend has, if not this one."""
        if algorithm is None or algorithm in self.algorithms[backend]:
            return None
        return f"algorithm must be None or one of {self.algorithms[backend]}, got {algorithm!r}"

    def check_algorithm(self, backend: str, algorithm: str | None) -> None:
        """Raises ValueError if the backend has no such algorithm."""
        if reason := self.unknown(backend, algorithm):
            raise ValueError(reason)


CHOICES: dict[str, Choice] = {}


class _State(threading.local):
    backend: str | None = None


_state = _State()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, calls that name no backend use this one (None: the measured best)."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name must be None or one of {BACKENDS}, got {name!r}")
    before, _state.backend = _state.backend, name
    try:
        yield
    finally:
        _state.backend = before


def available(op: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that can run an operator here, for tensors on a device.

    >>> fastconv.available("depthwise_conv2d")
    ('cpu', 'aten', 'reference', 'emulator')
    """
    if op not in CHOICES:
        raise ValueError(f"op must be one of {tuple(CHOICES)}, got {op!r}")
    device_type = torch.device(device).type
    return tuple(
        name for name in BACKENDS if name in CHOICES[op].algorithms and why_not(name, device_type) is None
    )


def why_not(backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no operator can run on a backend here, for tensors on a device; None if they can."""
    from . import _library

    if backend == "cpu":
        if device_type != "cpu":
            return f"it needs CPU tensors, got {device_type}"
        return _library.problem("cpu")
    if backend == "cuda":
        if device_type != "cuda":
            return (
                f"it needs CUDA tensors, got {device_type} (backend='emulator' runs its kernels on the CPU)"
            )
        if not torch.cuda.is_available():
            return "torch.cuda.is_available() is False"
        return _library.problem("cuda")
    if backend == "emulator":
        if device_type != "cpu":
            return f"it needs CPU tensors, got {device_type}"
        return _library.problem("emulator")
    if backend == "triton":
        return _why_not_triton(device_type, dtype)
    return None


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if not triton_installed():
        return "triton is not installed (pip install triton)"
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return f"it needs CUDA tensors, or CPU tensors with TRITON_INTERPRET=1, got {device_type}"
    if not triton_interpreted():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; use float32 or a GPU"
    return None


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def triton_interpreted() -> bool:
    return _TRITON_INTERPRETED


# Constants, for torch.compile to trace. Triton reads the variable once, when it is imported.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

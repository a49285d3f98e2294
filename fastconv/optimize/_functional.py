"""Kernels for code that calls ``torch.nn.functional`` itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.overrides import TorchFunctionMode

from ..nn._rules import check_backend, handlers_of


class _Served(threading.local):
    """Whether a kernel is at work; the calls that it makes itself do not concern the blocks further out."""

    now = False


_served = _Served()


class _Enable(TorchFunctionMode):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for handler in () if _served.now else handlers_of(function):
            call = handler(self.backend, *args, **kwargs)
            if call is not None:
                _served.now = True
                try:
                    return call()
                finally:
                    _served.now = False
        return function(*args, **kwargs)


@contextlib.contextmanager
def enable(backend: str | None = None) -> Iterator[None]:
    """Within the block, calls of PyTorch's functions that a kernel serves run on that kernel.

    Nothing is patched: the block sees the calls of its own thread, from modules too, and may be nested; the
    innermost block decides. Calls with arguments that no kernel serves go to PyTorch.

    Args:
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best. A named backend
            raises BackendError at a call that it cannot run, but another kernel could.

    >>> with fastconv.enable():
    ...     y = torch.nn.functional.conv2d(x, w, groups=x.shape[1])
    """
    check_backend(backend)
    with _Enable(backend):
        yield

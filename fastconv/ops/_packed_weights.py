"""Packed weights, and folded ones, kept from one call to the next.

A C++ convolution reads its weights in an order of its own. In inference that order is made once for each
weight and kept, up to a number of bytes for all of them; what was used least recently goes first. In training
it is made in each call, and nothing is kept.

What is kept goes when the weight's tensor or its memory does, or when a ``torch.optim.Optimizer`` that holds
the weight has stepped. It is used only while the weight is the same tensor in the same memory, with the same
shape, strides, dtype and version. PyTorch raises the version at every in-place operation, such as
``load_state_dict``, or ``weight.mul_(2)`` under ``no_grad``. It does not at a write through ``weight.data``,
numpy, DLPack or a raw pointer, or by another process. For these, at least ``SAMPLES`` evenly spaced values
are compared bit by bit. So a change is noticed if it is of every value, of a run of values in memory as long
as 1/``SAMPLES`` of the weight, or, in a contiguous weight of up to 8x8 taps, of one tap in all filters. A
change of fewer values may not be: :func:`clear_packed_weights` has to be called.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._arguments import integer
from ._operator import PLAIN, is_recorded

SAMPLES = 67  # a prime, so that they fall on other channels and taps of each filter

_WORDS = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class _Facts:
    """What a tensor was when something was made of it."""

    __slots__ = ("dtype", "pointer", "samples", "shape", "storage", "strides", "tensor", "values", "version")

    def __init__(self, key: tuple, tensor: torch.Tensor) -> None:
        self.tensor = weakref.ref(tensor, lambda _: _forget(key))
        # Not its address alone, which the next one may get.
        self.storage = weakref.ref(tensor.untyped_storage(), lambda _: _forget(key))
        self.version = tensor._version
        self.pointer = tensor.data_ptr()
        self.shape = tensor.shape
        self.strides = tensor.stride()
        self.dtype = tensor.dtype
        count = tensor.numel()
        step = max(count // SAMPLES, 1)
        while math.gcd(step, count) > 1:  # or all might be of one tap
            step -= 1
        if tensor.dim() == 1:  # running averages: PyTorch does not raise their version
            step = 1
        words = (_WORDS[tensor.element_size()] * count).from_address(self.pointer)
        self.samples = memoryview(words)[::step]  # read only after the checks of `hold`
        self.values = self.samples.tobytes()

    def hold(self, tensor: torch.Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.storage() is tensor.untyped_storage()
            and self.pointer == tensor.data_ptr()
            and self.shape == tensor.shape
            and self.strides == tensor.stride()
            and self.dtype == tensor.dtype
            and self.values == self.samples.tobytes()
        )


class _Kept:
    """What was made of some tensors, and what these were then."""

    __slots__ = ("bytes", "facts", "made")

    def __init__(self, key: tuple, tensors: tuple[torch.Tensor | None, ...]) -> None:
        self.facts = tuple(None if tensor is None else _Facts(key, tensor) for tensor in tensors)
        self.made: Any = None
        self.bytes = 0

    def holds(self, tensors: tuple[torch.Tensor | None, ...]) -> bool:
        for facts, tensor in zip(self.facts, tensors):  # noqa: SIM110 (all() takes longer)
            if tensor is not None and not facts.hold(tensor):
                return False
        return True


_limit = 2**30
_total = 0
_kept: OrderedDict[tuple, _Kept] = OrderedDict()  # the least recently used first
_lock = threading.RLock()  # a weight may die, and be forgotten, while this thread holds it


def packed_weight(name: str, weight: torch.Tensor, *arguments: object) -> torch.Tensor | None:
    """What ``torch.ops.fastconv.<name>_pack_weight`` makes of a weight; None where nothing may be kept."""
    return made_of((weight,), name, arguments, lambda *operands: pack_weight(name, *operands))


def pack_weight(name: str, weight: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The same, made anew."""
    return getattr(torch.ops.fastconv, f"{name}_pack_weight")(weight, *arguments)


def made_of(
    tensors: tuple[torch.Tensor | None, ...], name: str, arguments: tuple, make: Callable[..., Any]
) -> Any:
    """``make(*tensors, *arguments)``, a tensor or several, if need be of an earlier call with the same.

    None where nothing may be kept: the call that makes it belongs to what is recorded.
    """
    made = kept_of(tensors, name, arguments)
    if made is not None or _must_not_be_kept(tensors):
        return made
    key = (tuple(map(id, tensors)), name, *arguments)
    return _make(key, tensors, make) if all(t is None or _can_be_kept(t) for t in tensors) else None


def _must_not_be_kept(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    if is_recorded():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def kept_of(tensors: tuple[torch.Tensor | None, ...], name: str, arguments: tuple) -> Any:
    """What :func:`made_of` made of the same in an earlier call; None if it did not, or that is gone."""
    key = (tuple(map(id, tensors)), name, *arguments)
    kept = _kept.get(key)
    if kept is None or _must_not_be_kept(tensors) or not kept.holds(tensors):
        return None
    try:  # noqa: SIM105 (contextlib.suppress takes 0.3 us)
        _kept.move_to_end(key)
    except KeyError:  # another thread has let go of it
        pass
    return kept.made


def _can_be_kept(weight: torch.Tensor) -> bool:
    return (
        _limit > 0
        and type(weight) in PLAIN
        and weight.device.type == "cpu"  # whose memory can be looked at
        and weight.layout == torch.strided
        and not weight.is_inference()  # these have no version
        and not weight.is_neg()
        and weight.data_ptr() != 0  # or its memory is not there
        and 0 < weight.numel() == 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride()))
        and not torch.is_autocast_enabled("cpu")  # the weight was made for this call
        # Module.to would refuse to swap a parameter to which there is a weak reference.
        and not torch.__future__.get_swap_module_params_on_conversion()
    )


def _make(key: tuple, tensors: tuple[torch.Tensor | None, ...], make: Callable[..., Any]) -> Any:
    _, _, *arguments = key
    kept = _Kept(key, tensors)  # first, so that a write to a tensor meanwhile shows
    with torch.inference_mode(False), torch.no_grad():
        kept.made = make(*tensors, *arguments)
    kept.bytes = sum(made.nbytes for made in (kept.made if type(kept.made) is tuple else (kept.made,)))
    global _total
    if kept.bytes <= _limit:
        with _lock:
            _forget(key)
            _kept[key] = kept
            _total += kept.bytes
            _evict(_limit)
    return kept.made


def _forget(key: tuple) -> None:
    global _total
    with _lock:
        kept = _kept.pop(key, None)
        size = 0 if kept is None else kept.bytes
        _total -= size


def _forget_stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if not _kept:
        return
    stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    with _lock:
        for key in list(_kept):
            if not stepped.isdisjoint(key[0]):
                _forget(key)


# Fused optimizers, and those of other libraries, write to weights without raising their versions.
register_optimizer_step_post_hook(_forget_stepped)


def _evict(limit: int) -> None:
    """Down to a number of bytes; the lock is held."""
    global _total
    while _total > limit:
        size = _kept.popitem(last=False)[1].bytes
        _total -= size


def clear_packed_weights() -> None:
    """Lets go of all packed weights; they are packed again when they are needed.

    Call it after changing a few values of a weight in a way that PyTorch does not see: through
    ``weight.data``, numpy, or a raw pointer. All other changes are noticed.
    """
    with _lock:
        _evict(0)


def set_packed_weights_limit(limit: int) -> None:
    """Bounds the bytes of packed weights that are kept between calls, 1 GiB at first; 0 keeps none.

    Raises:
        ValueError, TypeError: ``limit`` is below 0, or no integer.
    """
    global _limit
    limit = integer("limit", limit, least=0)
    with _lock:
        _limit = limit
        _evict(limit)

"""What the checks and the choice of a kernel came to, kept for the next call that is alike.

They take longer than a small convolution, all the more when large ones have swept the caches in between.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from .. import backends
from ..precision import get_precision
from ._operator import PLAIN

_MOST = 4096  # calls that are kept; then all are forgotten

_plans: dict[Hashable, Any] = {}


def key_of(op: str, tensors: tuple[Any, ...], *arguments: Any) -> Hashable | None:
    """All that the checks and the choice look at; None where the call has to be looked at itself.

    Args:
        op: the operator's stem.
        tensors: the tensors of the call, or None where one is left out; the second is the weight.
        arguments: all others.
    """
    if torch.compiler.is_compiling():
        return None
    facts = []
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
        elif type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested:
            facts += tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        else:
            return None
    device_type = tensors[0].device.type if tensors[0] is not None else "cpu"
    if device_type not in ("cpu", "cuda") or torch.is_autocast_enabled(device_type):
        return None
    weight = tensors[1]
    training = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    for value in arguments:  # 1.0 is the same key as 1, and a tensor may change
        for number in value if type(value) is tuple else (value,):
            if not (number is None or type(number) in (int, str)):
                return None
    return op, *facts, training, arguments, backends._state.backend, get_precision()


def find(key: Hashable | None) -> Any:
    """The plan of an earlier call with this key, or None."""
    return None if key is None else _plans.get(key)


def keep(key: Hashable | None, plan: Any) -> Any:
    if key is not None:
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = plan
    return plan

"""Which modules and functions of PyTorch have a counterpart here; each operator's file here adds its own.

``optimize`` reads the modules, ``enable`` the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends import BACKENDS, CHOICES, why_not


@dataclass(frozen=True)
class Rule:
    """A module of PyTorch that a module of this library can take the place of.

    Attributes:
        op: the operator's stem.
        source: the exact type that is looked for.
        target: a subclass of ``source`` with the same parameters, that needs no attribute of its own.
        where: whether a module of type ``source`` is of the operator's kind, such as depthwise.
    """

    op: str
    source: type[nn.Module]
    target: type[nn.Module]
    where: Callable[[nn.Module], bool]


Handler = Callable[..., Callable[[], torch.Tensor] | None]

_rules: list[Rule] = []
_handlers: dict[Callable[..., Any], list[Handler]] = {}


def replaces(
    source: type[nn.Module], op: str, where: Callable[[nn.Module], bool] = lambda _: True
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: ``optimize`` turns modules of exactly type ``source`` into this class.

    The class has ``why_not() -> str | None``, the reason why no kernel serves this module, and
    ``kernel(*inputs) -> (backend, algorithm)``, what would run.
    """

    def register(target: type[nn.Module]) -> type[nn.Module]:
        if not issubclass(target, source):
            raise TypeError(f"{target.__name__} must be a subclass of {source.__name__}")
        _rules.append(Rule(op, source, target, where))
        return target

    return register


def serves(function: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Decorator: within ``fastconv.enable()`` this handler sees the calls of a function of PyTorch.

    The handler takes ``backend`` and then the function's own arguments. It returns a call that does the work
    with a kernel, or None where no kernel serves these arguments.
    """

    def register(handler: Handler) -> Handler:
        _handlers.setdefault(function, []).append(handler)
        return handler

    return register


def rules() -> tuple[Rule, ...]:
    """All rules, in the order in which they are tried."""
    return tuple(_rules)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module: its type is exactly the rule's source, and it is of the rule's kind."""
    for rule in _rules:
        if type(module) is rule.source and rule.where(module):
            return rule
    return None


def handlers_of(function: Callable[..., Any]) -> tuple[Handler, ...]:
    return tuple(_handlers.get(function, ()))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_watched(module: nn.Module) -> bool:
    """By hooks, which want to see what goes in and out; or it has a forward of its own."""
    own, everywhere = module.__dict__, vars(nn.modules.module)
    if "forward" in own or "_conv_forward" in own:
        return True
    for name in _HOOKS:
        if own[name]:
            return True
    for name in _GLOBAL_HOOKS:  # noqa: SIM110 (any() takes longer)
        if everywhere.get(name):
            return True
    return False


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")


def no_kernel(op: str, backend: str | None, tensor: torch.Tensor | None = None) -> str | None:
    """Why no kernel of an operator, or not the named backend, runs on such tensors; None if one does.

    For a module without parameters, whose device nothing tells: why none runs on any tensor here.
    """
    known = CHOICES[op].algorithms
    if backend is not None and backend not in known:
        return f"{op} has no backend {backend!r}; it has {tuple(known)}"
    wanted = [backend] if backend else [name for name in ("cpu", "cuda", "triton") if name in known]
    device, dtype = (None, torch.float32) if tensor is None else (tensor.device.type, tensor.dtype)
    reasons = {name: why_not(name, device or _device_for(name), dtype) for name in wanted}
    if None in reasons.values():
        return None
    return "; ".join(f"backend {name!r} cannot run here: {reason}" for name, reason in reasons.items())


def _device_for(backend: str) -> str:
    """The device of a backend's tensors; the CPU where there is no GPU, for the reason that names it."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"

"""Modules whose forwards run chains of layers in one call: containers, and forwards that can be rewritten."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn._chains import (
    ACTIVATION_LAYERS,
    ALONE,
    CONVOLUTIONS,
    FUSED,
    FusedKind,
    activation_of,
    chain_length,
    defer,
    fused_kind,
    may_pass,
    run_layers,
)
from ._forwards import SUM, rewritten

_PARTS = (*CONVOLUTIONS, nn.BatchNorm2d, nn.Linear, *ACTIVATION_LAYERS.values())  # of chains


@dataclass(frozen=True)
class ChainReport:
    """Layers that one call runs.

    Attributes:
        name, type: of the module in whose forward they are.
        layers: names of those that are modules.
        chain: what they are, such as ``"Conv2d + BatchNorm2d + sum + ReLU"``.
    """

    name: str
    type: str
    layers: tuple[str, ...]
    chain: str


class Fused:
    """A module of another class, whose forward runs its chains in one call each.

    It looks for them in each call, so whatever becomes of its layers, it computes what they say. What the
    class is stands in one attribute, :class:`fastconv.nn._chains.FusedKind`.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))
        original = original_type(self)
        own = (
            original.__reduce__ is not object.__reduce__ or original.__reduce_ex__ is not object.__reduce_ex__
        )
        return reduced if own else (_new, (original,), *reduced[2:])


def _new(original: type[nn.Module]) -> nn.Module:
    kind = fused_type(original) or original  # whose source has changed since
    return kind.__new__(kind)


_types: dict[type[nn.Module], type[nn.Module]] = {}


def fused_type(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class that takes a class's place; None if its forward cannot be rewritten."""
    function = original.forward
    if original in _types and _types[original].__dict__[FUSED].function is function:
        return _types[original]
    if not _is_usual(original):
        return None
    is_container = function is nn.Sequential.forward
    if is_container:
        forward, deferred, plain = _run_container, _defer_container, True
    elif (source := rewritten(function, original)) is not None:
        forward, deferred, plain = source.forward, source.deferred, source.plain
    else:
        return None
    deferred = _unless_changed(original, function, deferred)
    own = {
        FUSED: FusedKind(original, function, deferred, plain, is_container),
        "forward": _unless_changed(original, function, forward),
        "__doc__": original.__doc__,
        "__module__": original.__module__,
    }
    _types[original] = type(f"Fused{original.__name__}", (Fused, original), own)
    return _types[original]


def _is_usual(kind: type[nn.Module]) -> bool:
    """Whether calls, attributes and subclasses of it are what PyTorch and Python make them."""
    names = ("__call__", "__getattr__", "__getattribute__")
    if any(getattr(kind, name) is not getattr(nn.Module, name) for name in names):
        return False
    if issubclass(kind, nn.Sequential) and kind.__iter__ is not nn.Sequential.__iter__:
        return False
    registers = any("__init_subclass__" in vars(base) for base in kind.__mro__ if base is not object)
    return not registers and not issubclass(kind, (torch.jit.ScriptModule, torch.fx.GraphModule, Fused))


def _run_container(container: nn.Sequential, input: Any) -> Any:
    return run_layers(tuple(container._modules.values()), input)


def _defer_container(container: nn.Sequential, input: Any) -> Any:
    return defer(tuple(container._modules.values()), input)


def _unless_changed(original: type[nn.Module], function: Any, forward: Any) -> Any:
    """``forward`` as long as it is what the class computes; a compiler sees the class's own."""

    @functools.wraps(function)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorded = torch.compiler.is_compiling() or torch._C._is_tracing()
        if original.forward is function and not recorded:
            return forward(self, *args, **kwargs)
        return original.forward(self, *args, **kwargs)

    return run


def fuse_chains(model: nn.Module, selected: set[str]) -> list[ChainReport]:
    """Fuses what chains of selected layers a model has; those of earlier calls stay. A row for each."""
    named = dict(model.named_modules())
    fused = {
        layer
        for name, module in named.items()
        for row in rows_of(name, module, named)
        for layer in row.layers
    }
    for name, module in named.items():
        if name in selected:
            module.__dict__.pop(ALONE, None)
        elif name not in fused and type(module) in _PARTS:
            module.__dict__[ALONE] = True
    rows: list[ChainReport] = []
    for name, module in reversed(named.items()):  # what is in a module comes before it
        found = rows_of(name, module, named, fused=False)
        gains = found or _holds_containers(module)
        if isinstance(module, Fused):
            if not gains:
                unfuse(module)
        elif gains and "forward" not in vars(module):
            try:
                module.__class__ = fused_type(type(module))
            except Exception:  # whatever a class may do that is subclassed
                continue
        rows = [*found, *rows] if isinstance(module, Fused) else rows
    return rows


def rows_of(
    name: str, module: nn.Module, named: dict[str, nn.Module], fused: bool = True
) -> list[ChainReport]:
    """A row for each chain of a module; of one that is fused, unless all are asked for."""
    if fused and not isinstance(module, Fused):
        return []
    names: dict[Any, str] = {each: path for path, each in reversed(named.items())}
    kind = original_type(module)
    rows = []
    for layers in _sequences(module):
        for chain in _chains_in(layers):
            inside = tuple(names[layer] for layer in chain if layer in names)
            rows.append(ChainReport(name, kind.__name__, inside, " + ".join(map(_name_of, chain))))
    return rows


def _holds_containers(module: nn.Module) -> bool:
    """Whether it is a container whose chains are in containers: a chain of one may go on in the next."""
    return original_type(module).forward is nn.Sequential.forward and any(
        isinstance(child, Fused) and fused_kind(child).is_container for child in module._modules.values()
    )


def original_type(module: nn.Module) -> type[nn.Module]:
    return fused_kind(module).original if isinstance(module, Fused) else type(module)


def _name_of(layer: Any) -> str:
    if layer is SUM:
        return "sum"
    if isinstance(layer, nn.Module):
        return original_type(layer).__name__
    return getattr(layer, "__name__", type(layer).__name__)


def _sequences(module: nn.Module) -> Iterator[Sequence[Any]]:
    """The runs of layers in a module's forward, sums among them."""
    kind = original_type(module)
    if kind.forward is nn.Sequential.forward:
        yield list(module._modules.values())
    elif _is_usual(kind) and (source := rewritten(kind.forward, kind)) is not None:
        for layers in source.layers(module):
            yield [layer for layer in layers if layer is not ...]


def _chains_in(layers: Sequence[Any]) -> Iterator[Sequence[Any]]:
    first = 0
    while first < len(layers):
        length = 1 if layers[first] is SUM else chain_length(layers, first)
        end = last = first + length
        while last < len(layers) and may_pass(type(layers[last])):
            last += 1
        if last < len(layers) and layers[last] is SUM and layers[first] is not SUM:
            waits = type(layers[first]) in CONVOLUTIONS and activation_of(layers[end - 1]) is None
            if waits or (length == 1 and _can_wait(layers[first])):
                end = last + 1
                end += end < len(layers) and activation_of(layers[end]) is not None
        if end - first > 1:
            yield layers[first:end]
        first = end


def _can_wait(layer: Any) -> bool:
    """Whether a module may leave its last chain to a sum."""
    if isinstance(layer, Fused):
        return True
    if not isinstance(layer, nn.Module) or type(layer).forward is not nn.Sequential.forward:
        return False
    last = next(reversed(layer._modules.values()), None)
    return type(last) in (*CONVOLUTIONS, nn.BatchNorm2d) or _can_wait(last)


def unfuse(module: nn.Module) -> None:
    if isinstance(module, Fused):
        module.__class__ = original_type(module)
    module.__dict__.pop(ALONE, None)

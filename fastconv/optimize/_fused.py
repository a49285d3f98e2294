"""Modules whose forward runs chains of layers in one call each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from ._chains import Chain, compile_graph, find_chains

LEFT = "_fastconv_left"  # on a fused module: the layers that were not to be fused

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType, type)


@dataclass(frozen=True)
class ChainReport:
    """Layers that one call runs, or a module in which none were found because its forward cannot be traced.

    Attributes:
        name, type: of the module in whose forward they are.
        layers: names of the convolution, the normalisation and, if it is one, the activation.
        obstacle: why the forward cannot be traced; None where it was.
        chain: what is computed, by the names of the module's own layers.
    """

    name: str
    type: str
    layers: tuple[str, ...]
    obstacle: str | None = None
    chain: str = ""


class Forward:
    """A module's forward with its chains in one call each, as long as the module is as it was traced."""

    def __init__(self, module: nn.Module) -> None:
        attributes = vars(module)
        self.count = len(attributes)
        # What steers the forward: constants among the attributes, and of objects what tracing looks at.
        self.constants = [((name,), value) for name, value in attributes.items() if is_constant(value)]
        self.children = _children(module)
        self.call: Callable[..., Any] | None = None
        self.chains: list[Chain] = []
        self.obstacle: str | None = None
        before = dict(attributes)
        own = [name for name in before if name not in _OF_EVERY_MODULE and not is_constant(before[name])]
        try:
            attributes.update({name: _watched(before[name], (name,), self.constants) for name in own})
            name = "original_forward" if isinstance(module, Fused) else "forward"
            graph, self.chains = find_chains(module, before.get(LEFT, ()), name)
            written = (n for n, v in before.items() if n not in own and attributes.get(n, self) is not v)
            if attributes.keys() != before.keys() or any(written):
                self.chains, self.obstacle = [], "its forward writes to the module's attributes"
        except Exception as error:  # whatever a forward may raise that is given a proxy
            self.obstacle = f"its forward cannot be traced: {type(error).__name__}: {error}"
        finally:  # also what the forward itself has written
            attributes.clear()
            attributes.update(before)
        if self.chains:
            self.call = compile_graph(graph)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module's forward would be traced again as it was."""
        attributes = vars(module)
        return (
            len(attributes) == self.count
            and all(_same(_find(attributes, path), value) for path, value in self.constants)
            and _children(module) == self.children
        )


def _watched(real: Any, path: tuple[str, ...], seen: list[tuple[tuple[str, ...], Any]]) -> Any:
    """Stands for an object while a forward is traced: its constants may be read, and are noted; nothing else.

    A forward that does more with it, such as to iterate, cannot be traced.
    """

    def refuse(self: Any, *_: Any) -> Any:
        raise TypeError(f"it depends on self.{'.'.join(path)}, which may change")

    def read(self: Any, name: str) -> Any:
        value = getattr(real, name)
        if not is_constant(value):
            return _watched(value, (*path, name), seen)
        seen.append(((*path, name), value))
        return value

    refused = dict.fromkeys(("__bool__", "__eq__", "__hash__", "__setattr__"), refuse)
    kind = {"__getattr__": read, "__class__": property(lambda self: type(real)), **refused}
    return type("Watched", (), kind)()


def _find(attributes: dict[str, Any], path: tuple[str, ...]) -> Any:
    name, *rest = path
    found = attributes.get(name, _find)  # which is the same as nothing
    for name in rest:
        found = getattr(found, name, _find)
    return found


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def is_constant(value: Any) -> bool:
    """It cannot change but by another taking its place."""
    if type(value) is tuple:
        return all(map(is_constant, value))
    return isinstance(value, _CONSTANTS)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and a == b)


def _children(module: nn.Module) -> list:
    """Which there are, also in lists; not what they are, at which each call looks."""
    found: list = []
    for name, child in module._modules.items():
        found.append(name if child is not None else (name, None))
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.append(_children(child))
    return found


_forwards: weakref.WeakKeyDictionary[nn.Module, list[Forward]] = weakref.WeakKeyDictionary()


def forward_of(module: nn.Module) -> Forward:
    """The forward that holds for a module as it is; traced where there is none yet."""
    known = _forwards.setdefault(module, [])
    for forward in known:
        if forward.holds(module):
            return forward
    del known[:-3]  # training and eval, and one more state
    known.append(Forward(module))
    return known[-1]


class Fused:
    """A module of another class, whose forward runs its chains in one call each."""

    original: type[nn.Module]
    original_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # a compiler finds the chains in its own graph
            call = forward_of(self).call
            if call is not None:
                return call(self, *args, **kwargs)
        return self.original_forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        made, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (type(self).original,), *state


def _new(original: type[nn.Module]) -> nn.Module:
    kind = fused_type(original)
    return kind.__new__(kind)


_types: dict[type[nn.Module], type[nn.Module]] = {}


def fused_type(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _types:
        name = f"Fused{original.__name__}"
        own = {"original": original, "original_forward": original.forward, "__doc__": original.__doc__}
        _types[original] = type(name, (Fused, original), own)
    return _types[original]


def fuse(module: nn.Module, left: tuple[str, ...] = ()) -> Forward:
    """Gives a module the class that runs its chains in one call each, if it has any."""
    vars(module)[LEFT] = left
    forward = Forward(module)
    if forward.chains:
        try:
            module.__class__ = fused_type(type(module))
        except TypeError as error:  # such as a class with slots
            forward.chains, forward.obstacle = [], f"its class cannot be changed: {error}"
    if forward.chains:
        _forwards[module] = [forward]
    else:
        del vars(module)[LEFT]
    return forward


def unfuse(module: nn.Module) -> None:
    if isinstance(module, Fused):
        module.__class__ = type(module).original
        vars(module).pop(LEFT, None)
        _forwards.pop(module, None)


def fuse_chains(model: nn.Module, selected: set[str]) -> list[ChainReport]:
    """Fuses what chains of selected layers a model's modules have; those of earlier calls stay."""
    rows = []
    for name, module in list(candidates(model)):
        prefix = f"{name}." if name else ""
        layers = [layer for layer, _ in module.named_modules() if layer]
        left = [layer for layer in layers if prefix + layer not in selected]
        if isinstance(module, Fused):
            left = [layer for layer in left if layer in vars(module).get(LEFT, ())]
            unfuse(module)
        rows += rows_of(name, module, fuse(module, tuple(left)))
    return rows


def rows_of(name: str, module: nn.Module, forward: Forward) -> list[ChainReport]:
    kind = (type(module).original if isinstance(module, Fused) else type(module)).__name__
    if forward.obstacle is not None:
        return [ChainReport(name, kind, (), forward.obstacle)]
    prefix = f"{name}." if name else ""
    return [
        ChainReport(name, kind, tuple(prefix + layer for layer in chain.layers), chain=str(chain))
        for chain in forward.chains
    ]


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may have chains: a batch normalisation is among their children, or in a list of these."""
    for name, module in model.named_modules():
        own = type(module).__module__.startswith("fastconv.nn.")
        if not own and "forward" not in vars(module) and _has_norm(module):
            yield name, module


def _has_norm(module: nn.Module) -> bool:
    return any(
        type(child) is nn.BatchNorm2d
        or (isinstance(child, (nn.ModuleList, nn.ModuleDict)) and _has_norm(child))
        for child in module.children()
    )

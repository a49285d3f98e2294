"""Chains of layers in ``nn.Sequential``: convolution, batch normalisation and activation in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.conv_bn_act import CONVOLUTIONS, activation_of, run_chain

NOT_FUSED = "_fastconv_not_fused"  # on a fused container: names of its layers that were left out


@dataclass(frozen=True)
class ChainReport:
    """Layers that one call runs.

    Attributes:
        name, type: of the container.
        layers: names of the convolution, the normalisation and, if there is one, the activation.
        chain: what they are, such as ``"Conv2d + BatchNorm2d + ReLU"``.
    """

    name: str
    type: str
    layers: tuple[str, ...]
    chain: str


class Fused:
    """A container of another class, an ``nn.Sequential``, whose forward runs its chains in one call each.

    It looks for them in each call, so whatever becomes of the container, it computes what it says.
    """

    original: type[nn.Sequential]

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler sees all layers, and fuses what it can
            return super().forward(input)
        for names in runs_of(self):
            layer, norm, activation = (*(self._modules[name] for name in names), None, None)[:3]
            input = layer(input) if norm is None else run_chain(layer, norm, activation, input)
        return input

    def __reduce_ex__(self, protocol: Any) -> tuple:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (type(self).original,), *state


def _new(original: type[nn.Sequential]) -> nn.Sequential:
    kind = fused_type(original)
    return kind.__new__(kind)


_types: dict[type[nn.Sequential], type[nn.Sequential]] = {}


def fused_type(original: type[nn.Sequential]) -> type[nn.Sequential]:
    if original not in _types:
        own = {"original": original, "__doc__": original.__doc__}
        _types[original] = type(f"Fused{original.__name__}", (Fused, original), own)
    return _types[original]


def runs_of(container: nn.Sequential) -> Iterator[tuple[str, ...]]:
    """The names of its layers: two or three where they are a chain, else each by itself."""
    left = container.__dict__.get(NOT_FUSED, ())
    names = list(container._modules)
    layers = [None if name in left else container._modules[name] for name in names]
    first = 0
    while first < len(names):
        length = 1
        conv, norm, activation = (*layers[first : first + 3], None, None)[:3]
        if type(conv) in CONVOLUTIONS and type(norm) is nn.BatchNorm2d:
            length = 2 if activation is None or activation_of(activation) is None else 3
        yield tuple(names[first : first + length])
        first += length


def fuse_chains(model: nn.Module, selected: set[str]) -> list[ChainReport]:
    """Fuses what chains of selected layers a model's containers have; those of earlier calls stay."""
    rows = []
    named = dict(model.named_modules())
    chosen = {named[name] for name in selected}
    for name, module in named.items():
        if not _is_container(module):
            continue
        left = tuple(layer for layer, child in module._modules.items() if child not in chosen)
        if isinstance(module, Fused):
            left = tuple(layer for layer in left if layer in module.__dict__[NOT_FUSED])
            unfuse(module)
        module.__dict__[NOT_FUSED] = left
        if any(len(run) > 1 for run in runs_of(module)):
            try:
                module.__class__ = fused_type(type(module))
            except Exception:  # whatever a class may do that is subclassed
                del module.__dict__[NOT_FUSED]
            else:
                rows += rows_of(name, module)
        else:
            del module.__dict__[NOT_FUSED]
    return rows


def _is_container(module: nn.Module) -> bool:
    forward = type(module).forward
    return forward is Fused.forward or (forward is nn.Sequential.forward and "forward" not in vars(module))


def rows_of(name: str, module: nn.Sequential) -> list[ChainReport]:
    """A row for each chain of a fused container."""
    prefix = f"{name}." if name else ""
    return [
        ChainReport(
            name,
            type(module).original.__name__,
            tuple(prefix + layer for layer in run),
            " + ".join(type(module._modules[layer]).__name__ for layer in run),
        )
        for run in runs_of(module)
        if len(run) > 1
    ]


def unfuse(module: nn.Module) -> None:
    if isinstance(module, Fused):
        module.__class__ = type(module).original
        module.__dict__.pop(NOT_FUSED, None)

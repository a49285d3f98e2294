"""The table of networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

NETWORKS: dict[str, Callable[..., nn.Module]] = {}


def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: a network is known by the name of the function that builds it."""
    NETWORKS[build.__name__] = build
    return build


def register_depths(name: str, build: Callable[..., nn.Module], depths: Iterable[int], **fixed: Any) -> None:
    """``resnet18``, ``resnet34``, ...: networks that one function builds, given the depth first."""
    for depth in depths:
        NETWORKS[f"{name}{depth}"] = functools.partial(build, depth, **fixed)

"""The table of networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NETWORKS: dict[str, Callable[..., nn.Module]] = {}


def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: a network is known by the name of the function that builds it."""
    NETWORKS[build.__name__] = build
    return build

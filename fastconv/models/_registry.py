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


def register_variants(
    name: str, build: Callable[..., nn.Module], variants: Iterable[int | str], **fixed: Any
) -> None:
    """``resnet18``, ``resnet34``, ...: networks that one function builds, given the variant first."""
    for variant in variants:
        NETWORKS[f"{name}{variant}"] = functools.partial(build, variant, **fixed)

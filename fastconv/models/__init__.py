"""The networks that the library is measured on; each file of this folder is one of them.

>>> fastconv.models.list()
['mobilenet_v1']
>>> model = fastconv.models.create("mobilenet_v1", width=0.5)
>>> the_same = fastconv.models.create("mobilenet_v1", width=0.5, plain=True)  # torch.nn alone
"""

from __future__ import annotations

import builtins
from typing import Any

from torch import nn

from ._registry import NETWORKS
from .mobilenet_v1 import MobileNetV1, mobilenet_v1

__all__ = ["MobileNetV1", "create", "list", "mobilenet_v1"]


def list() -> builtins.list[str]:
    """The names that :func:`create` knows."""
    return sorted(NETWORKS)


def create(name: str, **options: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: one of :func:`list`.
        options: the network's own, such as ``width=0.5`` or ``num_classes=10``. Every network takes
            ``plain=True``: the same network, parameters and state_dict keys, from ``torch.nn`` alone.

    Raises:
        ValueError: there is no network of this name.
        TypeError: the network has no such option.
    """
    if name not in NETWORKS:
        raise ValueError(f"name must be one of {list()}, got {name!r}")
    return NETWORKS[name](**options)

"""The networks that the library is measured on; each file of this folder is one of them.

>>> fastconv.models.list()
['convnext_b', ..., 'densenet121', ..., 'efficientnet_b0', ..., 'mobilenet_v1', 'mobilenet_v2', ...]
>>> model = fastconv.models.create("mobilenet_v1", width=0.5)
>>> the_same = fastconv.models.create("mobilenet_v1", width=0.5, plain=True)  # torch.nn alone
"""

from __future__ import annotations

import builtins
from typing import Any

from torch import nn

from ._registry import NETWORKS
from .cifar_resnet import CifarResNet, cifar_resnet
from .convnext import ConvNeXt, convnext
from .densenet import DenseNet, densenet
from .efficientnet import EfficientNet, efficientnet
from .mobilenet_v1 import MobileNetV1, mobilenet_v1
from .mobilenet_v2 import MobileNetV2, mobilenet_v2
from .resnet import ResNet, resnet
from .shift_resnet import shift_resnet
from .shufflenet_v1 import ShuffleNetV1, shufflenet_v1
from .squeezenet import SqueezeNet, squeezenet1_0
from .tsm_resnet import StackedResNet, TSMResNet, stacked_resnet, tsm_resnet

__all__ = [
    "CifarResNet",
    "ConvNeXt",
    "DenseNet",
    "EfficientNet",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet",
    "ShuffleNetV1",
    "SqueezeNet",
    "StackedResNet",
    "TSMResNet",
    "cifar_resnet",
    "convnext",
    "create",
    "densenet",
    "efficientnet",
    "list",
    "mobilenet_v1",
    "mobilenet_v2",
    "resnet",
    "shift_resnet",
    "shufflenet_v1",
    "squeezenet1_0",
    "stacked_resnet",
    "tsm_resnet",
]


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

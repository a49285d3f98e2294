"""What the networks share."""

from __future__ import annotations

from torch import nn

from ..nn import Conv2d


def conv2d(plain: bool) -> type[nn.Conv2d]:
    """The convolution of a network: PyTorch's or this library's, of the same constructor."""
    return nn.Conv2d if plain else Conv2d


def initialize(model: nn.Module) -> None:
    """Fresh weights, under which a convolution and its ReLU keep the size of what they are given.

    A filter's fan is that of its group; with a dense layer's, depthwise activations would shrink by sqrt(C).

    Reference: He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

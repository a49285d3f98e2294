"""Chains of a graph, found: a convolution, or a linear layer of images, and what follows it.

A chain is followed from its first node by what uses it. Each of its values but the last has one user, the
next node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from ..nn._convolution import is_depthwise
from ..ops import conv2d, depthwise_conv2d
from ..ops._arguments import DTYPES
from ._effects import arguments_of, is_private, norm_arguments
from ._idioms import input_of, is_image, known, name_of, value_of
from ._rewrite import no_guards, same_pixels

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONVOLUTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_GEOMETRY = ("stride", "padding", "dilation", "groups")

TO_IMAGES, FROM_IMAGES = (0, 3, 1, 2), (0, 2, 3, 1)  # permutations: channels last, as linear layers have them


@dataclass(frozen=True)
class Chain:
    """Nodes that follow each other: the first is a convolution or linear, or in training a normalisation.

    Attributes:
        nodes: all of them.
        given: the arguments of the convolution, as which a linear layer counts; None where there is none.
        norm: the normalisation, or None.
        factor: what each channel is multiplied by then, or None.
        residual: what is added then, or None; ``residual_channels`` is the dimension of its channels.
        activation: what is applied then, or None.
        is_linear: the convolution is a linear layer, of ``(N, H, W, C)``.
        channels: the dimension of the last value's channels.
        first: a depthwise chain before it, for one call to run both; or None.
    """

    nodes: tuple[fx.Node, ...]
    given: dict[str, Any] | None = None
    norm: fx.Node | None = None
    factor: fx.Node | None = None
    residual: fx.Node | None = None
    residual_channels: int = 1
    activation: str | None = None
    is_linear: bool = False
    channels: int = 1
    first: Chain | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def numbers(self) -> list[fx.Node | None]:
        """running_mean, running_var, weight and bias of the normalisation, if there is one."""
        if self.norm is None:
            return [None] * 4
        given = norm_arguments(self.norm)
        return [given[name] for name in ("running_mean", "running_var", "weight", "bias")]

    @property
    def all_nodes(self) -> tuple[fx.Node, ...]:
        """Those of the chain before it, too."""
        return self.nodes if self.first is None else self.first.nodes + self.nodes

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: under autocast not that of its inputs."""
        return value_of(self.nodes[0]).dtype


def chains_from(node: fx.Node) -> list[Chain]:
    """The chains that a node starts, the longest first."""
    if is_batch_norm(node, training=True):
        return _followed(Chain((node,), norm=node))
    if (given := convolution_of(node)) is not None:
        chains = _followed(Chain((node,), given))
        before = _depthwise_chain(given["input"], node)
        if before is None:
            return chains
        return [each for chain in chains for each in (replace(chain, first=before), chain)]
    if (given := _linear_of(node)) is not None:
        return _followed(Chain((node,), given, is_linear=True, channels=3))
    return []


def _followed(chain: Chain) -> list[Chain]:
    found = [chain]
    while (longer := _longer(found[0])) is not None:
        found.insert(0, longer)
    return found


def _longer(chain: Chain) -> Chain | None:
    """The chain and the only user of its last value; None if that belongs to none."""
    user = _only_user(chain.last)
    if user is None or not _has_type_of(user, chain.last):
        return None
    nodes = (*chain.nodes, user)
    if chain.channels == 3 and _is_permutation(user, TO_IMAGES):
        return replace(chain, nodes=nodes, channels=1)
    if _passes(user):
        return replace(chain, nodes=nodes)
    if chain.activation is not None:
        return None
    if chain.residual is None:
        if chain.factor is None and chain.given is not None:
            bare = chain.norm is None and not chain.is_linear
            if bare and is_batch_norm(user, training=False):
                return replace(chain, nodes=nodes, norm=user)
            if (factor := _factor(user, chain)) is not None:
                return replace(chain, nodes=nodes, factor=factor)
        if (residual := _residual(user, chain.last)) is not None:
            return replace(chain, nodes=nodes, residual=residual, residual_channels=chain.channels)
    activation = _activation(user)
    return None if activation is None else replace(chain, nodes=nodes, activation=activation)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_type_of(node: fx.Node, other: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == value_of(other).dtype


def _depthwise_chain(end: fx.Node, user: fx.Node) -> Chain | None:
    """The chain of a depthwise convolution that ends with a value that only ``user`` reads."""
    if _only_user(end) is not user:
        return None
    node: Any = end
    for _ in range(4):  # what passes, activation, normalisation, convolution
        if not isinstance(node, fx.Node):
            return None
        if (given := convolution_of(node)) is not None:
            is_first = is_depthwise(value_of(given["weight"]), given["groups"])
            chains = _followed(Chain((node,), given)) if is_first else []
            return next((chain for chain in chains if chain.last is end and chain.residual is None), None)
        node = input_of(node)
    return None


# Convolutions


def convolution_of(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a convolution of images that kernels may serve; None if a node is none."""
    given = _own_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else _arguments(node)
    if given is None or not _are_nodes(given):
        return None
    if any(isinstance(leaf, fx.Node) for name in _GEOMETRY for leaf in tree_leaves(given[name])):
        return None
    output, input, weight = (value_of(n) for n in (node, given["input"], given["weight"]))
    if not all(is_image(value) for value in (output, input, weight)) or not isinstance(weight.shape[0], int):
        return None
    return given if _serves(given, output) and all(known(size > 0) for size in output.shape) else None


def _are_nodes(given: dict[str, Any]) -> bool:
    return all(isinstance(given[name], fx.Node) for name in ("input", "weight")) and isinstance(
        given["bias"], (fx.Node, type(None))
    )


def _serves(given: dict[str, Any], output: torch.Tensor) -> bool:
    """Whether the tensors have the output's type, or get it under autocast, which leaves float64 alone."""
    tensors = [value_of(given[name]) for name in ("input", "weight", "bias") if given[name] is not None]
    return all(
        t.device == output.device
        and (t.dtype == output.dtype or {t.dtype, output.dtype} <= set(DTYPES) - {torch.float64})
        for t in tensors
    )


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """Of PyTorch's functions."""
    names = CONVOLUTION
    if name_of(node) == "convolution":
        names = (*CONVOLUTION[:-1], "transposed", "output_padding", "groups")
    elif name_of(node) != "conv2d":
        return None
    given = CONVOLUTION_DEFAULTS | dict(zip(names, node.args)) | node.kwargs
    return None if given.get("transposed") else given


def _own_arguments(node: fx.Node) -> dict[str, Any] | None:
    """Of this library's operators, if they do nothing else yet; ``algorithm`` is what they were given."""
    operators = (conv2d.forward_operator, depthwise_conv2d.forward_operator)
    if not any(node.target is each.overload("cpu") for each in operators):
        return None
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args))
    if any(given.get(name) is not None for name in ("residual", "packed", "activation")):
        return None
    if "groups" not in given:
        given["groups"] = value_of(given["input"]).shape[1]
        if given["algorithm"] is not None:
            return None
    return given if value_of(node).device.type == "cpu" and not node.kwargs else None


def _linear_of(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of the 1x1 convolution that a linear layer of dense ``(N, H, W, C)`` is."""
    if name_of(node) != "linear":
        return None
    given = CONVOLUTION_DEFAULTS | dict(zip(CONVOLUTION[:3], node.args)) | node.kwargs
    if not _are_nodes(given):
        return None
    output, input, weight = (value_of(n) for n in (node, given["input"], given["weight"]))
    if not isinstance(input, FakeTensor) or input.dim() != 4 or weight.dim() != 2:
        return None
    with no_guards(input.fake_mode), input.fake_mode:
        if not same_pixels(torch.empty(input.shape), input):
            return None
        images = is_image(input.permute(TO_IMAGES)) and is_image(output.permute(TO_IMAGES))
    return given if images and _serves(given, output) and all(known(n > 0) for n in output.shape) else None


# What follows


def is_batch_norm(node: fx.Node, training: bool) -> bool:
    if name_of(node) != "batch_norm" or not is_image(value_of(node)):
        return False
    given, numbers = norm_arguments(node), Chain((node,), norm=node).numbers
    image = value_of(given["input"])
    if not training and numbers[0] is None:
        return False
    return (
        given["training"] is training
        and isinstance(given["eps"], float)
        and given["eps"] > 0
        and isinstance(given["momentum"], float)
        and all(n is None or value_of(n).dtype in DTYPES for n in numbers)
        and image.dtype == value_of(node).dtype
        and (numbers[0] is None) == (numbers[1] is None)
    )


def _is_permutation(node: fx.Node, order: tuple[int, ...]) -> bool:
    return name_of(node) == "permute" and not node.kwargs and tuple(tree_leaves(node.args[1:])) == order


def _passes(node: fx.Node) -> bool:
    """Whether a node of its input's type has its value, too: conversions to it, dropout in evaluation."""
    if name_of(node) == "to":
        return len(node.args) == 2 and isinstance(node.args[1], torch.dtype) and not node.kwargs
    return name_of(node) == "dropout" and arguments_of(nn.functional.dropout, node)["training"] is False


def _factor(mul: fx.Node, chain: Chain) -> fx.Node | None:
    """What a product multiplies each channel of a chain by; None if the node is no such product."""
    if name_of(mul) not in ("mul", "imul", "mul_") or len(mul.args) != 2 or mul.kwargs:
        return None
    left, right = mul.args
    other = right if left is chain.last else left
    if left is right or not isinstance(other, fx.Node) or (name_of(mul) != "mul" and left is other):
        return None
    a, b = value_of(chain.last), value_of(other)
    # float16 has no room for weights times factors such as 1e-6.
    if not isinstance(b, torch.Tensor) or b.dim() > 4 or b.dtype not in DTYPES or a.dtype == torch.float16:
        return None
    shape = (1,) * (4 - b.dim()) + tuple(b.shape)
    wanted = (a.shape[dim] if dim == chain.channels else 1 for dim in range(4))
    return other if b.device == a.device and all(known(m == n) for m, n in zip(shape, wanted)) else None


def _residual(add: fx.Node, chain: fx.Node) -> fx.Node | None:
    """What a sum adds to a chain, if it has its shape; None if the node is no such sum."""
    name = name_of(add)
    if name not in ("add", "iadd", "add_") or len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1:
        return None
    if set(add.kwargs) - {"alpha"}:
        return None
    left, right = add.args
    other = right if left is chain else left
    if left is right or not isinstance(other, fx.Node):
        return None
    if other is left and name != "add" and not is_private(left):  # its memory gets the sum
        return None
    a, b, c = (value_of(node) for node in (chain, other, add))
    if not isinstance(b, torch.Tensor) or not is_image(b) or not is_image(c):
        return None
    same = a.dtype == b.dtype == c.dtype and a.device == b.device
    return other if same and all(known(m == n) for m, n in zip(a.shape, b.shape)) else None


def _activation(node: fx.Node) -> str | None:
    """The name of the activation that a node applies to its only tensor; None if it is none."""
    name = name_of(node).removesuffix("_")
    if len(node.all_input_nodes) != 1 or "out" in node.kwargs:
        return None
    if name in ("relu", "relu6", "silu"):
        return name
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    if name == "hardtanh":
        given = arguments_of(nn.functional.hardtanh, node)
        return "relu6" if (given["min_val"], given["max_val"]) == (0, 6) else None
    return None

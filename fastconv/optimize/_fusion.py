"""Chains of a graph that one call computes: a convolution, batch normalisation, a sum, an activation.

A chain is followed from its first node by what uses it. Each of its values but the last has one user, the
next node; so the call may stand where the last one stood, unless something in between writes to what it
reads. Without gradients of its parameters a normalisation by running averages is folded into the weights,
before the graph runs. Training by the batch's statistics is two calls: the convolution, where our kernel is
the faster one, and the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from ..backends import BackendError
from ..nn._convolution import is_depthwise
from ..ops import _conv2d_choice, conv2d, conv_bn_act, depthwise_conv2d
from ..ops._activation import FROM_OUTPUT
from ..ops._arguments import DTYPES, padding_sides, pair
from ..ops._folded_weights import fold
from ..ops._operator import new_output
from ._effects import (
    arguments_of,
    changes_mode,
    is_private,
    is_written,
    memory_of,
    moved_past,
    norm_arguments,
)
from ._graph import GraphReport
from ._idioms import is_image, known, name_of, value_of
from ._prepared import Prepared, Recipe
from ._rewrite import memory_format_in_graph, no_guards, same_pixels, where

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONVOLUTION_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_GEOMETRY = ("stride", "padding", "dilation", "groups")
_OWN = ("cpu", "cuda", "triton", "emulator")


class Refused(Exception):
    """A chain stays with PyTorch; the message says why."""


@dataclass(frozen=True)
class Chain:
    """Nodes that follow each other: the first is a convolution, or in training a normalisation.

    Attributes:
        conv, norm, add, act: its nodes, in this order; None for what it lacks.
        residual: what ``add`` adds.
        activation: what ``act`` applies.
    """

    conv: fx.Node | None
    norm: fx.Node | None = None
    add: fx.Node | None = None
    act: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in (self.conv, self.norm, self.add, self.act) if node is not None]


def fuse(graph_module: fx.GraphModule, prepared: Prepared) -> list[GraphReport]:
    """In place; tells what was found."""
    graph, rows = graph_module.graph, []
    switches = any(changes_mode(node) for node in graph.nodes)
    for node in reversed(list(graph.nodes)):  # so that the later one of two chains gets their sum
        found = None
        if node._erased:
            continue
        if _is_batch_norm(node, training=True):
            found = _first(node, _followed(Chain(None, node)), _fuse_training)
        elif convolution_of(node) is not None:
            chains = _followed(Chain(node))
            found = _first(node, chains, lambda chain: _fuse_convolution(chain, prepared, switches))
        if found is not None:
            rows.insert(0, found)
    graph_module.recompile()
    return rows


def _first(node: fx.Node, chains: list[Chain], replace: Callable[[Chain], str]) -> GraphReport:
    """Replaces the longest chain that can be; the report is of the longest one where none can."""
    report = None
    for chain in chains:
        last, idiom = chain.nodes[-1], ", ".join(_label(n) for n in chain.nodes)
        name, place = last.name, where(last) or where(node)
        try:
            return GraphReport(replace(chain), idiom, name, place)
        except (Refused, BackendError) as error:
            op = "conv2d" if chain.norm is None else "conv_bn_act"
            report = report or GraphReport(op, idiom, name, place, str(error))
    return report


def _label(node: fx.Node) -> str:
    return name_of(node) or f"fastconv.{node.target._opname}"


# Finding


def _followed(chain: Chain) -> list[Chain]:
    """Chains from a first node on, the longest first."""
    found, user = [chain], _only_user(chain.nodes[-1])
    if chain.norm is None and user is not None and _is_batch_norm(user, training=False):
        found.append(Chain(chain.conv, user))
    for chain in list(found):
        user = _only_user(chain.nodes[-1])
        residual = None if user is None else _residual(user, chain.nodes[-1])
        summed = None
        if residual is not None:
            summed = Chain(chain.conv, chain.norm, user, None, residual)
            found.append(summed)
        for before in (chain, summed):
            user = None if before is None else _only_user(before.nodes[-1])
            activation = None if user is None else _activation(user)
            if activation is not None:
                found.append(Chain(chain.conv, chain.norm, before.add, user, before.residual, activation))
    return sorted(found, key=lambda chain: -len(chain.nodes))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def convolution_of(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a convolution of images that kernels may serve; None if a node is none."""
    given = _own_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else _arguments(node)
    if given is None:
        return None
    tensors = [given["input"], given["weight"]] + ([] if given["bias"] is None else [given["bias"]])
    if not all(isinstance(tensor, fx.Node) for tensor in tensors):
        return None
    if any(isinstance(leaf, fx.Node) for name in _GEOMETRY for leaf in tree_leaves(given[name])):
        return None
    values = [value_of(tensor) for tensor in (node, *tensors)]
    if not all(is_image(value) for value in values[:3]) or not isinstance(values[2].shape[0], int):
        return None
    same = all(v.dtype == values[0].dtype and v.device == values[0].device for v in values)
    return given if same and all(known(size > 0) for size in values[0].shape) else None


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


def _is_batch_norm(node: fx.Node, training: bool) -> bool:
    if name_of(node) != "batch_norm" or not is_image(value_of(node)):
        return False
    given = norm_arguments(node)
    image = value_of(given["input"])
    numbers = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
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


# Replacing


def _fuse_training(chain: Chain) -> str:
    """Normalisation by the batch's own statistics, and what follows it."""
    given = norm_arguments(chain.norm)
    image = value_of(given["input"])
    backend = conv_bn_act.choose(None, None, image)
    if backend not in _OWN:
        raise Refused("PyTorch's kernel is the measured best")
    _check_place(chain)
    numbers = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    keywords = {
        "momentum": given["momentum"],
        "eps": given["eps"],
        "activation": chain.activation,
        "residual": chain.residual,
        "backend": backend,
    }
    _replace(chain, conv_bn_act.batch_norm_act, (given["input"], *numbers), keywords)
    return "conv_bn_act"


def _fuse_convolution(chain: Chain, prepared: Prepared, switches: bool) -> str:
    """A convolution, a normalisation by running averages, and what follows."""
    given = convolution_of(chain.conv)
    image, weight, bias = given["input"], given["weight"], given["bias"]
    norm = norm_arguments(chain.norm) if chain.norm is not None else None
    numbers = [norm[name] for name in ("running_mean", "running_var", "weight", "bias")] if norm else []
    parameters = [node for node in (weight, bias, *numbers) if node is not None]
    with_gradient = torch.is_grad_enabled() or switches
    takes_gradient = [with_gradient and value_of(node).requires_grad for node in parameters]
    if with_gradient and any(value_of(n).requires_grad for n in numbers if n is not None):
        raise Refused("the normalisation takes a gradient, and would lose digits of it if it were folded")
    if chain.activation not in (None, *FROM_OUTPUT) and value_of(chain.nodes[-1]).requires_grad:
        raise Refused(f"the gradient of {chain.activation} would compute the convolution again")
    plan = _plan(chain, given)
    _check_place(chain)
    recipe = None
    if not any(takes_gradient) and (norm is not None or plan.algorithm is not None):
        recipe = _recipe(chain, prepared, parameters, given, numbers, norm, plan)
    graph, packed = chain.conv.graph, None
    mode = value_of(image).fake_mode
    if recipe is not None:
        made = prepared.inputs(recipe, mode)
        if norm is not None:
            weight, bias, *made = made
        packed = made[0] if made else None
    with graph.inserting_before(chain.nodes[-1]):
        if recipe is None and norm is not None:
            folded = call(graph, fold, (weight, bias, *numbers, norm["eps"]))
            weight, bias = (call(graph, operator.getitem, (folded, i)) for i in range(2))
        if plan.memory_format is not None:
            image = call(graph, torch.Tensor.contiguous, (image,), {"memory_format": plan.memory_format})
    target, arguments = plan.call(image, weight, bias, chain.residual, packed, chain.activation)
    _replace(chain, target, arguments)
    return plan.op if norm is None else "conv_bn_act"


@dataclass(frozen=True)
class _Plan:
    """The call that takes a chain's place: operator, overload, and what it is given.

    Attributes:
        memory_format: which the input is brought into first; None if it stays as it is.
        algorithm: the C++ kernel that reads packed weights, or None.
    """

    op: str
    backend: str
    geometry: tuple
    algorithm: str | None
    memory_format: torch.memory_format | None

    def call(self, image, weight, bias, residual, packed, activation) -> tuple[Any, tuple]:
        stride, padding, dilation, groups = self.geometry
        if self.backend == "aten":
            top, _, left, _ = padding
            return torch.conv2d, (image, weight, bias, stride, (top, left), dilation, groups)
        if self.op == "depthwise_conv2d":
            geometry = (stride, padding, dilation)
            target = depthwise_conv2d.forward_operator.overload(self.backend)
            return target, (image, weight, bias, *geometry, activation, None)
        target = conv2d.forward_operator.overload(self.backend)
        return target, (image, weight, bias, residual, packed, *self.geometry, activation, self.algorithm)


def _plan(chain: Chain, given: dict[str, Any]) -> _Plan:
    image, weight, groups = value_of(given["input"]), value_of(given["weight"]), given["groups"]
    stride, dilation = pair("stride", given["stride"]), pair("dilation", given["dilation"])
    padding = given["padding"]
    if "algorithm" not in given:
        padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    geometry = (stride, padding, dilation, groups)
    memory_format = None
    with no_guards(image.fake_mode), image.fake_mode:
        if not same_pixels(new_output(image, value_of(chain.conv).shape), value_of(chain.conv)):
            memory_format = memory_format_in_graph(value_of(chain.conv))  # PyTorch looks at the weight too
            if memory_format is None:
                raise Refused("its result lies in memory as no operator's result does")
            image = image.contiguous(memory_format=memory_format)
        if is_depthwise(weight, groups) and groups == image.shape[1]:
            if chain.residual is not None:
                raise Refused("depthwise_conv2d takes no residual")
            backend = depthwise_conv2d.choose(None, None, image, weight, stride, dilation)
            op, algorithm = "depthwise_conv2d", None
        else:
            op, fused = "conv2d", chain.add is not None or chain.act is not None
            backend = _conv2d_choice.choose(None, None, image, weight, *geometry, fused)
            algorithm = None
            if backend == "cpu":
                algorithm = _conv2d_choice.default_algorithm(image, weight, *geometry, fused)
            named = given.get("algorithm")
            if named is not None and (backend != "cpu" or not _is_default(named, image, weight, geometry)):
                backend, algorithm = "cpu", named
    if backend not in _OWN:
        symmetric = padding[0] == padding[1] and padding[2] == padding[3]
        if chain.norm is None or chain.add is not None or chain.act is not None or not symmetric:
            raise Refused("PyTorch's kernel is the measured best")
        return _Plan(op, "aten", geometry, None, memory_format)
    return _Plan(op, backend, geometry, algorithm, memory_format)


def _is_default(algorithm: str, image: torch.Tensor, weight: torch.Tensor, geometry: tuple) -> bool:
    """Whether a kernel may have been taken without being named, of images that lay otherwise too."""
    formats = (torch.contiguous_format, torch.channels_last)
    laid_out = (image.contiguous(memory_format=memory_format) for memory_format in formats)
    return any(_conv2d_choice.default_algorithm(x, weight, *geometry) == algorithm for x in laid_out)


def _recipe(chain, prepared, parameters, given, numbers, norm, plan) -> Recipe | None:
    """None where the weights are made in the graph, or written to before they are used."""
    memory = memory_of(*parameters)
    if is_written(_before(chain.nodes[-1]), memory):
        return None
    try:
        weight, bias, *rest = (prepared.source(node) for node in (given["weight"], given["bias"], *numbers))
    except LookupError:
        return None
    folded = tuple(rest) if norm else None
    return Recipe(weight, bias, folded, norm["eps"] if norm else 0.0, given["groups"], plan.algorithm)


def _before(end: fx.Node) -> Iterator[fx.Node]:
    for node in end.graph.nodes:
        if node is end:
            return
        yield node


def _check_place(chain: Chain) -> None:
    if (reason := moved_past(set(chain.nodes), chain.nodes[-1])) is not None:
        raise Refused(reason)


def call(graph: fx.Graph, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A new node, with its value before it runs."""
    kwargs = kwargs or {}
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), value_of)
    mode = next(leaf.fake_mode for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor))
    with no_guards(mode), mode:
        node.meta["example_value"] = target(*values[0], **values[1])
    return node


def _replace(chain: Chain, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    last = chain.nodes[-1]
    graph = last.graph
    with graph.inserting_before(last):
        new = call(graph, target, args, kwargs)
        meta = {k: v for k, v in last.meta.items() if k != "example_value"}
        new.meta.update(meta)
        if not same_pixels(value_of(new), value_of(last)):  # what comes next may see it
            memory_format = memory_format_in_graph(value_of(last))
            new = call(graph, torch.Tensor.contiguous, (new,), {"memory_format": memory_format})
            new.meta.update(meta)
    last.replace_all_uses_with(new)
    for node in reversed(chain.nodes):
        graph.erase_node(node)

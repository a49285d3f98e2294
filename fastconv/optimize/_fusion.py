"""Chains of a graph, replaced by one call: a convolution, batch normalisation, a sum, an activation.

The call may stand where the last node of the chain stood, unless something in between writes to what it
reads. Without gradients of its parameters a normalisation by running averages is folded into the weights,
before the graph runs, and so is a factor of each channel. Training by the batch's statistics is two calls:
the convolution, where our kernel is the faster one, and the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from .. import backends
from ..backends import BackendError
from ..nn._convolution import is_depthwise
from ..ops import _conv2d_choice, conv2d, conv_bn_act, depthwise_conv2d, separable_conv2d
from ..ops._activation import FROM_OUTPUT
from ..ops._arguments import padding_sides, pair
from ..ops._folded_weights import fold
from ..ops._operator import new_output
from ._effects import changes_gradients, is_written, memory_of, moved_past, norm_arguments
from ._graph import GraphReport
from ._graph_chains import FROM_IMAGES, TO_IMAGES, Chain, chains_from
from ._idioms import VIEWS, input_of, name_of, value_of
from ._prepared import Prepared, Recipe, as_weight
from ._rewrite import memory_format_in_graph, no_guards, same_pixels, same_strides, where

_OWN = ("cpu", "cuda", "triton", "emulator")


class Refused(Exception):
    """A chain stays with PyTorch; the message says why."""


def fuse(graph_module: fx.GraphModule, prepared: Prepared) -> list[GraphReport]:
    """In place; tells what was found."""
    graph, rows = graph_module.graph, []
    switches = any(changes_gradients(node) for node in graph.nodes)
    for node in reversed(list(graph.nodes)):  # so that the later one of two chains gets their sum
        if not node._erased and (chains := chains_from(node)):
            rows.insert(0, _replace_longest(chains, prepared, switches))
    graph_module.recompile()
    return rows


def _replace_longest(chains: list[Chain], prepared: Prepared, switches: bool) -> GraphReport:
    """Of those that can be replaced; the report is of the longest one where none can."""
    report = None
    for chain in chains:
        idiom, name = ", ".join(map(_label, chain.all_nodes)), chain.last.name
        place = where(chain.last) or where(chain.nodes[0])
        try:
            return GraphReport(_fuse(chain, prepared, switches), idiom, name, place)
        except (Refused, BackendError) as error:
            if report is None and chain.first is None:
                op = "conv2d" if chain.norm is None else "conv_bn_act"
                report = GraphReport(op, idiom, name, place, str(error))
    return report


def _label(node: fx.Node) -> str:
    return name_of(node) or f"fastconv.{node.target._opname}"


def _fuse(chain: Chain, prepared: Prepared, switches: bool) -> str:
    """Returns the name of the operator."""
    if chain.given is None:
        return _fuse_training(chain)
    if chain.first is not None:
        return _fuse_two(chain.first, chain, prepared, switches)
    return _fuse_convolution(chain, prepared, switches)


def _fuse_training(chain: Chain) -> str:
    """Normalisation by the batch's own statistics, and what follows it."""
    given = norm_arguments(chain.norm)
    backend = conv_bn_act.choose(None, None, value_of(given["input"]))
    if backend not in _OWN:
        raise Refused("PyTorch's kernel is the measured best")
    _check_place(chain)
    keywords = {
        "momentum": given["momentum"],
        "eps": given["eps"],
        "activation": chain.activation,
        "residual": chain.residual,
        "backend": backend,
    }
    _replace(chain, conv_bn_act.batch_norm_act, (given["input"], *chain.numbers), keywords)
    return "conv_bn_act"


def _fuse_convolution(chain: Chain, prepared: Prepared, switches: bool) -> str:
    """A convolution, a normalisation by running averages, and what follows."""
    learns = _learns(chain, switches)
    plan = _plan(chain)
    _check_place(chain)
    recipe = None if learns else _recipe(chain, prepared, plan.algorithm)
    if recipe is None and chain.factor is not None:
        raise Refused("what its channels are multiplied by is computed in the graph")
    with chain.last.graph.inserting_before(chain.last):
        image = _images(chain, chain.given["input"], chain.is_linear, plan.memory_format)
        residual = _images(chain, chain.residual, chain.residual_channels != 1)
        weight, bias, packed = _weights(chain, recipe, prepared)
    _replace(chain, *plan.call(image, weight, bias, residual, packed, chain.activation))
    return plan.op if chain.norm is None else "conv_bn_act"


def _fuse_two(first: Chain, second: Chain, prepared: Prepared, switches: bool) -> str:
    """A depthwise chain and a 1x1 one, in inference, where one call of both is faster."""
    if any(_learns(chain, switches) for chain in (first, second)) or value_of(second.last).requires_grad:
        raise Refused("it takes a gradient, for which what lies between the two is kept")
    plan, (_, weight, geometry) = _plan(first), _operands(second)
    image, depthwise, _ = _operands(first, plan.memory_format)
    with no_guards(image.fake_mode), image.fake_mode:
        if (
            plan.op != "depthwise_conv2d"
            or depthwise.shape[0] != image.shape[1]
            or (weight.shape[2:], *geometry) != ((1, 1), *separable_conv2d.POINTWISE)
            or first.dtype != second.dtype
            or not _is_default(second.given.get("algorithm"), image, weight, geometry)
        ):
            raise Refused("it is no depthwise and a 1x1 convolution")
        named = backends._state.backend is not None
        if named or not separable_conv2d.is_faster_fused(image, weight, plan.geometry[0]):
            raise Refused("two calls are the measured best")
        separable_conv2d.choose("cpu", "strips", image)
    _check_place(second)
    recipes = [
        _recipe(chain, prepared, algorithm)
        for chain, algorithm in ((first, None), (second, separable_conv2d.PRODUCTS["strips"]))
    ]
    if None in recipes:
        raise Refused("its weights are computed in the graph")
    with second.last.graph.inserting_before(second.last):
        input = _images(first, first.given["input"], False, plan.memory_format)
        residual = _images(second, second.residual, False)
        (dw, db, _), (pw, pb, packed) = (
            _weights(chain, recipe, prepared) for chain, recipe in zip((first, second), recipes)
        )
    arguments = (input, dw, pw, db, pb, residual, packed, *plan.geometry[:3])
    target = separable_conv2d.operator.overload("cpu")
    _replace(second, target, (*arguments, first.activation, second.activation, "strips"))
    return "separable_conv2d"


def _learns(chain: Chain, switches: bool) -> bool:
    """Whether a gradient of the convolution's parameters may be asked for; raises where it is in the way."""
    with_gradient = torch.is_grad_enabled() or switches

    def learn(*nodes: fx.Node | None) -> bool:
        return with_gradient and any(value_of(node).requires_grad for node in nodes if node is not None)

    if learn(*chain.numbers, chain.factor):
        what = "normalisation" if chain.factor is None else "factor of its channels"
        raise Refused(f"the {what} takes a gradient, and would lose digits of it if it were folded")
    learns, differentiated = (
        learn(chain.given["weight"], chain.given["bias"]),
        value_of(chain.last).requires_grad,
    )
    if chain.activation not in (None, *FROM_OUTPUT) and differentiated:
        raise Refused(f"the gradient of {chain.activation} would compute the convolution again")
    if chain.is_linear and (learns or differentiated):
        raise Refused("PyTorch's product of matrices has the faster gradient")
    return learns


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


def _plan(chain: Chain) -> _Plan:
    memory_format, output = None, value_of(chain.nodes[0])
    image, weight, geometry = _operands(chain)
    with no_guards(image.fake_mode), image.fake_mode:
        output = as_images(output, chain.is_linear)
        if not same_pixels(new_output(image, output.shape), output):
            memory_format = memory_format_in_graph(output)  # PyTorch looks at the weight too
            if memory_format is None:
                raise Refused("its result lies in memory as no operator's result does")
            image = image.contiguous(memory_format=memory_format)
        stride, padding, dilation, groups = geometry
        if is_depthwise(weight, groups) and groups == image.shape[1]:
            if chain.residual is not None:
                raise Refused("depthwise_conv2d takes no residual")
            backend = depthwise_conv2d.choose(None, None, image, weight, stride, dilation)
            op, algorithm = "depthwise_conv2d", None
        else:
            op, fused = "conv2d", chain.residual is not None or chain.activation is not None
            backend = _conv2d_choice.choose(None, None, image, weight, *geometry, fused)
            algorithm = None
            if backend == "cpu":
                algorithm = _conv2d_choice.default_algorithm(image, weight, *geometry, fused)
            named = chain.given.get("algorithm")
            if named is not None and (backend != "cpu" or not _is_default(named, image, weight, geometry)):
                backend, algorithm = "cpu", named
    if backend not in _OWN:
        symmetric = padding[0] == padding[1] and padding[2] == padding[3]
        folds = chain.norm is not None or (chain.factor is not None and not chain.is_linear)
        if not folds or chain.residual is not None or chain.activation is not None or not symmetric:
            raise Refused("PyTorch's kernel is the measured best")
        return _Plan(op, "aten", geometry, None, memory_format)
    return _Plan(op, backend, geometry, algorithm, memory_format)


def _operands(
    chain: Chain, memory_format: torch.memory_format | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """Image and weight without data, as the operator gets them; stride, padding, dilation and groups."""
    given = chain.given
    image, weight = value_of(given["input"]), value_of(given["weight"])
    with no_guards(image.fake_mode), image.fake_mode:
        image = as_images(image, chain.is_linear, chain.dtype, memory_format)
        weight = as_weight(weight, chain.dtype)
    stride, dilation = pair("stride", given["stride"]), pair("dilation", given["dilation"])
    padding = given["padding"]
    if "algorithm" not in given:
        padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    return image, weight, (stride, padding, dilation, given["groups"])


def _is_default(algorithm: str | None, image: torch.Tensor, weight: torch.Tensor, geometry: tuple) -> bool:
    """Whether a kernel may have been taken without being named, of images that lay otherwise too."""
    formats = (torch.contiguous_format, torch.channels_last)
    laid_out = (image.contiguous(memory_format=memory_format) for memory_format in formats)
    return algorithm is None or any(
        _conv2d_choice.default_algorithm(x, weight, *geometry) == algorithm for x in laid_out
    )


# The call's operands


def _recipe(chain: Chain, prepared: Prepared, algorithm: str | None) -> Recipe | None:
    """None where the weights are made in the graph, or written to before they are used."""
    weight, bias = (_uncast(chain.given[name], chain.dtype) for name in ("weight", "bias"))
    factor = chain.factor
    while factor is not None and name_of(factor) in VIEWS:
        factor = input_of(factor)
    nodes = (weight, bias, *chain.numbers, factor)
    if is_written(_before(chain.last), memory_of(*(node for node in nodes if node is not None))):
        return None
    casts = any(node is not None and value_of(node).dtype != chain.dtype for node in (weight, bias))
    if not (casts or chain.norm is not None or factor is not None):
        nodes = nodes[:1]
    eps = 0.0 if chain.norm is None else norm_arguments(chain.norm)["eps"]
    try:
        parts = tuple(map(prepared.source, nodes))
    except LookupError:
        return None
    return Recipe(parts, eps, chain.dtype, chain.given["groups"], algorithm)


def _uncast(node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    """The parameter that this library's modules bring into a type under autocast, or ask to be dense."""
    while node is not None and name_of(node) in ("contiguous", "to") and not node.kwargs:
        value, source = value_of(node), value_of(input_of(node))
        same = same_strides(zip(value.shape, value.stride(), source.stride()))
        if value.dtype != dtype or value.device != source.device or not same:
            break
        node = input_of(node)
    return node


def _before(end: fx.Node) -> Iterator[fx.Node]:
    for node in end.graph.nodes:
        if node is end:
            return
        yield node


def _weights(chain: Chain, recipe: Recipe | None, prepared: Prepared) -> tuple[fx.Node | None, ...]:
    """Weight, bias and packed weight, as the operator gets them."""
    graph, made = chain.last.graph, iter(())
    weight, bias = chain.given["weight"], chain.given["bias"]
    if recipe is not None:
        made = iter(prepared.inputs(recipe, value_of(weight).fake_mode))
        if recipe.folds:
            return next(made), next(made) if recipe.has_bias else None, next(made, None)
    elif chain.norm is not None:
        eps = norm_arguments(chain.norm)["eps"]
        folded = call(graph, fold, (weight, bias, *chain.numbers, eps))
        weight, bias = (call(graph, operator.getitem, (folded, i)) for i in range(2))
    weight, bias = (
        node
        if node is None or (value_of(node).dtype == chain.dtype and value_of(node).dim() != 2)
        else call(graph, as_weight, (node, chain.dtype))
        for node in (weight, bias)
    )
    return weight, bias, next(made, None)


def _images(
    chain: Chain, node: fx.Node | None, last: bool, memory_format: torch.memory_format | None = None
) -> fx.Node | None:
    if node is None or not (last or memory_format or value_of(node).dtype != chain.dtype):
        return node
    return call(node.graph, as_images, (node, last, chain.dtype, memory_format))


def as_images(
    input: torch.Tensor,
    last: bool,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """``(N, C, H, W)`` of that, or where channels are ``last``, of ``(N, H, W, C)``; as asked for."""
    images = input.permute(TO_IMAGES) if last else input
    images = images if dtype is None else images.to(dtype)
    return images if memory_format is None else images.contiguous(memory_format=memory_format)


# Into the graph


def _check_place(chain: Chain) -> None:
    if (reason := moved_past(set(chain.all_nodes), chain.last)) is not None:
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
    last = chain.last
    graph = last.graph
    with graph.inserting_before(last):
        new = call(graph, target, args, kwargs)
        meta = {k: v for k, v in last.meta.items() if k != "example_value"}
        new.meta.update(meta)
        if chain.channels != 1:
            new = call(graph, torch.permute, (new, FROM_IMAGES))
        if not same_pixels(value_of(new), value_of(last)):  # what comes next may see it
            memory_format = memory_format_in_graph(value_of(last))
            new = call(graph, torch.Tensor.contiguous, (new,), {"memory_format": memory_format})
        new.meta.update(meta)
    last.replace_all_uses_with(new)
    for node in reversed(chain.all_nodes):
        graph.erase_node(node)

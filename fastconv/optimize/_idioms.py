"""How this library's operators are spelled in graphs of PyTorch's own, and where a graph has one.

A view or a permutation is followed by what it does to an image's indices. Each dimension of a tensor that is
made of a source (N, C, H, W) is a sequence of factors (origin, stride, length), the slowest first: ``index``
steps of a factor are ``index * stride`` steps along the source's dimension ``origin``. A view regroups the
factors and a permutation moves them, whatever they are called and however their sizes are written. So a
shuffle is known by its result: the channels as (C/G factors of stride 1, G of stride C/G), all else in place.

Sizes are integers or symbols; what cannot be proven of a symbol is taken for false.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.experimental.symbolic_shapes import statically_known_true as known
from torch.utils._pytree import tree_leaves

from ..nn._rules import is_watched
from ..ops._arguments import DTYPES
from ..ops.channel_shuffle import channel_shuffle

VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
COPIES = {"contiguous", "clone"}
PERMUTATIONS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
CUTS = {"getitem", "slice"}
# Where functions are found that graphs call by their own names.
HOMES = (torch, nn.functional, torch.Tensor, torch._C._autograd, operator, builtins)

Factor = tuple[int, Any, Any]
Dims = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True)
class Match:
    """A part of a graph that one call can take the place of.

    Attributes:
        idiom: how it is spelled.
        op: the operator that takes its place, by name.
        call, arguments: the operator, and its arguments after the input.
        input: the image that it reads.
        nodes: all of it.
        result: of these, the one that others use.
        last: of these, the one that reads the input last; the call stands right behind it.
    """

    idiom: str
    op: str
    call: Callable[..., torch.Tensor]
    arguments: dict[str, Any]
    input: fx.Node
    nodes: frozenset[fx.Node]
    result: fx.Node
    last: fx.Node

    def obstacle(self) -> str | None:
        """Why the call may not stand there, though it computes the same numbers."""
        for node in self.nodes - {self.result}:
            if any(user not in self.nodes and not is_number(user) for user in node.users):
                return f"{node.name}, which is part of it, is used elsewhere too"
        node = min(self.nodes)
        while node is not self.last:
            node = node.next
            if node not in self.nodes and not _is_harmless(node):
                return f"{node.name} stands in its midst, and may write to what it reads"
        return None


def value_of(node: Any) -> Any:
    """What is known of a node's value before it runs: a tensor without data, a number, or None.

    Of an argument that is no node: itself.
    """
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else node


def number(size: Any) -> Any:
    """An integer, if a size is one in the guise of a symbol."""
    return int(size.node.expr) if isinstance(size, torch.SymInt) and size.node.expr.is_Integer else size


def is_image(value: Any) -> bool:
    """(N, C, H, W) that a kernel may serve, with a known number of channels."""
    return (
        isinstance(value, FakeTensor)
        and value.layout == torch.strided
        and value.dim() == 4
        and value.dtype in DTYPES
        and isinstance(value.shape[1], int)
        and value.shape[1] > 0
        and not free_unbacked_symbols(value)
    )


def name_of(node: fx.Node) -> str:
    """Of the operation, such as ``"view"`` for the method, the function and the ATen operator."""
    target = node.target
    if node.op == "call_method":
        return target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::") if target.namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    return name if any(getattr(home, name, None) is target for home in HOMES) else ""


def input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _is_harmless(node: fx.Node) -> bool:
    """It cannot write to a tensor."""
    if name_of(node) in VIEWS | COPIES | PERMUTATIONS | CUTS:
        return True
    return node.op == "get_attr" or is_number(node)


def is_number(node: fx.Node) -> bool:
    """Or several, such as a shape."""
    numbers = tree_leaves(value_of(node))
    computed = node.op in ("call_function", "call_method")
    return computed and all(isinstance(value, (int, torch.SymInt)) for value in numbers)


# One call


def single_call(node: fx.Node) -> Match | None:
    """PyTorch's own function or module."""
    name = name_of(node)
    if name == "channel_shuffle":
        groups = node.kwargs["groups"] if "groups" in node.kwargs else node.args[1]
    elif node.op == "call_module":
        module = node.graph.owning_module.get_submodule(node.target)
        name = type(module).__name__
        groups = module.groups if type(module) is nn.ChannelShuffle and not is_watched(module) else None
    else:
        return None
    source = input_of(node)
    if not isinstance(groups, int) or not is_image(value_of(source)):
        return None
    return Match(
        name, "channel_shuffle", channel_shuffle, {"groups": groups}, source, frozenset([node]), node, node
    )


# Views and permutations


def moved_channels(node: fx.Node) -> Match | None:
    """Views and permutations that shuffle the channels and leave all else in place."""
    if not is_image(value_of(node)):
        return None
    for source, path, dims in sources_of(node):
        groups = _groups(dims)
        if groups is not None:
            idiom = ", ".join(name_of(step) for step in path)
            return Match(
                idiom,
                "channel_shuffle",
                channel_shuffle,
                {"groups": groups},
                source,
                frozenset(path),
                node,
                node,
            )
    return None


def _groups(dims: Dims) -> int | None:
    """Of the shuffle that makes such dimensions; None if they are not a shuffle's."""
    channels = merged(dims[1])
    if not all(is_whole(dims[i], i) for i in (0, 2, 3)) or [origin for origin, _, _ in channels] != [1, 1]:
        return None
    return channels[1][2]  # two factors that are not one have changed places: (1, 1, C/G), (1, C/G, G)


def sources_of(node: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node], Dims]]:
    """Images that a tensor is a rearrangement of, the nearest first; the steps; its dimensions in theirs."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if is_image(value_of(node)):
            dims: Dims | None = _dims_of(value_of(node))
            for step in path:
                dims = dims and after(step, dims)
            if dims:
                yield node, list(path), dims
        if name_of(node) not in VIEWS | COPIES | PERMUTATIONS:
            return
        path.insert(0, node)
        node = input_of(node)


def _dims_of(image: torch.Tensor) -> Dims:
    return tuple(() if known(size == 1) else ((i, 1, size),) for i, size in enumerate(image.shape))


def after(step: fx.Node, dims: Dims) -> Dims | None:
    """A tensor's dimensions after a view, a copy or a permutation; None if they cannot be told."""
    before, value = value_of(input_of(step)), value_of(step)
    if not isinstance(value, torch.Tensor) or value.dtype != before.dtype:
        return None
    if name_of(step) in COPIES:
        return dims
    if name_of(step) in VIEWS:
        return _regrouped(dims, sizes_of(step))
    if step.all_input_nodes != [input_of(step)]:
        return None
    # Sizes that tell the dimensions apart.
    probe = torch.empty(tuple(range(2, 2 + value.dim())), device="meta")
    function = getattr(torch.Tensor, step.target) if step.op == "call_method" else step.target
    args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda _: probe)
    moved = function(*args, **kwargs)
    return tuple(dims[size - 2] for size in moved.shape)


def sizes_of(node: fx.Node) -> list[Any]:
    """A tensor's shape, with the integers that a view itself names: the symbols may hide one."""
    sizes, first, named = list(value_of(node).shape), 0, node.args[1:]
    if name_of(node) == "unflatten" and len(named) == 2:
        first, named = named
    elif name_of(node) not in ("view", "reshape", "_unsafe_view"):
        return sizes
    elif len(named) == 1:
        (named,) = named
    if isinstance(named, (tuple, list)) and isinstance(first, int):
        first %= value_of(node).dim() - (len(named) - 1 if first < 0 else 0)
        for dim, size in enumerate(named, first):
            if isinstance(size, int) and size >= 0:
                sizes[dim] = size
    return sizes


def _regrouped(dims: Dims, sizes: Sequence[Any]) -> Dims | None:
    """The factors in the same order, as dimensions of these sizes."""
    if not sizes or any(isinstance(size, int) and size == 0 for size in sizes):
        return None
    factors = [factor for dim in dims for factor in dim]
    result: list[tuple[Factor, ...]] = []
    for size in map(number, reversed(sizes[1:])):
        taken: list[Factor] = []
        while not known(size == 1):
            if not factors:
                return None
            origin, stride, length = factors.pop()
            if known(size % length == 0):
                taken.insert(0, (origin, stride, length))
                size = number(size // length)
            elif known(length % size == 0) or not factors:  # of the last, the first dimension has the rest
                taken.insert(0, (origin, stride, size))
                factors.append((origin, stride * size, number(length // size)))
                size = 1
            else:
                return None
        result.insert(0, tuple(taken))
    return (tuple(factors), *result)


def merged(dim: Sequence[Factor]) -> list[Factor]:
    """Neighbours that step through the source like one."""
    result: list[Factor] = []
    for origin, stride, length in dim:
        if result and result[-1][0] == origin and known(result[-1][1] == stride * length):
            length = result.pop()[2] * length
        result.append((origin, stride, length))
    return result


def is_whole(dim: Sequence[Factor], origin: int) -> bool:
    """Along it the source's dimension ``origin`` is in its place, if every other's factors are elsewhere."""
    factors = merged(dim)
    return not factors or (len(factors) == 1 and factors[0][0] == origin and known(factors[0][1] == 1))

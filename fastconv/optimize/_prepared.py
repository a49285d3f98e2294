"""Folded and packed weights of a compiled graph, made before it runs and given to it as further inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ..ops._folded_weights import fold
from ..ops._packed_weights import made_of, pack_weight

Source = int | torch.Tensor | None  # the position of an input, or a tensor that the graph holds


@dataclass(frozen=True)
class Recipe:
    """What is made of a convolution's weight, and of what is folded into it.

    Attributes:
        parts: the weight, which may be a linear layer's, if it is only packed. If anything is folded or cast:
            weight; bias; running_mean, running_var, weight and bias of a normalisation; and a factor of each
            channel; None for what there is not.
        eps: the normalisation's.
        dtype: in which the convolution computes.
        groups, algorithm: what the weight is packed for, or None where it is not.
    """

    parts: tuple[Source, ...]
    eps: float
    dtype: torch.dtype
    groups: int
    algorithm: str | None

    @property
    def folds(self) -> bool:
        """Whether weight and bias are made, too."""
        return len(self.parts) > 1

    @property
    def has_bias(self) -> bool:
        return any(source is not None for source in self.parts[1:3])

    def make(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Weight and bias, if they are folded; then the packed weight, if it is. Kept for the next call."""
        tensors = tuple(inputs[source] if type(source) is int else source for source in self.parts)
        packing = (self.groups, self.algorithm)
        if self.folds:
            name, arguments, function = "fold and cast", (self.eps, self.dtype, *packing), _fold
        else:
            name, arguments, function = "conv2d", packing, _pack
        made = made_of(tensors, name, arguments, function)
        made = function(*tensors, *arguments) if made is None else made
        return made if type(made) is tuple else (made,)


def _fold(*operands: Any) -> tuple[torch.Tensor, ...]:
    weight, bias, *numbers, factor, eps, dtype, groups, algorithm = operands
    weight = as_weight(weight, weight.dtype)
    if numbers[0] is not None:
        weight, bias = fold(weight, bias, *numbers, eps)
    if factor is not None:
        exact = torch.promote_types(weight.dtype, torch.float32)
        factor = factor.reshape(-1).to(exact)
        weight = weight.to(exact) * factor[:, None, None, None]
        bias = None if bias is None else bias.to(exact) * factor
    # Without what would keep the parameters themselves alive.
    made = tuple(tensor.detach().to(dtype) for tensor in (weight, bias) if tensor is not None)
    return made if algorithm is None else (*made, _pack(made[0], groups, algorithm))


def _pack(weight: torch.Tensor, groups: int, algorithm: str) -> torch.Tensor:
    return pack_weight("conv2d", as_weight(weight, weight.dtype), groups, algorithm)


def as_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A convolution's weight or bias in a type; that of a linear layer is a 1x1 convolution's."""
    return (weight[:, :, None, None] if weight.dim() == 2 else weight).to(dtype)


class Prepared:
    """The further inputs of one graph.

    Args:
        graph_module: from Dynamo; its placeholders are the inputs.
        example_inputs: of the placeholders.
    """

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._module = graph_module
        self._inputs = list(example_inputs)
        self._positions = {node: i for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))}
        self._nodes: dict[Recipe, list[fx.Node]] = {}
        self.examples: list[FakeTensor] = []

    def source(self, node: fx.Node | None) -> Source:
        """Where a tensor is found when the graph is called; raises LookupError if the graph computes it."""
        if node is None:
            return None
        if node in self._positions:
            source: Source = self._positions[node]
            value = self._inputs[source]
        elif node.op == "get_attr":
            source = value = getattr(self._module, node.target, None)
        else:
            raise LookupError(f"{node.name} is computed in the graph")
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            raise LookupError(f"{node.name} has no values yet")
        return source

    def inputs(self, recipe: Recipe, mode: FakeTensorMode) -> list[fx.Node]:
        """The placeholders of what a recipe makes."""
        if not recipe.folds and recipe.algorithm is None:
            return []
        if recipe not in self._nodes:
            with unset_fake_temporarily(), _no_autocast():
                made = recipe.make(self._inputs)
            self._nodes[recipe] = [self._placeholder(tensor, mode) for tensor in made]
        return self._nodes[recipe]

    def _placeholder(self, tensor: torch.Tensor, mode: FakeTensorMode) -> fx.Node:
        graph = self._module.graph
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            node = graph.placeholder(f"fastconv_prepared_{len(self.examples)}")
        node.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
        node._dynamo_source = None  # no tensor of the program's
        context = TracingContext.try_get()  # has another mode for what compiles the graph
        inner = mode if context is None or context.fake_mode is None else context.fake_mode
        self.examples.append(inner.from_tensor(tensor, static_shapes=True))
        return node

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph as a function of its original inputs."""
        recipes = tuple(self._nodes)
        if not recipes:
            return compiled

        def call(*inputs: Any) -> Any:
            with _no_autocast():
                made = [tensor for recipe in recipes for tensor in recipe.make(inputs)]
            return compiled(*inputs, *made)

        return call


def _no_autocast() -> contextlib.AbstractContextManager:
    """Within the block tensors are made in the types that they are asked for."""
    is_on = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if is_on else contextlib.nullcontext()

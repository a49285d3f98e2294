"""Folded and packed weights of a compiled graph, made before it runs and given to it as further inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ..ops._folded_weights import fold_and_pack
from ..ops._packed_weights import made_of, pack_weight, packed_weight

Source = int | torch.Tensor | None  # the position of an input, or a tensor that the graph holds


@dataclass(frozen=True)
class Recipe:
    """What is made of a convolution's weight and bias, and of a batch normalisation's tensors.

    Attributes:
        weight, bias: of the convolution.
        norm: running_mean, running_var, weight and bias of the normalisation, or None where there is none.
        eps: the normalisation's.
        groups, algorithm: what the weight is packed for, or None where it is not.
    """

    weight: Source
    bias: Source
    norm: tuple[Source, ...] | None
    eps: float
    groups: int
    algorithm: str | None

    def make(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Weight and bias, if they are folded; then the packed weight, if it is. Kept for the next call."""
        sources = (self.weight,) if self.norm is None else (self.weight, self.bias, *self.norm)
        tensors = tuple(inputs[source] if type(source) is int else source for source in sources)
        packing = (self.groups, self.algorithm)
        if self.norm is None:
            packed = packed_weight("conv2d", *tensors, *packing)
            return (pack_weight("conv2d", *tensors, *packing) if packed is None else packed,)
        made = made_of(tensors, "fold_and_pack", (self.eps, *packing), fold_and_pack)
        return fold_and_pack(*tensors, self.eps, *packing) if made is None else made


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
        if recipe not in self._nodes:
            with unset_fake_temporarily():
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
            return compiled(*inputs, *(tensor for recipe in recipes for tensor in recipe.make(inputs)))

        return call

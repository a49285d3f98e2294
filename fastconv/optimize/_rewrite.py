"""Finds the idioms in a graph, and puts calls of this library's operators in their places.

Imported when the first graph comes: what PyTorch has for symbolic shapes takes half a second to import.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ..nn._rules import no_kernel
from ..ops._operator import new_output
from ._graph import GraphReport
from ._idioms import Match, is_number, known, moved_channels, name_of, single_call, value_of
from ._slices import written_slices

IDIOMS = (single_call, moved_channels, written_slices)


def rewrite(graph_module: fx.GraphModule, obstacle: str | None = None) -> list[GraphReport]:
    """In place, and in the graphs within the graph; tells what was found. ``obstacle``: why all stays."""
    rows = []
    for child in graph_module.children():
        if isinstance(child, fx.GraphModule):  # such as the body of a checkpoint
            rows += rewrite(child, obstacle)
    left: set[fx.Node] = set()
    for node in list(graph_module.graph.nodes):
        match = None if node._erased else next(filter(None, (find(node) for find in IDIOMS)), None)
        if match is None or match.nodes & left:
            continue
        image = value_of(match.input)
        reason = obstacle or match.obstacle() or no_kernel(match.op, None, image)
        memory_format = None if _follows_input(match) else memory_format_in_graph(value_of(match.result))
        if reason is None and memory_format is None and not _lies_as(match, image):
            reason = "its result lies in memory as no operator's result does"
        rows.append(GraphReport(match.op, match.idiom, match.result.name, where(match.result), reason))
        if reason is None:
            _replace(match, memory_format)
        else:
            left.add(match.result)
    graph_module.recompile()
    return rows


def _follows_input(match: Match) -> bool:
    """Whether the result has the input's memory format, whatever that is when the graph runs."""
    if len(match.nodes) == 1:  # PyTorch's own operator does, whatever is recorded of it
        return True
    return any(name_of(n) == "zeros_like" and "memory_format" not in n.kwargs for n in match.nodes)


def _lies_as(match: Match, image: torch.Tensor) -> bool:
    return len(match.nodes) == 1 or (
        _follows_input(match) and same_pixels(_output_for(image), value_of(match.result))
    )


def memory_format_in_graph(result: torch.Tensor) -> torch.memory_format | None:
    """The one that the result has in this graph; None if neither. Views and copies always end in the same."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with no_guards(result.fake_mode), result.fake_mode:
            dense = torch.empty(result.shape, memory_format=memory_format)
        if same_pixels(dense, result):
            return memory_format
    return None


def _replace(match: Match, memory_format: torch.memory_format | None) -> None:
    graph, image = match.result.graph, value_of(match.input)
    key = "val" if "val" in match.result.meta else "example_value"
    meta = {k: v for k, v in match.result.meta.items() if k != "tensor_meta"}
    with graph.inserting_after(match.last):
        call = graph.call_function(match.call, (match.input,), match.arguments)
    call.meta = {**meta, key: _output_for(image), "is_wrapped": True}  # so that the code can be traced again
    if memory_format is not None:
        # The operator keeps the input's; what comes next may see, and write through, the memory of views.
        with graph.inserting_after(call):
            call = graph.call_method("contiguous", (call,), {"memory_format": memory_format})
        call.meta = meta
    match.result.replace_all_uses_with(call, delete_user_cb=lambda user: user not in match.nodes)
    # Sizes of what is gone are of no use any more; those that are keep their views.
    node, before = max(match.nodes), min(match.nodes).prev
    while node is not before:
        node, this = node.prev, node
        if not this.users and (this in match.nodes or is_number(this)):
            graph.erase_node(this)


def _output_for(image: torch.Tensor) -> torch.Tensor:
    """Of any of the operators: it is like the image."""
    with no_guards(image.fake_mode), image.fake_mode:
        return new_output(image, image.shape)


def same_pixels(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the images of two dense batches lie in the same way."""
    return same_strides(list(zip(a.shape, a.stride(), b.stride()))[1:])


def same_strides(dims: Iterable[tuple[Any, Any, Any]]) -> bool:
    return all(known(size == 1) or known(a == b) for size, a, b in dims)


def no_guards(mode: FakeTensorMode) -> contextlib.AbstractContextManager:
    """Within the block, what is asked about the mode's symbols becomes no condition of the graph."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def learn_shapes(graph_module: fx.GraphModule, example_input: Any) -> str | None:
    """Runs a graph without data, so that every node's value has a shape.

    Returns:
        Why what holds for these shapes may not hold for others; None if it does.
    """
    from torch._dynamo.source import ConstantSource

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)

    def fake(index: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        symbols = [value.dim() == 4 and dim != 1 for dim in range(value.dim())]
        if any(symbol and size < 2 for symbol, size in zip(symbols, value.shape)):
            raise ValueError(
                "example_input must have at least 2 images, rows and columns, for other programs are "
                f"shuffles where there is 1; got shape {tuple(value.shape)}"
            )
        sizes = [DimDynamic.DYNAMIC if symbol else DimDynamic.STATIC for symbol in symbols]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(value, source=ConstantSource(f"input{index}"), symbolic_context=context)

    fakes = [fake(index, value) for index, value in enumerate(inputs)]
    counters = [(buffer, buffer.clone()) for buffer in graph_module.buffers() if buffer.numel() == 1]
    with torch.no_grad():
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)
        for buffer, before in counters:  # of one value, fake tensors keep the real one
            buffer.copy_(before)
    if mode.shape_env.replacements:
        sizes = ", ".join(str(size) for size in mode.shape_env.replacements.values())
        return f"the graph runs on images of some sizes alone: example_input has fixed {sizes}"
    return None


def where(node: fx.Node) -> str | None:
    frames = re.findall(r'File "(.+?)", line (\d+)', node.stack_trace or "")
    return ":".join(frames[-1]) if frames else None

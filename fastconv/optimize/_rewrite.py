"""Finds the idioms in a graph, and puts calls of this library's operators in their places.

Imported when the first graph comes: what PyTorch has for symbolic shapes takes half a second to import.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from ..backends import use_backend
from ..nn._rules import no_kernel
from ..ops._operator import new_output
from ._graph import GraphReport
from ._idioms import Match, is_number, known, moved_channels, name_of, single_call, value_of
from ._slices import written_slices

log = logging.getLogger("fastconv")

READS_STRIDES = {
    "",  # no function of PyTorch, as far as name_of knows
    "as_strided",
    "as_strided_",
    "as_strided_scatter",
    "data_ptr",
    "is_contiguous",
    "resize_",
    "set_",
    "storage_offset",
    "stride",
    "untyped_storage",
}
IDIOMS = (single_call, moved_channels, written_slices)


def rewrite(graph_module: fx.GraphModule) -> list[GraphReport]:
    """In place, and in the graphs within the graph; tells what was found."""
    rows = []
    for child in graph_module.children():
        if isinstance(child, fx.GraphModule):  # such as the body of a checkpoint
            rows += rewrite(child)
    trial = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    _, changed = _replace_all(trial, may_change_strides=True)
    # In place, for a copy of Dynamo's graph lacks what Inductor asks it for.
    found, _ = _replace_all(
        graph_module, may_change_strides=not changed or _same_results(trial, graph_module.graph)
    )
    graph_module.recompile()
    return rows + found


def _replace_all(graph_module: fx.GraphModule, may_change_strides: bool) -> tuple[list[GraphReport], bool]:
    """What was found; and whether a result now has other strides."""
    rows: list[GraphReport] = []
    changed, left = False, set()
    for node in list(graph_module.graph.nodes):
        match = None if node._erased else next(filter(None, (find(node) for find in IDIOMS)), None)
        if match is None or match.nodes & left:
            continue
        image = value_of(match.input)
        # PyTorch's own operator keeps the memory format, too, whatever is recorded of it.
        moved = len(match.nodes) > 1 and not _same_pixels(_output_for(image), value_of(match.result))
        reason = match.obstacle() or no_kernel(match.op, None, image)
        if reason is None and moved and not may_change_strides:
            reason = (
                "the operator keeps the memory format and this does not; with other strides here "
                "the graph is not certain to have the same results"
            )
        rows.append(GraphReport(match.op, match.idiom, match.result.name, _where(match.result), reason))
        if reason is None:
            _replace(match)
            changed |= moved
        else:
            left.add(match.result)
    return rows, changed


def _replace(match: Match) -> None:
    graph, image = match.result.graph, value_of(match.input)
    with graph.inserting_after(match.last):
        call = graph.call_function(match.call, (match.input,), match.arguments)
    key = "val" if "val" in match.result.meta else "example_value"
    call.meta = {k: v for k, v in match.result.meta.items() if k != "tensor_meta"}
    call.meta[key] = _output_for(image)
    match.result.replace_all_uses_with(call, delete_user_cb=lambda user: user not in match.nodes)
    # Sizes of what is gone are of no use any more; those that are keep their views.
    node, before = max(match.nodes), min(match.nodes).prev
    while node is not before:
        node, this = node.prev, node
        if not this.users and (this in match.nodes or is_number(this)):
            graph.erase_node(this)


def _same_results(trial: fx.GraphModule, graph: fx.Graph) -> bool:
    """Whether it is certain that other strides within a graph change nothing outside it.

    The outputs must have the shapes and strides that they had, and nothing in between may read strides.
    """
    if any(map(_may_read_strides, trial.graph.nodes)):
        return False
    inputs = [value_of(node) for node in graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    # The reference's memory format is the kernels'; what PyTorch records of its own shuffle's is not.
    with mode, _no_guards(mode), torch.no_grad(), use_backend("reference"):
        given = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            if isinstance(v, torch.Tensor)
            else v
            for v in inputs
        ]
        try:
            results = fx.Interpreter(trial).run(*given, enable_io_processing=False)
        except Exception as error:
            log.debug("graph: it does not run with other strides", exc_info=error)
            return False
    expected = tree_leaves(fx.node.map_arg(graph.output_node().args[0], value_of))
    return all(_same_geometry(a, b) for a, b in zip(tree_leaves(results), expected, strict=True))


def _may_read_strides(node: fx.Node) -> bool:
    """Or is not PyTorch's own, so that nobody can tell."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(node.target)
        return not type(module).__module__.startswith(("torch.nn.", "fastconv.nn."))
    if node.op not in ("call_function", "call_method"):
        return False
    package = getattr(node.target, "__module__", None) or ""
    ours = package.removeprefix("torch._ops.").partition(".")[0] == "fastconv"
    return not ours and name_of(node) in READS_STRIDES


def _output_for(image: torch.Tensor) -> torch.Tensor:
    """Of any of the operators: it is like the image."""
    with _no_guards(image.fake_mode), image.fake_mode:
        return new_output(image, image.shape)


def _same_pixels(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the images of two dense batches lie in the same way."""
    return _same_strides(list(zip(a.shape, a.stride(), b.stride()))[1:])


def _same_geometry(a: Any, b: Any) -> bool:
    if not isinstance(b, torch.Tensor):
        return not isinstance(a, torch.Tensor)
    same_shape = a.dim() == b.dim() and all(known(m == n) for m, n in zip(a.shape, b.shape))
    return same_shape and _same_strides(zip(a.shape, a.stride(), b.stride()))


def _same_strides(dims: Iterable[tuple[Any, Any, Any]]) -> bool:
    return all(known(size == 1) or known(a == b) for size, a, b in dims)


def _no_guards(mode: FakeTensorMode) -> contextlib.AbstractContextManager:
    """Within the block, what is asked about the mode's symbols becomes no condition of the graph."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def learn_shapes(graph_module: fx.GraphModule, example_input: Any) -> None:
    """Runs a graph without data, so that every node's value has a shape."""
    from torch._dynamo.source import ConstantSource

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)

    def fake(index: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        symbols = [value.dim() == 4 and dim != 1 for dim in range(value.dim())]
        sizes = [DimDynamic.DYNAMIC if symbol else DimDynamic.STATIC for symbol in symbols]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(value, source=ConstantSource(f"input{index}"), symbolic_context=context)

    fakes = [fake(index, value) for index, value in enumerate(inputs)]
    with torch.no_grad():
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)


def _where(node: fx.Node) -> str | None:
    frames = re.findall(r'File "(.+?)", line (\d+)', node.stack_trace or "")
    return ":".join(frames[-1]) if frames else None

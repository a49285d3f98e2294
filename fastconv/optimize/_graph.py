"""Graphs: where PyTorch's operators spell one of this library's, one call of it stands instead.

``optimize_graph`` does it to any graph of torch.fx, the backend ``"fastconv"`` to those of torch.compile.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from ..backends import use_backend
from ..nn._rules import no_kernel
from ..ops._operator import memory_format_of, new_output
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
ORIGINALS: weakref.WeakKeyDictionary[fx.GraphModule, fx.Graph] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class GraphReport:
    """One place of a graph that spells an operator of this library.

    Attributes:
        op: the operator's name.
        idiom: how it was spelled, such as ``"view, transpose, contiguous, view"``.
        node: the name of the node whose result it is.
        where: the line of the program that made it, if the graph tells.
        reason: why it was left as it was; None if one call stands there now.
    """

    op: str
    idiom: str
    node: str
    where: str | None
    reason: str | None = None


def optimize_graph(graph_module: fx.GraphModule, example_input: Any = None) -> list[GraphReport]:
    """Puts this library's operators into a graph, in place, where it spells them with PyTorch's own.

    What is recognised: channel shuffles as one call or module, and as any views and permutations that
    amount to one; shifts, written slice by slice into zeros. All that is needed must be proven by
    the graph's shapes: channels and groups are known integers, batch and image may be symbols. Nothing that
    can be observed changes but the time: numbers, gradients, and the shapes and strides of the outputs.

    Args:
        graph_module: from ``torch.fx.symbolic_trace``, ``torch.export.export(...).module()`` or Dynamo.
        example_input: a tensor, or a tuple of arguments; for graphs that do not know their shapes, such as
            ``symbolic_trace``'s. Of four-dimensional tensors every size of at least 2 but the channels is
            taken for a symbol, any other for a constant.

    Returns:
        A row for each place that was recognised. ``fastconv.restore`` puts the graph back as it was.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(f"graph_module must be a torch.fx.GraphModule, got {type(graph_module).__name__}")
    if example_input is not None:
        _learn_shapes(graph_module, example_input)
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule) and module not in ORIGINALS:
            ORIGINALS[module] = copy.deepcopy(module.graph)
    return _rewrite(graph_module)


def restore_graph(module: nn.Module) -> None:
    """Undoes :func:`optimize_graph` on a module, but not on the modules in it."""
    if module in ORIGINALS:
        module.graph = ORIGINALS.pop(module)


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="fastconv")``: :func:`optimize_graph`, then Inductor.

    Args:
        graph_module, example_inputs: from Dynamo.
        mode, options: as ``torch.compile`` takes them for Inductor.

    What was found is logged, as INFO of the logger ``"fastconv"``.
    """
    rows = _rewrite(graph_module)
    done = Counter(f"{row.op} ({row.idiom})" for row in rows if row.reason is None)
    log.info("graph: %s", ", ".join(f"{count} {what}" for what, count in done.items()) or "nothing replaced")
    for row in rows:
        if row.reason is not None:
            log.info("graph: %s at %s stays with PyTorch: %s", row.op, row.where or row.node, row.reason)
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return torch._dynamo.lookup_backend("inductor")(
        graph_module, example_inputs, config_patches=patches or None
    )


def _rewrite(graph_module: fx.GraphModule) -> list[GraphReport]:
    rows = []
    for child in graph_module.children():
        if isinstance(child, fx.GraphModule):  # such as the body of a checkpoint
            rows += _rewrite(child)
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
        with _no_guards(image.fake_mode):
            # PyTorch's own operator keeps the format, too, whatever is recorded of it.
            formats = {memory_format_of(image), memory_format_of(value_of(match.result))}
        moved = len(match.nodes) > 1 and len(formats) > 1
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
    with _no_guards(image.fake_mode), image.fake_mode:
        call.meta[key] = new_output(image, image.shape)
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


def _same_geometry(a: Any, b: Any) -> bool:
    if not isinstance(b, torch.Tensor):
        return not isinstance(a, torch.Tensor)
    return a.dim() == b.dim() and all(
        known(m == n) and (known(m == 1) or known(s == t))
        for m, n, s, t in zip(a.shape, b.shape, a.stride(), b.stride())
    )


def _no_guards(mode: FakeTensorMode) -> contextlib.AbstractContextManager:
    """Within the block, what is asked about the mode's symbols becomes no condition of the graph."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def _learn_shapes(graph_module: fx.GraphModule, example_input: Any) -> None:
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

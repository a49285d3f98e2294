"""Graphs: where PyTorch's operators spell one of this library's, one call of it stands instead.

``optimize_graph`` does it to any graph of torch.fx, the backend ``"fastconv"`` to those of torch.compile.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

log = logging.getLogger("fastconv")

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
    can be observed changes but the time: numbers, gradients, shapes and strides; but our operators have no
    forward-mode derivatives.

    Args:
        graph_module: from ``torch.fx.symbolic_trace``, ``torch.export.export(...).module()`` or Dynamo.
        example_input: a tensor, or a tuple of arguments; for graphs that do not know their shapes, such as
            ``symbolic_trace``'s. Of four-dimensional tensors every size but the channels is taken for a
            symbol, and must be at least 2; any other is a constant. Hooks of its modules see tensors without
            data.

    Returns:
        A row for each place that was recognised. ``fastconv.restore`` puts the graph back as it was when this
        first changed it; what others have changed since goes with it.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(f"graph_module must be a torch.fx.GraphModule, got {type(graph_module).__name__}")
    from ._rewrite import learn_shapes, rewrite

    obstacle = None if example_input is None else learn_shapes(graph_module, example_input)
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule) and module not in ORIGINALS:
            ORIGINALS[module] = copy.deepcopy(module.graph)
    return rewrite(graph_module, obstacle)


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

    Chains of a convolution and what follows it become one call, too.

    Args:
        graph_module, example_inputs: from Dynamo.
        mode, options: as ``torch.compile`` takes them for Inductor.

    What was found is logged, as INFO of the logger ``"fastconv"``.
    """
    from ._fusion import fuse
    from ._layouts import use_channels_last
    from ._prepared import Prepared
    from ._rewrite import rewrite

    graph_module = _copy(graph_module)
    rows = rewrite(graph_module)
    converted = use_channels_last(graph_module)
    prepared = Prepared(graph_module, example_inputs)
    rows += fuse(graph_module, prepared)
    done = Counter(f"{row.op} ({row.idiom})" for row in rows if row.reason is None)
    log.info("graph: %s", ", ".join(f"{count} {what}" for what, count in done.items()) or "nothing replaced")
    if converted:
        log.info("graph: its images are converted to channels_last first")
    for row in rows:
        if row.reason is not None:
            log.info("graph: %s at %s stays with PyTorch: %s", row.op, row.where or row.node, row.reason)
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    compiled = torch._dynamo.lookup_backend("inductor")(
        graph_module, [*example_inputs, *prepared.examples], config_patches=patches or None
    )
    return prepared.bind(compiled)


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Dynamo reads its own graph again; this one may get further inputs."""
    copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, value in vars(graph_module).items():  # what Inductor is told of the program
        vars(copied).setdefault(name, value)
    copied.meta = dict(graph_module.meta)
    for old, new in zip(*(m.graph.find_nodes(op="placeholder") for m in (graph_module, copied))):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied

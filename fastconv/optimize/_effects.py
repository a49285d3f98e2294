"""What a node of a graph writes to, and so what may be computed before it or after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ..ops.conv_bn_act import batch_norm_act
from ._idioms import input_of, is_number, name_of, value_of

INPLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
INPLACE |= {"iand", "ior", "ixor", "ilshift", "irshift", "setitem"}
# These write to their arguments and are not called so.
_UNSURE = {"instance_norm", "embedding", "embedding_bag", "native_batch_norm", "cudnn_batch_norm"}
_GRADIENTS = ("_set_grad_enabled", "_enter_inference_mode")
_AUTOCAST = ("_enter_autocast", "_exit_autocast")


def changes_gradients(node: fx.Node) -> bool:
    """Whether what follows takes other gradients."""
    return getattr(node.target, "__name__", "") in _GRADIENTS


def changes_mode(node: fx.Node) -> bool:
    """Whether what follows takes other gradients, or computes in other types."""
    return changes_gradients(node) or getattr(node.target, "__name__", "") in _AUTOCAST


def written(node: fx.Node) -> list[fx.Node] | None:
    """The nodes whose memory a node writes to; None if that cannot be told, and so may be any."""
    target, name = node.target, name_of(node)
    if node.op in ("placeholder", "get_attr", "output") or changes_mode(node):
        return []
    if isinstance(target, torch._ops.OpOverload) and name not in _UNSURE:
        arguments = target._schema.arguments
        values = {**dict(zip((argument.name for argument in arguments), node.args)), **node.kwargs}
        writes = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        return _nodes(values.get(argument) for argument in writes)
    if target is batch_norm_act:
        return _nodes(node.args[1:3])
    if (getattr(target, "__module__", None) or "").startswith("fastconv.") or is_number(node):
        return []
    if not name or name.startswith("_") or name in _UNSURE:
        return None
    values = [node.kwargs.get("out")]
    if name.endswith("_") or name in INPLACE or _is_inplace(node):
        values.append(input_of(node))
    if name == "batch_norm" and norm_arguments(node)["training"] is not False:
        values += norm_arguments(node)["running_mean"], norm_arguments(node)["running_var"]
    return _nodes(values)


def norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Of a ``batch_norm``, by their names in ``torch.nn.functional``."""
    if node.target is torch.batch_norm:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        return dict(zip(names, node.args)) | node.kwargs
    return arguments_of(nn.functional.batch_norm, node)


def arguments_of(function: Any, node: fx.Node) -> dict[str, Any]:
    """What a node gives a function, and the defaults of what it does not."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_inplace(node: fx.Node) -> bool:
    if not inspect.isfunction(node.target):
        return False
    if "inplace" not in inspect.signature(node.target).parameters:
        return False
    return arguments_of(node.target, node)["inplace"] is not False


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, fx.Node)]


def memory_of(*nodes: Any) -> set[int]:
    """The memories that tensors lie in; numbers that tell whether two are the same, while both live."""
    return storages([value_of(node) for node in nodes])


def storages(values: Any) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def is_written(nodes: Iterable[fx.Node], memory: set[int]) -> bool:
    """Whether one of the nodes may write to such memory."""
    for node in nodes:
        targets = written(node)
        if targets is None or memory & memory_of(*targets):
            return True
    return False


def is_private(node: fx.Node) -> bool:
    """Whether nobody else looks at a tensor's memory: it is the graph's own, and each step has one user."""
    memory = memory_of(node)
    for other in node.graph.nodes:
        if memory & memory_of(other) and (other.op in ("placeholder", "get_attr") or len(other.users) != 1):
            return False
        if other is node:
            return True
    return False


def moved_past(nodes: set[fx.Node], end: fx.Node) -> str | None:
    """Why all of ``nodes`` may not be computed where the last of them, ``end``, is; None if they may."""
    read, node = set(), min(nodes)
    kept = {written_node for n in nodes for written_node in written(n) or () if written_node not in nodes}
    while node is not end:
        if node in nodes:
            read |= memory_of(*(n for n in node.all_input_nodes if n not in nodes))
        elif changes_mode(node):
            return f"{node.name} stands in its midst, and changes the mode"
        elif is_written((node,), read) or memory_of(*node.all_input_nodes) & memory_of(*kept):
            return f"{node.name} stands in its midst, and may write to what it reads"
        node = node.next
    return None

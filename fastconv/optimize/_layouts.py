"""One conversion of a graph's images to channels_last, where most convolutions are faster, instead of many.

Strides may change where nothing but strides shows it. So the graph is run without data, once more, and
whatever meets a tensor with other strides must be known to compute the same values from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ._effects import INPLACE, is_written, memory_of, storages
from ._graph_chains import convolution_of
from ._idioms import COPIES, CUTS, PERMUTATIONS, VIEWS, is_image, name_of, value_of
from ._rewrite import memory_format_in_graph, no_guards, same_strides

_LEAST = 2  # convolutions: for one, the conversions there and back take what it gains

# What computes the same values whatever the strides; a view that they do not allow raises.
_AGNOSTIC = {
    *VIEWS, *COPIES, *PERMUTATIONS, *CUTS, *(INPLACE - {"setitem"}),
    "conv2d", "convolution", "conv_transpose2d", "batch_norm", "group_norm", "layer_norm", "linear",
    "matmul", "softmax", "prelu", "dropout", "dropout2d", "relu", "relu6", "silu", "gelu", "hardtanh",
    "sigmoid", "hardsigmoid", "hardswish", "tanh", "mish", "elu", "leaky_relu", "softplus", "add", "sub",
    "mul", "div", "truediv", "neg", "abs", "exp", "sqrt", "rsqrt", "pow", "square", "clamp", "maximum",
    "minimum", "where", "mean", "sum", "amax", "cat", "stack", "chunk", "split", "unbind", "expand", "to",
    "float", "detach", "pad", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "interpolate", "pixel_shuffle", "channel_shuffle", "size", "dim", "numel", "zeros_like", "ones_like",
}  # fmt: skip


class _Depends(Exception):
    """Something in the graph looks at strides."""


def use_channels_last(graph_module: fx.GraphModule) -> bool:
    """In place; whether it was done. The graph's results keep their strides."""
    graph = graph_module.graph
    convolutions = [given for given in map(convolution_of, graph.nodes) if given is not None]
    if len(convolutions) < _LEAST or any(value_of(g["input"]).device.type != "cpu" for g in convolutions):
        return False
    weights = {given["weight"] for given in convolutions}
    inputs = [node for node in graph.find_nodes(op="placeholder") if node not in weights]
    images = [node for node in inputs if is_image(value_of(node)) and _is_contiguous_image(value_of(node))]
    if not images or is_written(graph.nodes, memory_of(*images)):
        return False
    mode = value_of(images[0]).fake_mode
    try:
        with no_guards(mode), mode:
            values = _values(graph, images)
        outputs = _outputs(graph, values)
    except Exception:  # an operator that refuses such strides says so in its own way
        return False
    last = graph.find_nodes(op="placeholder")[-1]
    for image in images:
        with graph.inserting_after(last):
            converted = graph.call_method("contiguous", (image,), {"memory_format": torch.channels_last})
        image.replace_all_uses_with(
            converted, delete_user_cb=lambda user, own=converted: user is not own and user.op != "output"
        )
        converted.meta["example_value"] = values[image]
    for node, value in values.items():
        if node not in images:
            node.meta["example_value"] = value
    output = graph.output_node()
    for node, memory_format in outputs.items():
        with graph.inserting_before(output):
            restored = graph.call_method("contiguous", (node,), {"memory_format": memory_format})
        restored.meta["example_value"] = node.meta["example_value"].contiguous(memory_format=memory_format)
        output.replace_input_with(node, restored)
    return True


def _is_contiguous_image(image: torch.Tensor) -> bool:
    """And not channels_last too."""
    many = image.shape[1] > 1 and (image.shape[2], image.shape[3]) != (1, 1)
    return many and image.is_floating_point() and memory_format_in_graph(image) == torch.contiguous_format


def _values(graph: fx.Graph, images: list[fx.Node]) -> dict[fx.Node, Any]:
    """Of all nodes, if those of the images were channels_last."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op in ("placeholder", "get_attr"):
            values[node] = value_of(node)
            if node in images:
                values[node] = values[node].contiguous(memory_format=torch.channels_last)
            continue
        moved = [n for n in node.all_input_nodes if not _same(values[n], value_of(n))]
        if not moved and not any(values[n] is not value_of(n) for n in node.all_input_nodes):
            values[node] = value_of(node)
            continue
        if moved and not _is_agnostic(node):
            raise _Depends(node.name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        function = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        values[node] = function(*args, **kwargs)
        if _types(values[node]) != _types(value_of(node)):  # autocast within the graph is not on here
            raise _Depends(node.name)
        was_view = memory_of(node) & memory_of(*node.all_input_nodes)
        is_view = storages(values[node]) & storages([values[n] for n in node.all_input_nodes])
        if bool(was_view) != bool(is_view):  # a reshape that copies now
            outputs = (n for n in graph.output_node().all_input_nodes if n is not node)
            if is_written(graph.nodes, was_view) or was_view & memory_of(*outputs):
                raise _Depends(node.name)
    return values


def _types(value: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_agnostic(node: fx.Node) -> bool:
    if (getattr(node.target, "__module__", None) or "").startswith("fastconv."):
        return True
    if getattr(node.target, "namespace", None) == "fastconv":
        return True
    return name_of(node).removesuffix("_") in _AGNOSTIC


def _outputs(graph: fx.Graph, values: dict[fx.Node, Any]) -> dict[fx.Node, torch.memory_format]:
    """The results that have to be brought back into the memory format that they had."""
    outputs, found = graph.output_node().all_input_nodes, {}
    for node in outputs:
        if node.op == "placeholder" or _same(values[node], value_of(node)):
            continue
        others = [n for n in graph.nodes if n is not node and (n in outputs or n.op == "placeholder")]
        if memory_of(node) & memory_of(*others):
            raise _Depends("a result is a view of another")
        value = value_of(node)
        if value.is_contiguous():
            found[node] = torch.contiguous_format
        elif value.dim() == 4 and memory_format_in_graph(value) is not None:
            found[node] = memory_format_in_graph(value)
        else:
            raise _Depends("a result is not dense")
    return found


def _same(new: Any, old: Any) -> bool:
    """Whether tensors have the same strides."""
    pairs = zip(tree_leaves(new), tree_leaves(old))
    return all(
        same_strides(zip(a.shape, a.stride(), b.stride())) for a, b in pairs if isinstance(a, torch.Tensor)
    )

"""Chains of layers in a module's own forward: convolution, batch normalisation, sum, activation.

A module's forward is traced by itself: its children are called, not looked into. Where it passes a
convolution to a batch normalisation, and that to a sum or an activation, and nothing else reads what is in
between, one call stands for all of them. That call looks at the layers as they are when it comes: what no
longer is as it was, such as a layer with a hook, runs as it did before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..nn._convolution import takes
from ..nn._rules import is_watched
from ..nn.conv2d import Conv2d
from ..nn.conv_bn_act import conv_norm_act
from ..nn.depthwise_conv2d import DepthwiseConv2d
from ..ops._activation import activate
from ..ops._operator import PLAIN

CONVOLUTIONS = (nn.Conv2d, Conv2d, DepthwiseConv2d)
ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
_FUNCTIONS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    nn.functional.relu: "relu",
    nn.functional.relu_: "relu",
    nn.functional.relu6: "relu6",
    nn.functional.silu: "silu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_SUMS = (operator.add, operator.iadd, torch.add)
# Layers that leave their input alone, and return something else.
_HARMLESS = (*CONVOLUTIONS, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Chain:
    """One convolution and what is computed with it.

    Attributes:
        conv, norm: names of the layers, as the module calls them.
        activation: its name, or None.
        layer: name of the activation's layer; None if there is none, or it is a function.
        sums: whether something is added before the activation.
    """

    conv: str
    norm: str
    activation: str | None
    layer: str | None
    sums: bool

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.conv, self.norm) if self.layer is None else (self.conv, self.norm, self.layer)

    def __str__(self) -> str:
        parts = [self.conv, self.norm, *(["sum"] if self.sums else []), self.layer or self.activation]
        return " + ".join(part for part in parts if part)


class _Proxy(fx.Proxy):
    """``a += b`` writes to a, where torch.fx by itself would make it ``a = a + b``."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Of one module's forward; its children are leaves."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def find_chains(
    module: nn.Module, left: tuple[str, ...], forward: str = "forward"
) -> tuple[fx.Graph, list[Chain]]:
    """A module's forward with a call in each chain's place, and the chains.

    ``left``: layers to leave alone. ``forward``: name of the method.

    Raises what tracing raises, where the forward cannot be traced.
    """
    tracer = _Tracer()
    tracer.traced_func_name = forward
    graph = tracer.trace(module)
    chains = []
    for node in list(graph.nodes):
        if node.op != "call_module" or type(_child(module, node)) is not nn.BatchNorm2d:
            continue
        conv = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(conv, fx.Node) or not _is_convolution(module, conv) or set(conv.users) != {node}:
            continue
        if conv.target in left or node.target in left or _calls(graph, node.target) > 1:
            continue
        chains.append(_replace(graph, module, conv, node))
    graph.lint()
    return graph, chains


def _child(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(node.target)


def _is_convolution(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return type(_child(module, node)) in CONVOLUTIONS


def _calls(graph: fx.Graph, target: str) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.nodes)


def _replace(graph: fx.Graph, module: nn.Module, conv: fx.Node, norm: fx.Node) -> Chain:
    last, residual = norm, None
    added = _only_user(norm)
    if added is not None and (other := _other_term(added, norm)) and _nothing_is_written(module, conv, added):
        last, residual = added, other
    activation, layer = None, None
    after = _only_user(last)
    if after is not None and (found := _activation(module, after)) and _follows(module, last, after):
        last, (activation, layer) = after, found
    with graph.inserting_before(last):
        layers = [graph.get_attr(name) if name else None for name in (conv.target, norm.target, layer)]
        call = graph.call_function(run_chain, (*layers, activation, conv.args[0], residual))
    last.replace_all_uses_with(call)
    for node in (last, *((added,) if residual is not None and last is not added else ()), norm, conv):
        if not node._erased:
            graph.erase_node(node)
    return Chain(conv.target, norm.target, activation, layer, residual is not None)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_term(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """What a sum adds to a term; None if the node is no sum of two tensors that may overwrite that term."""
    is_sum = node.op == "call_function" and node.target in _SUMS
    is_sum = is_sum or (node.op == "call_method" and node.target in ("add", "add_"))
    if not is_sum or len(node.args) != 2 or node.kwargs or node.args.count(term) != 1:
        return None
    in_place = node.target in (operator.iadd, "add_")
    other = node.args[1] if node.args[0] is term else node.args[0]
    if not isinstance(other, fx.Node) or (in_place and node.args[0] is not term):
        return None
    return other


def _activation(module: nn.Module, node: fx.Node) -> tuple[str, str | None] | None:
    """Its name, and that of its layer."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        name = activation_of(_child(module, node))
        return None if name is None else (name, node.target)
    names = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
    if node.target in names and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
        return names[node.target], None
    return None


def activation_of(layer: nn.Module) -> str | None:
    name = ACTIVATIONS.get(type(layer))
    return "gelu_tanh" if name == "gelu" and layer.approximate == "tanh" else name


def _follows(module: nn.Module, node: fx.Node, after: fx.Node) -> bool:
    return node.next is after or _nothing_is_written(module, node, after)


def _nothing_is_written(module: nn.Module, first: fx.Node, last: fx.Node) -> bool:
    """Whether what stands between may change places with ``first``: layers that write to no input."""
    node = first.next
    while node is not last:
        if node.op == "call_module" and not _is_harmless(_child(module, node)):
            return False
        if node.op not in ("call_module", "get_attr") and node.target is not run_chain:
            return False
        node = node.next
    return True


def _is_harmless(layer: nn.Module) -> bool:
    """It does not write to its input; in-place activations may write to what stands before them."""
    if type(layer) in _HARMLESS:
        return not is_watched(layer)
    if not isinstance(layer, nn.Sequential) or is_watched(layer) or len(layer) == 0:
        return False
    first, *rest = layer
    return _is_harmless(first) and all(_is_harmless(part) or activation_of(part) for part in rest)


def run_chain(
    conv: nn.Module,
    norm: nn.Module,
    layer: nn.Module | None,
    activation: str | None,
    input: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """A chain in one call; layer by layer, where a layer is no longer what it was or a tensor is unusual."""
    layers = (conv, norm) if layer is None else (conv, norm, layer)
    if (
        type(conv) in CONVOLUTIONS
        and type(norm) is nn.BatchNorm2d
        and (layer is None or activation_of(layer) == activation)
        and getattr(conv, "activation", None) is None
        and not any(map(is_watched, layers))
        and type(input) in PLAIN
        and takes(input, conv.weight, conv.bias)
        and _is_ordinary(norm, conv, input)
        and (residual is None or _fits(conv, input, residual))
    ):
        return conv_norm_act(conv, norm, activation, input, residual, getattr(conv, "backend", None))
    output = norm(conv(input))
    output = output if residual is None else output + residual
    return layer(output) if layer is not None else activate(output, activation)


def _is_ordinary(norm: nn.BatchNorm2d, conv: nn.Module, input: torch.Tensor) -> bool:
    numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        input.shape[1] == conv.in_channels  # else PyTorch's own error
        and norm.num_features == conv.out_channels
        and (norm.running_mean is not None or not norm.track_running_stats)
        and all(t is None or (type(t) in PLAIN and t.device == input.device) for t in numbers)
        and (not norm.training or input.shape[0] * input.shape[2] * input.shape[3] > 1)
    )


def _fits(conv: nn.Conv2d, input: torch.Tensor, residual: torch.Tensor) -> bool:
    """A residual of another shape or type would be broadcast or converted."""
    if type(residual) not in PLAIN or residual.dtype != input.dtype or residual.dim() != 4:
        return False
    if residual.device != input.device or residual.shape[:2] != (input.shape[0], conv.out_channels):
        return False
    if isinstance(conv.padding, str):
        padding = (0, 0) if conv.padding == "valid" else tuple((k - 1) * d / 2 for k, d in _windows(conv))
    else:
        padding = conv.padding
    return tuple(residual.shape[2:]) == tuple(
        int(size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, (k, d), s in zip(input.shape[2:], padding, _windows(conv), conv.stride)
    )


def _windows(conv: nn.Conv2d) -> zip:
    return zip(conv.kernel_size, conv.dilation)


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """``forward(self, ...)``, which finds the layers on ``self`` at each call."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<fastconv.optimize>", "exec"), scope)
    return scope["forward"]

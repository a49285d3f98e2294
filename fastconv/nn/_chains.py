"""Layers that follow each other: a chain of them, such as convolution, norm and activation, in one call.

``RUN``, ``DEFER`` and ``ADD`` are what :mod:`fastconv.optimize` writes into forwards. All of them look at the
layers in each call: what is unusual runs as PyTorch runs it, layer by layer.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, EllipsisType, FunctionType
from typing import Any

import torch
from torch import nn

from ..ops._arguments import output_size, padding_sides
from ..ops._operator import PLAIN, is_autocast
from ..ops._packed_weights import made_of
from ..ops.conv2d import conv2d
from ..ops.conv_bn_act import conv_bn_act, convolve
from ._convolution import takes
from ._inference import run_known, run_known_two, run_new, run_new_two
from ._rules import is_watched
from .conv2d import Conv2d
from .depthwise_conv2d import DepthwiseConv2d

ALONE = "_fastconv_alone"  # on a layer that is to run by itself

CONVOLUTIONS = (nn.Conv2d, Conv2d, DepthwiseConv2d)
ACTIVATION_LAYERS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}
_NAMES = {kind: name for name, kind in ACTIVATION_LAYERS.items()}
_FUNCTIONS = {
    torch.relu: "relu",
    nn.functional.relu: "relu",
    nn.functional.relu6: "relu6",
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
}
# Whose calls leave their inputs and all else alone, but for a normalisation's own averages.
_CALM = (*CONVOLUTIONS, nn.BatchNorm2d, nn.Identity, nn.AvgPool2d, nn.MaxPool2d)

Layer = Callable[[torch.Tensor], torch.Tensor]


def activation_of(layer: Layer) -> str | None:
    """The name of a layer or function of PyTorch's that a convolution can apply; None if it is none."""
    name = _NAMES.get(type(layer))
    if name is not None:
        return "gelu_tanh" if name == "gelu" and layer.approximate == "tanh" else name
    words = {}
    if type(layer) is functools.partial:
        layer, words = layer.func, layer.keywords
    name = _FUNCTIONS.get(layer) if type(layer) in (FunctionType, BuiltinFunctionType) else None
    if name == "gelu" and words.keys() <= {"approximate"}:
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(words.get("approximate", "none"))
    return name if words.keys() <= {"inplace"} else None


def is_alone(layer: Layer | None) -> bool:
    """Whether it has to be called itself: others look on, or ``optimize`` was told to leave it."""
    return isinstance(layer, nn.Module) and (ALONE in layer.__dict__ or is_watched(layer))


def chain_length(layers: Sequence[Layer], first: int) -> int:
    """How many layers from the first on are a chain, by their types; 1 if none is."""
    kind = type(layers[first])
    if kind not in CONVOLUTIONS and kind is not nn.Linear or ALONE in layers[first].__dict__:
        return 1
    end = first + 1
    if kind is not nn.Linear and end < len(layers) and type(layers[end]) is nn.BatchNorm2d:
        end += ALONE not in layers[end].__dict__
    if end < len(layers) and activation_of(layers[end]) is not None:
        end += ALONE not in getattr(layers[end], "__dict__", ())
    return end - first


def run_layers(layers: Sequence[Layer | EllipsisType], input: Any) -> Any:
    """Calls layers one after the other, ``...`` for none; chains of them in one call each."""
    layers = _flat(layers)
    first = 0
    while first < len(layers):
        length = chain_length(layers, first)
        if type(layers[first]) is nn.Linear:
            input = _run_linear(layers[first : first + length], input)
        elif length == 1:
            input = layers[first](input)
        else:
            parts, end = _parts(layers[first : first + length]), first + length
            if _may_be_first(parts) and end < len(layers):
                more = chain_length(layers, end)
                output = _run_two(parts, _parts(layers[end : end + more]), input)
                if output is not None:
                    input, first = output, end + more
                    continue
            input = run_chain(*parts, input)
        first += length
    return input


@dataclass(frozen=True)
class FusedKind:
    """What a class is whose forward ``optimize`` has rewritten, as its attribute ``FUSED``.

    Attributes:
        original: the class that it stands for.
        function: that class's forward, of which this class's own is made.
        deferred: the forward, but it may return a :class:`Pending`.
        plain: the forward only calls the module's children, one after the other.
        is_container: it is that of ``nn.Sequential``.
    """

    original: type[nn.Module]
    function: Any
    deferred: Callable[[nn.Module, Any], Any]
    plain: bool
    is_container: bool


FUSED = "_fastconv_fused"


def fused_kind(layer: Any) -> FusedKind | None:
    return type(layer).__dict__.get(FUSED)


def _flat(layers: Sequence[Layer | EllipsisType]) -> list[Layer]:
    """The layers in containers too; without those that a condition leaves out."""
    flat = []
    for layer in layers:
        fused = fused_kind(layer)
        is_container = type(layer) is nn.Sequential if fused is None else fused.is_container
        if is_container and not is_alone(layer):
            flat += _flat(layer._modules.values())
        elif layer is not ...:
            flat.append(layer)
    return flat


def _parts(chain: Sequence[Layer]) -> tuple[nn.Module, nn.Module | None, Layer | None]:
    """Convolution, normalisation or None, activation or None."""
    conv, *rest = chain
    norm = rest.pop(0) if rest and type(rest[0]) is nn.BatchNorm2d else None
    return conv, norm, rest[0] if rest else None


@dataclass
class Pending:
    """A convolution, and its normalisation if there is one, that wait for what is added to them.

    Attributes:
        conv, norm: these.
        input: of the convolution, or of ``first``.
        first: a chain before it that waits too, for one call to run both; or None.
    """

    conv: nn.Module
    norm: nn.Module | None
    input: torch.Tensor
    first: tuple[nn.Module, nn.Module | None, Layer | None] | None = None


def defer(layers: Sequence[Layer | EllipsisType], input: Any, between: Sequence[Layer | None] = ()) -> Any:
    """As :func:`run_layers`, but a chain at the end may wait, for one call to do it with a sum.

    Args:
        layers, input: as in :func:`run_layers`.
        between: what is called before the sum. It must not change what the chain reads.

    Returns:
        A tensor, or a :class:`Pending` for :func:`add`.
    """
    layers = _flat(layers)
    end = len(layers)
    while end and _passes(layers[end - 1]):
        end -= 1
    if type(input) in PLAIN:
        first = end - 2 if end > 1 and type(layers[end - 1]) is nn.BatchNorm2d else end - 1
        last = layers[end - 1] if end else None
        if first >= 0 and type(layers[first]) in CONVOLUTIONS:
            conv, norm, _ = _parts(layers[first:end])
            if not any(map(is_alone, (conv, norm))) and _are_calm(between, {conv, norm}):
                start = max(first - 3, 0)
                while start < first and start + chain_length(layers, start) < first:
                    start += 1
                parts = _parts(layers[start:first]) if start < first else (None, None, None)
                if not between and _may_be_first(parts) and not any(map(is_alone, parts)):
                    return Pending(conv, norm, run_layers(layers[:start], input), parts)
                return Pending(conv, norm, run_layers(layers[:first], input))
        elif isinstance(last, nn.Module) and _are_calm(between, set(last.modules()) if between else ()):
            return _defer_module(last, run_layers(layers[: end - 1], input))
    return run_layers(layers, input)


def _defer_module(module: nn.Module, input: Any) -> Any:
    if is_alone(module) or type(module).__call__ is not nn.Module.__call__:
        return module(input)
    fused = fused_kind(module)
    if fused is not None:
        return fused.deferred(module, input)
    if type(module).forward is nn.Sequential.forward:
        return defer(tuple(module._modules.values()), input)
    return module(input)


def _passes(layer: Layer) -> bool:
    """Whether it returns what it is given."""
    kind = type(layer)
    passes = may_pass(kind) and (kind is nn.Identity or not layer.training)
    return passes and not is_alone(layer)


def may_pass(kind: type) -> bool:
    """Whether layers of a type return what they are given, some of them in evaluation only."""
    return kind in (nn.Identity, nn.Dropout) or getattr(kind, "_fastconv_passes_in_evaluation", False)


def _are_calm(layers: Sequence[Layer | EllipsisType], waiting: Any) -> bool:
    """Whether calls of layers may go before those that wait."""
    return all(layer is None or _is_calm(layer, waiting) for layer in layers)


def _is_calm(layer: Any, waiting: Any) -> bool:
    if not isinstance(layer, nn.Module) or layer in waiting or is_watched(layer):
        return False
    kind = type(layer)
    if kind in _CALM:
        return True
    fused = fused_kind(layer)
    plain = kind.forward is nn.Sequential.forward if fused is None else fused.plain
    return plain and all(_is_calm(child, waiting) for child in layer._modules.values() if child is not None)


def add(left: Any, right: Any, inplace: bool, layers: Sequence[Layer | EllipsisType]) -> Any:
    """``left + right``, or ``left += right``, and layers on it. One of the two may be a :class:`Pending`."""
    pending, residual = (left, right) if type(left) is Pending else (right, left)
    layers = [layer for layer in layers if layer is not ...]
    if type(pending) is Pending:
        conv, norm, input = pending.conv, pending.norm, pending.input
        layer = layers[0] if layers and activation_of(layers[0]) is not None else None
        if pending.first is not None:
            output = _run_two(pending.first, (conv, norm, layer), input, residual)
            if output is not None:
                return run_layers(layers[layer is not None :], output)
            input = run_chain(*pending.first, input)
        fused = _run_fused(conv, norm, layer, input, residual) if type(residual) in PLAIN else None
        if fused is not None:
            return run_layers(layers[layer is not None :], fused)
        output = _one_by_one(conv, norm, None, input)
        left, right = (output, right) if pending is left else (left, output)
    return run_layers(layers, operator.iadd(left, right) if inplace else left + right)


RUN, DEFER, ADD = run_layers, defer, add


def run_chain(
    conv: nn.Module,
    norm: nn.Module | None,
    layer: Layer | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``layer(norm(conv(input)) + residual)`` in one call; layer by layer where something is unusual.

    That is a layer of another type, with hooks or a forward of its own, or a tensor that no kernel serves, or
    that would be broadcast or converted.
    """
    output = _run_fused(conv, norm, layer, input, residual, backend)
    return _one_by_one(conv, norm, layer, input, residual) if output is None else output


def _run_fused(conv, norm, layer, input, residual=None, backend=None) -> torch.Tensor | None:
    if not _has_types(conv, norm, layer):
        return None
    activation = None if layer is None else activation_of(layer)
    output = None if backend is not None else run_known(conv, norm, activation, input, residual)
    if output is None and _is_chain(conv, norm, input, residual):
        backend = backend or getattr(conv, "backend", None)
        output = conv_norm_act(conv, norm, activation, input, residual, backend)
    return output


Parts = tuple[nn.Module, nn.Module | None, Layer | None]  # of a chain


def _may_be_first(parts: Parts) -> bool:
    """Whether a chain is depthwise, in inference, so that a 1x1 convolution may join it."""
    conv, norm, _ = parts
    return norm is not None and not norm.training and conv.groups == conv.in_channels == conv.out_channels > 1


def _run_two(first: Parts, second: Parts, input: Any, residual: Any = None) -> torch.Tensor | None:
    """A depthwise chain and a 1x1 one in one call; None where they are none, or it is slower."""
    conv, norm, _ = second
    if type(conv) not in CONVOLUTIONS or norm is None or conv.kernel_size != (1, 1):
        return None
    if not (_has_types(*first) and _has_types(*second)):
        return None
    chains = [
        (*parts[:2], None if parts[2] is None else activation_of(parts[2])) for parts in (first, second)
    ]
    output = run_known_two(*chains, input, residual)
    if output is not None:
        return None if output is False else output
    depthwise = first[0]
    if (
        _is_chain(*first[:2], input)
        and conv.in_channels == depthwise.out_channels
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
        and takes(input, conv.weight, conv.bias)
        and _is_ordinary(conv, norm, input)
        and (residual is None or _fits(depthwise, conv.out_channels, input, residual))
    ):
        return run_new_two(*chains, input, residual)
    return None


def _one_by_one(conv, norm, layer, input, residual=None):
    output = conv(input)
    output = output if norm is None else norm(output)
    output = output if residual is None else output + residual
    return output if layer is None else layer(output)


def _has_types(conv, norm, layer) -> bool:
    return (
        type(conv) in CONVOLUTIONS
        and (norm is None or type(norm) is nn.BatchNorm2d)
        and (layer is None or _can_follow(norm, activation_of(layer)))
        and not any(map(is_alone, (conv, norm, layer)))
    )


def _is_chain(conv, norm, input, residual=None) -> bool:
    """Whether layers of these types, on these tensors, are what one call does."""
    return (
        getattr(conv, "activation", None) is None
        and torch.autograd.forward_ad._current_level < 0  # our operators have no forward-mode derivatives
        and getattr(conv, "algorithm", None) is None
        and type(input) in PLAIN
        and takes(input, conv.weight, conv.bias)
        and _is_ordinary(conv, norm, input)
        and (residual is None or _fits(conv, conv.out_channels, input, residual))
    )


def _can_follow(norm: nn.Module | None, activation: str | None) -> bool:
    """Without a normalisation, gradients of a curve would compute the convolution again."""
    curved = activation not in (None, "relu", "relu6")
    return activation is not None and not (norm is None and curved and torch.is_grad_enabled())


def _is_ordinary(conv: nn.Module, norm: nn.BatchNorm2d | None, input: torch.Tensor) -> bool:
    """Else PyTorch's layers raise errors of their own."""
    if input.shape[1] != conv.in_channels:
        return False
    if norm is None:
        return True
    numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    dtype = torch.get_autocast_dtype(input.device.type) if is_autocast(input) else input.dtype
    dtypes = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    return (
        norm.num_features == conv.out_channels
        and norm.eps > 0
        and type(norm.training) is bool
        and (norm.running_mean is None) == (norm.running_var is None)
        and (norm.running_mean is not None or not norm.track_running_stats)
        and all(
            t is None or (type(t) in PLAIN and t.device == input.device and t.dtype in dtypes)
            for t in numbers
        )
        and (not norm.training or input.shape[0] * input.shape[2] * input.shape[3] > 1)
    )


def _fits(conv: nn.Module, channels: int, input: torch.Tensor, residual: torch.Tensor) -> bool:
    """Whether a residual has the shape, type and device of what is normalised."""
    dtype = torch.get_autocast_dtype(input.device.type) if is_autocast(input) else input.dtype
    if type(residual) not in PLAIN or residual.dtype != dtype or residual.device != input.device:
        return False
    geometry = (conv.kernel_size, conv.stride, conv.dilation)
    if conv.padding_mode == "zeros":
        top, bottom, left, right = padding_sides(conv.padding, *geometry)
    else:
        left, right, top, bottom = conv._reversed_padding_repeated_twice
    sizes = (
        output_size(size, kernel, stride, padding, dilation)
        for size, kernel, stride, dilation, padding in zip(
            input.shape[2:], *geometry, (top + bottom, left + right)
        )
    )
    return residual.shape == (input.shape[0], channels, *sizes)


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    activation: str | None,
    input: torch.Tensor,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What layers of PyTorch, an addition and an activation do, ``norm``'s counter of batches too."""
    if backend is None and (output := run_new(conv, norm, activation, input, residual)) is not None:
        return output
    if conv.padding_mode != "zeros":
        input = nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    geometry = {
        "stride": conv.stride,
        "padding": conv.padding if conv.padding_mode == "zeros" else 0,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }
    if norm is None:
        return convolve(input, conv.weight, conv.bias, geometry, activation, residual, backend)
    training = norm.training or norm.running_mean is None
    tracks = norm.training and norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else norm.momentum
    counts = tracks and norm.num_batches_tracked is not None
    if counts and norm.momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked + 1)
    running = (None, None) if training and not tracks else (norm.running_mean, norm.running_var)
    output = conv_bn_act(
        input,
        conv.weight,
        conv.bias,
        *running,
        norm.weight,
        norm.bias,
        training=training,
        momentum=momentum,
        eps=norm.eps,
        **geometry,
        activation=activation,
        residual=residual,
        backend=backend,
    )
    if counts:
        norm.num_batches_tracked.add_(1)
    return output


def _run_linear(layers: Sequence[Layer], input: Any) -> Any:
    """A linear layer and perhaps an activation; of channels_last images, in inference, a 1x1 convolution."""
    linear, *after = layers
    if not torch.is_grad_enabled() and type(input) in PLAIN and input.dim() == 4 and input.is_contiguous():
        images = input.permute(0, 3, 1, 2)
        if not any(map(is_alone, layers)) and input.shape[3] == linear.in_features:
            # Detached, for a view of the parameter itself would keep it alive.
            weight = made_of((linear.weight,), "1x1", (), lambda weight: weight.detach()[:, :, None, None])
            if weight is not None and takes(images, weight, linear.bias):
                activation = activation_of(after[0]) if after else None
                return conv2d(images, weight, linear.bias, activation=activation).permute(0, 2, 3, 1)
    output = linear(input)
    return after[0](output) if after else output

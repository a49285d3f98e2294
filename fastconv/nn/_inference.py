"""Chains in inference, again: a call like one that was looked at before needs few looks.

All the checks of :mod:`fastconv.nn._chains` take longer than a small convolution. What they came to is kept
in the plans of :mod:`fastconv.ops._plans`, the folded and packed weights in
:mod:`fastconv.ops._packed_weights`, which notices each change of the six tensors that they are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import backends
from ..ops import _plans, conv2d, depthwise_conv2d, separable_conv2d
from ..ops._activation import add_and_activate
from ..ops._arguments import padding_sides
from ..ops._folded_weights import fold_and_pack
from ..ops._packed_weights import kept_of, made_of, packed_weight

Chain = tuple[nn.Module, nn.Module, str | None]  # convolution, normalisation, activation


def _is_plain(conv: nn.Module, norm: nn.Module | None) -> bool:
    own = conv.__dict__
    if norm is not None:
        state = norm.__dict__
        if (
            state["training"]
            or "running_mean" not in state["_buffers"]
            or "weight" not in state["_parameters"]
        ):
            return False
    return not (
        "weight" not in own["_parameters"]
        or "bias" not in own["_parameters"]
        or own["padding_mode"] != "zeros"
        or own.get("activation") is not None
        or own.get("backend") is not None
        or own.get("algorithm") is not None
    )


def _key(conv: nn.Module, norm: nn.Module | None, activation: str | None, input: Any, residual: Any) -> Any:
    """Of all that decides how a chain runs but its values; None where the layers must be looked at."""
    if not _is_plain(conv, norm):
        return None
    own = conv.__dict__
    parameters = own["_parameters"]
    tensors = (input, parameters["weight"], parameters["bias"], residual)
    geometry = own["stride"], own["padding"], own["dilation"], own["groups"]
    name = "convolution" if norm is None else "chain"
    return _plans.key_of(name, tensors, *geometry, activation)


def _tensors(conv: nn.Module, norm: nn.Module) -> tuple[torch.Tensor | None, ...]:
    parameters = conv.__dict__["_parameters"]
    numbers, running = norm.__dict__["_parameters"], norm.__dict__["_buffers"]
    return (
        parameters["weight"],
        parameters["bias"],
        running["running_mean"],
        running["running_var"],
        numbers["weight"],
        numbers["bias"],
    )


def run_known(
    conv: nn.Module, norm: nn.Module | None, activation: str | None, input: Any, residual: Any
) -> torch.Tensor | None:
    """``act(norm(conv(input)) + residual)`` as in an earlier call; None where there was none."""
    key = _key(conv, norm, activation, input, residual)
    found = _plans.find(key)
    if found is None:
        return None
    run, plan, making = found
    if norm is None:
        return run(plan, _unfolded(conv, making), input, residual, activation)
    made = kept_of(_tensors(conv, norm), "fold_and_pack", (norm.__dict__["eps"], *making))
    return None if made is None else run(plan, made, input, residual, activation)


def run_new(
    conv: nn.Module,
    norm: nn.Module | None,
    activation: str | None,
    input: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """The same, of a chain that was checked; None where nothing may be kept."""
    key = _key(conv, norm, activation, input, residual)
    if key is None or (norm is not None and norm.running_mean is None):
        return None
    geometry = conv.stride, conv.padding, conv.dilation
    if conv.groups == input.shape[1] > 1 and conv.weight.shape[1] == 1:
        inner = None if residual is not None else activation
        plan = depthwise_conv2d.make_plan(input, conv.weight, conv.bias, *geometry, inner)
        found = _run_depthwise, plan, (conv.groups, None)
    else:
        tensors = (input, conv.weight, conv.bias, residual)
        plan = conv2d.make_plan(*tensors, *geometry, conv.groups, activation)
        found = _run_dense, plan, (conv.groups, plan[1] if plan[0] == "cpu" else None)
    run, plan, making = found
    if norm is None:
        made = _unfolded(conv, making)
    else:
        made = made_of(_tensors(conv, norm), "fold_and_pack", (norm.eps, *making), fold_and_pack)
    if made is None:
        return None
    _plans.keep(key, found)
    return run(plan, made, input, residual, activation)


def _unfolded(conv: nn.Module, making: tuple[int, str | None]) -> tuple[torch.Tensor | None, ...]:
    parameters = conv.__dict__["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    return (weight, bias) if making[1] is None else (weight, bias, packed_weight("conv2d", weight, *making))


def _run_dense(plan, made, input, residual, activation):
    weight, bias, *packed = made
    return conv2d.run_plan(plan, input, weight, bias, residual, *(packed or [None]), activation)


def _run_depthwise(plan, made, input, residual, activation):
    if residual is None:
        return depthwise_conv2d.run_plan(plan, input, *made, activation)
    return add_and_activate(depthwise_conv2d.run_plan(plan, input, *made, None), residual, activation)


# A depthwise chain and then one of a 1x1 convolution, as one call of separable_conv2d.


def _key_of_two(first: Chain, second: Chain, input: Any, residual: Any) -> Any:
    if not (_is_plain(*first[:2]) and _is_plain(*second[:2])):
        return None
    own, other = first[0].__dict__, second[0].__dict__
    parameters, others = own["_parameters"], other["_parameters"]
    tensors = (input, parameters["weight"], parameters["bias"], others["weight"], others["bias"], residual)
    geometry = own["stride"], own["padding"], own["dilation"], own["groups"]
    product = other["stride"], other["padding"], other["groups"]
    return _plans.key_of("two chains", tensors, *geometry, *product, first[2], second[2])


def run_known_two(first: Chain, second: Chain, input: Any, residual: Any) -> torch.Tensor | None | bool:
    """Both as in an earlier call; None where there was none, False where it is better not to."""
    found = _plans.find(_key_of_two(first, second, input, residual))
    if not found:
        return found
    made = [
        kept_of(_tensors(conv, norm), "fold_and_pack", (norm.__dict__["eps"], *making))
        for (conv, norm, _), making in zip((first, second), found[1])
    ]
    return None if None in made else _run_two(found[0], made, first, second, input, residual)


def run_new_two(
    first: Chain, second: Chain, input: torch.Tensor, residual: torch.Tensor | None
) -> torch.Tensor | None:
    """The same, of chains that were checked; None where nothing may be kept, or it would be slower."""
    key = _key_of_two(first, second, input, residual)
    (conv, norm, _), (product, other, _) = first, second
    if key is None or norm.running_mean is None or other.running_mean is None:
        return None
    if backends._state.backend is not None or not separable_conv2d.is_faster_fused(
        input, product.weight, conv.stride
    ):
        return _plans.keep(key, False) or None
    geometry = (
        conv.stride,
        padding_sides(conv.padding, conv.kernel_size, conv.stride, conv.dilation),
        conv.dilation,
    )
    making = (conv.groups, None), (1, separable_conv2d.PRODUCTS["strips"])
    made = [
        made_of(_tensors(conv, norm), "fold_and_pack", (norm.eps, *how), fold_and_pack)
        for (conv, norm, _), how in zip((first, second), making)
    ]
    if made[0] is None or made[1] is None:
        return None
    _plans.keep(key, (geometry, making))
    return _run_two(geometry, made, first, second, input, residual)


def _run_two(geometry, made, first, second, input, residual):
    (weight, bias), (product, product_bias, packed) = made
    tensors = (input, weight, product, bias, product_bias, residual, packed)
    return separable_conv2d.operator("cpu", *tensors, *geometry, first[2], second[2], "strips")

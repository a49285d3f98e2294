"""Convolution, batch normalisation, residual and activation in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..backends import Choice
from . import _moments
from ._activation import activate, activation_backward, add_and_activate, check_activation
from ._arguments import check_tensor
from ._folded_weights import folded_weight
from ._operator import (
    Operator,
    as_memory_format,
    autocast,
    is_autocast,
    map_one_by_one,
    memory_format_of,
    new_output,
    sum_type,
)
from .conv2d import conv2d, conv2d_reference
from .depthwise_conv2d import depthwise_conv2d


def conv_bn_act_reference(
    input: torch.Tensor,  # (N, C, H, W)
    weight: torch.Tensor,  # (M, C/G, KH, KW)
    bias: torch.Tensor | None,  # (M,), and so are all numbers of channels
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    residual: torch.Tensor | None = None,  # (N, M, E, F)
) -> torch.Tensor:
    """The definition: a convolution, normalised by its own statistics or by the running ones."""
    sums = conv2d_reference(input, weight, bias, stride, padding, dilation, groups)
    if not training:
        return normalized(sums, running_mean, running_var, bn_weight, bn_bias, eps, activation, residual)
    mean, variance = _statistics(sums)
    _update(running_mean, running_var, mean, variance, momentum, sums)
    return normalized(sums, mean, variance, bn_weight, bn_bias, eps, activation, residual)


def _statistics(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel."""
    mean = sums.mean((0, 2, 3))
    return mean, (sums - mean[:, None, None]).square().mean((0, 2, 3))


def normalized(sums, mean, variance, weight, bias, eps, activation, residual):
    """``act((sums - mean) / sqrt(variance + eps) * weight + bias + residual)`` of ``(N, M, E, F)`` sums."""
    output = (sums - mean[:, None, None]) * torch.rsqrt(variance + eps)[:, None, None]
    if weight is not None:
        output = output * weight[:, None, None]
    if bias is not None:
        output = output + bias[:, None, None]
    return activate(output if residual is None else output + residual, activation)


def conv_bn_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str | None = "relu",
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Convolution, batch normalisation, residual and activation.

    ``y = act(bn(conv(x, w, b)) + r)``, ``bn(s) = (s - mean) / sqrt(variance + eps) * bn_weight + bn_bias``
    for each of M channels. The same as ``torch.nn.functional.conv2d``, ``batch_norm``, an addition and an
    activation; differentiable twice. The output has the memory format of the input.

    Training: mean and variance are those of the batch, and the running ones are updated in place, as
    ``torch.nn.functional.batch_norm`` does. For the gradient only the input and the convolution's result are
    kept, and the residual where the activation needs it.
    Else: the running ones are folded into the convolution, ``w' = p*w``, ``b' = p*(b - running_mean) +
    bn_bias`` with ``p = bn_weight / sqrt(running_var + eps)``, unless a gradient of ``bn_weight`` or
    ``bn_bias`` is needed. Where none is, folded weights are kept from call to call, like packed ones
    (:func:`fastconv.clear_packed_weights`).

    Args:
        input: ``(N, C, H, W)``; float32, bfloat16, float16 (summed in float32) or float64.
        weight: ``(M, C/G, KH, KW)``, as in :func:`fastconv.conv2d`, or as in
            :func:`fastconv.depthwise_conv2d` where ``groups`` is C.
        bias: ``(M,)`` or None.
        running_mean, running_var: ``(M,)``, or None in training, where nothing is to be updated.
        bn_weight, bn_bias: ``(M,)``, or None for ones and zeros.
        training: whether the batch's own mean and variance are taken.
        momentum: of the running ones: ``running = (1 - momentum) * running + momentum * batch``, where the
            batch's variance is the unbiased one.
        eps: added to the variance.
        stride, padding, dilation, groups: of the convolution, as in :func:`fastconv.conv2d`.
        activation: None, ``"relu"``, ``"relu6"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        residual: what is added before the activation, in the shape of the output, or None.
        backend: see :mod:`fastconv.backends`; None takes the measured best.

    Returns:
        ``(N, M, E, F)``.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it and says what is allowed.
        BackendError: the named backend cannot run this call; the message says why.

    Reference: Ioffe and Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """
    check_tensor("input", input, rank=4)
    if is_autocast(input):
        input, weight, bias, residual = autocast(input.device.type, (input, weight, bias, residual))
    check_tensor("weight", weight, rank=4, like=input)
    numbers = (running_mean, running_var, bn_weight, bn_bias)
    _check(input, weight, *numbers, training, momentum, eps, activation)
    chosen = choose(backend, None, input)  # raises in this operator's name, before anything is computed
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    takes_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in numbers)
    if not training and not takes_gradient:
        weight, bias = folded_weight(weight, bias, *numbers, eps)
        return convolve(input, weight, bias, geometry, activation, residual, backend)
    gathered = None
    if training and chosen in _moments.BACKENDS:
        gathered = _moments.convolve(input, weight, bias, **geometry, backend=backend, chosen=chosen)
    sums, *moments = gathered or [convolve(input, weight, bias, geometry, None, None, backend)]
    if not training:  # the gradient of a folded weight would lose digits of those of bn_weight
        return add_and_activate(
            torch.nn.functional.batch_norm(sums, *numbers, False, 0.0, eps), residual, activation
        )
    return batch_norm_act(
        sums,
        *numbers,
        momentum=momentum,
        eps=eps,
        activation=activation,
        residual=residual,
        backend=backend,
        moments=moments,
    )


def batch_norm_act(
    input: torch.Tensor,  # (N, C, H, W)
    running_mean: torch.Tensor | None,  # (C,), or None, updated in place
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: torch.Tensor | None,  # (N, C, H, W), or None
    backend: str | None = None,
    algorithm: str | None = None,
    moments: Sequence[torch.Tensor] = (),  # mean and variance of input (C,), where they are known
) -> torch.Tensor:
    """Training's second half: normalises by the batch's mean and variance, adds, activates."""
    if residual is not None:
        check_tensor("residual", residual, rank=4, like=input)
        if residual.shape != input.shape:
            raise ValueError(
                f"residual must have the output's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
    if input.numel() == input.shape[1] > 0:
        raise ValueError(
            "training must be False, or the output have more than one value for each channel, got output of "
            f"shape {tuple(input.shape)}"
        )
    backend = choose(backend, algorithm, input)
    if backend == "aten":
        output = torch.nn.functional.batch_norm(
            input, running_mean, running_var, weight, bias, True, momentum, eps
        )
        return add_and_activate(output, residual, activation)
    if backend == "reference":
        exact = input.to(sum_type(input.dtype))
        mean, variance = _statistics(exact)
        output = normalized(exact, mean, variance, weight, bias, eps, activation, residual).to(input.dtype)
        output = as_memory_format(output, memory_format_of(input))
    else:
        exact = sum_type(input.dtype)
        weight, bias = (None if t is None else t.to(exact) for t in (weight, bias))
        operands = (input, residual, weight, bias)
        if moments:
            mean, variance = moments
            output = apply_operator(backend, *operands, mean, variance, eps, activation)
        else:
            output, mean, variance = operator(backend, *operands, eps, activation, algorithm)
    _update(running_mean, running_var, mean, variance, momentum, input)
    return output


def convolve(input, weight, bias, geometry, activation, residual, backend):
    if not (geometry["groups"] == input.shape[1] > 1 and weight.shape[1] == 1):
        return conv2d(
            input, weight, bias, **geometry, activation=activation, residual=residual, backend=backend
        )
    own = {name: value for name, value in geometry.items() if name != "groups"}
    if residual is None:
        return depthwise_conv2d(input, weight, bias, **own, activation=activation, backend=backend)
    return add_and_activate(
        depthwise_conv2d(input, weight, bias, **own, backend=backend), residual, activation
    )


def _check(
    input, weight, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, activation
) -> None:
    check_activation(activation)
    if not isinstance(training, bool):
        raise TypeError(f"training must be True or False, got {training!r}")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
    }
    for name, numbers in named.items():
        if numbers is None:
            continue
        check_tensor(name, numbers, rank=1)
        if numbers.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(numbers.shape)}")
        if numbers.device != input.device:
            raise ValueError(f"{name} is on {numbers.device}, but input is on {input.device}; move one")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both None")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be tensors where training=False, got None")


@torch.no_grad()
def _update(running_mean, running_var, mean, variance, momentum, sums) -> None:
    """The running averages, in place; the variance by the unbiased one, of count - 1."""
    count = sums.shape[0] * sums.shape[2] * sums.shape[3]
    if running_mean is None or count == 0:
        return
    batch = [mean.detach(), variance * (count / (count - 1))]
    running = [running_mean, running_var]
    batch = [new if new.dtype == old.dtype else new.to(old.dtype) for new, old in zip(batch, running)]
    if torch.compiler.is_compiling():
        torch._foreach_lerp_(running, batch, momentum)
        return
    # As PyTorch does: a gradient by running averages that were others then is no error.
    with torch.autograd._unsafe_preserve_version_counter(tuple(running)):
        torch._foreach_lerp_(running, batch, momentum)


choose = Choice(
    "conv_bn_act",
    algorithms={
        "cpu": ("vectorized", "plain"),
        "cuda": ("sliced", "plain"),
        "emulator": ("sliced", "plain"),
        "triton": ("sliced",),
        "aten": (),
        "reference": (),
    },
)


# The second half of training as an operator. Its other outputs are the batch's mean and variance.


def _check_normalize(input, residual, weight, bias, eps, activation, algorithm) -> None:
    check_tensor("input", input, rank=4)
    check_activation(activation)
    choose.check_algorithm("triton", algorithm)
    if residual is not None:
        _check_image("residual", residual, input)
    for name, numbers in (("weight", weight), ("bias", bias)):
        _check_numbers(name, numbers, input)


def _check_image(name, image, input) -> None:
    check_tensor(name, image, rank=4, like=input)
    if image.shape != input.shape:
        raise ValueError(f"{name} must have input's shape {tuple(input.shape)}, got {tuple(image.shape)}")


def _check_numbers(name, numbers, input) -> None:
    if numbers is None:
        return
    check_tensor(name, numbers, rank=1)
    exact = sum_type(input.dtype)
    if numbers.dtype != exact or numbers.device != input.device or numbers.shape[0] != input.shape[1]:
        raise ValueError(
            f"{name} must be ({input.shape[1]},) of {exact} on {input.device}, got {tuple(numbers.shape)} of "
            f"{numbers.dtype} on {numbers.device}"
        )


def new_numbers(input: torch.Tensor) -> torch.Tensor:
    """One of each channel, not initialised."""
    return torch.empty(input.shape[1], dtype=sum_type(input.dtype), device=input.device)


def _fake(input, residual, weight, bias, eps, activation, algorithm):
    return new_output(input, input.shape), new_numbers(input), new_numbers(input)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, residual, weight, bias, ctx.eps, ctx.activation, ctx.algorithm = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    kept = None if ctx.activation is None else residual  # nothing else asks for the sum
    ctx.save_for_backward(input, kept, weight, bias, mean, variance)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple:
    need_input, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    operands = (grad, *ctx.saved_tensors, ctx.eps, ctx.activation)
    if torch.is_grad_enabled():
        grads = _composed_gradients(*operands)
    else:
        needs_own = need_residual and ctx.activation is not None
        grads = backward_operator(ctx.backend, *operands, ctx.algorithm, needs_own)
        if need_residual and not needs_own:
            grads = (grads[0], grad, *grads[2:])
    needed = (need_input, need_residual, need_weight, need_bias)
    grads = [g if need else None for g, need in zip(grads, needed)]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _composed_gradients(grad, input, residual, weight, bias, mean, variance, eps, activation):
    """By PyTorch's own operators, which can be differentiated again."""
    if activation is not None:
        output = torch.nn.functional.batch_norm(input, None, None, weight, bias, True, eps=eps)
        grad = activation_backward(grad, output if residual is None else output + residual, activation)
    inverse = torch.rsqrt(variance + eps)
    arguments = (grad, input, weight, None, None, mean, inverse, True, eps, [True, True, True])
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(*arguments)
    return grad_input, grad, grad_weight, grad_bias


operator = Operator(
    "conv_bn_act_normalize",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str? activation, "
    "str? algorithm) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=map_one_by_one,
    flops=lambda *_, out_shape: 0,
    check=_check_normalize,
    triton="conv_bn_act:conv_bn_act_normalize_triton",
    autocast=None,
)


# The same where a convolution has gathered mean and variance. They belong to input: the gradient is the same.


def _check_apply(input, residual, weight, bias, mean, variance, eps, activation) -> None:
    _check_normalize(input, residual, weight, bias, eps, activation, None)
    _check_numbers("mean", mean, input)
    _check_numbers("variance", variance, input)


def _apply_setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    input, residual, weight, bias, mean, variance, ctx.eps, ctx.activation = inputs
    ctx.algorithm = None
    kept = None if ctx.activation is None else residual
    ctx.save_for_backward(input, kept, weight, bias, mean, variance)


apply_operator = Operator(
    "conv_bn_act_apply",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps, "
    "str? activation) -> Tensor",
    fake=lambda input, *_: new_output(input, input.shape),
    setup_context=_apply_setup_context,
    backward=_backward,
    vmap=map_one_by_one,
    flops=lambda *_, out_shape: 0,
    check=_check_apply,
    triton="conv_bn_act:conv_bn_act_apply_triton",
    autocast=None,
)


# Its gradients: of input, residual, weight, bias. The residual's is an empty tensor where it is not needed.


def _backward_fake(
    grad_output, input, residual, weight, bias, mean, variance, eps, activation, algorithm, need_residual
):
    image = new_output(input, input.shape)
    grad_residual = torch.empty_like(image) if need_residual else input.new_empty(0)
    return image, grad_residual, new_numbers(input), new_numbers(input)


def _check_backward(
    grad_output, input, residual, weight, bias, mean, variance, eps, activation, algorithm, need_residual
) -> None:
    _check_normalize(input, residual, weight, bias, eps, activation, algorithm)
    _check_image("grad_output", grad_output, input)
    _check_numbers("mean", mean, input)
    _check_numbers("variance", variance, input)


def _backward_backward(ctx: Any, *grads: torch.Tensor) -> tuple:
    raise NotImplementedError(
        "torch.ops.fastconv.conv_bn_act_normalize_backward has no gradient; differentiate "
        "fastconv.conv_bn_act twice instead"
    )


backward_operator = Operator(
    "conv_bn_act_normalize_backward",
    "(Tensor grad_output, Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor variance, float eps, str? activation, str? algorithm, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=_backward_backward,
    vmap=map_one_by_one,
    flops=lambda *_, out_shape: 0,
    check=_check_backward,
    triton="conv_bn_act:conv_bn_act_normalize_backward_triton",
    autocast=None,
)

ConvBnActFunction = operator.function()

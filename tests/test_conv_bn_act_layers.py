"""conv_bn_act, the whole operator: convolution, running averages, folding, modules of PyTorch beside it."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, LAYOUTS, runs
from test_conv_bn_act import DENSE, EPS, activated, operands
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv import conv_bn_act, conv_bn_act_reference
from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops.conv_bn_act import operator

all_runs, own = runs("conv_bn_act"), runs("conv_bn_act", own=True)
BACKENDS = list(dict.fromkeys(run.backend for run in all_runs))

CONVOLUTIONS = {
    "dense": ((2, 5, 7, 6), (8, 5, 3, 3), {"padding": 1, "stride": 2}),
    "pointwise": ((2, 6, 5, 5), (9, 6, 1, 1), {}),
    "grouped": ((2, 6, 5, 7), (4, 3, 3, 3), {"groups": 2, "padding": "same"}),
    "depthwise": ((2, 6, 5, 7), (12, 1, 3, 3), {"groups": 6, "padding": (1, 0), "dilation": (1, 2)}),
}


def layers(name, dtype=torch.float32, bias=True, **batch_norm):
    """Input, and PyTorch's two layers."""
    shape, weight, geometry = CONVOLUTIONS[name]
    groups = geometry.get("groups", 1)
    torch.manual_seed(3)
    conv = nn.Conv2d(shape[1], weight[0], weight[2:], bias=bias, **geometry)
    assert conv.weight.shape == weight and groups == conv.groups
    norm = nn.BatchNorm2d(weight[0], eps=EPS, **batch_norm)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return torch.randn(shape, device=DEVICE, dtype=dtype), conv.to(DEVICE, dtype), norm.to(DEVICE, dtype)


def call_with(conv, norm, input, training, function=conv_bn_act, **keywords):
    return function(
        input, conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        training=training, momentum=norm.momentum, eps=norm.eps, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("residual", [True, False])
def test_ten_steps_of_training_and_then_inference(name, backend, layout, residual):
    dtype = torch.float64
    if backend == "triton" and DEVICE == "cpu" and name != "depthwise":
        pytest.skip("interpreted, a dense convolution takes seconds")
    steps = 10 if backend in (None, "cpu", "cuda") else 2
    input, conv, norm = layers(name, dtype)
    _, exact_conv, exact_norm = layers(name, dtype)
    for step in range(steps + 1):
        training = step < steps
        x = torch.randn(input.shape, dtype=dtype, device=DEVICE, generator=None)
        x = LAYOUTS[layout](lambda _, x=x: x.clone(), x.shape).requires_grad_()
        exact_x = x.detach().clone().requires_grad_()
        exact_norm.train(training)
        wanted = exact_norm(exact_conv(exact_x))
        added = torch.randn_like(wanted) if residual else None
        wanted = F.relu(wanted if added is None else wanted + added)
        output = call_with(conv, norm, x, training, activation="relu", residual=added, backend=backend)
        assert_close(output, wanted, dtype, 1000)
        grad = torch.randn_like(output)
        pairs = [(x, exact_x), *zip((*conv.parameters(), *norm.parameters()),
                                    (*exact_conv.parameters(), *exact_norm.parameters()))]  # fmt: skip
        grads = torch.autograd.grad(output, [p for p, _ in pairs], grad)
        exact_grads = torch.autograd.grad(wanted, [p for _, p in pairs], grad)
        for found, exact in zip(grads, exact_grads):
            assert_close(found, exact, dtype, 1000, scale=max(1.0, exact.abs().max().item()))
        assert_close(norm.running_mean, exact_norm.running_mean, dtype, 1000, scale=1.0)
        assert_close(norm.running_var, exact_norm.running_var, dtype, 1000)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_the_chain(activation, training):
    input, conv, norm = layers("grouped", torch.float64)
    norm.train(training)
    added = torch.randn_like(conv(input))
    _, _, other = layers("grouped", torch.float64)
    found = call_with(
        conv, other, input, training, conv_bn_act_reference, activation=activation, residual=added
    )
    assert_close(found, activated(norm(conv(input)) + added, activation), torch.float64, 100)
    assert_close(other.running_var, norm.running_var, torch.float64, 100)


@pytest.mark.parametrize("missing", ["running", "affine", "both"])
def test_what_may_be_none(missing):
    input, conv, norm = layers(
        "dense", torch.float64, affine=missing == "running", track_running_stats=missing == "affine"
    )
    assert_close(
        call_with(conv, norm, input, True, activation="relu"), F.relu(norm(conv(input))), torch.float64, 100
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_images_with_float32_numbers(dtype, training):
    input, conv, norm = layers("pointwise")
    with torch.no_grad():
        output = call_with(conv.to(dtype), norm, input.to(dtype), training)
    assert output.dtype == dtype and norm.running_mean.dtype == torch.float32
    exact_norm = layers("pointwise", torch.float64)[2].train(training)
    wanted = F.relu(exact_norm(F.conv2d(input.to(dtype).double(), conv.weight.double(), conv.bias.double())))
    assert (output.double() - wanted).abs().max() < 16 * torch.finfo(dtype).eps * wanted.abs().max()


def test_autocast():
    input, conv, norm = layers("dense")
    with torch.autocast(DEVICE, torch.bfloat16):
        output = call_with(
            conv, norm, input.requires_grad_(), True, residual=torch.zeros(2, 8, 4, 3, device=DEVICE)
        )
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert conv.weight.grad.dtype == norm.weight.grad.dtype == norm.running_var.dtype == torch.float32


def test_folded_weights_are_kept_until_something_changes():
    input, conv, norm = layers("dense")
    norm.eval()
    fastconv.clear_packed_weights()
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    with torch.no_grad():
        first = call_with(conv, norm, input, False)
        assert torch.equal(first, call_with(conv, norm, input, False))
        for tensor in tensors:
            tensor.mul_(1.25)
            wanted = F.relu(norm(conv(input)))
            torch.testing.assert_close(call_with(conv, norm, input, False), wanted)
        for tensor in tensors:  # no version tells of this
            tensor.data.mul_(0.75)
            torch.testing.assert_close(call_with(conv, norm, input, False), F.relu(norm(conv(input))))
        norm.train()(conv(input))
        torch.testing.assert_close(call_with(conv, norm.eval(), input, False), F.relu(norm(conv(input))))


def test_folded_weights_are_made_once(monkeypatch):
    from fastconv.ops import _folded_weights

    input, conv, norm = layers("dense")
    calls, fold = [], _folded_weights.fold
    monkeypatch.setattr(_folded_weights, "fold", lambda *given: calls.append(1) or fold(*given))
    with torch.no_grad():
        for _ in range(3):
            call_with(conv, norm, input, False)
    assert len(calls) == 1
    call_with(conv, norm.requires_grad_(False), input, False).sum().backward()
    assert len(calls) == 2, "where the convolution's weight takes a gradient nothing is kept"
    call_with(conv, norm.requires_grad_(True), input, False)
    assert len(calls) == 2, "where the normalisation's takes one nothing is folded"


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    input, conv, norm = layers("dense")
    _, _, other = layers("dense")

    def step(x, norm):
        return call_with(conv, norm, x, training, activation="silu").square().sum()

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
        compiled(x, norm).backward()
        step(y, other).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, other.running_var)
        torch.testing.assert_close(norm.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-4)


def test_func():
    image, residual, weight, bias = operands((2, 3, 3, 3), torch.float64)

    def loss(image, weight):
        return operator(own[0].backend, image, residual, weight, bias, EPS, "silu", None)[0].square().sum()

    found = torch.func.grad(loss, (0, 1))(image, weight)
    wanted = torch.autograd.grad(loss(image, weight), (image, weight))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    images = torch.stack([image, 2 * image]).detach()
    mapped = torch.func.vmap(lambda x: operator(own[0].backend, x, None, weight, bias, EPS, None, None)[0])
    for one, x in zip(mapped(images), images):
        torch.testing.assert_close(one, operator(own[0].backend, x, None, weight, bias, EPS, None, None)[0])


# Errors


def of(*shape, dtype=torch.float32):
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


BAD = [
    ({"training": 1}, TypeError, "training must be True or False, got 1"),
    ({"momentum": None}, TypeError, "momentum must be a number, got None"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
    ({"activation": "tanh"}, ValueError, "activation must be one of"),
    ({"running_mean": None}, ValueError, "running_mean and running_var must both"),
    ({"running_mean": None, "running_var": None, "training": False}, ValueError, "training=False, got None"),
    ({"bn_weight": of(7)}, ValueError, r"bn_weight must have shape \(8,\), got \(7,\)"),
    ({"running_var": of(8, 1)}, ValueError, "running_var must have 1 dimensions"),
    ({"bn_bias": [0.0] * 8}, TypeError, "bn_bias must be a torch.Tensor, got list"),
    ({"residual": of(2, 8, 4, 4)}, ValueError, "residual must have the output's shape"),
    ({"backend": "magic"}, ValueError, "backend must be None or one of"),
    ({"input": of(2, 5, 7)}, ValueError, "input must have 4 dimensions"),
    ({"weight": of(8, 5, 3, 3, dtype=torch.float64)}, TypeError, "weight is"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    input, conv, norm = layers("dense")
    arguments = {
        "input": input, "weight": conv.weight, "bias": conv.bias, "running_mean": norm.running_mean,
        "running_var": norm.running_var, "bn_weight": norm.weight, "bn_bias": norm.bias, "training": True,
        "stride": 2, "padding": 1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        conv_bn_act(**{**arguments, **change})


def test_one_value_for_each_channel_is_an_error_as_it_is_in_pytorch():
    _, conv, norm = layers("pointwise")
    one = torch.randn(1, 6, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(conv(one))
    with pytest.raises(ValueError, match="more than one value for each channel"):
        call_with(conv, norm, one, True)
    torch.testing.assert_close(call_with(conv, norm, one, False), F.relu(norm.eval()(conv(one))))


@pytest.mark.parametrize("run", own, ids=str)
def test_operators_called_by_themselves_check_their_arguments(run):
    image, residual, weight, bias = (t.detach() for t in operands((2, 3, 4, 4), torch.float32))
    forward = run.operator("conv_bn_act_normalize")
    for given, name in [
        ((image[0], None, weight, bias, EPS, None), "input"),
        ((image, residual[:1], weight, bias, EPS, None), "residual"),
        ((image, residual.double(), weight, bias, EPS, None), "residual"),
        ((image, None, weight[:2], bias, EPS, None), "weight"),
        ((image, None, weight, bias.double(), EPS, None), "bias"),
        ((image, None, weight, bias, EPS, "tanh"), "activation"),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=name):
            forward(*given, run.algorithm)
    with pytest.raises((RuntimeError, ValueError), match="algorithm"):
        forward(image, None, weight, bias, EPS, None, "magic")
    backward = run.operator("conv_bn_act_normalize_backward")
    numbers = (weight, bias, weight, weight)
    with pytest.raises((RuntimeError, ValueError), match="grad_output"):
        backward(image[:1], image, None, *numbers, EPS, None, run.algorithm, False)
    with pytest.raises((RuntimeError, ValueError), match="variance"):
        backward(image, image, None, *numbers[:3], weight[:2], EPS, None, run.algorithm, False)

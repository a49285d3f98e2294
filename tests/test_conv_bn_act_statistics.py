"""conv_bn_act's convolutions that gather mean and variance while they store, and what follows them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import DEVICE
from test_conv_bn_act import activated
from tolerances import assert_close
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv.ops._conv2d_choice import WIDE_VECTORS
from fastconv.ops._moments import ALGORITHMS, _algorithm, dense_operator, depthwise_operator
from fastconv.ops.conv_bn_act import apply_operator, operator

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="C++ kernels alone gather them")

EPS = 1e-3
ONES, THREE, TWO = (
    ((1, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (1, 1, 1, 1), (1, 1)),
    ((2, 2), (1, 1, 1, 1), (1, 1)),
)

# Input, weight, (stride, padding, dilation), groups; tiles and vectors that are not full, several panels.
DENSE = {
    "edges": ((2, 5, 9, 11), (37, 5, 3, 3), THREE, 1),
    "one image": ((1, 16, 8, 8), (16, 16, 3, 3), THREE, 1),
    "many tiles": ((5, 8, 30, 34), (72, 8, 3, 3), THREE, 1),
    "one row": ((3, 4, 1, 70), (20, 4, 3, 3), THREE, 1),
    "groups": ((2, 12, 7, 6), (18, 6, 3, 3), THREE, 2),
    "sides": ((2, 3, 6, 7), (8, 3, 3, 3), ((1, 1), (2, 0, 1, 0), (1, 1)), 1),
    "pointwise": ((3, 20, 13, 15), (130, 20, 1, 1), ONES, 1),
    "stride": ((2, 18, 15, 14), (33, 18, 3, 3), TWO, 1),
    "stem": ((2, 3, 33, 30), (24, 3, 7, 7), ((2, 2), (3, 3, 3, 3), (1, 1)), 1),
    "dilation": ((2, 6, 12, 9), (7, 6, 3, 2), ((1, 2), (2, 1, 0, 1), (2, 1)), 1),
}
DEPTHWISE = {
    "edges": ((2, 37, 9, 11), (37, 1, 3, 3), THREE),
    "few channels": ((2, 5, 8, 9), (5, 1, 3, 3), THREE),
    "stride": ((3, 48, 17, 15), (48, 1, 5, 5), ((2, 2), (2, 2, 2, 2), (1, 1))),
    "multiplier": ((2, 6, 7, 7), (18, 1, 3, 3), THREE),
    "large": ((1, 72, 60, 31), (72, 1, 3, 3), THREE),
    "one pixel": ((40, 20, 1, 1), (20, 1, 1, 1), ONES),
}
CASES = [
    *((name, algorithm) for name in DENSE for algorithm in ALGORITHMS
      if algorithm == "direct" or (DENSE[name][1][2:] == (3, 3) and DENSE[name][2][::2] == THREE[::2])),
    *((name, "depthwise") for name in DEPTHWISE),
]  # fmt: skip


def numbers(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(name, algorithm, dtype=torch.float32, bias=None):
    """Input (channels_last), weight and bias, and the arguments behind them, of a convolution."""
    shape, filters, *geometry = (DEPTHWISE if algorithm == "depthwise" else DENSE)[name]
    bias = numbers(filters[:1], dtype, 2) if bias is None else torch.full(filters[:1], bias, dtype=dtype)
    stride = (math.prod(shape[1:]), 1, shape[1] * shape[3], shape[1])  # also of one channel or pixel
    input = torch.empty_strided(shape, stride, dtype=dtype).copy_(numbers(shape, dtype))
    weight = numbers(filters, dtype, 1) / math.prod(filters[1:]) ** 0.5
    return (input, weight, bias), (*geometry[0], *geometry[1:])


def gathered(tensors, geometry, algorithm):
    if algorithm == "depthwise":
        return depthwise_operator("cpu", *tensors, *geometry)
    return dense_operator("cpu", *tensors, *geometry, algorithm)


def convolved(tensors, geometry, algorithm):
    """By the operator that gathers nothing, which has the same kernel."""
    if algorithm == "depthwise":
        return torch.ops.fastconv.depthwise_conv2d(*tensors, *geometry, None, "vectorized")
    return torch.ops.fastconv.conv2d(*tensors, None, None, *geometry, None, algorithm)


def check_moments(output, mean, variance, far=0):
    """Against those of the values that were stored.

    far: how often the mean's own rounding may show in the variance, where parts' means are kept in its type.
    """
    exact = output.double()
    wanted, spread = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    eps = torch.finfo(mean.dtype).eps
    assert ((mean - wanted).abs() <= 16 * eps * (wanted.abs() + spread.sqrt())).all()
    assert ((variance - spread).abs() <= eps * (64 * spread + far * wanted.abs() * spread.sqrt())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_moments_are_those_of_the_output(name, algorithm, dtype):
    tensors, geometry = operands(name, algorithm, dtype)
    output, mean, variance = gathered(tensors, geometry, algorithm)
    assert torch.equal(output, convolved(tensors, geometry, algorithm))
    assert output.is_contiguous(memory_format=torch.channels_last)
    check_moments(output, mean, variance)


@pytest.mark.parametrize(
    ("name", "algorithm"), [("many tiles", a) for a in ALGORITHMS] + [("large", "depthwise")]
)
def test_a_far_mean_does_not_cancel_the_variance(name, algorithm):
    tensors, geometry = operands(name, algorithm, bias=1000.0)
    check_moments(*gathered(tensors, geometry, algorithm))


def test_a_constant_channel_has_no_variance():
    input = torch.full((2, 16, 6, 6), 0.3).contiguous(memory_format=torch.channels_last)
    _, mean, variance = dense_operator("cpu", input, torch.ones(5, 16, 1, 1), None, *ONES, 1, "direct")
    assert (variance == 0).all() and (mean - 4.8).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "algorithm"), [("many tiles", a) for a in ALGORITHMS] + [("large", "depthwise")]
)
def test_the_result_does_not_depend_on_the_threads(name, algorithm):
    tensors, geometry = operands(name, algorithm)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gathered(tensors, geometry, algorithm))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "algorithm"), [("pointwise", "direct"), ("edges", "depthwise")])
def test_what_is_not_finite_reaches_its_channels_alone(name, algorithm, value):
    (input, weight, bias), geometry = operands(name, algorithm)
    input[1, 2, 5, 3] = value
    hit = torch.arange(weight.shape[0]) == 2 if algorithm == "depthwise" else slice(None)
    output, mean, variance = gathered((input, weight, bias), geometry, algorithm)
    assert variance[hit].isnan().all() and not mean[hit].isfinite().any()
    finite = variance.isfinite()
    assert finite.sum() == (36 if algorithm == "depthwise" else 0)
    done = apply_operator("cpu", output, None, None, None, mean, variance, EPS, "relu")
    assert done[:, ~finite].isnan().all() and done[:, finite].isfinite().all()


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_other_instruction_sets(capability):
    code = (
        "import test_conv_bn_act_statistics as t; import fastconv._host as host\n"
        f"assert host.cpu_capability() == {capability!r}\n"
        "for case in t.CASES: t.test_moments_are_those_of_the_output(*case, t.torch.float32)"
    )
    environment = {**os.environ, "FASTCONV_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env=environment,
        capture_output=True,
        text=True,
    )
    if "this processor's best is" in result.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [True, False])
def test_apply_is_the_second_half_of_normalize(dtype, memory_format, activation, residual):
    input = numbers((3, 21, 6, 7), dtype).contiguous(memory_format=memory_format)
    added = numbers(input.shape, dtype, 1) if residual else None
    weight, bias = numbers((21,), seed=2), numbers((21,), seed=3)
    wanted, mean, variance = operator("cpu", input, added, weight, bias, EPS, activation, "vectorized")
    found = apply_operator("cpu", input, added, weight, bias, mean, variance, EPS, activation)
    assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    empty = input[:0]
    assert apply_operator("cpu", empty, None, None, None, mean, variance, EPS, None).shape == empty.shape


# The whole operator


class Record(TorchDispatchMode):
    """Names of the operators that run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.add(op.name())
        return op(*args, **(kwargs or {}))


LAYERS = {
    "winograd": ((4, 16, 24, 24), (32, 16, 3, 3), {"padding": 1}),
    "direct": ((4, 16, 24, 24), (32, 16, 3, 3), {"padding": 1, "stride": 2}),
    "pointwise": ((4, 32, 24, 24), (64, 32, 1, 1), {}),
    "depthwise": ((4, 32, 24, 24), (32, 1, 3, 3), {"padding": 1, "groups": 32}),
}


def layer(name, dtype=torch.float32, scale=1):
    shape, weight, geometry = LAYERS[name]
    if scale != 1:
        shape = (2, shape[1] // scale, 4, 4)
        weight = (weight[0] // scale, max(weight[1] // scale, 1), *weight[2:])
        if "groups" in geometry:
            geometry = {**geometry, "groups": shape[1]}
    input = numbers(shape, dtype).contiguous(memory_format=torch.channels_last)
    tensors = [input, numbers(weight, dtype, 1), numbers(weight[:1], dtype, 2), numbers(weight[:1], dtype, 3)]
    return [t.requires_grad_() for t in tensors], geometry


def call(tensors, geometry, activation="relu", residual=None, running=(None, None), **keywords):
    input, weight, bn_weight, bn_bias = tensors
    return fastconv.conv_bn_act(
        input, weight, None, *running, bn_weight, bn_bias, training=True, momentum=1.0, eps=EPS,
        activation=activation, residual=residual, **geometry, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "cpu") for name in LAYERS), ("winograd", None), ("depthwise", None)]
)
def test_output_running_averages_and_gradients(name, backend):
    tensors, geometry = layer(name)
    running = torch.zeros(2, tensors[1].shape[0])
    with Record() as record:
        output = call(tensors, geometry, running=running, backend=backend)
    wanted_op = "depthwise_conv2d_moments" if name == "depthwise" else "conv2d_moments"
    assert {f"fastconv::{wanted_op}", "fastconv::conv_bn_act_apply"} <= record.names
    exact = [t.detach().double().requires_grad_() for t in tensors]
    exact_running = torch.zeros(2, tensors[1].shape[0], dtype=torch.float64)
    sums = F.conv2d(exact[0], exact[1], None, **geometry)
    wanted = F.relu(F.batch_norm(sums, *exact_running, *exact[2:], True, 1.0, EPS))
    assert_close(output, wanted, torch.float32, 1000, algorithm="winograd_f4")
    for found, right in zip(running, exact_running):
        assert_close(
            found, right, torch.float32, 1000, max(1.0, right.abs().max().item()), algorithm="winograd_f4"
        )
    grad = numbers(output.shape, seed=5) * (wanted.detach() > 1e-3)  # rounding decides at the corner
    grads = torch.autograd.grad(output, tensors, grad)
    exact_grads = torch.autograd.grad(wanted, exact, grad.double())
    for found, right in zip(grads, exact_grads):
        scale = max(1.0, right.abs().max().item())
        assert_close(found, right, torch.float32, 4096, scale, algorithm="winograd_f4")


@pytest.mark.skipif(not WIDE_VECTORS, reason="without wide vectors PyTorch's convolution is faster")
def test_where_pytorchs_convolution_is_as_fast_the_saved_pass_decides():
    for shape, filters, stride, wanted in (
        ((4, 64, 56, 56), (256, 64, 1, 1), 1, "direct"),
        ((4, 64, 56, 56), (128, 64, 3, 3), 2, "direct"),
        ((4, 3, 224, 224), (64, 3, 7, 7), 2, "direct"),
        ((4, 32, 112, 112), (16, 32, 1, 1), 1, None),
        ((4, 64, 14, 14), (384, 64, 1, 1), 1, None),
        ((4, 64, 56, 56), (64, 64, 3, 3), 1, "winograd_f4"),
    ):
        input = torch.empty(shape, memory_format=torch.channels_last)
        weight = torch.empty(filters, requires_grad=True)
        geometry = ((stride, stride), (filters[2] // 2,) * 4, (1, 1), 1)
        assert _algorithm(input, weight, geometry, None) == wanted
        assert _algorithm(input, weight, geometry, "cpu") == (wanted or "direct")
        if shape[1] == 3:
            assert _algorithm(input.requires_grad_(), weight, geometry, None) is None


def test_where_nothing_is_gathered():
    tensors, geometry = layer("winograd")
    for change in (
        lambda t: t.contiguous(),
        lambda t: t.to(torch.bfloat16, memory_format=torch.channels_last),
        lambda t: t[:0],
    ):
        changed = [change(tensors[0]), tensors[1].to(change(tensors[0]).dtype), *tensors[2:]]
        with Record() as record:
            call(changed, geometry)
        assert not any("moments" in name or "apply" in name for name in record.names)
    with Record() as record:
        call(tensors, geometry, backend="aten")
    assert not any("fastconv" in name for name in record.names)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name, activation):
    tensors, geometry = layer(name, torch.float64, scale=8)
    residual = numbers(call(tensors, geometry).shape, torch.float64, 7).requires_grad_()

    def function(*given):
        return call(given[:-1], geometry, activation, given[-1], backend="cpu")

    assert torch.autograd.gradcheck(function, (*tensors, residual), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*tensors, residual), fast_mode=True)


@pytest.mark.parametrize("name", ["pointwise", "depthwise"])
def test_opcheck(name):
    tensors, geometry = operands("edges", name if name == "depthwise" else "direct")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = (
        torch.ops.fastconv.depthwise_conv2d_moments.default
        if name == "depthwise"
        else torch.ops.fastconv.conv2d_moments.default
    )
    rest = () if name == "depthwise" else ("direct",)
    input, weight, bias = tensors
    for image in (input, torch.cat([input, input], 1)[:, : input.shape[1]]):
        given = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (weight, bias)
        ]
        torch.library.opcheck(op, (image.requires_grad_(), *given, *geometry, *rest), test_utils=tests)
    moments = [t.abs().requires_grad_(False) for t in (bias.detach(), bias.detach())]
    output = op(input.detach(), weight, bias, *geometry, *rest)[0]
    arguments = (output.requires_grad_(), output.detach(), bias, None, *moments, EPS, "relu")
    torch.library.opcheck(torch.ops.fastconv.conv_bn_act_apply.default, arguments, test_utils=tests)


@pytest.mark.parametrize("algorithm", ["direct", "depthwise"])
def test_operators_called_by_themselves_check_their_arguments(algorithm):
    (input, weight, bias), geometry = operands("edges", algorithm)
    for image, filters, message in (
        (input.contiguous(), weight, "channels_last"),
        (input[:0], weight, "empty"),
        (input.bfloat16(), weight.bfloat16(), "float32 or float64"),
        (input[0], weight, "input"),
        (input, weight.double(), "weight"),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            gathered((image, filters, None), geometry, algorithm)
    with pytest.raises((RuntimeError, ValueError), match="bias"):
        gathered((input, weight, bias[:2]), geometry, algorithm)


def test_an_algorithm_that_gathers_nothing_is_refused():
    (input, weight, bias), geometry = operands("edges", "direct")
    with pytest.raises((RuntimeError, ValueError), match="algorithm must be one of direct, winograd_f2"):
        dense_operator("cpu", input, weight, bias, *geometry, "im2col")


def test_errors_are_those_of_the_convolution():
    tensors, geometry = layer("winograd")
    with pytest.raises(ValueError, match="weight must have shape"):
        call([tensors[0][:, :8], *tensors[1:]], geometry)
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        call(tensors, geometry, residual=torch.zeros(1, 32, 24, 24))
    with pytest.raises(ValueError, match="more than one value for each channel"):
        call([tensors[0][:1, :, :3, :3], *tensors[1:]], {"padding": 0})


def test_compile():
    tensors, geometry = layer("winograd")

    def step(input):
        return call([input, *tensors[1:]], geometry, "silu").square().sum()

    x, y = (tensors[0].detach().clone(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    torch.compile(step, fullgraph=True)(x).backward()
    step(y).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_vmap_and_flops():
    (input, weight, bias), geometry = operands("edges", "direct")
    images = torch.stack([input, 2 * input])
    mapped = torch.func.vmap(lambda x: dense_operator("cpu", x, weight, bias, *geometry, "direct"))(images)
    for k, image in enumerate((input, 2 * input)):
        for found, wanted in zip(mapped, gathered((image, weight, bias), geometry, "direct")):
            torch.testing.assert_close(found[k], wanted)
    for algorithm, shape in (("direct", DENSE["edges"]), ("depthwise", DEPTHWISE["edges"])):
        tensors, geometry = operands("edges", algorithm)
        with FlopCounterMode(display=False) as counter:
            output = gathered(tensors, geometry, algorithm)[0]
        filters, *taps = shape[1]
        assert counter.get_total_flops() == 2 * output.numel() * torch.Size(taps).numel()
        assert output.shape[1] == filters


def test_activations_of_the_whole():
    tensors, geometry = layer("pointwise")
    sums = F.conv2d(tensors[0].double(), tensors[1].double(), None, **geometry)
    normal = F.batch_norm(sums, None, None, tensors[2].double(), tensors[3].double(), True, 0.0, EPS)
    for activation in ("relu6", "gelu", "gelu_tanh", "silu"):
        output = call(tensors, geometry, activation)
        assert_close(output, activated(normal, activation), torch.float32, 1000)

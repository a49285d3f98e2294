"""conv_bn_act's convolutions that gather mean and variance in CUDA and Triton, on a GPU or in its place."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE, Run, for_runs
from test_conv_bn_act_statistics import ONES, THREE, TWO, Record, check_moments
from tolerances import assert_close
from torch.nn import functional as F

import fastconv
from fastconv.backends import available
from fastconv.ops._moments import BACKENDS, dense_operator, depthwise_operator
from fastconv.ops.conv_bn_act import apply_operator, operator

EPS = 1e-3
OWN = [name for name in available("conv_bn_act", DEVICE) if name in BACKENDS and name != "cpu"]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ALGORITHMS = {"triton": ("implicit_gemm", "pointwise")}
pytestmark = pytest.mark.skipif(not OWN, reason="no backend of a GPU is here")

# Input, weight, (stride, padding, dilation), groups; tiles that are full, one pixel more, one less.
DENSE = {
    "edges": ((2, 5, 9, 11), (37, 5, 3, 3), THREE, 1),
    "full tiles": ((2, 16, 8, 8), (64, 16, 3, 3), THREE, 1),
    "one pixel more": ((1, 8, 3, 43), (17, 8, 1, 1), ONES, 1),
    "one pixel less": ((1, 8, 1, 127), (16, 8, 1, 1), ONES, 1),
    "one value": ((1, 8, 1, 1), (8, 8, 1, 1), ONES, 1),
    "groups": ((2, 32, 7, 6), (48, 16, 3, 3), THREE, 2),
    "narrow groups": ((2, 12, 7, 6), (18, 2, 3, 3), THREE, 6),
    "sides": ((2, 8, 6, 7), (8, 8, 3, 3), ((1, 1), (2, 0, 1, 0), (1, 1)), 1),
    "pointwise": ((3, 24, 5, 7), (136, 24, 1, 1), ONES, 1),
    "stride": ((2, 16, 15, 14), (40, 16, 3, 3), TWO, 1),
    "dilation": ((2, 6, 12, 9), (7, 6, 3, 2), ((1, 2), (2, 1, 0, 1), (2, 1)), 1),
}
DEPTHWISE = {
    "edges": ((2, 37, 9, 11), (37, 1, 3, 3), THREE),
    "few channels": ((5, 3, 8, 9), (3, 1, 3, 3), THREE),
    "stride": ((2, 48, 17, 15), (48, 1, 5, 5), ((2, 2), (2, 2, 2, 2), (1, 1))),
    "seven": ((1, 16, 18, 33), (16, 1, 7, 7), ((1, 1), (3, 3, 3, 3), (1, 1))),
    "rows of tiles": ((1, 8, 70, 40), (8, 1, 3, 3), THREE),
    "one row": ((3, 4, 1, 70), (4, 1, 3, 3), THREE),
    "one pixel": ((4, 20, 1, 1), (20, 1, 3, 3), THREE),
}
ANY = {  # kernels, strides and multipliers that CUDA has not compiled in
    "multiplier": ((2, 6, 7, 7), (18, 1, 3, 3), THREE),
    "row by row": ((1, 4, 9, 12), (4, 1, 9, 9), ((1, 2), (4, 4, 4, 4), (1, 1))),
    "dilation": ((2, 5, 9, 8), (5, 1, 3, 2), ((2, 1), (2, 1, 0, 1), (2, 3))),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
POINTWISE = ((1, 1), ONES)  # kernel and geometry that an algorithm of that name takes
RUNS = [Run(backend, algorithm) for backend in OWN for algorithm in ALGORITHMS[backend]]
DEPTHWISE_RUNS = [Run(backend, None) for backend in OWN]
FAR = [*((run, "full tiles") for run in RUNS), *((run, "rows of tiles") for run in DEPTHWISE_RUNS)]


def serves(run: Run, case: str, dtype: torch.dtype, **_) -> bool:
    if run.algorithm == "pointwise" and (DENSE[case][1][2:], DENSE[case][2]) != POINTWISE:
        return False
    return run.serves(dtype)


each_far_case = pytest.mark.parametrize(
    ("run", "case"), [(run, case) for run, case in FAR if run.algorithm != "pointwise"]
)
each_layout = pytest.mark.parametrize("layout", FORMATS)


def numbers(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def operands(name, layout, dtype=torch.float32, bias=None, depthwise=False):
    """Input, weight and bias, and the arguments behind them, of a convolution."""
    shape, filters, *geometry = ({**DEPTHWISE, **ANY} if depthwise else DENSE)[name]
    stride = (math.prod(shape[1:]), 1, shape[1] * shape[3], shape[1])  # also of one channel or pixel
    input = numbers(shape, dtype)
    if layout == "channels_last":
        input = torch.empty_strided(shape, stride, dtype=dtype, device=DEVICE).copy_(input)
    weight = (numbers(filters, torch.float64, 1) / math.prod(filters[1:]) ** 0.5).to(dtype)
    given = numbers(filters[:1], dtype, 2) if bias is None else torch.full_like(weight[:, 0, 0, 0], bias)
    return (input, weight, given), (*geometry[0], *geometry[1:])


def gathered(run, tensors, geometry):
    if len(geometry) == 3:
        return depthwise_operator(run.backend, *tensors, *geometry)
    return dense_operator(run.backend, *tensors, *geometry, run.algorithm)


def convolved(run, tensors, geometry):
    """By the operator that gathers nothing, which has the same kernel."""
    if len(geometry) == 3:
        return run.operator("depthwise_conv2d")(*tensors, *geometry, None, "tiled")
    return run.operator("conv2d")(*tensors, None, None, *geometry, None, run.algorithm)


def check(run, tensors, geometry):
    """Output and moments against float64, and the output against the same kernel's that gathers nothing."""
    output, mean, variance = gathered(run, tensors, geometry)
    input, weight, bias = (t.double() for t in tensors)
    stride, (top, bottom, left, right), dilation, *groups = geometry
    padded = F.pad(input, (left, right, top, bottom))
    groups = groups[0] if groups else input.shape[1]
    exact = F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    assert_close(output, exact, tensors[0].dtype, weight[0].numel() + 1)
    plain = convolved(run, tensors, geometry)
    assert torch.equal(output, plain) and output.stride() == plain.stride()
    assert mean.dtype == variance.dtype == (torch.float64 if output.dtype == torch.float64 else torch.float32)
    check_moments(output, mean, variance, far=2)


@for_runs(
    RUNS,
    case=(DENSE, DENSE),
    layout=(FORMATS, FORMATS),
    dtype=(DTYPES, DTYPES),
    where=serves,
    cover=["case layout", "dtype layout"],
)
def test_dense(run, case, layout, dtype):
    check(run, *operands(case, layout, dtype))


@for_runs(
    DEPTHWISE_RUNS,
    case=((*DEPTHWISE, *ANY), (*DEPTHWISE, *ANY)),
    layout=(FORMATS, FORMATS),
    dtype=(DTYPES, DTYPES),
    where=lambda run, case, dtype, **_: run.serves(dtype) and (case in DEPTHWISE or run.backend == "triton"),
    cover=["case layout", "dtype layout"],
)
def test_depthwise(run, case, layout, dtype):
    check(run, *operands(case, layout, dtype, depthwise=True))


@each_layout
@each_far_case
def test_a_far_mean_does_not_cancel_the_variance(run, case, layout):
    tensors, geometry = operands(case, layout, bias=1000.0, depthwise=run.algorithm is None)
    check(run, tensors, geometry)
    first, again = (gathered(run, tensors, geometry) for _ in range(2))
    assert all(map(torch.equal, first, again))  # the same bits every time


@each_layout
@pytest.mark.parametrize("backend", OWN)
def test_a_constant_channel_has_no_variance(backend, layout):
    input = torch.full((2, 16, 6, 6), 0.3, device=DEVICE).contiguous(memory_format=FORMATS[layout])
    weight = torch.ones(16, 16, 1, 1, device=DEVICE)
    nine = torch.full((16, 1, 3, 3), 16 / 9, device=DEVICE)
    for _, mean, variance in (
        dense_operator(backend, input, weight, None, *ONES, 1, ALGORITHMS[backend][0]),
        depthwise_operator(backend, input, nine, None, *ONES),
    ):
        assert ((variance >= 0) & (variance < 2e-11)).all() and (mean - 4.8).abs().max() < 1e-5


@each_layout
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", OWN)
def test_what_is_not_finite_reaches_its_channels_alone(backend, value, layout):
    (input, weight, bias), geometry = operands("edges", layout, depthwise=True)
    input[1, 2, 5, 3] = value
    _, mean, variance = depthwise_operator(backend, input, weight, bias, *geometry)
    assert variance[2].isnan() and not mean[2].isfinite()
    others = torch.arange(37, device=DEVICE) != 2
    assert mean[others].isfinite().all() and variance[others].isfinite().all()


# Triton's own: tiles that are small, parts that are merged again and again.


@pytest.mark.skipif("triton" not in OWN, reason="triton cannot run here")
@pytest.mark.parametrize(
    ("algorithm", "layout"), [("implicit_gemm", "channels_last"), ("pointwise", "contiguous")]
)
def test_many_small_tiles_merge_level_by_level(algorithm, layout, monkeypatch):
    from fastconv.kernels import _moments, conv2d_launch

    monkeypatch.setattr(conv2d_launch, "tile_side", lambda size, most: 16)
    monkeypatch.setattr(_moments, "MERGED_PARTS", 2)
    monkeypatch.setattr(_moments, "MERGED_CHANNELS", 8)
    check(Run("triton", algorithm), *operands("one pixel more", layout, bias=1000.0))


# The second half, and the whole operator.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_layout
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("backend", OWN)
def test_apply_is_the_second_half_of_normalize(backend, residual, layout, dtype):
    input = numbers((3, 21, 6, 7), dtype).contiguous(memory_format=FORMATS[layout])
    added = numbers(input.shape, dtype, 1) if residual else None
    weight, bias = numbers((21,), seed=2), numbers((21,), seed=3)
    for activation in (None, "relu", "gelu"):
        wanted, mean, variance = operator(backend, input, added, weight, bias, EPS, activation, "sliced")
        found = apply_operator(backend, input, added, weight, bias, mean, variance, EPS, activation)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    empty = input[:0]
    assert apply_operator(backend, empty, None, None, None, mean, variance, EPS, None).shape == empty.shape
    with pytest.raises((RuntimeError, ValueError), match="variance"):
        apply_operator(backend, input, None, None, None, mean, variance[:3], EPS, None)


LAYERS = {
    "dense": ((2, 8, 7, 6), (16, 8, 3, 3), {"padding": 1}),
    "depthwise": ((2, 8, 7, 6), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
}


def layer(name, layout, dtype=torch.float32):
    shape, weight, geometry = LAYERS[name]
    input = numbers(shape, dtype).contiguous(memory_format=FORMATS[layout])
    weight = numbers(weight, dtype, 1)
    tensors = [input, weight, *(numbers(weight.shape[:1], dtype, seed) for seed in (2, 3))]
    return [t.requires_grad_() for t in tensors], geometry


def call(tensors, geometry, activation="relu", residual=None, running=(None, None), **keywords):
    input, weight, bn_weight, bn_bias = tensors
    return fastconv.conv_bn_act(
        input, weight, None, *running, bn_weight, bn_bias, training=True, momentum=1.0, eps=EPS,
        activation=activation, residual=residual, **geometry, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@each_layout
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OWN)
def test_output_running_averages_and_gradients(backend, name, layout, dtype):
    tensors, geometry = layer(name, layout, dtype)
    running = torch.zeros(2, tensors[1].shape[0], device=DEVICE)
    with Record() as record:
        output = call(tensors, geometry, "silu", running=running, backend=backend)
    wanted = "depthwise_conv2d_moments" if name == "depthwise" else "conv2d_moments"
    names = {found.split("::")[1].split(".")[0] for found in record.names if found.startswith("fastconv::")}
    assert names == {wanted, "conv_bn_act_apply"}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    sums = F.conv2d(exact[0], exact[1], None, **geometry)
    kept = sums + (sums.to(dtype).double() - sums).detach()  # rounded, as the kernel stores them
    exact_running = torch.zeros(2, tensors[1].shape[0], dtype=torch.float64, device=DEVICE)
    expected = F.silu(F.batch_norm(kept, *exact_running, *exact[2:], True, 1.0, EPS))
    assert_close(output, expected, dtype, 200)
    for found, right in zip(running, exact_running):
        assert_close(found, right, torch.float32, 200, max(1.0, right.abs().max().item()))
    grad = numbers(output.shape, dtype, 5)
    grads = torch.autograd.grad(output, tensors, grad)
    for found, right in zip(grads, torch.autograd.grad(expected, exact, grad.double())):
        scale = max(1.0, right.abs().max().item())
        assert_close(found, right, dtype, 4096, 4 * scale if dtype == torch.float16 else scale)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", OWN)
def test_gradcheck(backend, name):
    tensors, geometry = layer(name, "channels_last" if name == "dense" else "contiguous", torch.float64)
    few = 2 if name == "dense" else 1  # input channels
    small = tensors[0][:, :few, :3, :3], tensors[1][:3, :few], tensors[2][:3], tensors[3][:3]
    if name == "depthwise":
        small, geometry = (tensors[0][:, :3, :3, :3], *small[1:]), {"padding": 1, "groups": 3}
    tensors = [t.detach().clone().requires_grad_() for t in small]

    def function(*given):
        return call(given, geometry, "silu", backend=backend)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["dense", "depthwise"])
@pytest.mark.parametrize("backend", OWN)
def test_opcheck(backend, name):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    own = depthwise_operator if name == "depthwise" else dense_operator
    rest = () if name == "depthwise" else (ALGORITHMS[backend][0],)
    for layout in FORMATS:
        case = "one pixel" if name == "depthwise" else "one pixel more"
        (input, weight, bias), geometry = operands(case, layout, depthwise=name == "depthwise")
        for image in (input, torch.cat([input, input], 1)[:, : input.shape[1]]):
            given = [t.detach().clone().requires_grad_() for t in (weight, bias)]
            leaf = image.detach().requires_grad_()
            torch.library.opcheck(own.overload(backend), (leaf, *given, *geometry, *rest), test_utils=tests)
        moments = [bias.detach().abs(), bias.detach().abs()]
        output = own(backend, input, weight, bias, *geometry, *rest)[0]
        arguments = (output.requires_grad_(), output.detach(), bias, None, *moments, EPS, "relu")
        torch.library.opcheck(apply_operator.overload(backend), arguments, test_utils=tests)


@pytest.mark.parametrize("backend", OWN)
def test_operators_called_by_themselves_check_their_arguments(backend):
    for algorithm in (ALGORITHMS[backend][0], None):
        run = Run(backend, algorithm)
        (input, weight, bias), geometry = operands("edges", "contiguous", depthwise=algorithm is None)
        for image, filters, message in (
            (input[:0], weight, "empty"),
            (input[0], weight, "input"),
            (input, weight.double(), "weight"),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
                gathered(run, (image, filters, None), geometry)
        with pytest.raises((RuntimeError, ValueError), match="bias"):
            gathered(run, (input, weight, bias[:2]), geometry)
    with pytest.raises((RuntimeError, ValueError), match="algorithm must be"):
        (input, weight, bias), geometry = operands("edges", "contiguous")
        dense_operator(backend, input, weight, bias, *geometry, "winograd_f4")


def test_where_nothing_is_gathered():
    tensors, geometry = layer("dense", "channels_last")
    for keywords in (
        {"backend": "aten"},
        {"backend": "reference"},
        {"backend": None} if DEVICE == "cuda" else {},
    ):
        if not keywords:
            continue
        with Record() as record:
            call(tensors, geometry, **keywords)
        assert not any("moments" in name or "apply" in name for name in record.names)
    for backend in OWN:
        with Record() as record:
            call([tensors[0][:0], *tensors[1:]], geometry, backend=backend)
        assert not any("moments" in name or "apply" in name for name in record.names)

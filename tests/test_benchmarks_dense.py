"""The performance suite on dense convolutions: what it counts, and kernels that serve some layers alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_benchmarks import LIMITS, OURS, TORCH, harness, report, results, tiny
from tolerances import ALGORITHMS, TOLERANCES

import fastconv
from fastconv.backends import CHOICES, BackendError


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_dense_multiply_adds_are_what_ones_count(op):
    benchmark = harness.load(op)
    for layer in harness.layers(op):
        few = {
            name: min(layer.sizes[name], 2 * layer.sizes.get("groups", 1)) for name in ("channels", "filters")
        }
        sizes = {**layer.sizes, **few, "batch": 1, "fused": 0}
        image, weight = (torch.ones_like(tensor) for tensor in benchmark.tensors(sizes, torch.Generator()))
        assert benchmark.macs_inside(sizes) == benchmark.peer(sizes, image, weight).double().sum().item(), (
            layer
        )
        pixels = benchmark.peer(sizes, image, weight) if op == "conv2d" else image
        assert benchmark.macs(sizes) == weight[0].numel() * pixels.numel(), layer


def test_fused_chain_is_checked_with_all_its_gradients():
    sizes = {**harness.load("conv2d").tiny, "fused": 1}
    for direction in harness.PASSES:
        problem = harness.Problem(harness.load("conv2d"), harness.Layer("x", "fused", sizes), direction)
        contenders = harness.contenders("conv2d", backends_wanted=["reference"])
        assert [entry["refused"] for entry in problem.check(contenders)] == [None] * len(contenders)
        _, _, expected = problem._prepare()
        assert len(expected) == (1 if direction == "forward" else 4)
        if direction == "forward":  # relu has its effect, and no value is near its corner
            output = expected[0]
            assert (output == 0).any() and output[output > 0].min() > 0.1


@pytest.mark.parametrize("direction", harness.PASSES)
@pytest.mark.parametrize(
    "changes", [{}, {"residual": 0}, {"filters": 4, "groups": 4}], ids=["dense", "no residual", "depthwise"]
)
def test_normalisation_is_checked_in_each_algorithm(direction, changes):
    benchmark = harness.load("conv_bn_act")
    layer = harness.Layer("x", "y", {**benchmark.tiny, **changes})
    for dtype in (torch.float32, torch.bfloat16):
        problem = harness.Problem(benchmark, layer, direction, dtype)
        contenders = [
            TORCH,
            *(harness.Contender("fastconv", "nhwc", "cpu", name) for name in (None, "plain")),
        ]
        assert [entry["refused"] for entry in problem.check(contenders)] == [None] * 3
    if direction == "forward":  # relu has its effect, and no value is near its corner
        (output,) = problem._prepare()[2]
        assert (output == 0).any() and output[output > 0].min() > 1


@pytest.mark.parametrize("direction", harness.PASSES)
def test_kernel_that_does_not_serve_is_left_out(direction):
    def ours(sizes, *tensors, backend, algorithm):
        if backend is not None:
            raise BackendError("it takes no image of that colour")
        return fastconv.conv2d_reference(*tensors, None, sizes["stride"], sizes["padding"])

    contenders = [TORCH, OURS, harness.Contender("fastconv", "nchw")]
    group = tiny("conv2d", direction, ours=ours).measure(contenders, rounds=1, seconds=0, ceilings=LIMITS)
    assert [entry["name"] for entry in group["contenders"]] == ["torch nchw", "fastconv nchw"]
    assert not any(entry["refused"] for entry in group["contenders"])
    reason = "BackendError: it takes no image of that colour"
    assert group["left_out"] == {OURS.name: reason}
    result = results.collect("conv2d", [group, group], LIMITS, "float32", None)
    results.check(result)
    assert report.refusals(result) == [] and report.left_out(result) == [f"{OURS.name}: {reason}"]


def test_own_choice_that_does_not_serve_is_refused():
    def ours(*_, **__):
        raise BackendError("none")

    (entry,) = tiny("conv2d", ours=ours).check([harness.Contender("fastconv", "nchw")])
    assert entry["refused"] == "BackendError: none" and entry["left_out"] is None


def test_slow_algorithms_run_only_when_their_backend_is_named():
    def algorithms(**choice):
        return {contender.algorithm for contender in harness.contenders("conv2d", **choice)}

    assert "plain" not in algorithms() and "direct" in algorithms()
    assert {"plain", "direct"} <= algorithms(backends_wanted=["cpu"])


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_ladder_has_every_algorithm(op):
    for backend, steps in harness.load(op).ladder_steps.items():
        assert sorted(steps) == sorted(CHOICES[op].algorithms[backend])


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_no_algorithm_is_allowed_more_than_in_the_tests(op):
    for algorithm, rounding in harness.load(op).rounding.items():
        terms = 1e6
        allowed = harness.tolerance(torch.float32, rounding**2 * terms)
        c = TOLERANCES[torch.float32].c * ALGORITHMS[algorithm]
        assert allowed <= c * torch.finfo(torch.float32).eps * terms**0.5


def test_weight_layout_is_the_weights():
    """A user who converts the images only converts the residual, too."""
    seen = []

    def peer(sizes, *tensors):
        seen.extend(tensor.is_contiguous() for tensor in tensors)
        return harness.load("conv2d").peer(sizes, *tensors)

    sizes = {**harness.load("conv2d").tiny, "fused": 1}
    benchmark = dataclasses.replace(harness.load("conv2d"), peer=peer)
    problem = harness.Problem(benchmark, harness.Layer("x", "fused", sizes), "forward")
    problem.check([harness.Contender("torch", "nhwc", weight_layout="nchw")])
    assert seen == [False, True, True, False]  # input, weight, bias, residual

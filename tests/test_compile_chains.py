"""torch.compile(model, backend="fastconv"): chains of a convolution and what follows it, as one call."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import Block, Compiled, close, graphs, images, needs_kernel, randomized, step
from torch import nn
from torch.nn import functional as F

pytestmark = needs_kernel

RESIDUAL = [
    "conv_bn_act (conv2d, batch_norm, relu)",
    "conv_bn_act (conv2d, batch_norm)",
    "conv_bn_act (conv2d, batch_norm, iadd, relu)",
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference(dtype, channels_last):
    model = randomized(Block(16), dtype).eval()
    x = images(2, 16, 32, 33, dtype=dtype, channels_last=channels_last)
    with torch.no_grad():
        compiled = Compiled(model, "inductor" if dtype == torch.float32 else "eager")
        close(compiled(x), model(x))
    assert sorted(compiled.fused) == sorted(RESIDUAL)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"tracks": False}, {"stride": 2, "inplace": False}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_steps_and_then_inference(dtype, options):
    model = randomized(Block(**options), dtype)
    ours = copy.deepcopy(model)
    compiled = Compiled(ours, "inductor" if dtype == torch.float32 else "eager")
    for _ in range(3):
        x = images(2, 3, 17, 18, dtype=dtype)
        for actual, expected in zip(step(compiled, ours, x), step(model, model, x), strict=True):
            close(actual, expected)
    for actual, expected in zip(ours.buffers(), model.buffers(), strict=True):
        close(actual, expected)
    found = [idiom for idiom in compiled.fused if idiom.startswith("conv_bn_act")]
    assert found == [
        "conv_bn_act (batch_norm, relu)",
        "conv_bn_act (batch_norm)",
        "conv_bn_act (batch_norm, iadd, relu)",
    ]
    with torch.no_grad():
        close(Compiled(ours.eval())(x), model.eval()(x))


def test_weights_that_change_between_calls():
    model = randomized(Block(16)).eval()
    x = images(1, 16, 17, 18)
    with torch.no_grad():
        compiled = Compiled(model)
        for tensor in model.state_dict().values():
            tensor.mul_(1.25) if tensor.is_floating_point() else None
            close(compiled(x), model(x))
        model.load_state_dict(randomized(Block(16)).state_dict())
        close(compiled(x), model(x))
        model.conv1.weight.data.mul_(0.5)
        close(compiled(x), model(x))
        assert len(compiled.graphs) == 1
        model.conv2.weight = nn.Parameter(model.conv2.weight * 2)
        close(compiled(x), model(x))


def test_a_batch_of_any_size():
    model = randomized(Block(16)).eval()
    with torch.no_grad():
        compiled = Compiled(model, "inductor")
        for batch in (2, 3, 5):
            x = images(batch, 16, 32, 33)
            torch._dynamo.mark_dynamic(x, 0)
            close(compiled(x), model(x))
    assert sorted(compiled.fused) == sorted(RESIDUAL), "one graph"


# What must stay


def left(function, *inputs):
    """Runs a function that keeps all or some of its nodes; returns what was fused."""
    with torch.no_grad():
        compiled = Compiled(function)
        expected_inputs = [x.clone() for x in inputs]
        expected = function(*expected_inputs)
        actual = compiled(*inputs)
        flat = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
        for a, e in zip((*flat(actual), *inputs), (*flat(expected), *expected_inputs), strict=True):
            close(a, e)
    return compiled.fused


def operands():
    return images(1, 16, 32, 32), images(32, 16, 3, 3)


def test_values_that_are_seen_elsewhere_too():
    x, weight = operands()

    def twice(x, weight):
        y = F.conv2d(x, weight)
        return F.relu(y) + y

    def returned(x, weight):
        y = F.conv2d(x, weight)
        return y, F.relu(y)

    def viewed(x, weight):
        y = F.conv2d(x, weight)
        view = y[:, 0]
        return F.relu(y, inplace=True), view * 2

    def summed(x, weight):
        y = F.conv2d(x, weight)
        y += F.conv2d(x, weight * 2)
        return F.relu(y), y

    for function, fused in (
        (twice, ["conv2d (conv2d)"]),
        (returned, ["conv2d (conv2d)"]),
        (viewed, ["conv2d (conv2d)"]),
        (summed, ["conv2d (conv2d)", "conv2d (conv2d, iadd)"]),
    ):
        assert left(function, x, weight) == fused, function


def test_what_is_written_in_between():
    x, weight = operands()
    residual = images(1, 32, 30, 30)

    def input_written(x, weight, residual):
        y = F.conv2d(x, weight)
        x.mul_(2)
        return F.relu(y)

    def weight_written(x, weight, residual):
        y = F.conv2d(x, weight)
        weight[:] = 0
        return F.relu(y), weight * 1

    def weight_written_before(x, weight, residual):
        weight.mul_(2)
        return F.relu(F.conv2d(x, weight))

    def residual_written(x, weight, residual):
        y = F.conv2d(x, weight) + residual
        residual.add_(1)
        return F.relu(y)

    def residual_takes_the_sum(x, weight, residual):
        residual += F.conv2d(x, weight)
        return F.relu(residual)

    for function, fused in (
        (input_written, "conv2d (conv2d)"),
        (weight_written, "conv2d (conv2d)"),
        (weight_written_before, "conv2d (conv2d, relu)"),
        (residual_written, "conv2d (conv2d, add)"),
        (residual_takes_the_sum, "conv2d (conv2d)"),
    ):
        assert left(function, x.clone(), weight.clone(), residual.clone()) == [fused], function.__name__


def test_sums_of_other_shapes_and_other_activations():
    x, weight = operands()
    row = images(1, 32, 1, 1)
    assert left(lambda x, w, r: F.relu(F.conv2d(x, w) + r), x, weight, row) == ["conv2d (conv2d)"]
    full = images(1, 32, 30, 30)
    assert left(lambda x, w, r: torch.add(F.conv2d(x, w), r, alpha=2), x, weight, full) == ["conv2d (conv2d)"]
    assert left(lambda x, w: F.hardtanh(F.conv2d(x, w), -1, 1), x, weight) == ["conv2d (conv2d)"]
    for activation in (F.silu, F.gelu, F.relu6, lambda y: F.gelu(y, approximate="tanh")):
        (fused,) = left(lambda x, w, act=activation: act(F.conv2d(x, w)), x, weight)
        assert fused in {f"conv2d (conv2d, {name})" for name in ("silu", "gelu", "relu6", "hardtanh")}


class Shared(nn.Module):
    """One convolution for two images, and one normalisation for both of its results."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        return F.silu(self.norm(self.conv(y)) + y)


def test_shared_layers():
    model = randomized(Shared())
    ours, x = copy.deepcopy(model), images(2, 16, 32, 32)
    compiled = Compiled(ours)
    for _ in range(2):
        for actual, expected in zip(step(compiled, ours, x), step(model, model, x), strict=True):
            close(actual, expected)
    for actual, expected in zip(ours.buffers(), model.buffers(), strict=True):
        close(actual, expected)
    assert [name for name in compiled.fused if "batch_norm" in name] == [
        "conv_bn_act (batch_norm, relu)",
        "conv_bn_act (batch_norm, add, silu)",
    ]
    with torch.no_grad():
        compiled = Compiled(ours.eval())
        close(compiled(x), model.eval()(x))
    assert compiled.fused == [
        "conv_bn_act (conv2d, batch_norm, relu)",
        "conv_bn_act (conv2d, batch_norm, add, silu)",
    ]


@pytest.mark.parametrize("frozen", ["norm", "all", "statistics"])
def test_frozen_normalisation(frozen):
    """Where its own parameters take no gradient it is folded, and the convolution's gradient goes through."""
    model = randomized(Block(16)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(frozen == "statistics")
    if frozen == "all":
        model.requires_grad_(False)
    x = images(2, 16, 24, 24, dtype=torch.float64)
    compiled = Compiled(model)
    for actual, expected in zip(step(compiled, model, x), step(model, model, x), strict=True):
        close(actual, expected)
    if frozen == "statistics":
        assert set(compiled.fused) == {"conv2d (conv2d)"}
        assert any("takes a gradient" in reason for _, reason in compiled.left)
    else:
        assert sorted(compiled.fused) == sorted(RESIDUAL)


def test_a_momentum_of_none():
    """Its weight of the new batch is a number that the program reads from a tensor: two graphs."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU())
    ours = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=graphs.compile_graph)
    for _ in range(3):
        x = images(2, 3, 9, 9)
        for actual, expected in zip(step(compiled, ours, x), step(model, model, x), strict=True):
            close(actual, expected)
    for actual, expected in zip(ours.buffers(), model.buffers(), strict=True):
        close(actual, expected)


def autocast_within(model):
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return run


@pytest.mark.parametrize("within", [False, True])
def test_under_autocast(within):
    """It computes in autocast's type; weights are folded in their own, and brought into that one."""
    model, x = randomized(Block(16)).eval(), images(1, 16, 32, 32)
    ours = autocast_within(model) if within else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not within):
        compiled = Compiled(ours)
        for _ in range(2):
            with torch.autocast("cpu", enabled=False):
                exact = model(x)
            output = compiled(x)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), exact, rtol=0.03, atol=0.03)
            model.conv2.weight.mul_(0.5)
    assert sorted(compiled.fused) == sorted(RESIDUAL)
    (graph,) = compiled.final
    convolutions = [n for n in graph.graph.nodes if n.target is torch.ops.fastconv.conv2d.default]
    assert all(node.args[0].meta["val"].dtype == torch.bfloat16 for node in convolutions) and convolutions


@pytest.mark.parametrize("within", [False, True])
def test_training_under_autocast(within):
    model, x = randomized(Block(16)), images(2, 16, 24, 24)
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    exact = step(model, model, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        expected = step(autocast_within(theirs) if within else theirs, theirs, x)
        compiled = Compiled(autocast_within(ours) if within else ours)
        found = step(compiled, ours, x)
    largest = max(float(e.abs().max()) for e in exact[1:])
    for actual, wanted, true in zip(found, expected, exact, strict=True):
        assert actual.dtype == wanted.dtype
        error, theirs_error = ((t - true).abs().max() for t in (actual, wanted))
        assert error <= 2 * theirs_error + 0.01 * largest
    assert [idiom for idiom in compiled.fused if "batch_norm" in idiom] == [
        "conv_bn_act (batch_norm, relu)",
        "conv_bn_act (batch_norm)",
        "conv_bn_act (batch_norm, iadd, relu)",
    ]


def test_types_of_their_own():
    """float64 is left alone by autocast; a model in bfloat16 needs none."""
    model, x = randomized(Block(16)).eval(), images(1, 16, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact = copy.deepcopy(model).double()
        compiled = Compiled(exact)
        close(compiled(x.double()), exact(x.double()))
    assert sorted(compiled.fused) == sorted(RESIDUAL)
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        compiled = Compiled(half)
        exact = copy.deepcopy(half).float()(x.bfloat16().float())
        output = compiled(x.bfloat16())
        torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    assert compiled.fused


def test_gradients_switched_within_the_graph():
    model, x = randomized(Block(16)).double().eval(), images(2, 16, 24, 24, dtype=torch.float64)

    def function(x):
        with torch.no_grad():
            y = model.act(model.norm1(model.conv1(x)))
        return model.conv2(y + x.mean())

    compiled = Compiled(function)
    for actual, expected in zip(step(compiled, model, x), step(function, model, x), strict=True):
        close(actual, expected)
    assert compiled.fused == ["conv2d (conv2d)"] * 2, "what takes gradients elsewhere is not folded"

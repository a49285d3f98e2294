"""torch.compile(model, backend="fastconv"): chains of a convolution and what follows it, as one call."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn import functional as F

import fastconv

graphs = importlib.import_module("fastconv.optimize._graph")
fusion = importlib.import_module("fastconv.optimize._fusion")
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or fastconv.available("conv2d")[0] != "cpu", reason="no compiled CPU kernel here"
)


class Compiled:
    """A model or a function, compiled, and what was fused: ``"conv_bn_act (conv2d, batch_norm, relu)"``.

    Args:
        rest: what compiles the graph: ``"inductor"``, or ``"aot_eager"``, which takes a tenth of the time.
    """

    def __init__(self, function, rest="aot_eager", **keywords):
        torch._dynamo.reset()
        self.graphs, self.left, self._rest = [], [], rest
        self._call = torch.compile(function, backend=self._backend, fullgraph=True, **keywords)

    def _backend(self, module, inputs):
        fuse, lookup = fusion.fuse, torch._dynamo.lookup_backend

        def noted(*arguments):
            rows = fuse(*arguments)
            self.graphs.append([f"{row.op} ({row.idiom})" for row in rows if row.reason is None])
            self.left += [(row.idiom, row.reason) for row in rows if row.reason is not None]
            return rows

        def rest(module, inputs, config_patches):
            return lookup(self._rest)(module, inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fusion, "fuse", noted)
            if self._rest != "inductor":
                patch.setattr(torch._dynamo, "lookup_backend", lambda _: rest)
            return graphs.compile_graph(module, inputs)

    def __call__(self, *inputs):
        return self._call(*inputs)

    @property
    def fused(self):
        """Of the only graph."""
        (found,) = self.graphs
        return found


class Block(nn.Module):
    """What residual networks are made of; the addition is as their authors write it."""

    def __init__(self, channels=3, filters=32, stride=1, affine=True, tracks=True, inplace=True):
        super().__init__()

        def norm():
            return nn.BatchNorm2d(filters, affine=affine, track_running_stats=tracks)

        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding="same")
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride), norm())
        self.norm1, self.norm2, self.act = norm(), norm(), nn.ReLU(inplace)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.act(y)


def randomized(model, dtype=torch.float32):
    """Numbers of batch normalisation that are not zeros and ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model.to(dtype)


def images(*shape, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def close(actual, expected):
    limits = {"rtol": 1e-9, "atol": 1e-9} if expected.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **limits)
    steps = (
        [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (actual, expected)
    )
    assert next(steps) == next(steps)


def step(function, model, x):
    """Output, and gradients of everything."""
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = function(x)
    output.sin().mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


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
        compiled = Compiled(model, "inductor" if dtype == torch.float32 else "aot_eager")
        close(compiled(x), model(x))
    assert sorted(compiled.fused) == sorted(RESIDUAL)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"tracks": False}, {"stride": 2, "inplace": False}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_steps_and_then_inference(dtype, options):
    model = randomized(Block(**options), dtype)
    ours = copy.deepcopy(model)
    compiled = Compiled(ours, "inductor" if dtype == torch.float32 else "aot_eager")
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
            x = images(batch, 16, 17, 18)
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

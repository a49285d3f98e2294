"""Models that nobody here wrote: the ResNet of transformers, with small random weights, before and after."""

import os
import sys

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv.nn import Conv2d

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a download
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TRIAL = sys.modules["fastconv.optimize._trial"]
HAS_KERNEL = "cpu" in fastconv.available("conv2d", "cpu") and DEVICE == "cpu"
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no compiled kernel here")
LAYERS = {"basic": (2, 1, 2, 1), "bottleneck": (1, 2)}
CONVOLUTIONS = {"basic": 1 + 2 * 6 + 3, "bottleneck": 1 + 3 * 3 + 1}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The images are small: more threads would wait for each other most of the time."""
    threads(1)


def resnet(layer_type, dtype=torch.float32):
    """As ResNet-18 (basic) or ResNet-50 (bottleneck), narrower and with fewer layers."""
    depths = LAYERS[layer_type]
    model = transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32][: len(depths)],
            depths=list(depths),
            layer_type=layer_type,
        )
    ).to(DEVICE, dtype)
    # Without statistics of its own inputs, fresh batch normalisation lets the values decay to nothing.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model.train()(images(dtype, 4))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()


def images(dtype=torch.float32, count=2):
    return torch.randn(count, 3, 48, 40, device=DEVICE, dtype=dtype)


def run(model, x):
    """Outputs, and the gradients of parameters and input; batch statistics come back as they were."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = x.clone().requires_grad_()
    outputs = list(model(x).values())
    assert all(0.1 < output.std() < 10 for output in outputs)
    cotangents = [torch.cos(torch.arange(o.numel(), device=DEVICE).view(o.shape)).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [x, *model.parameters()], cotangents)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    return [*(output.detach() for output in outputs), *grads]


class Calls(TorchDispatchMode):
    """The names of the operators that run, such as ``aten::convolution``."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


def contents(model):
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


def close(actual, expected, tolerance):
    """As norms, each tensor; a bias before batch normalisation has a gradient of rounding errors alone."""
    largest = max(float(e.norm()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).norm()) <= tolerance * max(float(e.norm()), 1e-3 * largest)


@needs_kernel
@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_our_kernels_give_the_same_numbers(layer_type, training, memory_format):
    model = resnet(layer_type, torch.float64).train(training).to(memory_format=memory_format)
    x = images(torch.float64).to(memory_format=memory_format)
    before, expected = contents(model), run(model, x)
    assert fastconv.optimize(model, backend="cpu") is model
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {type(layer) for layer in layers} == {Conv2d} and len(layers) == CONVOLUTIONS[layer_type]
    with Calls() as calls:
        watched = run(model, x)
    close(watched, expected, 1e-10)
    close(run(model, x), expected, 1e-10)
    assert "fastconv::conv2d_backward" in calls.names
    assert calls.names & {"fastconv::conv2d", "fastconv::conv2d_moments"}
    assert not any("convolution" in name for name in calls.names)
    with torch.no_grad():
        output = model.eval()(x).last_hidden_state
        assert torch.equal(model(x).last_hidden_state, output), "with packed weights that were kept"
    model.train(training)
    fastconv.restore(model)
    assert contents(model) == before
    assert all(map(torch.equal, run(model, x), expected))


@pytest.mark.filterwarnings("ignore:other programs keep")
@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("backend", [None, pytest.param("cpu", marks=needs_kernel)])
@pytest.mark.parametrize("training", [False, True])
def test_optimize_with_an_example(monkeypatch, layer_type, backend, training):
    monkeypatch.setattr(TRIAL, "SECONDS", 0.02)
    model, x = resnet(layer_type).train(training), images()
    before, expected = contents(model), run(model, x)
    fastconv.optimize(model, x, backend=backend)
    report = fastconv.report(model)
    rows = [row for row in report.rows if row.matched]
    assert len(rows) == CONVOLUTIONS[layer_type]
    for row in rows:
        assert (row.kernel is None) != (row.reason is None)
        if row.kernel is not None:
            assert row.seconds_after < 0.98 * row.seconds_before
            assert backend is None or row.kernel.startswith("cpu/")
        else:
            assert "not faster" in row.reason or backend is None and "PyTorch's own" in row.reason
    assert report.parity is None or report.parity.holds
    close(run(model, x), expected, 1e-3)
    fastconv.restore(model)
    assert contents(model) == before
    assert all(map(torch.equal, run(model, x), expected))


@needs_kernel
def test_strict_takes_the_kernel_of_every_layer(monkeypatch):
    def faster(contenders, *_, **__):
        for call in contenders.values():
            call()
        return {"before": [2.0], "after": [1.0]}

    monkeypatch.setattr(TRIAL, "interleave", faster)
    model, x = resnet("basic"), images()
    expected = run(model, x)
    fastconv.optimize(model, x, backend="cpu", strict=True)
    assert len(fastconv.report(model).swapped) == CONVOLUTIONS["basic"]
    assert fastconv.report(model).parity.holds
    close(run(model, x), expected, 1e-3)

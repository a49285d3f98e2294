"""Depthwise convolution in torch.compile and torch.export, and its operators in the dispatcher."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, of_each_backend, runs
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastconv
from fastconv import depthwise_conv2d, depthwise_conv2d_reference

OP = "depthwise_conv2d"
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
one_algorithm = of_each_backend(runs(OP, own=True))  # compiling takes seconds
each_backend = for_runs(one_algorithm)
GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "activation": "silu"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tensors(batch=1, size=(6, 7), dtype=torch.float64, layout="contiguous"):
    def make(shape):
        return torch.randn(shape, dtype=dtype, device=DEVICE)

    return LAYOUTS[layout](make, (batch, 3, *size)), make((6, 1, 3, 2)), make((6,))


def output_and_gradients(f, given):
    leaves = [t.detach().requires_grad_() for t in given]
    output = f(*leaves)
    return output, *torch.autograd.grad(output.sin().sum(), leaves)


def check(f, given, geometry=GEOMETRY):
    expected = output_and_gradients(
        functools.partial(depthwise_conv2d_reference, **geometry), [t.double() for t in given]
    )
    actual = output_and_gradients(f, given)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, given[0].dtype, 200)
    return actual


@for_runs(
    one_algorithm,
    name=([OP, f"{OP}_backward"], [OP, f"{OP}_backward"]),
    sample=(
        [
            ("contiguous", (2, 3, 5, 6)),
            ("channels_last", (2, 3, 5, 6)),
            ("channels_last_channel_slice", (2, 3, 5, 6)),
            ("stepped", (1, 2, 4, 5)),
            ("contiguous", (0, 3, 5, 6)),
            ("channels_last", (2, 0, 5, 6)),
        ],
        [("channels_last_channel_slice", (1, 2, 3, 4)), ("contiguous", (0, 3, 5, 6))],
    ),
)
def test_opcheck(sample, name, run):
    layout, shape = sample

    def make(shape):
        return torch.randn(shape, dtype=torch.float64, device=DEVICE)

    input = LAYOUTS[layout](make, shape).detach().requires_grad_()
    weight = make((2 * shape[1], 1, 3, 2)).requires_grad_()
    bias = make((2 * shape[1],)).requires_grad_()
    geometry = ((2, 1), (1, 0, 1, 2), (1, 2))
    if name == OP:
        samples = [(input, weight, bias, *geometry, "gelu", run.algorithm)]
        samples += [(input, weight, None, *geometry, None, run.algorithm)]
    else:
        output = run.operator(OP)(input, weight, bias, *geometry, None, run.algorithm)
        grad_output = LAYOUTS[layout](make, tuple(output.shape)).detach().requires_grad_()
        needs = [(True, True, True), (True, False, False), (False, True, False)]
        samples = [(grad_output, input, weight, *geometry, run.algorithm, *need) for need in needs]
    for sample in samples:
        torch.library.opcheck(run.operator(name), sample)


@for_runs(
    runs(OP),
    layout=(["contiguous", "channels_last", "channels_last_channel_slice"], ["channels_last"]),
)
def test_compile(layout, run):
    f = functools.partial(depthwise_conv2d, **GEOMETRY, **run.keywords)
    check(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors(layout=layout))


def test_compile_with_inductor():
    run = runs(OP, own=True)[0]

    def f(x, w, b):  # with neighbours that Inductor fuses, so that strides matter
        x = torch.nn.functional.relu(x + 1)
        return depthwise_conv2d(x, w, b, **GEOMETRY, **run.keywords) * 2

    def reference(x, w, b):
        return depthwise_conv2d_reference(torch.nn.functional.relu(x + 1), w, b, **GEOMETRY) * 2

    compiled = torch.compile(f, fullgraph=True)
    for layout in ("contiguous", "channels_last"):
        given = tensors(layout=layout)
        for a, e in zip(output_and_gradients(compiled, given), output_and_gradients(reference, given)):
            assert_close(a, e, torch.float64, 200)


@each_backend
def test_compile_for_any_size(run):
    f = functools.partial(depthwise_conv2d, **GEOMETRY, **run.keywords)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for batch, size in ((4, (8, 9)), (5, (10, 11))):  # not those of the weight
        check(compiled, tensors(batch, size))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_makes_the_choice(backend):
    """The choice of a backend, and use_backend around it, can be traced."""
    compiled = torch.compile(
        functools.partial(depthwise_conv2d, **GEOMETRY), fullgraph=True, backend="aot_eager"
    )
    with fastconv.use_backend(backend):
        check(compiled, tensors())


@each_backend
def test_compile_of_func_grad(run):
    """An autograd.Function alone is silently wrong here, torch.library.register_autograd alone refuses."""

    def loss(f, *given):
        return f(*given, **GEOMETRY).sin().sum()

    given = tensors()
    ours = functools.partial(depthwise_conv2d, **run.keywords)
    compiled = torch.compile(
        torch.func.grad(functools.partial(loss, ours), argnums=(0, 1, 2)), fullgraph=True, backend="aot_eager"
    )
    theirs = torch.func.grad(functools.partial(loss, depthwise_conv2d_reference), argnums=(0, 1, 2))
    for a, e in zip(compiled(*given), theirs(*given), strict=True):
        assert_close(a, e, torch.float64, 200)


class Layer(torch.nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x, w, b):
        return depthwise_conv2d(x, w, b, **GEOMETRY, **self.run.keywords)


@each_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, run):
    batch, height, width = (
        torch.export.Dim(name, min=2 if name == "batch" else 3, max=64)
        for name in ("batch", "height", "width")
    )
    program = torch.export.export(
        Layer(run),
        tensors(2),
        dynamic_shapes=({0: batch, 2: height, 3: width}, None, None),
        strict=strict,
    )
    assert any(node.target is run.operator(OP) for node in program.graph.nodes)
    check(program.module(), tensors())
    check(program.module(), tensors(3, (9, 11)))


# Without data.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_fake_tensors(layout):
    given = tensors(layout=layout)
    mode = FakeTensorMode()
    real = output_and_gradients(functools.partial(depthwise_conv2d, **GEOMETRY), given)
    fake = output_and_gradients(
        functools.partial(depthwise_conv2d, **GEOMETRY), [mode.from_tensor(t) for t in given]
    )
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


@each_own_run
def test_meta_tensors_of_the_operators(run):
    input, weight, bias = (t.to("meta") for t in tensors(layout="channels_last"))
    geometry = ((2, 1), (1, 1, 2, 2), (1, 2))
    output = run.operator(OP)(input, weight, bias, *geometry, "silu", run.algorithm)
    grads = run.operator(f"{OP}_backward")(output, input, weight, *geometry, run.algorithm, True, True, True)
    expected = torch.empty(1, 6, 3, 9, device="meta").to(memory_format=torch.channels_last)
    assert (output.shape, output.stride()) == (expected.shape, expected.stride())
    assert output.device.type == "meta" and output.dtype == torch.float64
    for grad, tensor in zip(grads, (input, weight, bias), strict=True):
        assert (grad.shape, grad.stride()) == (tensor.shape, tensor.stride())


def test_meta_tensors():
    given = [t.to("meta") for t in tensors()]
    assert depthwise_conv2d(*given, **GEOMETRY).shape == (1, 6, 3, 9)

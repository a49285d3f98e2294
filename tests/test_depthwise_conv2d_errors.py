"""Depthwise convolution given bad input: each error names the argument, what it was, and what is allowed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import DEVICE, ELSEWHERE, runs
from tolerances import assert_close

from fastconv import BackendError, depthwise_conv2d
from fastconv.backends import BACKENDS, CHOICES, available
from fastconv.ops._activation import ACTIVATIONS

OP = "depthwise_conv2d"
each_run = pytest.mark.parametrize("run", runs(OP), ids=str)
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)


def on_device(arguments):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def good(**changes):
    arguments = {
        "input": torch.randn(2, 3, 5, 7, device=DEVICE),
        "weight": torch.randn(6, 1, 3, 3, device=DEVICE),
        "bias": torch.randn(6, device=DEVICE),
    }
    return {**arguments, **on_device(changes)}


zeros = torch.zeros
BAD = {  # what is wrong: the arguments, the error, and what its message must hold
    "input is no tensor": ({"input": [[1.0]]}, TypeError, "input", "torch.Tensor", "list"),
    "input of rank 3": ({"input": zeros(3, 5, 7)}, ValueError, "input", "4 dimensions", "(3, 5, 7)"),
    "weight of rank 3": ({"weight": zeros(6, 3, 3)}, ValueError, "weight", "4 dimensions", "(6, 3, 3)"),
    "bias of rank 2": ({"bias": zeros(6, 1)}, ValueError, "bias", "1 dimensions", "(6, 1)"),
    "integers": ({"input": zeros(2, 3, 5, 7, dtype=torch.int32)}, TypeError, "input", "float32", "int32"),
    "complex": ({"input": zeros(2, 3, 5, 7, dtype=torch.cfloat)}, TypeError, "input", "float32", "complex64"),
    "mixed weight": ({"weight": zeros(6, 1, 3, 3).double()}, TypeError, "weight", "float64", "float32"),
    "mixed bias": ({"bias": zeros(6).half()}, TypeError, "bias", "float16", "float32"),
    "filters of no channel": (
        {"weight": zeros(5, 1, 3, 3), "bias": None},
        *(ValueError, "weight", "(m * 3, 1, KH, KW)", "(5, 1, 3, 3)"),
    ),
    "a full convolution's weight": ({"weight": zeros(6, 3, 3, 3)}, ValueError, "weight", "(6, 3, 3, 3)"),
    "filters but no channels": ({"input": zeros(2, 0, 5, 7)}, ValueError, "weight", "0 channels"),
    "no taps": ({"weight": zeros(6, 1, 0, 3)}, ValueError, "weight", "tap", "(6, 1, 0, 3)"),
    "bias too short": ({"bias": zeros(3)}, ValueError, "bias", "(6,)", "(3,)"),
    "bias to broadcast": ({"bias": zeros(1)}, ValueError, "bias", "(6,)", "(1,)"),
    "kernel too high": ({"weight": zeros(6, 1, 6, 3)}, ValueError, "weight", "height", "6", "5"),
    "kernel too wide": ({"weight": zeros(6, 1, 3, 8)}, ValueError, "weight", "width", "8", "7"),
    "dilated kernel too wide": ({"dilation": 4}, ValueError, "weight", "dilation 4", "height", "9", "5"),
    "kernel wider than padded": (
        {"weight": zeros(6, 1, 3, 14), "padding": (0, 3)},
        *(ValueError, "weight", "width", "14", "13"),
    ),
    "no pixels": ({"input": zeros(2, 3, 0, 7)}, ValueError, "weight", "height", "0"),
    "stride 0": ({"stride": 0}, ValueError, "stride", "at least 1", "0"),
    "stride -1": ({"stride": (1, -1)}, ValueError, "stride", "at least 1", "(1, -1)"),
    "stride of a float": ({"stride": 1.5}, TypeError, "stride", "integer", "1.5"),
    "stride of a pair of floats": ({"stride": (1, 2.0)}, TypeError, "stride", "integer", "2.0"),
    "stride of three": ({"stride": (1, 2, 3)}, TypeError, "stride", "pair", "(1, 2, 3)"),
    "stride of none": ({"stride": None}, TypeError, "stride", "integer", "None"),
    "padding -1": ({"padding": -1}, ValueError, "padding", "at least 0", "-1"),
    "padding of a float": ({"padding": 0.5}, TypeError, "padding", "integer", "0.5"),
    "padding unknown": ({"padding": "full"}, ValueError, "padding", "'same'", "'valid'", "'full'"),
    "same, strided": ({"padding": "same", "stride": (1, 2)}, ValueError, "padding", "stride 1", "(1, 2)"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation", "at least 1", "0"),
    "dilation -2": ({"dilation": (-2, 1)}, ValueError, "dilation", "at least 1", "(-2, 1)"),
    **{
        f"{name} 2**62": ({name: (1, 2**62)}, ValueError, name, "at most 2147483647", str(2**62))
        for name in ("stride", "padding", "dilation")
    },
    "activation unknown": (
        {"activation": "tanh"},
        ValueError,
        "activation",
        "'tanh'",
        *map(repr, ACTIVATIONS),
    ),
    "activation a function": ({"activation": torch.relu}, ValueError, "activation", "'relu'"),
    "backend unknown": ({"backend": "cudnn"}, ValueError, "backend", "'cudnn'", *map(repr, BACKENDS)),
    "algorithm unknown": ({"algorithm": "fft"}, BackendError, "algorithm", "'fft'", "vectorized", "tiled"),
}


@pytest.mark.parametrize("changes, error, words", [(c, e, w) for c, e, *w in BAD.values()], ids=BAD)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as raised:
        depthwise_conv2d(**good(**changes))
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tensors_on_two_devices(name):
    arguments = good()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, but input is on {DEVICE}"):
        depthwise_conv2d(**arguments)


@pytest.mark.parametrize("run", [run for run in runs(OP) if run.algorithm], ids=str)
def test_algorithm_of_another_backend(run):
    known = CHOICES[OP].algorithms[run.backend]
    with pytest.raises(
        BackendError, match=re.escape(f"algorithm must be None or one of {known}, got 'other'")
    ):
        depthwise_conv2d(**good(), backend=run.backend, algorithm="other")


@pytest.mark.parametrize("backend", sorted(ELSEWHERE))
def test_backend_that_cannot_run_says_why(backend):
    device = {"cuda": "CUDA", "cpu": "CPU", "emulator": "CPU"}[backend]
    with pytest.raises(BackendError, match=f"backend='{backend}' cannot run here: it needs {device} tensors"):
        depthwise_conv2d(**good(), backend=backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="of Triton's interpreter")
def test_triton_interpreted_refuses_bfloat16():
    arguments = {k: v.bfloat16() for k, v in good().items()}
    with pytest.raises(BackendError, match="backend='triton' cannot run here: .*interpreter.* bfloat16"):
        depthwise_conv2d(**arguments, backend="triton")


def test_library_that_is_not_built_says_how_to_build_it(monkeypatch, tmp_path):
    from fastconv import _library

    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    reason = _library.load.__wrapped__("kernels")
    assert "libfastconv_kernels.so is not built" in reason and "pip install" in reason


# The operators themselves, whose callers need not have been checked. Nothing may crash or read past the end.

GEOMETRY = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
OPERATOR_BAD = {
    "input of rank 3": {"input": zeros(3, 5, 7)},
    "weight of rank 2": {"weight": zeros(6, 9)},
    "weight of a full convolution": {"weight": zeros(6, 3, 3, 3)},
    "filters of no channel": {"weight": zeros(5, 1, 3, 3)},
    "no filters": {"input": zeros(2, 0, 5, 7)},
    "no taps": {"weight": zeros(6, 1, 3, 0)},
    "kernel too high": {"weight": zeros(6, 1, 8, 3)},
    "mixed types": {"weight": zeros(6, 1, 3, 3).double()},
    "integers": {"input": zeros(2, 3, 5, 7).long(), "weight": zeros(6, 1, 3, 3).long(), "bias": None},
    "stride 0": {"stride": (0, 1)},
    "stride -1": {"stride": (1, -1)},
    "padding -1": {"padding": (1, 1, -1, 1)},
    "dilation 0": {"dilation": (1, 0)},
    "stride 2**62": {"stride": (1, 2**62)},
    "padding 2**62": {"padding": (2**62,) * 4},
    "stride of three": {"stride": (1, 1, 1)},
    "padding of two": {"padding": (1, 1)},
    "algorithm unknown": {"algorithm": "fft"},
}
FORWARD_BAD = {
    **OPERATOR_BAD,
    "bias too short": {"bias": zeros(5)},
    "bias of rank 2": {"bias": zeros(6, 1)},
    "mixed bias": {"bias": zeros(6).double()},
    "activation unknown": {"activation": "tanh"},
}
BACKWARD_BAD = {
    **OPERATOR_BAD,
    "grad_output too small": {"grad_output": zeros(2, 6, 5, 6)},
    "grad_output of another batch": {"grad_output": zeros(1, 6, 5, 7)},
    "grad_output of other channels": {"grad_output": zeros(2, 3, 5, 7)},
    "grad_output of rank 3": {"grad_output": zeros(6, 5, 7)},
    "mixed grad_output": {"grad_output": zeros(2, 6, 5, 7).half()},
}


def forward(run, **changes):
    arguments = {**good(), **GEOMETRY, "activation": None, "algorithm": run.algorithm, **changes}
    return run.operator(OP)(*arguments.values())


def backward(run, **changes):
    arguments = {
        "grad_output": torch.randn(2, 6, 5, 7, device=DEVICE),
        **good(),
        **GEOMETRY,
        "algorithm": run.algorithm,
        "need": True,
        **changes,
    }
    del arguments["bias"]
    *rest, need = arguments.values()
    return run.operator(f"{OP}_backward")(*rest, need, need, need)


@each_own_run
def test_operators_take_what_is_good(run):
    forward(run)
    backward(run)


@each_own_run
@pytest.mark.parametrize("changes", FORWARD_BAD.values(), ids=FORWARD_BAD)
def test_forward_operator_refuses(changes, run):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        forward(run, **on_device(changes))


@each_own_run
@pytest.mark.parametrize("changes", BACKWARD_BAD.values(), ids=BACKWARD_BAD)
def test_backward_operator_refuses(changes, run):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        backward(run, **on_device(changes))


@pytest.mark.parametrize("backend", [b for b in ("cuda", "emulator") if b in available(OP, DEVICE)])
def test_tiled_refuses_what_does_not_fit_shared_memory(backend):
    """Left open, the choice is the plain kernel; asked for by name, no other kernel stands in silently."""
    image = torch.randn(1, 1, 250, 250, device=DEVICE, requires_grad=True)
    weight = torch.randn(1, 1, 3, 3, device=DEVICE)
    output = depthwise_conv2d(image, weight, dilation=120, backend=backend)
    expected = torch.nn.functional.conv2d(image.double(), weight.double(), dilation=120)
    assert_close(output, expected, torch.float32, 9)
    with pytest.raises(RuntimeError, match="algorithm='tiled' cannot hold.*use algorithm='plain'"):
        depthwise_conv2d(image, weight, dilation=120, backend=backend, algorithm="tiled")
    (grad,) = torch.autograd.grad(output.sum(), image)
    assert_close(grad, torch.autograd.grad(expected.sum(), image)[0].double(), torch.float32, 9)


# More than 2^31 elements. Memory that is zero and never written costs nothing, so the input may be that
# large; one pixel beyond 2^31 is not zero, and long strides keep the output small. The input's gradient is
# as large as the input, 4 GiB that are written: --slow. (One row of 2^31 pixels is no image: kernels may
# refuse it, or run out of memory for the rows that they keep at hand.)

BEYOND = {  # height and width, stride
    "tall": ((2**26 + 2**10, 2**5), (2**16, 2**3)),
    "square": ((2**16 + 2**5, 2**15), (2**11, 2**9)),
}


def huge(size, stride):
    """An image of zeros but for the last pixel that a 1x1 kernel visits, and the output's size."""
    if DEVICE == "cuda":
        image = torch.zeros(1, 1, *size, dtype=torch.float16, device=DEVICE)
    else:
        image = torch.from_numpy(np.zeros((1, 1, *size), dtype=np.float16))
    visited = image[:, :, :: stride[0], :: stride[1]]
    visited[0, 0, -1, -1] = 3.0
    assert (visited.shape[2] - 1) * stride[0] * size[1] + (visited.shape[3] - 1) * stride[1] >= 2**31
    return image, tuple(visited.shape)


# Triton's interpreter would copy the image, and back.
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.slow], ids=str)
@pytest.mark.parametrize("size, stride", BEYOND.values(), ids=BEYOND)
def test_more_than_2_to_the_31_elements(size, stride, run):
    image, output_shape = huge(size, stride)
    weight = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float16, device=DEVICE)
    output = depthwise_conv2d(image, weight, stride=stride, **run.keywords)
    assert output.shape == output_shape
    assert output[0, 0, -1, -1] == output.sum() == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("size, stride", BEYOND.values(), ids=BEYOND)
def test_gradient_of_more_than_2_to_the_31_elements(size, stride, run):
    image, output_shape = huge(size, stride)
    weight = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float16, device=DEVICE)
    grad_output = torch.zeros(output_shape, dtype=torch.float16, device=DEVICE)
    grad_output[0, 0, -1, -1] = 4.0
    grad_input, grad_weight, grad_bias = run.operator(f"{OP}_backward")(
        grad_output, image, weight, stride, (0, 0, 0, 0), (1, 1), run.algorithm, True, True, True
    )
    visited = grad_input[0, 0, :: stride[0], :: stride[1]]
    assert visited[-1, -1] == visited.sum() == 2.0
    assert grad_weight.item() == 12.0 and grad_bias.item() == 4.0

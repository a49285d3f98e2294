"""Convolution given bad input: each error names the argument, what it was, and what is allowed."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from cases import DEVICE, ELSEWHERE, runs
from convolutions import Convolution
from tolerances import assert_close

from fastconv import BackendError, conv2d, conv_transpose2d, depthwise_conv2d, use_backend
from fastconv.backends import BACKENDS, CHOICES
from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import pair

OP = "conv2d"
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
zeros = torch.zeros


def on_device(arguments):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def good(**changes):
    arguments = {
        "input": torch.randn(2, 4, 5, 7, device=DEVICE),
        "weight": torch.randn(6, 2, 3, 3, device=DEVICE),
        "bias": torch.randn(6, device=DEVICE),
        "groups": 2,
    }
    return {**arguments, **on_device(changes)}


BAD = {  # what is wrong: the arguments, the error, and what its message must hold
    "input is no tensor": ({"input": [[1.0]]}, TypeError, "input", "torch.Tensor", "list"),
    "input of rank 3": ({"input": zeros(4, 5, 7)}, ValueError, "input", "4 dimensions", "(4, 5, 7)"),
    "weight of rank 3": ({"weight": zeros(6, 2, 3)}, ValueError, "weight", "4 dimensions", "(6, 2, 3)"),
    "bias of rank 2": ({"bias": zeros(6, 1)}, ValueError, "bias", "1 dimensions", "(6, 1)"),
    "integers": ({"input": zeros(2, 4, 5, 7, dtype=torch.int32)}, TypeError, "input", "float32", "int32"),
    "mixed weight": ({"weight": zeros(6, 2, 3, 3).double()}, TypeError, "weight", "float64", "float32"),
    "mixed bias": ({"bias": zeros(6).half()}, TypeError, "bias", "float16", "float32"),
    "mixed residual": (
        {"residual": zeros(2, 6, 3, 5).half()},
        *(TypeError, "residual", "float16", "float32"),
    ),
    "residual of another size": (
        {"residual": zeros(2, 6, 5, 7)},
        *(ValueError, "residual", "(2, 6, 3, 5)", "(2, 6, 5, 7)"),
    ),
    "residual to broadcast": ({"residual": zeros(1, 6, 3, 5)}, ValueError, "residual", "(1, 6, 3, 5)"),
    "groups that do not divide the channels": (
        {"groups": 3, "weight": zeros(6, 1, 3, 3)},
        *(ValueError, "groups", "divide", "4 channels", "3"),
    ),
    "groups that do not divide the filters": (
        {"groups": 4, "weight": zeros(6, 1, 3, 3)},
        *(ValueError, "groups", "divide", "6", "4"),
    ),
    "groups 0": ({"groups": 0}, ValueError, "groups", "at least 1", "0"),
    "groups of a float": ({"groups": 2.0}, TypeError, "groups", "integer", "2.0"),
    "channels of another number of groups": (
        {"groups": 1},
        *(ValueError, "weight", "(M, 4, KH, KW)", "4 channels", "groups=1", "(6, 2, 3, 3)"),
    ),
    "no channels": (
        {"input": zeros(2, 0, 5, 7), "weight": zeros(6, 0, 3, 3), "groups": 1},
        *(ValueError, "input", "weight", "at least one channel", "(2, 0, 5, 7)"),
    ),
    "no filters": ({"weight": zeros(0, 2, 3, 3), "bias": None}, ValueError, "weight", "one filter"),
    "no taps": ({"weight": zeros(6, 2, 0, 3)}, ValueError, "weight", "tap", "(6, 2, 0, 3)"),
    "bias too short": ({"bias": zeros(3)}, ValueError, "bias", "(6,)", "(3,)"),
    "kernel too high": ({"weight": zeros(6, 2, 6, 3)}, ValueError, "weight", "height", "6", "5"),
    "kernel too wide": ({"weight": zeros(6, 2, 3, 8)}, ValueError, "weight", "width", "8", "7"),
    "dilated kernel too high": ({"dilation": 4}, ValueError, "weight", "dilation 4", "height", "9", "5"),
    "no pixels": ({"input": zeros(2, 4, 0, 7)}, ValueError, "weight", "height", "0"),
    "stride 0": ({"stride": 0}, ValueError, "stride", "at least 1", "0"),
    "stride of a float": ({"stride": 1.5}, TypeError, "stride", "integer", "1.5"),
    "padding -1": ({"padding": -1}, ValueError, "padding", "at least 0", "-1"),
    "padding unknown": ({"padding": "full"}, ValueError, "padding", "'same'", "'valid'", "'full'"),
    "same, strided": ({"padding": "same", "stride": (1, 2)}, ValueError, "padding", "stride 1", "(1, 2)"),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation", "at least 1", "0"),
    **{
        f"{name} 2**62": ({name: (1, 2**62)}, ValueError, name, "at most 2147483647", str(2**62))
        for name in ("stride", "padding", "dilation")
    },
    "activation unknown": (
        {"activation": "tanh"},
        *(ValueError, "activation", "'tanh'", *map(repr, ACTIVATIONS)),
    ),
    "backend unknown": ({"backend": "cudnn"}, ValueError, "backend", "'cudnn'", *map(repr, BACKENDS)),
    "algorithm unknown": ({"algorithm": "fft"}, BackendError, "algorithm", "'fft'", "plain", "unfold"),
}


@pytest.mark.parametrize("changes, error, words", [(c, e, w) for c, e, *w in BAD.values()], ids=BAD)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as raised:
        conv2d(**good(**changes))
    message = str(raised.value)
    assert all(word in message for word in words), message


NOT_DENSE = {  # how a tensor is made so, and what the message says of it
    "sparse": (torch.Tensor.to_sparse, "torch.sparse_coo"),
    "mkldnn": (torch.Tensor.to_mkldnn, "torch._mkldnn"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor, tensor]), "a nested tensor"),
}
EACH_TENSOR = [
    (function, name)
    for function in (conv2d, conv_transpose2d, depthwise_conv2d)
    for name in ("input", "weight", "bias", "residual")
    if name != "residual" or function is conv2d
]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("inside_autocast", [False, True])
@pytest.mark.parametrize("make, layout", NOT_DENSE.values(), ids=NOT_DENSE)
@pytest.mark.parametrize("function, name", EACH_TENSOR)
def test_tensors_that_are_not_dense(function, name, make, layout, inside_autocast):
    """Sparse, for oneDNN alone, or nested: refused before a kernel of PyTorch's stumbles over it."""
    arguments = {"input": zeros(2, 4, 5, 7), "weight": zeros(4, 1, 3, 3), "bias": zeros(4)}
    if function is conv2d:
        arguments["residual"] = zeros(2, 4, 3, 5)
    if function is not depthwise_conv2d:
        arguments["groups"] = 4
    function(**arguments)
    arguments[name] = make(arguments[name])
    message = f"{name} must be a dense tensor, of layout torch.strided, got {layout}"
    inside = torch.autocast("cpu", torch.bfloat16) if inside_autocast else contextlib.nullcontext()
    with inside, pytest.raises(TypeError, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_tensors_on_two_devices(name):
    arguments = good(residual=zeros(2, 6, 3, 5))
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, but input is on {DEVICE}"):
        conv2d(**arguments)


@pytest.mark.parametrize("run", [run for run in runs(OP) if run.algorithm], ids=str)
def test_algorithm_of_another_backend(run):
    known = CHOICES[OP].algorithms[run.backend]
    message = f"algorithm must be None or one of {known}, got 'other'"
    with pytest.raises(BackendError, match=re.escape(message)):
        conv2d(**good(), backend=run.backend, algorithm="other")


@pytest.mark.parametrize("backend", sorted(ELSEWHERE & set(CHOICES[OP].algorithms)))
def test_backend_that_cannot_run_says_why(backend):
    device = {"cuda": "CUDA", "cpu": "CPU", "emulator": "CPU"}[backend]
    with pytest.raises(BackendError, match=f"backend='{backend}' cannot run here: it needs {device} tensors"):
        conv2d(**good(), backend=backend)


UNSERVED = {  # run: what it does not serve, and what the message must hold
    "triton-pointwise": [
        ({}, "needs a 1x1 weight", "3x3"),
        ({"weight": zeros(6, 2, 1, 1), "stride": 2}, "stride 1", "stride=(2, 2)"),
        ({"weight": zeros(6, 2, 1, 1), "padding": 1}, "no padding", "padding=(1, 1, 1, 1)"),
    ],
    **{
        f"cpu-winograd_{tile}": [
            ({"weight": zeros(6, 2, 3, 2)}, "3x3 weight", "3x2"),
            ({"stride": (1, 2)}, "stride 1", "stride=(1, 2)"),
            ({"dilation": 2}, "dilation 1", "dilation=(2, 2)"),
        ]
        for tile in ("f2", "f4", "f6")
    },
    "cpu-grouped": [
        (
            {"input": zeros(1, 80, 3, 3), "weight": zeros(6, 40, 3, 3)},
            *("at most 32 channels", "got 40 and 3"),
        ),
        ({"weight": zeros(80, 2, 3, 3), "bias": None}, "filters in a group", "got 2 and 40"),
    ],
    "emulator-implicit_gemm": [
        ({}, "float16 and bfloat16", "torch.float32"),
        (
            {"input": zeros(1, 8, 3, 3).half(), "weight": zeros(16, 4, 3, 3).half(), "bias": None},
            *("multiple of 8 channels", "got 4 and 8"),
        ),
    ],
}


@pytest.mark.parametrize(
    "run, changes, words",
    [(run, c, words) for run in runs(OP, own=True) for c, *words in UNSERVED.get(str(run), [])],
    ids=str,
)
def test_an_algorithm_refuses_what_it_does_not_serve(changes, words, run):
    """Asked for by name, no other kernel stands in silently; left open, another serves."""
    with pytest.raises(BackendError) as raised:
        conv2d(**good(**changes), **run.keywords)
    assert all(word in str(raised.value) for word in (f"algorithm='{run.algorithm}'", *words))
    conv2d(**good(**changes), backend=run.backend)
    with use_backend(run.backend), pytest.raises(BackendError):
        conv2d(**good(**changes), algorithm=run.algorithm)


# The operators themselves, whose callers need not have been checked. Nothing may crash or read past the end.

GEOMETRY = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 2}
OPERATOR_BAD = {
    "input of rank 3": {"input": zeros(4, 5, 7)},
    "weight of rank 2": {"weight": zeros(6, 9)},
    "weight of other groups": {"weight": zeros(6, 4, 3, 3)},
    "groups that do not divide": {"groups": 4},
    "groups 0": {"groups": 0},
    "no channels": {"input": zeros(2, 0, 5, 7), "weight": zeros(6, 0, 3, 3)},
    "no filters": {"weight": zeros(0, 2, 3, 3)},
    "no taps": {"weight": zeros(6, 2, 3, 0)},
    "kernel too high": {"weight": zeros(6, 2, 8, 3)},
    "mixed types": {"weight": zeros(6, 2, 3, 3).double()},
    "integers": {"input": zeros(2, 4, 5, 7).long(), "weight": zeros(6, 2, 3, 3).long(), "bias": None},
    "stride 0": {"stride": (0, 1)},
    "padding -1": {"padding": (1, 1, -1, 1)},
    "dilation 0": {"dilation": (1, 0)},
    "stride 2**62": {"stride": (1, 2**62)},
    "padding 2**62": {"padding": (2**62,) * 4},
    "dilation 2**62": {"dilation": (2**62, 1)},
    "stride of three": {"stride": (1, 1, 1)},
    "padding of two": {"padding": (1, 1)},
    "algorithm unknown": {"algorithm": "fft"},
}
FORWARD_BAD = {
    **OPERATOR_BAD,
    "bias too short": {"bias": zeros(5)},
    "bias of rank 2": {"bias": zeros(6, 1)},
    "mixed bias": {"bias": zeros(6).double()},
    "residual too small": {"residual": zeros(2, 6, 5, 6)},
    "residual of rank 3": {"residual": zeros(6, 5, 7)},
    "mixed residual": {"residual": zeros(2, 6, 5, 7).double()},
    "packed of nothing": {"packed": zeros(3)},
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


def named(run):
    """The algorithm, where it serves the good arguments; else the operator's own choice."""
    served = Convolution((2, 4, 5, 7), 6, padding=1, groups=2).serves(run)
    return run.algorithm if served else None


def forward(run, changes):
    tensors = good()
    arguments = {
        **{name: tensors.get(name) for name in ("input", "weight", "bias", "residual", "packed")},
        **GEOMETRY,
        "activation": None,
        "algorithm": named(run),
    }
    return run.operator(OP)(*{**arguments, **on_device(changes)}.values())


def backward(run, changes):
    arguments = {
        "grad_output": torch.randn(2, 6, 5, 7, device=DEVICE),
        **{name: good()[name] for name in ("input", "weight")},
        **GEOMETRY,
        "algorithm": named(run),
    }
    changes = {k: v for k, v in changes.items() if k != "bias"}
    return run.operator(f"{OP}_backward")(*{**arguments, **on_device(changes)}.values(), True, True, True)


@each_own_run
def test_operators_take_what_is_good(run):
    assert forward(run, {}).shape == (2, 6, 5, 7)
    assert backward(run, {})[0].shape == (2, 4, 5, 7)


@each_own_run
@pytest.mark.parametrize("changes", FORWARD_BAD.values(), ids=FORWARD_BAD)
def test_forward_operator_refuses(changes, run):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        forward(run, changes)


@each_own_run
@pytest.mark.parametrize("changes", BACKWARD_BAD.values(), ids=BACKWARD_BAD)
def test_backward_operator_refuses(changes, run):
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        backward(run, changes)


@each_own_run
def test_operator_refuses_what_its_algorithm_does_not_serve(run):
    for changes, *_ in UNSERVED.get(str(run), []):
        if run.algorithm == "grouped":
            break  # it serves wide groups too; what it is not is fast
        given = good(**changes)
        stride, dilation = (pair(name, given.get(name, 1)) for name in ("stride", "dilation"))
        rest = (stride, (given.get("padding", 0),) * 4, dilation, 2, None, run.algorithm)
        with pytest.raises((RuntimeError, ValueError), match=f"algorithm='{run.algorithm}'"):
            run.operator(OP)(given["input"], given["weight"], None, None, None, *rest)


PACK_BAD = {
    "algorithm unknown": ((zeros(6, 2, 3, 3), 2, "fft"), "algorithm must be one of direct"),
    "groups": ((zeros(6, 2, 3, 3), 4, "plain"), "multiple of 4"),
    "integers": ((zeros(6, 2, 3, 3).long(), 2, "plain"), "weight must be float32"),
    "rank": ((zeros(6, 2, 3), 2, "plain"), "4 dimensions"),
    "nothing": ((zeros(0, 2, 3, 3), 2, "plain"), "must not be empty"),
}


@pytest.mark.parametrize("arguments, message", PACK_BAD.values(), ids=PACK_BAD)
def test_packing_refuses(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastconv.conv2d_pack_weight(*arguments)


def test_packed_weights_are_for_the_cpu():
    tensors = good()
    packed = torch.ops.fastconv.conv2d_pack_weight(tensors["weight"].cpu(), 2, "plain").to(DEVICE)
    for run in runs(OP, own=True):
        if run.backend != "cpu":
            rest = (packed, *GEOMETRY.values(), None, named(run))
            with pytest.raises((RuntimeError, ValueError), match="packed must be None"):
                run.operator(OP)(tensors["input"], tensors["weight"], None, None, *rest)


@pytest.mark.parametrize("backend", [b for b in ("cuda", "emulator") if b not in ELSEWHERE])
def test_direct_refuses_what_does_not_fit_shared_memory(backend):
    """Left open, another kernel serves; asked for by name, none stands in silently."""
    image = torch.randn(1, 1, 250, 250, device=DEVICE)
    weight = torch.randn(1, 1, 3, 3, device=DEVICE)
    expected = torch.nn.functional.conv2d(image.double(), weight.double(), dilation=120)
    assert_close(conv2d(image, weight, dilation=120, backend=backend), expected, torch.float32, 9)
    with pytest.raises(RuntimeError, match="algorithm='direct' does not serve"):
        conv2d(image, weight, dilation=120, backend=backend, algorithm="direct")


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.parametrize("algorithm", ["direct", "plain"])
def test_forward_mode_is_refused(algorithm):
    """Without a formula, tangents would be lost in silence."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)

    def convolve(x):
        return conv2d(x, weight, backend="cpu", algorithm=algorithm)

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(convolve, (input,), (torch.ones_like(input),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            convolve(dual)
        assert convolve(input).shape == (1, 3, 3, 3)


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
def test_memory_that_is_not_there():
    weight = torch.randn(3, 2, 3, 3)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="its memory is not allocated"):
        conv2d(torch.randn(1, 2, 5, 5), weight, backend="cpu")


def test_a_call_alike_is_checked_where_it_differs():
    """Checks are kept for calls that are alike; a float is not like the integer of its value."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    assert conv2d(input, weight, stride=(1, 1)).shape == (1, 3, 3, 3)
    with pytest.raises(TypeError, match="stride must be"):
        conv2d(input, weight, stride=(1.0, 1.0))
    step = torch.tensor(1)
    assert conv2d(input, weight, stride=step).shape == (1, 3, 3, 3)
    step.add_(1)
    assert conv2d(input, weight, stride=step).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("backend", [b for b in ("cpu", "cuda", "emulator") if b not in ELSEWHERE])
def test_result_that_fits_no_memory(backend):
    with pytest.raises(RuntimeError, match=r"no memory for a result of shape \(2, 6, 2147483651, "):
        conv2d(**good(), padding=2**30, backend=backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
def test_huge_strides_cost_nothing():
    input = torch.randn(1, 2, 5, 5, requires_grad=True)
    conv2d(input, torch.randn(3, 2, 3, 3), stride=2**31 - 1, backend="cpu").sum().backward()
    assert input.grad.shape == input.shape
    with pytest.raises(BackendError, match="at most 4096, got stride"):
        conv2d(input, torch.randn(3, 2, 3, 3), stride=65, backend="cpu", algorithm="direct")


@pytest.mark.skipif("triton" in ELSEWHERE, reason="of Triton's kernels")
@pytest.mark.parametrize("algorithm", [None, "implicit_gemm"])
def test_triton_takes_no_stride_of_endless_phases(algorithm):
    input = torch.randn(1, 2, 5, 5, device=DEVICE)
    with pytest.raises(BackendError, match=f"at most 4096, got stride=.{2**31 - 1}, "):
        conv2d(input, input.new_ones(3, 2, 3, 3), stride=2**31 - 1, backend="triton", algorithm=algorithm)

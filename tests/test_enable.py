"""fastconv.enable: kernels for code that calls torch.nn.functional."""

import threading

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv

ELSEWHERE = "cuda" if DEVICE == "cpu" else "cpu"  # a backend that cannot run on these tensors
HAS_KERNEL = fastconv.available("depthwise_conv2d", DEVICE)[0] in ("cpu", "cuda")


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def tensors(channels=4, groups=None, size=8):
    groups = channels if groups is None else groups
    x = torch.randn(2, channels, size, size, device=DEVICE)
    return (
        x,
        torch.randn(channels, channels // groups, 3, 3, device=DEVICE),
        torch.randn(channels, device=DEVICE),
    )


def names_of(call):
    with Calls() as calls, torch.no_grad():
        call()
    return calls.names


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: functional.conv2d(x, w, b, 2, 1, 1, 4),
        lambda x, w, b: functional.conv2d(input=x, weight=w, bias=b, padding="same", groups=4),
        lambda x, w, b: torch.conv2d(x, w, stride=(1, 2), padding=(1, 0), dilation=2, groups=4),
        lambda x, w, b: nn.Conv2d(4, 4, 3, groups=4, device=DEVICE).requires_grad_(False)(x),
    ],
)
def test_depthwise_calls_go_to_the_kernel(call):
    torch.manual_seed(1)
    expected = call(*tensors())
    torch.manual_seed(1)
    with fastconv.enable(backend="reference"):
        names = names_of(lambda: call(*tensors()))
        torch.manual_seed(1)
        actual = call(*tensors())
    assert "convolution" not in names
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_KERNEL, reason="no compiled kernel here")
def test_the_compiled_kernel_runs():
    x, w, b = tensors()
    with fastconv.enable():
        assert "depthwise_conv2d" in names_of(lambda: functional.conv2d(x, w, b, groups=4))


CALLS = {
    "dense": lambda x, w, b: functional.conv2d(x, w, b, 2, 1, 2),
    "grouped": lambda x, w, b: torch.conv2d(x, w[:, :2], stride=(1, 2), padding=1, groups=2),
    "keywords": lambda x, w, b: functional.conv2d(input=x, weight=w, bias=b, padding="same"),
    "one channel": lambda x, w, b: functional.conv2d(x[:, :1], w[:, :1], b),
    "module": lambda x, w, b: nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1, device=DEVICE)(x),
    "transposed": lambda x, w, b: functional.conv_transpose2d(x, w, b, 2, 1, 1, 1, 1),
    "transposed, grouped": lambda x, w, b: torch.conv_transpose2d(x, w, groups=2, dilation=(2, 1)),
    "transposed, depthwise": lambda x, w, b: functional.conv_transpose2d(x, w[:, :1], b, groups=4),
    "transposed module": lambda x, w, b: nn.ConvTranspose2d(4, 2, 3, 2, device=DEVICE)(x, [18, 18]),
}


@pytest.mark.parametrize("name", CALLS)
def test_dense_and_transposed_calls_go_to_the_kernel(name):
    def call():
        torch.manual_seed(1)
        with torch.no_grad():
            return CALLS[name](*tensors(groups=1))

    expected = call()
    assert names_of(call)[-1] in ("convolution", "_convolution", "mkldnn_convolution")
    with fastconv.enable(backend="reference"):
        names, actual = names_of(call), call()
    assert not any("convolution" in name for name in names)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if DEVICE == "cpu" and HAS_KERNEL:
        with fastconv.enable("cpu"):
            assert ("conv_transpose2d" if "transposed" in name else "conv2d") in names_of(call)
    with fastconv.enable():  # the measured best
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.conv2d(tensors()[0][0], tensors()[1], groups=4),  # no batch
        lambda: functional.conv2d(*(t.to(torch.complex64) for t in tensors()), groups=4),
        lambda: functional.conv_transpose2d(*(t.to(torch.complex64) for t in tensors(groups=1))),
        lambda: functional.conv2d(*(t.to("meta") for t in tensors(groups=1))),
        lambda: functional.conv1d(tensors()[0][0], tensors(8)[0][0, :, :, :3]),
    ],
)
def test_other_calls_go_to_pytorch(call):
    with fastconv.enable(backend=ELSEWHERE):  # which would raise, were it asked
        assert any("convolution" in name or "conv" in name for name in names_of(call))


def test_named_backend_that_cannot_run_raises():
    x, w, b = tensors()
    with fastconv.enable(backend=ELSEWHERE), pytest.raises(fastconv.BackendError, match="cannot run here"):
        functional.conv2d(x, w, b, groups=4)
    with pytest.raises(ValueError, match="backend must be None or one of"), fastconv.enable("gpu"):
        pass


def test_nesting_and_leaving():
    x, w, b = tensors()

    def served():
        return "convolution" not in names_of(lambda: functional.conv2d(x, w, b, groups=4))

    assert not served()
    with fastconv.enable("reference"):
        assert served()
        with fastconv.enable("aten"):
            assert not served()
        assert served()
        with pytest.raises(KeyError), fastconv.enable("aten"):
            raise KeyError
        assert served()
    assert not served()


def test_other_threads_do_not_see_it():
    x, w, b = tensors()
    seen = []
    with fastconv.enable(ELSEWHERE):
        thread = threading.Thread(target=lambda: seen.append(functional.conv2d(x, w, b, groups=4).shape))
        thread.start()
        thread.join()
    assert seen == [(2, 4, 6, 6)]


def test_gradients():
    x, w, b = (t.double().requires_grad_() for t in tensors())
    expected = torch.autograd.grad(functional.conv2d(x, w, b, groups=4).square().sum(), (x, w, b))
    with fastconv.enable("reference"):
        actual = torch.autograd.grad(functional.conv2d(x, w, b, groups=4).square().sum(), (x, w, b))
    torch.testing.assert_close(actual, expected)


def test_autocast_mixes_types():
    x, w, b = tensors()
    with torch.autocast(DEVICE, torch.bfloat16), fastconv.enable("reference"):
        y = functional.conv2d(x.bfloat16(), w, b, groups=4)
    assert y.dtype == torch.bfloat16
    with fastconv.enable("reference"), pytest.raises(RuntimeError):
        functional.conv2d(x.bfloat16(), w, b, groups=4)  # as PyTorch says it

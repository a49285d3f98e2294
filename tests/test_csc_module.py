"""fastconv.nn.CSC: conv, shift, conv, and the link."""

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import CSC, Shift2d


def block(*arguments, **keywords):
    """With batch norms that do something."""
    made = CSC(*arguments, **keywords).to(DEVICE, torch.float64)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


def image(channels=6, size=(7, 8)):
    return torch.randn(2, channels, *size, dtype=torch.float64, device=DEVICE, requires_grad=True)


def by_definition(csc, x, stride, kernel_size, dilation):
    """In PyTorch's functions, the shift as its reference."""

    def normal(norm, x):
        return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)

    hidden = torch.relu(normal(csc.bn1, nn.functional.conv2d(x, csc.conv1.weight)))
    channels = hidden.shape[1]
    shifted = fastconv.shift2d_reference(hidden, Shift2d(channels, kernel_size, dilation).offsets)
    y = nn.functional.conv2d(shifted, csc.conv2.weight.view(-1, channels, 1, 1), None, stride)
    y = torch.relu(normal(csc.bn2, y))
    if len(csc.shortcut):
        x = normal(csc.shortcut[1], nn.functional.conv2d(x, csc.shortcut[0].weight, None, stride))
    return y + x


@pytest.mark.parametrize(
    "filters, stride, expansion, kernel_size, dilation",
    [(6, 1, 3, 3, 1), (6, 1, 1.5, 3, 2), (12, 2, 1, 3, 1), (6, 2, 5, 5, 1), (7, 1, 2, 3, 1), (6, 3, 2, 1, 1)],
)
def test_is_its_formula(filters, stride, expansion, kernel_size, dilation):
    csc, x = block(6, filters, stride, expansion, kernel_size, dilation), image()
    expected = by_definition(csc, x, stride, kernel_size, dilation)
    actual = csc(x)
    assert actual.shape == (2, filters, -(-7 // stride), -(-8 // stride))
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    tensors = [x, *csc.parameters()]
    for a, e in zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (actual, expected))):
        torch.testing.assert_close(a, e)


def test_keys_and_copies():
    csc, x = block(6, 12, 2, 2).eval(), image()
    convolutions = {"conv1.weight", "conv2.weight", "shortcut.0.weight"}
    assert {name for name in csc.state_dict() if name.endswith("weight")} == convolutions | {
        "bn1.weight",
        "bn2.weight",
        "shortcut.1.weight",
    }
    assert not any("shortcut" in name for name in block(6, 6, expansion=2).state_dict())
    expected = csc(x)
    for again in (copy.deepcopy(csc), pickle.loads(pickle.dumps(csc))):
        assert torch.equal(again(x), expected)
    torch.testing.assert_close(csc(x.to(memory_format=torch.channels_last)), expected)


def test_cost_is_that_of_its_layers():
    table = fastconv.cost(CSC(16, 32, 2, 3), (16, 8, 8))
    assert table.macs == 64 * 16 * 96 + 16 * 96 * 32 + 16 * 16 * 32
    assert table.parameters == sum(p.numel() for p in CSC(16, 32, 2, 3).parameters())
    assert not any(row.type == "CSC" for row in table.layers)


def test_backend_reaches_every_layer():
    csc = CSC(6, 12, 2, 2, backend="reference").to(DEVICE, torch.float64)
    x = image()
    torch.testing.assert_close(csc(x), by_definition(csc, x, 2, 3, 1))
    with pytest.raises(fastconv.BackendError, match="triton|cuda"):
        CSC(6, 12, backend="triton" if DEVICE == "cuda" else "cuda").to("cpu")(x.float().cpu())


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((0, 6), ValueError, "in_channels must be at least 1, got 0"),
        ((6, 6.5), TypeError, "out_channels must be an integer, got 6.5"),
        ((6, 6, 0), ValueError, "stride must be at least 1, got 0"),
        ((6, 6, 1, 0), ValueError, "expansion must be a number that leaves a channel to shift, got 0 for"),
        ((6, 6, 1, "2"), ValueError, "expansion must be a number that leaves .*, got '2'"),
        ((6, 6, 1, float("nan")), ValueError, "expansion must be a number that leaves .*, got nan"),
        ((6, 6, 1, 1), ValueError, "channels must be at least 9"),
        ((6, 6, 1, 3, 2), ValueError, "kernel_size must be odd"),
        ((6, 6, 1, 3, 3, 0), ValueError, "dilation must be at least 1"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        CSC(*arguments)


def test_backend_error():
    with pytest.raises(ValueError, match="backend must be None or one of"):
        CSC(6, 12, backend="cudnn")

"""fastconv.nn.ConvBNAct: the same as the container that it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import ConvBNAct
from fastconv.ops._activation import ACTIVATIONS


def container(module, activation):
    """PyTorch's layers with the module's parameters."""
    layers = {None: [], "relu": [nn.ReLU()], "relu6": [nn.ReLU6()], "silu": [nn.SiLU()], "gelu": [nn.GELU()]}
    layers["gelu_tanh"] = [nn.GELU(approximate="tanh")]
    return nn.Sequential(*copy.deepcopy(list(module[:2])), *layers[activation]).to(DEVICE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [
    {}, {"groups": 4}, {"stride": 2, "bias": True}, {"kernel_size": 1, "affine": False}, {"momentum": None},
    {"track_running_stats": False},
    {"kernel_size": (3, 5), "dilation": (2, 1), "eps": 0.1, "padding": "same"},
], ids=str)  # fmt: skip
def test_as_the_container(activation, options):
    module = ConvBNAct(4, 8, activation=activation, **options).to(DEVICE)
    other = container(module, activation)
    assert list(module.state_dict()) == list(other.state_dict())
    for training in (True, True, False):
        x = torch.randn(2, 4, 7, 6, device=DEVICE)
        module.train(training), other.train(training)
        found, wanted = module(x), other(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(found, list(module.parameters()), grad)
        wanted = torch.autograd.grad(wanted, list(other.parameters()), grad)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for a, b in zip(module.buffers(), other.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_residual_and_size():
    module = ConvBNAct(4, 4, 3, dilation=2).to(DEVICE)
    x = torch.randn(2, 4, 7, 6, device=DEVICE)
    other = container(module, "relu")
    torch.testing.assert_close(module(x, x), torch.relu(other[:2](x) + x), rtol=1e-4, atol=1e-5)


def test_hooks_and_other_layers_run_one_by_one():
    module = ConvBNAct(4, 4).to(DEVICE).eval()
    x, seen = torch.randn(2, 4, 5, 5, device=DEVICE), []
    wanted = module(x, x)
    handle = module[1].register_forward_hook(lambda *given: seen.append(given[2]))
    torch.testing.assert_close(module(x, x), wanted, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    handle.remove()
    module[1] = nn.GroupNorm(2, 4).to(DEVICE)
    torch.testing.assert_close(module(x), torch.relu(module[1](module[0](x))))


@pytest.mark.parametrize("change", [
    lambda m: m.__setitem__(2, nn.Tanh()), lambda m: m.append(nn.Sigmoid()), lambda m: m.pop(2),
    lambda m: m.__setitem__(2, nn.GELU("tanh")), lambda m: m.__setitem__(0, nn.Conv2d(4, 4, 1)),
])  # fmt: skip
def test_changed_layers_count(change):
    module = ConvBNAct(4, 4).eval()
    change(module)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(module(x), nn.Sequential(*module)(x), rtol=1e-4, atol=1e-5)


def test_a_failed_call_counts_no_batch():
    module = ConvBNAct(4, 4, kernel_size=9, padding=0)
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.randn(2, 4, 5, 5))
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize("residual", [(2, 4, 1, 1), (1, 4, 5, 5), (4, 5, 5), (5, 5)])
def test_a_residual_is_broadcast_and_promoted(residual):
    module = ConvBNAct(4, 4).eval()
    x, single = torch.randn(2, 4, 5, 5), torch.randn(residual)
    for r in (single, single.double()):
        wanted = torch.relu(module[:2](x) + r)
        torch.testing.assert_close(module(x, r), wanted, rtol=1e-4, atol=1e-5)


def test_copies_text_and_errors():
    module = ConvBNAct(4, 4, backend="reference").to(DEVICE).eval()
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert "backend='reference'" in str(module) and "BatchNorm2d" in str(module)
    with pytest.raises(ValueError, match="activation must be one of"):
        ConvBNAct(4, 4, activation="tanh")
    with pytest.raises(ValueError, match="backend must be None or one of"):
        ConvBNAct(4, 4, backend="magic")


def test_optimize_leaves_its_layers_alone():
    module = nn.Sequential(ConvBNAct(4, 4)).to(DEVICE)
    fastconv.optimize(module)
    assert type(module) is nn.Sequential and type(module[0]) is ConvBNAct and type(module[0][0]) is nn.Conv2d
    assert "part of a ConvBNAct" in str(fastconv.report(module))

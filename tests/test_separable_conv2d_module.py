"""fastconv.nn.SeparableConv2d: the same as the containers that it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import SeparableConv2d
from fastconv.nn import separable_conv2d as module_file
from fastconv.ops._activation import ACTIVATIONS


def plain(module):
    """PyTorch's containers of the same layers."""
    return nn.Sequential(*(nn.Sequential(*copy.deepcopy(list(part))) for part in module))


def calibrated(module):
    """With running averages that are not those of a new module."""
    module = module.to(DEVICE)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 2), layer.bias.normal_()
    return module


@pytest.fixture
def fused(monkeypatch):
    """The calls of fastconv.separable_conv2d."""
    calls, operator = [], module_file.separable_conv2d
    monkeypatch.setattr(
        module_file, "separable_conv2d", lambda *a, **k: (calls.append(k), operator(*a, **k))[1]
    )
    return calls


OPTIONS = [
    {}, {"stride": 2, "bias": True}, {"kernel_size": (3, 5), "dilation": (2, 1), "padding": "same"},
    {"eps": 0.1, "momentum": None, "mid_activation": None}, {"norm": False}, {"norm": False, "bias": True},
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_the_containers(activation, options, fused):
    module = calibrated(SeparableConv2d(16, 24, activation=activation, **options))
    other = plain(module)
    assert list(module.state_dict()) == list(other.state_dict())
    for training in (True, True, False):
        x = torch.randn(2, 16, 7, 6, device=DEVICE)
        module.train(training), other.train(training)
        found, wanted = module(x), other(x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(found, list(module.parameters()), grad)
        wanted = torch.autograd.grad(wanted, list(other.parameters()), grad)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)
        for a, b in zip(module.buffers(), other.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(fused) == (3 if "norm" in options else 0)  # a gradient of bn_weight is needed
    fused.clear()
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-4)
    assert len(fused) == 2


def test_state_dict_keys():
    module = SeparableConv2d(4, 8)
    assert list(module.state_dict())[:2] == ["0.0.weight", "0.1.weight"]
    assert {"0.1.running_mean", "1.0.weight", "1.1.num_batches_tracked"} <= set(module.state_dict())
    assert module[0][0].weight.shape == (4, 1, 3, 3) and module[1][0].weight.shape == (8, 4, 1, 1)
    assert list(SeparableConv2d(4, 8, norm=False).state_dict()) == ["0.0.weight", "1.0.weight"]
    assert type(module[:1]) is nn.Sequential


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_residual(training, norm, fused):
    """Added before the last activation; one that is broadcast or converted, too."""
    module = calibrated(SeparableConv2d(16, 16, norm=norm)).train(training)
    x = torch.randn(2, 16, 7, 6, device=DEVICE)
    middle = plain(module)[0](x)
    last = plain(module)[1]
    for residual in (x, x.double(), x[:, :, :1, :1]):
        wanted = torch.relu(last[:-1](middle) + residual)
        torch.testing.assert_close(module(x, residual), wanted, rtol=1e-4, atol=1e-4)
    assert len(fused) == (0 if norm and training else 1)


@torch.no_grad()
def test_weights_that_change_are_folded_again(fused):
    module = calibrated(SeparableConv2d(16, 16)).eval()
    x = torch.randn(2, 16, 7, 6, device=DEVICE)
    for change in (
        lambda: module[0][0].weight.mul_(2),
        lambda: module[1][1].running_var.mul_(2),
        lambda: module[0][1].bias.add_(1),
        lambda: module.load_state_dict(calibrated(SeparableConv2d(16, 16)).state_dict()),
    ):
        module(x)
        change()
        torch.testing.assert_close(module(x), plain(module)(x), rtol=1e-4, atol=1e-4)
    assert len(fused) == 8


CHANGES = [
    lambda m: m[0][1].register_forward_hook(lambda *_: None),
    lambda m: m[1].register_forward_hook(lambda *_: None),
    lambda m: m[0].__setitem__(1, nn.GroupNorm(2, 16)),
    lambda m: m[1].__setitem__(2, nn.Tanh()),
    lambda m: m[1].append(nn.Sigmoid()),
    lambda m: m[0].__setitem__(0, nn.Conv2d(16, 16, 3, groups=2)),
    lambda m: m[0].__setitem__(0, nn.Conv2d(16, 16, 3, groups=16, padding=1, padding_mode="circular")),
    lambda m: m[1].__setitem__(0, nn.Conv2d(16, 24, 1, stride=2)),
    lambda m: m[1].__setitem__(0, nn.Conv2d(16, 24, 1, padding=1)),
    lambda m: m[1][1].train(),
    lambda m: setattr(m[0][2], "forward", torch.tanh),
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_layers_count(change, fused):
    module = calibrated(SeparableConv2d(16, 24)).cpu().eval()
    change(module)
    x = torch.randn(2, 16, 7, 6)
    torch.testing.assert_close(module(x), plain(module)(x), rtol=1e-4, atol=1e-4)
    assert fused == []


@torch.no_grad()
def test_a_hook_sees_its_layer():
    module, seen = SeparableConv2d(4, 4).eval(), []
    module[0][1].register_forward_hook(lambda *given: seen.append(given[2]))
    module(torch.randn(2, 4, 5, 5))
    assert len(seen) == 1


def test_a_gradient_of_the_input_alone():
    """Frozen weights: folded ones would do, and the layers do as well."""
    module = calibrated(SeparableConv2d(16, 16)).eval().requires_grad_(False)
    x = torch.randn(2, 16, 7, 6, device=DEVICE, requires_grad=True)
    found, wanted = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (module, plain(module)))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_copies_text_and_errors():
    module = SeparableConv2d(4, 4, backend="reference").to(DEVICE).eval()
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert "backend='reference'" in str(module) and "BatchNorm2d" in str(module)
    with pytest.raises(ValueError, match="activation must be one of"):
        SeparableConv2d(4, 4, mid_activation="tanh")
    with pytest.raises(ValueError, match="backend must be None or one of"):
        SeparableConv2d(4, 4, backend="magic")
    with pytest.raises(fastconv.BackendError):
        SeparableConv2d(4, 4, backend="cuda" if DEVICE == "cpu" else "cpu").to(DEVICE).eval()(x)


@torch.no_grad()
def test_optimize_leaves_it_right():
    for norm in (True, False):
        module = nn.Sequential(calibrated(SeparableConv2d(16, 16, norm=norm))).eval()
        x = torch.randn(2, 16, 7, 6, device=DEVICE)
        wanted = module(x)
        fastconv.optimize(module)
        assert type(module[0]) is SeparableConv2d
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)

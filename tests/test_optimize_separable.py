"""A depthwise chain and a 1x1 one after it: one call in inference, and nothing else changes."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from cases import DEVICE
from test_optimize_chains import check_same
from torch import nn

import fastconv

INFERENCE = sys.modules["fastconv.nn._inference"]
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or "cpu" not in fastconv.available("conv2d", "cpu"), reason="no compiled kernel here"
)


@pytest.fixture
def calls(monkeypatch):
    """The two activations, and whether there was a residual, of each call that ran two chains."""
    seen, run = [], INFERENCE._run_two

    def watched(geometry, made, first, second, input, residual):
        seen.append((first[2], second[2], residual is not None))
        return run(geometry, made, first, second, input, residual)

    monkeypatch.setattr(INFERENCE, "_run_two", watched)
    return seen


def norm(channels):
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.uniform_(made.running_mean)
    return made


class Block(nn.Module):
    def __init__(self, channels=24, filters=24, kernel=3, stride=1, residual=True):
        super().__init__()
        torch.manual_seed(0)
        depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        self.conv = nn.Sequential(
            nn.Sequential(depthwise, norm(channels), nn.ReLU6(inplace=True)),
            nn.Conv2d(channels, filters, 1, bias=False),
            norm(filters),
        )
        self.residual = residual

    def forward(self, x):
        if self.residual:
            return x + self.conv(x)
        return self.conv(x)


def image(channels=24, count=2):
    return torch.randn(count, channels, 9, 8, device=DEVICE).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [
    {}, {"kernel": 5}, {"stride": 2, "residual": False, "filters": 40}, {"residual": False},
], ids=str)  # fmt: skip
def test_one_call(calls, options):
    original = Block(**options).eval()
    model = fastconv.optimize(copy.deepcopy(original))
    with torch.no_grad():
        for count in (2, 2, 3):
            x = image(count=count)
            found, wanted = model(x), original(x)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert found.stride() == wanted.stride()
    assert calls == [("relu6", None, original.residual)] * 3
    check = image().requires_grad_()
    torch.testing.assert_close(model(check), original(check), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3, "not where a gradient is needed"


def test_nested_containers_and_activations(calls):
    def build():
        block = Block(residual=False)
        return nn.Sequential(*block.conv[:1], nn.Sequential(*block.conv[1:], nn.SiLU())).eval()

    model, original, x = fastconv.optimize(build()), build(), image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    assert calls == [("relu6", "silu", False)]


@pytest.mark.parametrize("change", [
    lambda block: block.conv[1].weight.mul_(2),
    lambda block: block.conv[0][1].running_var.add_(1),
    lambda block: setattr(block.conv[2], "eps", 0.5),
    lambda block: block.conv.__setitem__(1, nn.Conv2d(24, 24, 1)),
    lambda block: block.conv.__setitem__(1, nn.Conv2d(24, 24, 3, padding=1)),
    lambda block: block.conv[0].__setitem__(2, nn.Tanh()),
    lambda block: setattr(block.conv[0][0], "padding_mode", "reflect"),
    lambda block: block.conv[2].train(),
    lambda block: vars(block.conv[0][0]).update(dilation=(2, 2), padding=(2, 2)),
])  # fmt: skip
@torch.no_grad()
def test_changes_count(change):
    model, original = fastconv.optimize(Block().eval()), Block().eval()
    x = image()
    model(x)
    for each in (model, original):
        torch.manual_seed(1)
        change(each)
    for _ in range(2):
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv", "conv.0", "conv.0.0", "conv.0.2", "conv.1", "conv.2"])
@torch.no_grad()
def test_hooks_are_served(calls, name):
    model, original = fastconv.optimize(Block().eval()), Block().eval()
    x, seen = image(), []
    model(x)
    calls.clear()
    for each in (model, original):
        each.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2].clone()))
        each(x)
    assert calls == ([("relu6", None, False)] if name == "conv" else []) and len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


def test_training():
    check_same(fastconv.optimize(Block(4, 4)), Block(4, 4))

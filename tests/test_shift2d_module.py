"""fastconv.nn.Shift2d: which channel goes where, and how it lives in models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import Shift2d


def image(channels: int = 19, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(2, channels, 5, 6, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), ((1, 3), 2), ((5, 3), (1, 2)), (1, 1)])
def test_every_place_of_the_window_has_its_run(kernel_size, dilation):
    layer = Shift2d(19, kernel_size, dilation)
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    places = [((i - kh // 2) * dh, (j - kw // 2) * dw) for i in range(kh) for j in range(kw)]
    found = [tuple(row) for row in layer.offsets.tolist()]
    assert found == sorted(found), "channels of one place follow each other, row by row"
    run = 19 // len(places)
    for place in places:
        assert found.count(place) == run + (place == (0, 0)) * (19 % len(places))


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), ((1, 3), 2), ((3, 1), (3, 1))])
def test_is_a_depthwise_convolution_of_one_ones(kernel_size, dilation):
    layer, x = Shift2d(19, kernel_size, dilation), image()
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    weight = torch.zeros(19, 1, kh, kw, device=DEVICE)
    for channel, (row, column) in enumerate(layer.offsets.tolist()):
        weight[channel, 0, row // dh + kh // 2, column // dw + kw // 2] = 1
    padding = (kh // 2 * dh, kw // 2 * dw)
    expected = nn.functional.conv2d(x, weight, None, 1, padding, layer.dilation, 19)
    assert torch.equal(layer(x), expected)


def test_given_offsets():
    offsets = torch.randint(-7, 8, (19, 2))
    layer, x = Shift2d(19, offsets=offsets), image()
    expected = fastconv.shift2d(x, offsets)
    assert torch.equal(layer(x), expected)
    offsets.zero_()
    assert torch.equal(layer(x), expected), "the module has its own"
    assert torch.equal(
        Shift2d(2, offsets=[(0, 1), (1, 0)])(x[:, :2]), fastconv.shift2d(x[:, :2], [(0, 1), (1, 0)])
    )


def test_in_models():
    layer, x = Shift2d(19), image()
    expected = layer(x)
    assert not layer.state_dict() and not list(layer.parameters())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(DEVICE).half().float()):
        assert torch.equal(other(x), expected)
    assert layer.offsets.device.type == "cpu" and layer.offsets.dtype == torch.int64
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    model = fastconv.optimize(nn.Sequential(Shift2d(19), nn.Conv2d(19, 4, 1)).to(DEVICE))
    assert type(model[0]) is Shift2d


def test_backend_is_passed_on():
    assert torch.equal(Shift2d(19, backend="reference")(image()), Shift2d(19)(image()))
    with pytest.raises(fastconv.BackendError, match="cannot run here"):
        Shift2d(19, backend="cuda" if DEVICE == "cpu" else "cpu")(image())


def test_cost():
    model = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1), Shift2d(18, (3, 5), (2, 1)), nn.Conv2d(18, 4, 1))
    rows = {row.name: row for row in fastconv.cost(model, (3, 16, 16)).layers}
    assert rows["1"].macs == 0 and rows["1"].parameters == 0
    assert rows["1"].bytes == 2 * 4 * 18 * 16 * 16
    assert rows["1"].receptive_field == (3 + 4, 3 + 4)


def test_repr():
    assert repr(Shift2d(9)) == "Shift2d(9, kernel_size=(3, 3))"
    other = Shift2d(9, (1, 3), 2, backend="reference")
    assert repr(other) == "Shift2d(9, kernel_size=(1, 3), dilation=(2, 2), backend='reference')"
    assert repr(Shift2d(1, offsets=[(0, 1)])) == "Shift2d(1, offsets=...)"


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((0,), {}, ValueError, "channels must be at least 1, got 0"),
        ((8.0,), {}, TypeError, "channels must be an integer, got 8.0"),
        ((8,), {}, ValueError, "channels must be at least 9, one for each place of a 3x3 window, got 8"),
        ((8, 2), {}, ValueError, r"kernel_size must be odd, .* got \(2, 2\)"),
        ((8, (3, 0)), {}, ValueError, "kernel_size must be at least 1"),
        ((9, 3, 0), {}, ValueError, "dilation must be at least 1"),
        ((3,), {"offsets": [(0, 1)]}, ValueError, r"offsets must have shape \(3, 2\).* got \(1, 2\)"),
        ((1,), {"offsets": torch.zeros(1, 2)}, TypeError, "offsets must be integers"),
        ((9,), {"backend": "gpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error, match=words):
        Shift2d(*arguments, **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"offsets must have shape \(4, 2\)"):
        Shift2d(9)(image(4))

"""fastconv.nn.ShiftConv2d: Shift2d and a 1x1 convolution in one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import Shift2d, ShiftConv2d


def image(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (2, 19, 7, 5)), generator=generator).to(DEVICE)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"kernel_size": (1, 5), "stride": 2},
        {"dilation": 2, "bias": False},
        {"offsets": [(0, 3), (-2, 1)] * 9 + [(9, 9)]},
    ],
)
def test_is_shift_and_convolution(keywords):
    layer = ShiftConv2d(19, 8, **keywords).to(DEVICE)
    window = {name: keywords[name] for name in ("kernel_size", "dilation", "offsets") if name in keywords}
    shift = Shift2d(19, **window)
    convolution = nn.Conv2d(19, 8, 1, keywords.get("stride", 1), bias=keywords.get("bias", True)).to(DEVICE)
    convolution.load_state_dict(layer.state_dict())
    for x in (image(), image().contiguous(memory_format=torch.channels_last), image(19, 7, 5)):
        shifted = convolution(shift(x.view(-1, 19, 7, 5)))
        torch.testing.assert_close(layer(x), shifted if x.dim() == 4 else shifted[0])


def test_activation():
    layer = ShiftConv2d(19, 8, activation="silu").to(DEVICE)
    plain = ShiftConv2d(19, 8).to(DEVICE)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(image()), nn.functional.silu(plain(image())))
    assert "activation='silu'" in repr(layer) and "window=(3, 3)" in repr(layer)


def test_in_models():
    layer = ShiftConv2d(19, 8, stride=2).to(DEVICE)
    expected = layer(image())
    assert set(layer.state_dict()) == {"weight", "bias"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(image()), expected)
    assert layer.why_not() is None
    assert layer.kernel(image())[0] in fastconv.available("shift_conv2d", DEVICE)
    assert "dilated=(2, 2)" in repr(ShiftConv2d(19, 8, dilation=2))
    table = fastconv.cost(nn.Sequential(layer, nn.Conv2d(8, 2, 3)), (19, 7, 7))
    assert (table.layers[0].macs, table.layers[0].parameters) == (19 * 8 * 4 * 4, 19 * 8 + 8)
    assert [row.receptive_field for row in table.layers] == [(3, 3), (7, 7)]
    assert type(fastconv.optimize(nn.Sequential(layer))[0]) is ShiftConv2d


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels and the emulator")
def test_names_the_kernel_that_runs():
    pixels = image().contiguous(memory_format=torch.channels_last)
    assert ShiftConv2d(19, 8).kernel(image()) == ("cpu", "im2col")
    assert ShiftConv2d(19, 8).kernel(pixels) == ("cpu", "direct")
    assert ShiftConv2d(19, 8, stride=2).kernel(pixels) == ("cpu", "im2col")
    assert ShiftConv2d(19, 8, backend="emulator").kernel(image()) == ("emulator", "im2col")


def test_on_no_device():
    """Offsets are settings: they have values where parameters have none."""
    with torch.device("meta"):
        layers = ShiftConv2d(19, 8), Shift2d(19)
    assert layers[0].weight.is_meta
    for layer in layers:
        assert torch.equal(layer.offsets, Shift2d(19).offsets)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"in_channels": 8}, "channels"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"offsets": [(0, 0)]}, "offsets"),
        ({"stride": 0}, "stride"),
        ({"activation": "tanh"}, "activation"),
        ({"backend": "fft"}, "backend"),
        ({"algorithm": "fft"}, "algorithm"),
    ],
)
def test_bad_arguments(wrong, named):
    with pytest.raises(ValueError, match=named):
        ShiftConv2d(**{"in_channels": 19, "out_channels": 8, **wrong})

"""fastconv.nn.GroupConv2dShuffle: torch.nn.Conv2d with a shuffle behind it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import GroupConv2dShuffle


def image(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(shape or (2, 6, 7, 5)), generator=generator).to(DEVICE)


ARGUMENTS = [
    ((6, 9, 1), {"groups": 3}),
    ((6, 4, 3), {"stride": 2, "padding": 1, "groups": 2, "bias": False}),
    ((6, 12, (3, 1)), {"padding": "same", "dilation": (2, 1), "groups": 6}),
    ((6, 9, 3), {"padding": 1, "groups": 3, "padding_mode": "reflect"}),
]


@pytest.mark.parametrize("arguments, keywords", ARGUMENTS)
def test_is_convolution_and_shuffle(arguments, keywords):
    theirs = nn.Conv2d(*arguments, **keywords).to(DEVICE)
    ours = GroupConv2dShuffle(*arguments, **keywords).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    for x in (image(), image().contiguous(memory_format=torch.channels_last), image(6, 7, 5)):
        shuffled = nn.functional.channel_shuffle(theirs(x.view(-1, 6, 7, 5)), keywords["groups"])
        torch.testing.assert_close(ours(x), shuffled if x.dim() == 4 else shuffled[0])


def test_activation():
    layer = GroupConv2dShuffle(6, 9, 1, groups=3, activation="silu").to(DEVICE)
    plain = GroupConv2dShuffle(6, 9, 1, groups=3).to(DEVICE)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(image()), nn.functional.silu(plain(image())))
    assert "activation='silu'" in repr(layer)


def test_in_models():
    layer = GroupConv2dShuffle(6, 9, 1, groups=3).to(DEVICE)
    expected = layer(image())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(image()), expected)
    assert layer.why_not() is None
    if DEVICE == "cpu":
        assert layer.kernel(image()) == ("cpu", "im2col")
        assert GroupConv2dShuffle(6, 9, 1, groups=3, backend="emulator").kernel(image())[1] == "im2col"
    (row,) = fastconv.cost(layer, (6, 7, 5)).layers
    assert (row.macs, row.parameters) == (9 * 2 * 7 * 5, 9 * 2 + 9)
    model = fastconv.optimize(nn.Sequential(layer))
    assert type(model[0]) is GroupConv2dShuffle


@pytest.mark.parametrize(
    "wrong", [{"groups": 4}, {"activation": "tanh"}, {"backend": "fft"}, {"algorithm": "fft"}]
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GroupConv2dShuffle(6, 9, 1, **{"groups": 3, **wrong})

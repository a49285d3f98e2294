"""The networks: published figures, and the same network with and without this library."""

import pytest
import torch
from torch import nn

import fastconv
from fastconv.nn import DepthwiseConv2d


@pytest.mark.parametrize(
    "width, millions, parameters",
    [(1.0, 569, 4_231_976), (0.75, 325, 2_585_560), (0.5, 149, 1_331_592), (0.25, 41, 470_072)],
)
@pytest.mark.parametrize("plain", [False, True])
def test_mobilenet_v1_figures(width, millions, parameters, plain):
    model = fastconv.models.create("mobilenet_v1", width=width, plain=plain)
    table = fastconv.cost(model, (3, 224, 224))
    assert table.macs == pytest.approx(millions * 1e6, rel=0.02)
    assert table.parameters == parameters


def test_plain_is_the_same_network_from_torch_alone():
    torch.manual_seed(0)
    ours = fastconv.models.create("mobilenet_v1", width=0.25, num_classes=10, in_channels=1)
    torch.manual_seed(0)
    plain = fastconv.models.create("mobilenet_v1", width=0.25, num_classes=10, in_channels=1, plain=True)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))
    names = {type(module).__module__ for module in plain.modules()} - {type(plain).__module__}
    assert all(name.startswith("torch.nn.") for name in names)
    assert sum(isinstance(module, DepthwiseConv2d) for module in ours.modules()) == 13
    x = torch.randn(4, 1, 32, 32)
    y, expected = ours.train()(x), plain.train()(x)
    assert y.shape == (4, 10)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


def test_fresh_activations_keep_their_size():
    """The depthwise layers' fan is that of one channel; with a dense layer's they would shrink by sqrt(C)."""
    model = fastconv.models.create("mobilenet_v1", plain=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            assert float(module.weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


def test_list_and_create():
    assert "mobilenet_v1" in fastconv.models.list()
    assert fastconv.models.list() == sorted(fastconv.models.list())
    with pytest.raises(ValueError, match="name must be one of .*mobilenet_v1.*, got 'mobilenet'"):
        fastconv.models.create("mobilenet")
    with pytest.raises(TypeError, match="depth"):
        fastconv.models.create("mobilenet_v1", depth=3)
    with pytest.raises(ValueError, match="width must be above 0"):
        fastconv.models.create("mobilenet_v1", width=0)

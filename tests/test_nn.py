"""fastconv.nn.DepthwiseConv2d against torch.nn.Conv2d: constructor, state, numbers."""

import copy
import io
import pickle

import pytest
import torch
from cases import DEVICE
from tolerances import assert_close
from torch import nn

import fastconv
from fastconv.nn import DepthwiseConv2d

SHAPES = [
    {"in_channels": 6, "kernel_size": 3, "padding": 1},
    {
        "in_channels": 4,
        "out_channels": 12,
        "kernel_size": (3, 5),
        "stride": (2, 1),
        "padding": (1, 2),
        "bias": False,
    },
    {"in_channels": 3, "kernel_size": 5, "padding": "same", "dilation": (1, 2)},
    {"in_channels": 5, "kernel_size": 3, "stride": 2, "padding": 2, "padding_mode": "reflect"},
    {"in_channels": 5, "kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"in_channels": 2, "kernel_size": 1},
]


def twins(**options):
    """The same layer from torch.nn and from fastconv.nn."""
    torch.manual_seed(3)
    other = DepthwiseConv2d(**options, device=DEVICE)
    options.setdefault("out_channels", options["in_channels"])
    torch.manual_seed(3)
    return nn.Conv2d(**options, groups=options["in_channels"], device=DEVICE), other


@pytest.mark.parametrize("options", SHAPES)
def test_same_state_and_numbers_as_conv2d(options):
    plain, ours = twins(**options)
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    x = torch.randn(2, options["in_channels"], 9, 8, device=DEVICE, requires_grad=True)
    reference = copy.deepcopy(plain).double()
    x64 = x.detach().double().requires_grad_()
    expected, actual = reference(x64), ours(x)
    taps = ours.weight[0].numel()
    assert_close(actual, expected, torch.float32, taps)
    cotangent = torch.randn_like(actual)
    (expected_x, expected_w) = torch.autograd.grad(expected, (x64, reference.weight), cotangent.double())
    (actual_x, actual_w) = torch.autograd.grad(actual, (x, ours.weight), cotangent)
    assert_close(actual_x, expected_x, torch.float32, taps * 4)
    assert_close(actual_w, expected_w, torch.float32, expected[:, 0].numel())


def test_unbatched_input():
    plain, ours = twins(in_channels=4, kernel_size=3, padding=1)
    x = torch.randn(4, 6, 7, device=DEVICE)
    assert ours(x).shape == (4, 6, 7)
    assert_close(ours(x), plain.double()(x.double()), torch.float32, 9)


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "gelu_tanh", "silu"])
def test_activation_is_folded_in(activation):
    functional = {
        "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
    }.get(activation) or getattr(nn.functional, activation)
    layer = DepthwiseConv2d(4, activation=activation, padding=1, device=DEVICE)
    x = 3 * torch.randn(2, 4, 5, 5, device=DEVICE)
    plain, _ = twins(in_channels=4, kernel_size=3, padding=1)
    plain.load_state_dict(layer.state_dict())
    assert_close(layer(x), functional(plain.double()(x.double())), torch.float32, 9, scale=10.0)


@pytest.mark.parametrize("options", SHAPES[:2])
def test_pickle_deepcopy_and_torch_save(options):
    layer = DepthwiseConv2d(**options, backend="reference", activation="relu", device=DEVICE)
    x = torch.randn(1, options["in_channels"], 8, 8, device=DEVICE)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert type(other) is DepthwiseConv2d
        assert (other.activation, other.backend) == ("relu", "reference")
        assert torch.equal(other(x), layer(x))


def test_repr_names_what_conv2d_does_not_have():
    assert repr(DepthwiseConv2d(4)) == "DepthwiseConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=4)"
    assert repr(DepthwiseConv2d(4, activation="silu", backend="aten")).endswith(
        "groups=4, activation='silu', backend='aten')"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"in_channels": 4, "out_channels": 6}, "out_channels must be a multiple of in_channels=4, got 6"),
        ({"in_channels": 4, "out_channels": 0}, "out_channels must be a multiple"),
        ({"in_channels": 4, "activation": "tanh"}, "activation must be one of"),
        ({"in_channels": 4, "backend": "gpu"}, "backend must be None or one of"),
        ({"in_channels": 4, "stride": 2, "padding": "same"}, "strided"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        DepthwiseConv2d(**options)


def test_named_backend_that_cannot_run_raises():
    layer = DepthwiseConv2d(4, backend="cuda" if DEVICE == "cpu" else "cpu").to(DEVICE)
    with pytest.raises(fastconv.BackendError, match="cannot run here"):
        layer(torch.randn(1, 4, 8, 8, device=DEVICE))


def test_every_rule_names_an_operator_and_a_drop_in_class():
    for rule in fastconv.nn.rules():
        assert rule.op in fastconv.backends.CHOICES
        assert issubclass(rule.target, rule.source)
        assert rule.target.__name__ in fastconv.nn.__all__
        assert callable(rule.target.why_not) and callable(rule.target.kernel)

"""The activations as kernels compute them, value by value, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from test_conv_bn_act import activated

from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops.conv_bn_act import apply_operator, backward_operator

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="vectors are the C++ kernels'")

# Between these, for as many values as there are in a few vectors and a rest, and at the ends.
EDGES = [
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    5.9,
    6.1,
    13.2,
    -13.3,
    14.0,
    -14.0,
    80.0,
    -80.0,
    100.0,
    -100.0,
    1e10,
    -1e10,
]


def values(dtype):
    return torch.cat([torch.linspace(-15, 15, 20011, dtype=torch.float64), torch.tensor(EDGES).double()]).to(
        dtype
    )


def identity(x, dtype):
    """Operands of a normalisation that changes nothing: one channel of mean 0 and variance 1."""
    exact = torch.promote_types(dtype, torch.float32)
    return x[None, None, None], None, None, None, torch.zeros(1, dtype=exact), torch.ones(1, dtype=exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation, dtype):
    x = values(dtype)
    found = apply_operator("cpu", *identity(x, dtype), 0.0, activation).flatten().double()
    wanted = activated(x.double(), activation)
    bound = 4 * torch.finfo(dtype).eps * x.double().abs().clamp(max=1.0)  # of what the activation multiplies
    assert ((found - wanted).abs() <= bound + 4 * torch.finfo(dtype).eps * wanted.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, dtype):
    """Of the residual, which is the activation's own."""
    x = values(dtype)
    input, _, *numbers = identity(x, dtype)
    found = (
        backward_operator(
            "cpu",
            torch.ones_like(input),
            input,
            torch.zeros_like(input),
            *numbers,
            0.0,
            activation,
            None,
            True,
        )[1]
        .flatten()
        .double()
    )
    exact = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(activated(exact, activation).sum(), exact)
    # gelu_tanh multiplies what is left of 1 - tanh^2 by up to 15, here and in the reference.
    units = 32 if activation == "gelu_tanh" else 8
    assert ((found - wanted).abs() <= units * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite(activation):
    x = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat_interleave(32)
    found = apply_operator("cpu", *identity(x, torch.float32), 0.0, activation).flatten()
    assert found[:32].isnan().all()
    assert (found[32:64] == (6.0 if activation == "relu6" else float("inf"))).all()
    assert not (found[64:] > 0).any()  # or NaN, as in PyTorch, where the formula has -inf * 0

"""Forwards and changes of which a fused model once made something else than the original."""

from __future__ import annotations

import pickle
import types
from dataclasses import dataclass

import pytest
import torch
from cases import DEVICE
from forwards import Layers
from test_optimize_chains import check_same, image
from torch import nn

import fastconv


class Frozen(Layers):
    def forward(self, x):
        with torch.no_grad():
            return self.bn1(self.conv1(x))


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


class Guarded(Layers):
    """A shortcut that is there only if a flag says so."""

    def __init__(self):
        super().__init__(flag=False)
        del self.shortcut

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        identity = x
        if self.flag:
            identity = self.shortcut(x)
        y += identity
        return y


class Method(Layers):
    def half(self, x):
        return x / 2

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        i = self.half(x)
        y += i
        return y


class Function(Layers):
    def __init__(self):
        super().__init__()
        self.negated = torch.neg

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y += self.negated(x)
        return y


@dataclass
class Scale:  # which cannot be hashed
    by: float = 2.0

    def __call__(self, x):
        return x * self.by


class Unhashable(Layers):
    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, x):
        return self.act(self.scale(self.bn1(self.conv1(x))))


class NamedAsOurs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.function, self.deferred = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.original, self.is_container = nn.Conv2d(4, 4, 1), nn.SiLU()

    def forward(self, x):
        return self.is_container(self.original(self.deferred(self.function(self.plain(x)))))


class MadeInBetween(Layers):
    def features(self, x):
        self.head = nn.Identity() if self.flag else nn.Tanh()
        return x

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.features(x)
        return self.head(x)


class SharedNormTwice(Layers):
    def forward(self, x):
        y = self.bn1(x * 2)
        return self.act(self.bn1(self.conv1(y)))


@pytest.mark.parametrize("build", [
    Guarded, Method, Function, Unhashable, NamedAsOurs, MadeInBetween, SharedNormTwice,
    lambda: Outer(Guarded()), lambda: Outer(NamedAsOurs()),
])  # fmt: skip
def test_the_same(build):
    check_same(fastconv.optimize(build().to(DEVICE)), build().to(DEVICE))


def test_what_is_returned_within_a_context_is_computed_there():
    model = fastconv.optimize(Outer(Frozen()).to(DEVICE))
    assert not model(image()).requires_grad


def test_gradients_by_running_averages_that_have_moved_since():
    model, original = (Layers.__new__(SharedNormTwice) for _ in range(2))
    for each in (model, original):
        each.__init__()
        each.to(DEVICE)
    fastconv.optimize(model)
    x, grads = image(), []
    for each in (model, original):
        first = each.eval()(x)
        second = each.train()(2 * x)
        (first.sum() + second.square().sum()).backward()
        grads.append(each.conv1.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["conv1", "bn1"])
def test_a_weight_that_is_no_parameter(name):
    def build():
        model = Layers.__new__(SharedNormTwice)
        model.__init__()
        return model.to(DEVICE)

    model, original = fastconv.optimize(build()), build()
    for each in (model, original):
        layer = getattr(each.eval(), name)
        weight = layer.weight.detach().clone() * 2
        del layer.weight
        layer.weight = weight
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


def test_a_convolution_of_ones_own():
    def circular(self, input, weight, bias):
        padded = nn.functional.pad(input, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(padded, weight, bias)

    model, original = fastconv.optimize(SharedNormTwice().to(DEVICE)), SharedNormTwice().to(DEVICE)
    for each in (model, original):
        each.conv1._conv_forward = types.MethodType(circular, each.conv1)
    check_same(model, original)


def test_meta_tensors_and_conditions():
    class OnDevice(Layers):
        def __init__(self):
            super().__init__()
            self.register_buffer("on", torch.tensor(True))

        def forward(self, x):
            x = self.bn1(self.conv1(x))
            if self.on:
                x = self.act(x)
            return x

    fastconv.optimize(OnDevice().to("meta"))
    check_same(fastconv.optimize(OnDevice().to(DEVICE)), OnDevice().to(DEVICE))


def test_forward_mode_derivatives_in_training():
    import torch.autograd.forward_ad as forward_ad

    model = fastconv.optimize(SharedNormTwice(), exclude=nn.Conv2d)
    fused = fastconv.optimize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    fused[0].__class__ = nn.Conv2d
    x = torch.randn(2, 4, 6, 5)
    for each in (model, fused):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(each(forward_ad.make_dual(x, x)))
        assert found.tangent is not None


class Made(Layers):
    def __reduce__(self):
        return Made, ()

    def forward(self, x):
        return self.act(self.bn1(self.conv1(x)))


def test_a_pickle_of_ones_own():
    model = fastconv.optimize(Made())
    x = image().cpu()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_none_raises_as_it_did():
    model = fastconv.optimize(Made().to(DEVICE))
    model.act = None
    with pytest.raises(TypeError):
        model(image())

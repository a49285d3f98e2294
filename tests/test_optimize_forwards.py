"""Chains that forwards spell: they run in one call each, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import DEVICE
from forwards import (
    FORWARDS,
    OVERWRITTEN,
    SUMS,
    UNUSUAL,
    ChosenSum,
    Inner,
    Layers,
    Nested,
    SumAfterShortcut,
    SumInPlace,
)
from test_optimize_chains import calls, check_same, image  # noqa: F401 (calls is a fixture)
from torch import nn

import fastconv
from fastconv.optimize._chains import Fused


@pytest.mark.parametrize("kind", FORWARDS, ids=lambda kind: kind.__name__)
def test_fused(calls, kind):  # noqa: F811
    model, original = kind().to(DEVICE), kind().to(DEVICE)
    fastconv.optimize(model)
    assert isinstance(model, Fused) and type(model)._fastconv_fused.original is kind
    rows = fastconv.report(model).chains
    assert any("sum" in row.chain for row in rows) == (kind in SUMS)
    with torch.no_grad():
        model.eval()(image())
    assert len(calls) == FORWARDS[kind]
    check_same(model, original)
    fastconv.restore(model)
    assert type(model) is kind and vars(model).keys() == vars(original).keys()


@pytest.mark.parametrize("kind", sorted(SUMS, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_sums_are_part_of_the_call(monkeypatch, kind):
    seen, run = [], fastconv.nn._chains.conv_norm_act

    def watched(conv, norm, activation, input, residual=None, backend=None):
        seen.append(residual is not None)
        return run(conv, norm, activation, input, residual, backend)

    monkeypatch.setattr(fastconv.nn._chains, "conv_norm_act", watched)
    model = fastconv.optimize(kind().to(DEVICE)).eval()
    model(image())
    assert sum(seen) == 1


@pytest.mark.parametrize("kind", UNUSUAL, ids=lambda kind: kind.__name__)
def test_unusual_forwards_compute_what_they_say(kind):
    model, original = fastconv.optimize(kind().to(DEVICE)), kind().to(DEVICE)
    check_same(model, original)


@pytest.mark.parametrize("kind", OVERWRITTEN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_overwritten_is_read_first(kind, training):
    model, original = fastconv.optimize(kind().to(DEVICE)), kind().to(DEVICE)
    x = image()
    with torch.no_grad():
        found, wanted = model.train(training)(x), original.train(training)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ChosenSum, SumInPlace])
@pytest.mark.parametrize("flag", [True, False])
def test_attributes_are_read_in_each_call(kind, flag):
    model, original = fastconv.optimize(kind().to(DEVICE)), kind().to(DEVICE)
    for each in (model, original):
        each.flag = flag
        each.nothing = nn.Identity() if flag else None
    check_same(model, original)


@pytest.mark.parametrize("change", [
    lambda model: setattr(model, "bn1", nn.Identity()),
    lambda model: setattr(model, "bn1", nn.InstanceNorm2d(4)),
    lambda model: setattr(model, "act", nn.Tanh()),
    lambda model: setattr(model, "conv1", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    lambda model: setattr(model, "shortcut", nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(4, 1, 1))),
    lambda model: setattr(model, "shortcut", None),
    lambda model: setattr(model, "forward", lambda x: x * model.conv1.weight.sum()),
    lambda model: setattr(model.bn1, "training", False),
    lambda model: setattr(model.bn1, "weight", None) or setattr(model.bn1, "bias", None),
])  # fmt: skip
def test_a_changed_model_computes_what_it_says(change):
    model, original = fastconv.optimize(SumAfterShortcut().to(DEVICE)), SumAfterShortcut().to(DEVICE)
    for each in (model, original):
        torch.manual_seed(1)
        change(each)
        each.to(DEVICE)
    check_same(model, original)


@pytest.mark.parametrize("name", ["conv1", "bn1", "act", "shortcut", "shortcut.1", ""])
def test_hooks_see_what_they_saw(name):
    model, original = fastconv.optimize(SumAfterShortcut().to(DEVICE)), SumAfterShortcut().to(DEVICE)
    seen = {}
    for each in (model, original):
        notes = seen.setdefault(each, [])
        each.get_submodule(name).register_forward_hook(
            lambda module, args, output, notes=notes: notes.append((args[0].clone(), output.clone()))
        )
    x = image()
    for each in (model, original):
        each(x)
    (found,), (wanted,) = seen.values()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_method_that_the_class_gets_later_counts():
    class Later(Layers):
        forward = Nested.forward

    model = fastconv.optimize(Later().to(DEVICE))
    Later.forward = Inner.forward
    x = image()
    torch.testing.assert_close(model.eval()(x), Inner.forward(model, x))
    fastconv.restore(model)
    fastconv.optimize(model)
    assert type(model)._fastconv_fused.function is Inner.forward


def test_source_that_does_not_tell_is_left():
    names = {}
    exec("def forward(self, x):\n    return self.act(self.bn1(self.conv1(x)))\n", names)
    nowhere = type("Nowhere", (Layers,), {"forward": names["forward"]})
    assert type(fastconv.optimize(nowhere())) is nowhere

    def decorated(self, x):
        return Nested.forward(self, x)

    other = type("Other", (Layers,), {"forward": decorated})
    assert type(fastconv.optimize(other())) is other


def test_copies_pickles_and_signatures():
    model = fastconv.optimize(Nested().to(DEVICE)).eval()
    x = image()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert isinstance(other, Fused) and torch.equal(other(x), model(x))
        assert type(fastconv.restore(other)) is Nested
    assert inspect.signature(model.forward) == inspect.signature(Nested().forward)
    assert list(model.state_dict()) == list(Nested().state_dict())


def test_only_exclude_and_a_second_call(calls):  # noqa: F811
    model = fastconv.optimize(SumInPlace().to(DEVICE), exclude="bn1")
    x = image()
    model.eval()(x)
    assert len(calls) == 1, "the second chain alone"
    calls.clear()
    fastconv.optimize(model, only=["conv1", "bn1", "act"])(x)
    assert len(calls) == 2
    fastconv.restore(model)
    assert not any("_fastconv_alone" in vars(module) for module in model.modules())


def test_compiled_traced_and_exported():
    model, original = fastconv.optimize(SumAfterShortcut().eval()), SumAfterShortcut().eval()
    x, close = image().cpu(), {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), original(x), **close)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), original(x), **close)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), original(x), **close)
    mapped = torch.func.vmap(lambda y: model(y[None])[0])(x)
    torch.testing.assert_close(mapped, original(x), **close)


def test_autocast():
    model, original = fastconv.optimize(SumAfterShortcut().to(DEVICE)), SumAfterShortcut().to(DEVICE)
    x = image()
    with torch.autocast(DEVICE, torch.bfloat16):
        found, wanted = model(x), original(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)


def test_what_training_learns_is_the_same():
    model, original = fastconv.optimize(SumAfterShortcut().to(DEVICE)), SumAfterShortcut().to(DEVICE)
    steps = [
        torch.optim.SGD(each.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
        for each in (model, original)
    ]
    for _ in range(10):
        x = image()
        losses = []
        for each, step in zip((model, original), steps):
            step.zero_grad()
            loss = each(x).square().mean()
            loss.backward()
            step.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    for a, b in zip(model.state_dict().values(), original.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    original.load_state_dict(model.state_dict())
    model.load_state_dict(original.state_dict())

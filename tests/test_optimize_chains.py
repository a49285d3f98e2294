"""Chains of convolution, batch normalisation and activation: what is fused, and what must not change."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import threading

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.optimize._chains import Fused

MODULE = sys.modules["fastconv.nn._chains"]


@pytest.fixture
def calls(monkeypatch):
    """The activation of each chain that ran in one call."""
    seen, run, run_known = [], MODULE.conv_norm_act, MODULE.run_known

    def watched(conv, norm, activation, *given):
        seen.append(activation)
        return run(conv, norm, activation, *given)

    def known(conv, norm, activation, *given):
        output = run_known(conv, norm, activation, *given)
        seen.extend([] if output is None else [activation])
        return output

    monkeypatch.setattr(MODULE, "conv_norm_act", watched)
    monkeypatch.setattr(MODULE, "run_known", known)
    return seen


def image(requires_grad=False):
    return torch.randn(2, 4, 6, 5, device=DEVICE, requires_grad=requires_grad)


def chain(*rest, norm=None, kind=nn.Sequential):
    torch.manual_seed(0)
    norm = norm or nn.BatchNorm2d(4)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    rest = rest or (nn.ReLU(inplace=True),)
    return kind(nn.Conv2d(4, 4, 3, padding=1), norm, *rest).to(DEVICE)


def linear():
    chained = chain()  # whose seed is that of these layers too
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5), nn.Linear(5, 6), *chained).to(DEVICE)


def check_same(model, other, steps=3):
    """Outputs, gradients and buffers over steps of training, and then in inference."""
    for step in range(steps + 1):
        model.train(step < steps)
        other.train(step < steps)
        x = image(requires_grad=True)
        y = x.detach().clone().requires_grad_()
        found, wanted = model(x), other(y)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(found, (x, *model.parameters()), grad, allow_unused=True)
        wanted = torch.autograd.grad(wanted, (y, *other.parameters()), grad, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(y), rtol=1e-4, atol=1e-4)


FUSED = {
    "relu": (lambda: chain(), ["relu"]),
    "relu6": (lambda: chain(nn.ReLU6()), ["relu6"]),
    "silu": (lambda: chain(nn.SiLU(inplace=True)), ["silu"]),
    "gelu": (lambda: chain(nn.GELU()), ["gelu"]),
    "gelu_tanh": (lambda: chain(nn.GELU("tanh")), ["gelu_tanh"]),
    "another activation": (lambda: chain(nn.Sigmoid()), [None]),
    "no activation": (lambda: chain()[:2], [None]),
    "two": (lambda: nn.Sequential(*chain(), *chain(nn.Tanh()), chain()[0]), ["relu", None]),
    "in a container": (lambda: nn.Sequential(chain(), nn.Sequential(chain()[:2])), ["relu", None]),
    "no normalisation": (lambda: nn.Sequential(*chain()[:1], nn.ReLU6(), nn.BatchNorm2d(4)), ["relu6"]),
    "linear layers": (lambda: linear(), ["relu"]),
    "of statistics of its own": (lambda: chain(norm=nn.BatchNorm2d(4, track_running_stats=False)), ["relu"]),
    "momentum None": (lambda: chain(norm=nn.BatchNorm2d(4, momentum=None)), ["relu"]),
    "the same layers twice": (lambda: (lambda c: nn.Sequential(*c, *c))(chain()), ["relu", "relu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused(calls, name):
    build, expected = FUSED[name]
    model, original = build(), build()
    fastconv.optimize(model)
    with torch.no_grad():
        model.eval()(image())
    assert calls == expected
    check_same(model, original)


class Mine(nn.BatchNorm2d):
    pass


class Reversed(nn.Sequential):
    def forward(self, input):
        return super().forward(input.flip(0))


@pytest.mark.parametrize("build", [
    lambda: chain(norm=Mine(4)), lambda: chain(norm=nn.SyncBatchNorm(4)),
    lambda: chain(norm=nn.GroupNorm(2, 4)),
    lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), lambda: chain(kind=Reversed),
    lambda: nn.Sequential(*chain()[:1], nn.MaxPool2d(1), nn.BatchNorm2d(4), nn.ReLU()),
])  # fmt: skip
def test_left_alone(build):
    model = fastconv.optimize(build().to(DEVICE))
    assert not isinstance(model, Fused) and fastconv.report(model).chains == []


@pytest.mark.parametrize("index", range(3))
def test_hooks_are_served_and_leave_no_trace(calls, index):
    model = fastconv.optimize(chain()).eval()
    seen = []
    handle = model[index].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = image()
    model(x)
    assert calls == [] and len(seen) == 1
    torch.testing.assert_close(seen[0], chain().eval()[: index + 1](x))
    handle.remove()
    model(x)
    assert calls == ["relu"] and len(seen) == 1


@pytest.mark.parametrize("change", [
    lambda model: model.__setitem__(1, nn.Identity()),
    lambda model: model.__setitem__(1, nn.BatchNorm2d(4, eps=0.5).to(DEVICE)),
    lambda model: model.__setitem__(2, nn.Tanh()),
    lambda model: model.append(nn.Sigmoid()),
    lambda model: model.pop(2),
    lambda model: model.insert(1, nn.Tanh()),
    lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    lambda model: setattr(model[0], "forward", lambda x: x),
    lambda model: setattr(model[0], "padding_mode", "reflect"),
    lambda model: setattr(model[1], "training", False),
])  # fmt: skip
def test_a_changed_model_computes_what_it_says(change):
    model, plain = fastconv.optimize(chain()), chain()
    for each in (model, plain):
        change(each)
    check_same(model, plain)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_statistics_and_frozen_layers(training):
    model, other = fastconv.optimize(chain()), chain()
    for each in (model, other):
        each.train(training)
        each[1].eval().requires_grad_(False)
    x = image()
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, other[0].weight.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(model[1].running_mean, other[1].running_mean)


def test_pytorchs_own_errors():
    model, other = fastconv.optimize(chain()), chain()
    images = image()
    for bad in (images[:1, :, :1, :1], images[0]):
        with pytest.raises((ValueError, RuntimeError)) as wanted:
            other[:2](bad)
        with pytest.raises(type(wanted.value)) as found:
            model(bad)
        assert str(found.value) == str(wanted.value)
    with pytest.raises(RuntimeError):
        fastconv.optimize(chain(), exclude="0")(images[:, :3])


def test_copies_files_and_slices(calls):
    x, model = image(), fastconv.optimize(chain()).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        calls.clear()
        assert isinstance(other, Fused) and torch.equal(other(x), model(x)) and len(calls) == 2
        with torch.no_grad():
            other[0].weight.add_(1)
        assert not torch.equal(other(x), model(x))
        assert type(fastconv.restore(other)) is nn.Sequential
    part = model[:2]
    torch.testing.assert_close(part(x), chain().eval()[:2](x), rtol=1e-4, atol=1e-5)
    assert type(fastconv.restore(part)) is nn.Sequential
    assert torch.equal(copy.copy(model)(x), model(x))
    assert list(inspect.signature(model.forward).parameters) == ["input"], "as a container's"


def test_restore_is_exact_and_state_dicts_are_the_same():
    model = chain()
    before, keys, text = dict(vars(model)), list(model.state_dict()), str(model)
    fastconv.optimize(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(chain().state_dict())
    fastconv.restore(model)
    assert type(model) is nn.Sequential and vars(model) == before and str(model) == text
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_only_and_exclude(calls):
    model = nn.Sequential(*chain(), *chain())
    fastconv.optimize(model, exclude="1")
    model(image())
    assert len(calls) == 1
    fastconv.optimize(model, only=["0", "1", "2"])  # adds to what there is
    calls.clear()
    model(image())
    assert calls == ["relu", "relu"]


def test_report():
    model = fastconv.optimize(nn.Sequential(chain(), nn.Flatten()), image())
    (row,) = fastconv.report(model).chains
    assert row.name == "0" and row.layers == ("0.0", "0.1", "0.2") and row.type == "Sequential"
    assert row.chain.endswith("Conv2d + BatchNorm2d + ReLU")
    text = str(fastconv.report(model))
    assert f"1 x {row.chain}: in one call" in text and "no kernel for BatchNorm2d" not in text
    assert fastconv.report(copy.deepcopy(model)).chains == [row]
    assert fastconv.report(model).as_dict()["chains"][0]["layers"] == row.layers


@pytest.mark.parametrize("training", [True, False])
def test_chains_that_differ_are_not_fused(monkeypatch, training):
    """Also one that is wrong only where weights are folded, without gradients."""
    run = MODULE.conv_norm_act

    def wrong(*given):
        return run(*given) * (1.001 if training or not torch.is_grad_enabled() else 1)

    monkeypatch.setattr(MODULE, "conv_norm_act", wrong)
    model = fastconv.optimize(chain().train(training), image())
    report = fastconv.report(model)
    assert type(model) is nn.Sequential and report.chains == [] and not report.differing_chains.holds
    assert report.parity is None or report.parity.holds
    assert "chains of layers run one by one; fused, the whole model differs: outputs" in str(report)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(MODULE, "conv_norm_act", lambda *given: 1 / 0)
    model = chain()
    before = dict(vars(model))
    with pytest.raises(ZeroDivisionError):
        fastconv.optimize(model, image())
    assert type(model) is nn.Sequential and vars(model) == before


def test_a_class_that_must_not_be_subclassed():
    class Final(nn.Sequential):
        def __init_subclass__(cls, **given):
            raise ValueError("no")

    model = chain(kind=Final)
    before = dict(vars(model))
    fastconv.optimize(model, exclude="0")
    assert type(model) is Final and vars(model) == before


def test_threads():
    model, other = fastconv.optimize(chain()).eval(), chain().eval()
    images, wrong = [image() for _ in range(4)], []
    expected = [other(x) for x in images]

    def run(index):
        for _ in range(50):
            if not torch.allclose(model(images[index]), expected[index], rtol=1e-3, atol=1e-4):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_compiled_traced_and_exported():
    model, other = fastconv.optimize(chain()).eval(), chain().eval()
    x = image()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), other(x), **close)
    model = fastconv.optimize(chain().eval(), exclude="0")  # the container alone
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), other(x), **close)
    sizes = {"input": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    x = torch.cat([x, x])
    torch.testing.assert_close(exported(x), other(x), **close)


def test_autocast():
    model, other = fastconv.optimize(chain()), chain()
    x = image()
    with torch.autocast(DEVICE, torch.bfloat16):
        found, wanted = model(x), other(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model[1].running_var, other[1].running_var, rtol=0.05, atol=0.01)


def test_a_network(calls):
    model = fastconv.models.create("mobilenet_v1", width=0.25, plain=True).to(DEVICE).eval()
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)
    assert len(calls) == 1 + 2 * 13 == len(fastconv.report(model).chains)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)

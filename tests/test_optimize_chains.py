"""Chains of convolution, batch normalisation, sum and activation: what is fused, and what must not change."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from cases import DEVICE
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.optimize._fused import Fused

CHAINS = sys.modules["fastconv.optimize._chains"]


@pytest.fixture
def calls(monkeypatch):
    """The activation, and whether there was a residual, of each chain that ran in one call."""
    seen, run = [], CHAINS.conv_norm_act

    def watched(conv, norm, activation, input, residual, backend):
        seen.append((activation, residual is not None))
        return run(conv, norm, activation, input, residual, backend)

    monkeypatch.setattr(CHAINS, "conv_norm_act", watched)
    return seen


class Block(nn.Module):
    """``body(self, x)`` over two convolutions with batch normalisations, and an activation."""

    def __init__(self, body, layer=None, **attributes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if layer is None else layer
        self.down = nn.Sequential(
            nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)
        for norm in (self.bn1, self.bn2, self.down[2]):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        return self.body(self, x)


def image(requires_grad=False):
    return torch.randn(2, 4, 6, 5, device=DEVICE, requires_grad=requires_grad)


def check_same(model, other, steps=3):
    """Outputs, gradients and buffers over steps of training, and then inference."""
    for step in range(steps + 1):
        model.train(step < steps)
        other.train(step < steps)
        x = image(requires_grad=True)
        y = x.detach().clone().requires_grad_()
        found, wanted = model(x.clone()), other(y.clone())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(found, (x, *model.parameters()), grad, allow_unused=True)
        wanted = torch.autograd.grad(wanted, (y, *other.parameters()), grad, allow_unused=True)
        for a, b in zip(found, wanted):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        for a, b in zip(model.buffers(), other.buffers()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def residual_block(self, x):
    out = self.act(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    shortcut = self.down(x)
    out += shortcut
    return self.act(out)


def sum_of(add):
    def body(self, x):
        return F.relu(add(self.bn1(self.conv1(x)), x))

    return body


def gelu_of(approximate):
    return lambda: (lambda self, x: self.act(self.bn1(self.conv1(x))), nn.GELU(approximate))


FUSED = {
    "residual block": (residual_block, None, [("relu", False), ("relu", False), ("relu", True)]),
    "sum": (sum_of(lambda a, b: a + b), None, [("relu", True)]),
    "reversed sum": (sum_of(lambda a, b: b + a), None, [("relu", True)]),
    "torch.add": (sum_of(torch.add), None, [("relu", True)]),
    "method add_": (sum_of(lambda a, b: a.add_(b)), None, [("relu", True)]),
    "sum alone": (lambda self, x: self.bn1(self.conv1(x)) + x, None, [(None, True)]),
    "function": (lambda self, x: torch.relu(self.bn1(self.conv1(x))), None, [("relu", False)]),
    "method": (lambda self, x: self.bn1(self.conv1(x)).relu_(), None, [("relu", False)]),
    "in place": (lambda self, x: F.silu(self.bn1(self.conv1(x)), inplace=True), None, [("silu", False)]),
    "no activation": (lambda self, x: self.bn1(self.conv1(x)).sigmoid(), None, [(None, False)]),
    "gelu": (*gelu_of("none")(), [("gelu", False)]),
    "gelu_tanh": (*gelu_of("tanh")(), [("gelu_tanh", False)]),
    "twice the same layers": (lambda self, x: self.conv2(self.bn1(self.conv1(x))), None, [(None, False)]),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(calls, name):
    body, layer, expected = FUSED[name]
    model = Block(body, layer).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    assert isinstance(model, Fused) and isinstance(model, Block)
    model.eval()(image())
    assert sorted(map(str, calls)) == sorted(map(str, expected))
    check_same(model, original)


def overwrites_the_input(self, x):
    out = self.bn1(self.conv1(x))
    x.mul_(2)
    return out + x


def adds_to_the_shortcut(self, x):
    out = self.bn1(self.conv1(x))
    x += out
    return self.act(x)


def activates_in_between(self, x):
    out = self.bn1(self.conv1(x))
    shortcut = self.act(x)
    return out + shortcut


LEFT = {
    "convolution read twice": lambda self, x: self.bn1(y := self.conv1(x)) + y,
    "normalisation called twice": lambda self, x: self.bn1(self.conv2(self.bn1(self.conv1(x)))),
    "no convolution": lambda self, x: self.act(self.bn1(x)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(calls, name):
    model = Block(LEFT[name]).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    model.eval()(image())
    assert calls == [] or name == "no convolution"
    check_same(model, original)


@pytest.mark.parametrize("body", [overwrites_the_input, adds_to_the_shortcut, activates_in_between])
def test_a_sum_is_not_fused_over_what_may_write(calls, body):
    model = Block(body).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    x = image()
    y = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), original.eval()(y))
    torch.testing.assert_close(x, y)
    assert calls == [(None, False)]


def test_normalisation_read_twice_ends_the_chain(calls):
    model = Block(lambda self, x: F.relu(y := self.bn1(self.conv1(x))) + y).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model).eval()(image())
    assert calls == [(None, False)]
    check_same(model, original)


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).to(DEVICE)


@pytest.mark.parametrize("index", range(3))
def test_hooks_are_served_and_leave_no_trace(calls, index):
    model = fastconv.optimize(chain())
    seen = []
    handle = model[index].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    x = image()
    model.eval()(x)
    assert calls == [] and len(seen) == 1
    torch.testing.assert_close(seen[0], chain().eval()[: index + 1](x))
    handle.remove()
    model(x)
    assert len(calls) == 1 and len(seen) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.__setitem__(1, nn.Identity()),
        lambda model: model.__setitem__(1, nn.BatchNorm2d(4, eps=0.5).to(DEVICE)),
        lambda model: model.append(nn.Sigmoid()),
        lambda model: model.pop(2),
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        lambda model: setattr(model[0], "forward", lambda x: x),
        lambda model: setattr(model[0], "padding_mode", "reflect"),
        lambda model: model[1].register_parameter("weight", None),
        lambda model: model.insert(1, nn.Tanh()),
    ],
)
def test_a_changed_model_computes_what_it_says(change):
    model = fastconv.optimize(chain())
    plain = nn.Sequential(*copy.deepcopy(fastconv.restore(copy.deepcopy(model))))
    for each in (model, plain):
        change(each)
    check_same(model, plain)


def test_attributes_that_steer_the_forward(calls):
    def body(self, x):
        x = self.bn1(self.conv1(x))
        return self.act(x) if self.active else x.tanh()

    model = Block(body, active=True).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    for active in (True, False, True):
        model.active = original.active = active
        check_same(model, original, steps=1)
    assert {activation for activation, _ in calls} == {"relu", None}


@pytest.mark.parametrize(
    "read", [bool, len, list, lambda v: v[0], lambda v: v["a"], lambda v: v == 1, lambda v: v()]
)
def test_objects_that_may_change_inside_are_not_traced(calls, read):
    def body(self, x):
        x = self.bn1(self.conv1(x))
        return self.act(x) if read(self.value) else x

    model = Block(body, value=[True]).to(DEVICE)
    fastconv.optimize(model)
    assert type(model) is Block and calls == []
    (row,) = [row for row in fastconv.report(model).chains if row.name == ""]
    assert "cannot be traced: TypeError" in row.obstacle and row.obstacle in str(fastconv.report(model))


def test_constants_of_objects_steer_the_forward(calls):
    class Config:
        def __init__(self):
            self.inner, self.unread = self, [1]
            self.active = True

    def body(self, x):
        assert isinstance(self.config, Config) and self.config is not None
        x = self.bn1(self.conv1(x))
        return self.act(x) if self.config.inner.active else x.tanh()

    model = Block(body, config=Config()).to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    for active in (True, False, True):
        model.config.active = original.config.active = active
        check_same(model, original, steps=1)
    assert {activation for activation, _ in calls} == {"relu", None}


def test_tracing_leaves_nothing_behind():
    def body(self, x):
        self.count += 1
        self.last = 3
        return self.bn1(self.conv1(x))

    model = Block(body, count=0).to(DEVICE)
    fastconv.optimize(model)
    assert model.count == 0 and not hasattr(model, "last")
    for _ in range(3):
        model(image())
    assert model.count == 3 and type(model) is Block
    assert "writes to the module's attributes" in str(fastconv.report(model))


def test_training_flags_of_single_layers(calls):
    model = fastconv.optimize(chain())
    other = chain()
    for each in (model, other):
        each.train()
        each[1].eval()  # a frozen normalisation
    x = image()
    torch.testing.assert_close(model(x), other(x))
    assert torch.equal(model[1].running_mean, other[1].running_mean) and len(calls) == 1


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 6, 5), (4, 6, 5), (6, 5)])
def test_a_broadcast_residual(calls, shape):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, y):
            return self.norm(self.conv(x)) + y

    model = Sum().to(DEVICE)
    original = copy.deepcopy(model)
    fastconv.optimize(model)
    x, y = image(), torch.randn(shape, device=DEVICE)
    torch.testing.assert_close(model(x, y), original(x, y))
    torch.testing.assert_close(model(x, y.double()), original(x, y.double()))
    torch.testing.assert_close(model(x, x), original(x, x))
    assert calls == [(None, True)]


def test_pytorchs_own_errors():
    model, other = fastconv.optimize(chain()), chain()
    images = image()
    for bad in (images[:1, :, :1, :1], images[0]):
        with pytest.raises((ValueError, RuntimeError)) as wanted:
            other[:2](bad)
        with pytest.raises(type(wanted.value)) as found:
            model(bad)
        assert str(found.value) == str(wanted.value)


def test_copies_files_and_slices(calls):
    model = fastconv.optimize(Block(residual_block).to(DEVICE))
    model.body = "residual"
    Block.residual = residual_block
    x = image()
    sequential = fastconv.optimize(chain()).eval()
    file = io.BytesIO()
    torch.save(sequential, file)
    file.seek(0)
    for other in (
        copy.deepcopy(sequential),
        pickle.loads(pickle.dumps(sequential)),
        torch.load(file, weights_only=False),
    ):
        calls.clear()
        assert isinstance(other, Fused) and torch.equal(other(x), sequential(x)) and len(calls) == 2
        with torch.no_grad():
            other[0].weight.add_(1)
        assert not torch.equal(other(x), sequential(x))
        assert type(fastconv.restore(other)) is nn.Sequential
    part = sequential[:2]
    torch.testing.assert_close(part(x), chain().eval()[:2](x))
    assert type(fastconv.restore(part)) is nn.Sequential
    shallow = copy.copy(sequential)
    assert torch.equal(shallow(x), sequential(x))


def test_restore_is_exact_and_state_dicts_are_the_same():
    model = Block(residual_block).to(DEVICE)
    before, keys, text = dict(vars(model)), list(model.state_dict()), str(model)
    fastconv.optimize(model)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()]
    model.load_state_dict(Block(residual_block).state_dict())
    fastconv.restore(model)
    assert type(model) is Block and vars(model).keys() == before.keys() and str(model) == text
    assert all(type(m).__module__.startswith("torch.") for m in list(model.modules())[1:])


def test_only_and_exclude(calls):
    def body(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))

    model = Block(body).to(DEVICE)
    fastconv.optimize(model, exclude="bn1")
    model(image())
    assert len(calls) == 1
    fastconv.optimize(model, only=["conv1", "bn1"])  # adds to what there is
    calls.clear()
    model(image())
    assert len(calls) == 2


def test_report():
    model = fastconv.optimize(Block(residual_block).to(DEVICE), image())
    rows = [row for row in fastconv.report(model).chains if row.name == ""]
    assert [row.chain for row in rows] == ["conv1 + bn1 + act", "conv2 + bn2 + sum + act"]
    assert rows[1].layers == ("conv2", "bn2", "act") and rows[1].type == "Block"
    assert "1 x one call for conv2 + bn2 + sum + act of Block" in str(fastconv.report(model))
    again = fastconv.report(copy.deepcopy(model))
    assert [row.chain for row in again.chains if row.name == ""] == [row.chain for row in rows]
    assert fastconv.report(model).as_dict()["chains"][0]["layers"] == ("conv1", "bn1", "act")


def test_a_wrong_kernel_takes_all_back(monkeypatch):
    run = CHAINS.conv_norm_act
    monkeypatch.setattr(CHAINS, "conv_norm_act", lambda *given: run(*given) * 1.001)
    model = fastconv.optimize(Block(residual_block).to(DEVICE), image())
    assert type(model) is Block and not fastconv.report(model).parity.holds


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(CHAINS, "conv_norm_act", lambda *given: 1 / 0)
    model = Block(residual_block).to(DEVICE)
    with pytest.raises(ZeroDivisionError):
        fastconv.optimize(model, image())
    assert type(model) is Block and not any(name.startswith("_fastconv") for name in vars(model))


def test_other_normalisations_stay():
    class Mine(nn.BatchNorm2d):
        pass

    for norm in (Mine(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)):
        model = fastconv.optimize(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()).to(DEVICE))
        assert not isinstance(model, Fused)


def test_compiled():
    model, other = fastconv.optimize(chain()).eval(), chain().eval()
    x = image()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), other(x), rtol=1e-4, atol=1e-5)


def test_autocast():
    model, other = fastconv.optimize(chain()), chain()
    x = image()
    with torch.autocast(DEVICE, torch.bfloat16):
        found, wanted = model(x), other(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model[1].running_var, other[1].running_var, rtol=0.05, atol=0.01)

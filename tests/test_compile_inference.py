"""torch.compile(model, backend="fastconv") in inference: separable convolutions, linear layers of images."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import Compiled, close, images, needs_kernel, randomized, step
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.ops import separable_conv2d

pytestmark = needs_kernel

SEPARABLE = "separable_conv2d (conv2d, batch_norm, relu6, conv2d, batch_norm, add, relu)"
LINEAR = ["conv2d (linear, gelu)", "conv2d (linear, permute, mul, add)"]


class Separable(nn.Module):
    """Depthwise and 1x1, each with its normalisation, and a sum."""

    def __init__(self, channels=32, conv=nn.Conv2d, depthwise=nn.Conv2d):
        super().__init__()
        groups = {} if depthwise is fastconv.nn.DepthwiseConv2d else {"groups": channels}
        self.dw = depthwise(channels, channels, 3, padding=1, bias=False, **groups)
        self.pw = conv(channels, channels, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def middle(self, x):
        return F.relu6(self.norm1(self.dw(x)))

    def forward(self, x):
        return F.relu(x + self.norm2(self.pw(self.middle(x))))


class Pixels(nn.Module):
    """ConvNeXt's linear layers: channels last, a factor for each channel, and a sum."""

    def __init__(self, channels=64, wide=256, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(channels, wide, bias), nn.Linear(wide, channels, bias)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        y = self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x + self.scale * y


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request, monkeypatch):
    """The rule leaves float64 to two calls; the kernel has it."""
    if request.param == torch.float64:
        monkeypatch.setattr(separable_conv2d, "is_faster_fused", lambda *_: True)
    return request.param


def pair(kind, dtype):
    """Model, and an image that kernels are taken for."""
    if kind is Pixels:
        return Pixels().to(dtype), images(2, 64, 16, 16, dtype=dtype, channels_last=True)
    return randomized(kind(), dtype), images(2, 32, 16, 16, dtype=dtype)


def is_fused(compiled, kind):
    return sorted(compiled.fused) == (LINEAR if kind is Pixels else [SEPARABLE])


KINDS = pytest.mark.parametrize("kind", [Separable, Pixels])


@KINDS
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs(kind, dtype, channels_last):
    model, x = pair(kind, dtype)
    rest = "inductor" if channels_last and dtype == torch.float32 else "eager"
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        compiled = Compiled(model.eval(), rest)
        close(compiled(x), model(x))
    assert is_fused(compiled, kind)
    if rest == "eager":
        counts = [compiled.calls(op) for op in ("separable_conv2d", "depthwise_conv2d", "conv2d")]
        assert counts == ([1, 0, 0] if kind is Separable else [0, 0, 2])


@KINDS
def test_training(kind, dtype):
    """Neither is for training: what lies between is kept there, and linear layers are PyTorch's."""
    model, x = pair(kind, dtype)
    ours = copy.deepcopy(model)
    compiled = Compiled(ours)
    for _ in range(2):
        for actual, expected in zip(step(compiled, ours, x), step(model, model, x), strict=True):
            close(actual, expected)
    assert not any("linear" in idiom or "separable" in idiom for idiom in compiled.fused)


@KINDS
def test_a_gradient_of_the_image_alone(kind, dtype):
    model, x = pair(kind, dtype)
    model.eval().requires_grad_(False)
    compiled = Compiled(model)
    for actual, expected in zip(step(compiled, model, x), step(model, model, x), strict=True):
        close(actual, expected)
    assert not any("linear" in idiom or "separable" in idiom for idiom in compiled.fused)


@KINDS
def test_weights_that_change_between_calls(kind, dtype):
    model, x = pair(kind, dtype)
    model.eval()
    with torch.no_grad():
        compiled = Compiled(model)
        for tensor in model.state_dict().values():
            tensor.mul_(1.25) if tensor.is_floating_point() else None
            close(compiled(x), model(x))
        model.load_state_dict(pair(kind, dtype)[0].state_dict())
        close(compiled(x), model(x))
        for parameter in model.parameters():
            parameter.data.mul_(0.75)
            close(compiled(x), model(x))
        assert is_fused(compiled, kind), "one graph"


@KINDS
def test_a_batch_of_any_size(kind):
    model, _ = pair(kind, torch.float32)
    model.eval()
    with torch.no_grad():
        compiled = Compiled(model)
        for batch in (2, 3, 5):
            x = torch.cat([pair(kind, torch.float32)[1]] * batch).contiguous(
                memory_format=torch.channels_last
            )
            torch._dynamo.mark_dynamic(x, 0)
            close(compiled(x), model(x))
    assert is_fused(compiled, kind), "one graph"


@KINDS
def test_a_module_used_twice(kind, dtype):
    model, x = pair(kind, dtype)
    model.eval()
    twice = lambda x: model(model(x))  # noqa: E731
    with torch.no_grad():
        compiled = Compiled(twice)
        close(compiled(x), twice(x))
    assert sorted(compiled.fused) == sorted((LINEAR if kind is Pixels else [SEPARABLE]) * 2)
    (graph,) = compiled.final
    packed = {node.args[6 if kind is Separable else 4] for node in own_calls(graph)}
    assert len(packed) == len(LINEAR if kind is Pixels else [SEPARABLE]), "packed once"


def own_calls(graph):
    targets = (torch.ops.fastconv.separable_conv2d.default, torch.ops.fastconv.conv2d.default)
    return [node for node in graph.graph.nodes if node.target in targets]


@pytest.mark.parametrize("own", ["float32", "autocast"])
def test_this_librarys_modules(own):
    model = randomized(Separable(64, fastconv.nn.Conv2d, fastconv.nn.DepthwiseConv2d)).eval()
    x = images(2, 64, 16, 16, channels_last=True)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=own == "autocast"):
            compiled = Compiled(model)
            limit = 1e-4 if own == "float32" else 0.05
            torch.testing.assert_close(compiled(x), exact, rtol=limit, atol=limit)
    assert compiled.calls("separable_conv2d") == 1


# What must stay


def run(function, x):
    with torch.no_grad():
        compiled = Compiled(function)
        for actual, expected in zip(flat(compiled(x)), flat(function(x)), strict=True):
            close(actual, expected)
    return compiled


def flat(value):
    return value if isinstance(value, tuple) else (value,)


def test_two_convolutions_that_are_not_one():
    model, x = pair(Separable, torch.float32)
    model.eval()
    strided, grouped = nn.Conv2d(32, 32, 1, stride=2), nn.Conv2d(32, 32, 1, groups=2)
    dense, padded = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1, padding=1)
    multiplied = nn.Conv2d(32, 64, 3, padding=1, groups=32)

    def seen_elsewhere(x):
        y = model.middle(x)
        return model.pw(y), y

    def used_twice(x):
        y = model.middle(x)
        return model.pw(y) + y

    def written(x):
        y = model.middle(x)
        x.add_(1)
        return model.pw(y), x.sub_(1)

    def summed_in_between(x):
        return model.pw(F.relu(model.norm1(model.dw(x)) + x))

    def pooled_in_between(x):
        return model.pw(F.max_pool2d(model.middle(x), 2))

    for function in (seen_elsewhere, used_twice, written, summed_in_between, pooled_in_between):
        assert run(function, x).calls("separable_conv2d") == 0, function.__name__
    for second in (strided, grouped, dense, padded):
        assert run(lambda x, conv=second: conv(model.middle(x)), x).calls("separable_conv2d") == 0
    assert run(lambda x: model.pw(multiplied(x)[:, :32]), x).calls("separable_conv2d") == 0
    few = images(2, 32, 40, 40)  # of which contiguous ones are not faster, but channels_last is
    assert run(lambda x: model.pw(model.middle(x)), few).calls("separable_conv2d") == 1
    with fastconv.use_backend("reference"):
        assert run(model, x).calls("separable_conv2d") == 0


def test_without_normalisation():
    """Weights that are not folded are packed alone; those that the graph computes are left to two calls."""
    dw, pw, x = (
        nn.Conv2d(32, 32, 5, 2, padding=2, groups=32),
        nn.Conv2d(32, 48, 1, bias=False),
        images(2, 32, 16, 16),
    )
    compiled = run(lambda x: F.gelu(pw(F.silu(dw(x)))), x)
    assert compiled.fused == ["separable_conv2d (conv2d, silu, conv2d, gelu)"]
    compiled = run(lambda x: F.conv2d(dw(x), pw.weight * 2), x)
    assert compiled.calls("separable_conv2d") == 0


def test_a_depthwise_chain_and_a_sum():
    """The normalisation is folded; sum and activation are one pass, which Inductor makes."""
    model, x = pair(Separable, torch.float32)
    model.eval()
    compiled = run(lambda x: F.relu(model.norm1(model.dw(x)) + x), x)
    assert compiled.fused == ["conv_bn_act (conv2d, batch_norm)"] and compiled.left == []
    assert compiled.calls("depthwise_conv2d") == 1


SPELLED = {
    "the module's": (lambda y, scale: scale * y.permute(0, 3, 1, 2), "linear, permute, mul"),
    "timm's": (lambda y, scale: y.permute(0, 3, 1, 2) * scale.reshape(1, -1, 1, 1), "linear, permute, mul"),
    "the authors'": (lambda y, scale: (scale.view(-1) * y).permute(0, 3, 1, 2), "linear, mul, permute"),
    "none": (lambda y, scale: F.relu(y).permute(0, 3, 1, 2), "linear, relu, permute"),
    "no images again": (lambda y, scale: torch.sigmoid(F.silu(y)), "linear, silu"),
    "dropout": (lambda y, scale: F.dropout(y, 0.5, False).mul_(scale.view(-1)), "linear, dropout, mul_"),
    "a sum": (lambda y, scale: F.gelu(scale.view(-1).expand(2, 14, 14, 80) + y), "linear, add, gelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_linear_layers_spelled_otherwise(name, dtype):
    spelled, idiom = SPELLED[name]
    scale, x = nn.Parameter(torch.rand(80, 1, 1, dtype=dtype)), torch.randn(2, 14, 14, 256, dtype=dtype)
    for bias in (False, True):
        layer = nn.Linear(256, 80, bias).to(dtype)
        compiled = run(lambda x, layer=layer: spelled(layer(x), scale), x)
        assert compiled.fused == [f"conv2d ({idiom})"]


def test_linear_layers_that_stay():
    layer, scale = nn.Linear(256, 80), nn.Parameter(torch.rand(80))
    x, flat_x = torch.randn(2, 14, 14, 256), torch.randn(2, 196, 256)

    def seen_elsewhere(x):
        y = layer(x)
        return F.gelu(y), y * scale

    def multiplied_otherwise(x):
        return F.gelu(layer(x)) * torch.arange(14.0)[:, None]

    def computed_factor(x):
        return layer(x) * scale.exp()

    def moved(x):
        return layer(x.transpose(1, 2)), layer(x[:, ::2])

    def written(x):
        y = layer(x)
        scale.mul_(2)
        return y * scale, scale.div_(2) * 1

    for function in (seen_elsewhere, multiplied_otherwise, computed_factor, written):
        for idiom in run(function, x).fused:
            assert idiom in ("conv2d (linear)", "conv2d (linear, gelu)"), function.__name__
    assert run(moved, x).fused == run(layer, flat_x).fused == run(layer, x[:, :2, :2]).fused == []


def test_a_factor_that_float16_has_no_room_for():
    model, x = Pixels().half(), images(2, 64, 16, 16, channels_last=True).half()
    nn.init.constant_(model.scale, 1e-6)
    with torch.no_grad():
        assert not any("mul" in idiom for idiom in run_close(model, x).fused)


def run_close(function, x):
    compiled = Compiled(function)
    torch.testing.assert_close(compiled(x), function(x), rtol=1e-2, atol=1e-2)
    return compiled

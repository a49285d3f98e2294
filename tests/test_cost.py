"""fastconv.cost against the formulas, by hand."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastconv
from fastconv import _library, ceilings
from fastconv.nn import DepthwiseConv2d

# A machine of 100 GFLOP/s and 10 GB/s: from 10 FLOPs a byte on, arithmetic is the limit.
CEILINGS = SimpleNamespace(
    floor_time=lambda flops, nbytes, dtype: max(flops / 100e9, nbytes / 10e9),
    bound=lambda flops, nbytes, dtype: "arithmetic" if flops / 100e9 > nbytes / 10e9 else "memory",
)


def cost(model, size):
    return fastconv.cost(model, size, ceilings=CEILINGS)


def test_dense_convolution():
    B, C, M, K, H = 2, 3, 8, 5, 16
    table = cost(nn.Conv2d(C, M, K, stride=2, padding=2), (B, C, H, H))
    E = (H + 4 - 5) // 2 + 1
    (layer,) = table.layers
    assert E == 8
    assert layer.output_shape == (B, M, E, E)
    assert layer.macs == table.macs == B * M * K * K * C * E * E
    assert layer.parameters == table.parameters == M * C * K * K + M
    assert layer.storage_bits == table.storage_bits == 32 * (M * C * K * K + B * C * H * H + B * M * E * E)
    assert layer.bytes == 4 * (M * C * K * K + M + B * C * H * H + B * M * E * E)
    assert layer.intensity == 2 * layer.macs / layer.bytes
    assert layer.receptive_field == (5, 5)


def test_grouped_convolution_divides_macs_and_weights():
    C = M = 12
    G, K, E = 4, 3, 7
    (layer,) = cost(nn.Conv2d(C, M, K, padding=1, groups=G, bias=False), (1, C, E, E)).layers
    assert layer.macs == M * K * K * C * E * E // G
    assert layer.storage_bits == 32 * (M * C * K * K // G + C * E * E + M * E * E)


@pytest.mark.parametrize("ours", [False, True])
def test_depthwise_separable(ours):
    B, C, M, K, H = 3, 6, 10, 3, 8
    depthwise = DepthwiseConv2d(C, bias=False, padding=1) if ours else nn.Conv2d(C, C, K, 1, 1, 1, C, False)
    table = cost(nn.Sequential(depthwise, nn.Conv2d(C, M, 1, bias=False)), (B, C, H, H))
    pixels = H * H
    assert table.macs == B * K * K * C * pixels + B * M * C * pixels
    assert [layer.macs for layer in table.layers] == [B * K * K * C * pixels, B * M * C * pixels]
    # The tensor between the two is stored once.
    stored = B * C * pixels + C * K * K + B * C * pixels + M * C + B * M * pixels
    assert table.storage_bits == 32 * stored


def test_linear_batch_norm_and_pool():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 5))
    norm, pool, linear = cost(model, (2, 4, 6, 6)).layers
    assert (norm.macs, pool.macs, linear.macs) == (0, 0, 2 * 36 * 5)
    assert norm.parameters == 8
    assert norm.bytes == 4 * (2 * 2 * 4 * 36 + 4 * 4)  # input, output; weight, bias, mean, variance
    assert pool.bytes == 4 * (2 * 4 * 36 + 2 * 4 * 9)
    assert linear.storage_bits == 32 * (36 * 5 + 2 * 36 + 2 * 5)
    assert linear.receptive_field == (6, 6)  # it reads every pixel


def test_receptive_field_grows_by_kernel_dilation_and_strides():
    model = nn.Sequential(
        nn.Conv2d(1, 1, 7, stride=2),  # 1 + 6 = 7
        nn.MaxPool2d(3, stride=2),  # 7 + 2*2 = 11
        nn.Conv2d(1, 1, 3, dilation=2),  # 11 + 2*2*4 = 27
        nn.Conv2d(1, 1, (1, 5)),  # 27, 27 + 4*4 = 43
    )
    fields = [layer.receptive_field for layer in cost(model, (1, 1, 96, 96)).layers]
    assert fields == [(7, 7), (11, 11), (27, 27), (27, 43)]


def test_receptive_field_of_branches_is_the_larger():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 5, padding=2), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.c(torch.relu(self.a(x) + self.b(x)))

    assert cost(Residual(), (1, 2, 16, 16)).layers[-1].receptive_field == (7, 7)


def test_receptive_field_is_where_the_gradient_is():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, 2), nn.Conv2d(1, 1, 3, dilation=3), nn.AvgPool2d(2, 2))
    x = torch.randn(1, 1, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[0, 0, 3, 3], x)
    rows = grad[0, 0].abs().sum(1).nonzero()
    extent = int(rows.max() - rows.min()) + 1
    assert cost(model, (1, 1, 64, 64)).receptive_field == (extent, extent)


def test_functional_calls_are_not_lost():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(nn.functional.conv2d(x, self.weight).mean((2, 3)))

    table = cost(Functional(), (1, 3, 10, 10))
    assert table.other_macs == 4 * 27 * 64
    assert table.macs == 4 * 27 * 64 + 4 * 2
    assert table.parameters == 4 * 27 + 4 * 2 + 2


def test_shared_layer_counts_twice_and_its_weights_once():
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    table = cost(nn.Sequential(layer, layer), (1, 4, 8, 8))
    assert table.macs == 2 * 4 * 4 * 9 * 64
    assert table.parameters == 4 * 4 * 9
    assert table.storage_bits == 32 * (4 * 4 * 9 + 3 * 4 * 64)


def test_bound_and_floor_follow_the_ceilings():
    deep = cost(nn.Conv2d(256, 256, 3, padding=1, bias=False), (1, 256, 28, 28)).layers[0]
    shallow = cost(DepthwiseConv2d(256, padding=1, bias=False), (1, 256, 28, 28)).layers[0]
    assert deep.bound(CEILINGS) == "arithmetic"
    assert deep.floor_seconds(CEILINGS) == 2 * deep.macs / 100e9
    assert shallow.bound(CEILINGS) == "memory"
    assert shallow.floor_seconds(CEILINGS) == shallow.bytes / 10e9


def test_totals_and_printing():
    table = cost(fastconv.models.create("mobilenet_v1", width=0.25), (3, 64, 64))
    assert table.macs == sum(layer.macs for layer in table.layers)
    assert table.floor_seconds == pytest.approx(sum(layer.floor_seconds(CEILINGS) for layer in table.layers))
    text = str(table)
    assert "features.1.0.0" in text and "DepthwiseConv2d" in text and "470 k" in text.splitlines()[-1]
    assert len(table.cells()) == len(table.layers) + 1
    assert "features.1.0.0" in _printed_by_rich(table)


def _printed_by_rich(table):
    console = pytest.importorskip("rich.console").Console(width=160, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_without_the_extension_the_floor_is_empty_and_says_why(monkeypatch):
    monkeypatch.setattr(_library, "host", lambda: None)
    monkeypatch.setattr(ceilings, "_measure_cpu", ceilings._measure_cpu.__wrapped__)  # nothing kept
    table = fastconv.cost(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (3, 10, 10))
    head, layer, total, reason = str(table).splitlines()
    assert "13.8 k" in layer and "13.8 k" in total
    assert head.endswith("bound  floor ms") and layer.endswith("6.67") and total.endswith("3x3")
    assert reason.startswith("no bound and no floor: ") and _library.build_command() in reason
    assert reason in " ".join(_printed_by_rich(table).split())
    with pytest.raises(RuntimeError, match="fastconv._host, which is not built"):
        table.floor_seconds  # noqa: B018


def test_the_model_is_left_alone():
    model = fastconv.models.create("mobilenet_v1", width=0.25).train()
    model.features[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [tensor._version for tensor in model.state_dict(keep_vars=True).values()]
    fastconv.cost(model, (3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert versions == [tensor._version for tensor in model.state_dict(keep_vars=True).values()]
    assert model.training and not model.features[0].training
    assert not any(module._forward_hooks for module in model.modules())


def test_large_networks_cost_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4096, 3, padding=1), nn.Conv2d(4096, 4096, 3, padding=1))
    table = cost(model, (64, 3, 4096, 4096))
    assert table.macs == 64 * 4096**2 * 9 * (3 * 4096 + 4096**2)


@pytest.mark.parametrize("size", [(), (1, -3, 8, 8)])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match="input_size must be"):
        cost(nn.Conv2d(3, 3, 3), size)


def test_half_precision_moves_half_the_bytes():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    full = cost(layer, (1, 4, 8, 8)).layers[0]
    half = cost(layer.bfloat16(), (1, 4, 8, 8)).layers[0]
    assert half.bytes * 2 == full.bytes
    assert half.storage_bits == full.storage_bits
    assert math.isclose(half.intensity, 2 * full.intensity)

"""The networks: published figures, and the same network with and without this library."""

import collections
import copy
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from networks import SMALL, parameters, randomize_norms
from torch import nn

import fastconv
from fastconv import cli, models
from fastconv.cli.compare import calibrate
from fastconv.nn import DepthwiseConv2d

SHAPES = Path(__file__).parents[1] / "benchmarks/shapes"


@pytest.mark.parametrize(
    "width, millions, count",
    [(1.0, 569, 4_231_976), (0.75, 325, 2_585_560), (0.5, 149, 1_331_592), (0.25, 41, 470_072)],
)
@pytest.mark.parametrize("plain", [False, True])
def test_mobilenet_v1_figures(width, millions, count, plain):
    model = models.create("mobilenet_v1", width=width, plain=plain)
    table = fastconv.cost(model, (3, 224, 224))
    assert table.macs == pytest.approx(millions * 1e6, rel=0.02)
    assert table.parameters == count


@pytest.mark.parametrize(
    "name, count",
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        # Less the 1x1 convolutions and batch norms of three links.
        ("plain18", 11_689_512 - 64 * 128 - 128 * 256 - 256 * 512 - 2 * (128 + 256 + 512)),
        ("plain34", 21_797_672 - 64 * 128 - 128 * 256 - 256 * 512 - 2 * (128 + 256 + 512)),
    ],
)
def test_resnet_parameters(name, count):
    with torch.device("meta"):
        assert parameters(models.create(name)) == count


@pytest.mark.parametrize("depth, kind", [(18, "basic"), (50, "bottleneck")])
def test_resnet_is_the_one_of_transformers(depth, kind, monkeypatch):
    """Their checkpoints come from the same source as torchvision's; only the names differ."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = [256, 512, 1024, 2048] if depth == 50 else [64, 128, 256, 512]
    repeats = [3, 4, 6, 3] if depth == 50 else [2, 2, 2, 2]
    config = transformers.ResNetConfig(layer_type=kind, depths=repeats, hidden_sizes=sizes, num_labels=10)
    theirs = transformers.ResNetForImageClassification(config).eval()
    randomize_norms(theirs)
    rules = [
        (r"resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"resnet\.encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}"),
        (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"),
        (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
        (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
        (r"classifier\.1", "fc"),
    ]
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        state[name] = value
    model = models.resnet(depth, num_classes=10).eval()
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name, gigas", [("resnet18", 1.81), ("resnet50", 4.09)])
def test_resnet_macs(name, gigas):
    """Figures of torchvision's documentation."""
    table = fastconv.cost(models.create(name, plain=True), (3, 224, 224))
    assert table.macs == pytest.approx(gigas * 1e9, rel=0.02)


@pytest.mark.parametrize(
    "depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_cifar_resnet_parameters(depth, millions):
    digits = 1 if millions > 1 else 2
    with torch.device("meta"):
        assert round(parameters(models.create(f"resnet{depth}")) / 1e6, digits) == millions
        if f"plain{depth}" in models.list():
            assert parameters(models.create(f"plain{depth}")) == parameters(models.create(f"resnet{depth}"))


# MACs in millions of the paper's tables 5 and, for squeeze and excitation, its text; parameters in millions
# of the authors' repository (megvii-model/ShuffleNet-Series), where it has that row.
@pytest.mark.parametrize(
    "options, macs, count",
    [
        ({"scale": 2.0}, 524, 5.4),
        ({"scale": 1.5}, 292, 3.4),
        ({"scale": 1.0}, 138, 1.9),
        ({"scale": 1.0, "groups": 8}, 140, 2.4),
        ({"scale": 0.5, "groups": 8}, 40, 1.0),
        ({"scale": 0.5, "groups": 4}, 38, None),
        ({"scale": 0.5, "shallow": True}, 40, None),
        ({"scale": 2.0, "se": True}, 527, None),
    ],
)
def test_shufflenet_v1_figures(options, macs, count):
    model = models.create("shufflenet_v1", **options)
    table = fastconv.cost(model, (3, 224, 224))
    assert table.macs == pytest.approx(macs * 1e6, rel=0.05)
    assert count is None or table.parameters == pytest.approx(count * 1e6, abs=0.06e6)
    if "shallow" in options:
        assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == 26


def test_shufflenet_v1_without_shuffle():
    """It costs as much, and every output of a group reads that group alone."""
    ours, without = (models.shufflenet_v1(0.25, 3, shuffle=shuffle, plain=True) for shuffle in (True, False))
    assert parameters(ours) == parameters(without)
    assert sum(isinstance(module, nn.ChannelShuffle) for module in ours.modules()) == 16
    assert not any(isinstance(module, nn.ChannelShuffle) for module in without.modules())
    for model, reached in ((ours, 60), (without, 20)):
        unit = model.eval().stage2[1]
        x = torch.randn(1, 60, 5, 5, requires_grad=True)
        unit(x)[0, :20].sum().backward()
        assert int(x.grad.abs().sum((0, 2, 3)).count_nonzero()) == reached


def test_links():
    """What reaches the output where a branch is silent."""
    x = torch.randn(2, 16, 5, 6)
    block = models.cifar_resnet(20).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    y = block(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2].relu()) and y[:, 16:].count_nonzero() == 0
    block = models.cifar_resnet(20, residual=False).eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    assert block(x).count_nonzero() == 0
    x = torch.randn(2, 60, 5, 6)
    down, same = models.shufflenet_v1(0.25).eval().stage3[:2]
    for unit in (down, same):
        nn.init.zeros_(unit.bn3.weight)
    y = down(x)
    assert torch.equal(y[:, :60], nn.functional.avg_pool2d(x, 3, 2, 1).relu()) and not y[:, 60:].any()
    assert torch.equal(same(y - 1), (y - 1).relu())


# Parameters in millions of the table of the authors' repository (alvinwan/shiftresnet-cifar), 10 classes.
@pytest.mark.parametrize(
    "depth, millions",
    [
        (20, {1: 0.03, 3: 0.10, 6: 0.19, 9: 0.28}),
        (56, {1: 0.10, 3: 0.29, 6: 0.58, 9: 0.87}),
        (110, {1: 0.20, 3: 0.59, 6: 1.18, 9: 1.76}),
    ],
)
def test_shift_resnet_parameters(depth, millions):
    resnet = parameters(models.create(f"resnet{depth}"))
    for expansion, count in millions.items():
        model = models.create(f"shift_resnet{depth}", expansion=expansion, num_classes=10)
        assert round(parameters(model) / 1e6, 2) == count
        assert (parameters(model) < resnet) == (expansion < 9), "at 9 it has more, as in that table"


def test_shift_resnet_figures():
    """Of the authors' count, 95,642 parameters and 16,581,248 FLOPs.

    It takes the first convolution for one of 64 filters on one channel.
    """
    table = fastconv.cost(models.create("shift_resnet20", expansion=3, num_classes=10), (3, 32, 32))
    assert table.parameters == 95_642
    first = 32 * 32 * 9
    assert table.macs - first * 3 * 16 == 16_581_248 - first * 64
    resnet = fastconv.cost(models.create("resnet20"), (3, 32, 32))
    for expansion in (1, 3, 6):
        model = models.create("shift_resnet20", expansion=expansion, num_classes=10)
        assert fastconv.cost(model, (3, 32, 32)).macs < resnet.macs


@pytest.mark.parametrize("depth", [18, 50])
def test_tsm_costs_what_its_backbone_costs(depth):
    table = fastconv.cost(models.create(f"tsm_resnet{depth}", num_classes=1000), (8, 3, 64, 64))
    backbone = fastconv.cost(models.create(f"resnet{depth}"), (8, 3, 64, 64))
    assert (table.macs, table.parameters) == (backbone.macs, backbone.parameters)


@pytest.mark.parametrize("plain", [False, True])
def test_tsm_shifts_in_the_branch(plain):
    """A fold of channels comes from the next frame, and one from the last; the link is not shifted."""
    model = models.tsm_resnet(18, segments=3, num_classes=10, plain=plain).eval()
    blocks = [module for module in model.modules() if hasattr(module, "bn2")]
    assert len(blocks) == 8
    x = torch.randn(6, 64, 3, 4)
    expected = x.unflatten(0, (2, 3)).clone()
    expected[:, :, :16] = 0
    expected[:, :2, :8] = x.unflatten(0, (2, 3))[:, 1:, :8]
    expected[:, 1:, 8:16] = x.unflatten(0, (2, 3))[:, :2, 8:16]
    assert torch.equal(blocks[0].shift(x), expected.flatten(0, 1))
    nn.init.zeros_(blocks[0].bn2.weight)
    assert torch.equal(blocks[0](x), x.relu())


@pytest.mark.parametrize("name", ["tsm_resnet18", "stacked_resnet18"])
def test_video_input(name):
    model = models.create(name, segments=2, num_classes=10).eval()
    x = torch.randn(3, 2, 3, 32, 32)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (3, 10)
        assert torch.equal(model(x.flatten(0, 1)), y)
        assert model(x[:0]).shape == (0, 10)
        for wrong in (x[:, :1], x.flatten(0, 1)[1:], x[0, 0]):
            with pytest.raises(
                ValueError, match=r"input must be \(N\*2, C, H, W\) or \(N, 2, C, H, W\), got"
            ):
                model(wrong)


def test_tsm_loads_checkpoints_of_images_and_of_the_authors():
    backbone = models.resnet(18, 10)
    model, again = (models.tsm_resnet(18, num_classes=10) for _ in range(2))
    model.load_state_dict(backbone.state_dict())
    names = {"fc.weight": "new_fc.weight", "fc.bias": "new_fc.bias"}
    theirs = {}
    for name, value in backbone.state_dict().items():
        if name.startswith("layer"):
            name = name.replace(".conv1.", ".conv1.net.")
        theirs["module." + names.get(name, "base_model." + name)] = value
    nn.Sequential(again, nn.Linear(10, 2)).load_state_dict(
        {f"0.{name}": value for name, value in theirs.items()}
        | {"1.weight": torch.zeros(2, 10), "1.bias": torch.zeros(2)}
    )
    for loaded in (model, again):
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, backbone.state_dict()[name]), name


@pytest.mark.parametrize("name, options, shape", SMALL.values(), ids=SMALL)
def test_plain_is_the_same_network_from_torch_alone(name, options, shape):
    torch.manual_seed(0)
    ours = models.create(name, **options).double()
    torch.manual_seed(0)
    plain = models.create(name, **options, plain=True).double()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values()))
    modules = {type(module).__module__.partition(".")[0] for module in ours.modules()}
    assert "fastconv" in modules
    assert not any(type(module).__module__.startswith("fastconv.nn") for module in plain.modules())
    x = torch.randn(shape, dtype=torch.float64)
    results, cotangent = [], None
    for model in (ours, plain):
        image = x.clone().requires_grad_()
        torch.manual_seed(1)  # the same values are dropped
        y = model.train()(image)
        cotangent = torch.randn_like(y) if cotangent is None else cotangent
        results.append([y.detach(), *torch.autograd.grad(y, [image, *model.parameters()], cotangent)])
    assert y.shape == (shape[0] // (options.get("segments", 1) if len(shape) == 4 else 1), 10)
    # What a batch norm takes away again has no gradient but rounding: so one scale for all.
    largest = max(float(gradient.abs().max()) for gradient in results[1][1:])
    for (a, b), scale in zip(zip(*results), [float(results[1][0].abs().max()), *[largest] * len(results[1])]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * scale)


def test_modules_of_the_library():
    model = models.create("mobilenet_v1", width=0.25)
    assert sum(isinstance(module, DepthwiseConv2d) for module in model.modules()) == 13
    model = models.create("shufflenet_v1", scale=0.25)
    kinds = collections.Counter(type(module) for module in model.modules())
    # The first unit's convolution is dense, and shuffled in a step of its own.
    assert kinds[fastconv.nn.GroupConv2dShuffle] == 15 and kinds[fastconv.nn.ChannelShuffle] == 1
    kinds = collections.Counter(type(module) for module in models.create("shift_resnet20").modules())
    assert kinds[fastconv.nn.CSC] == kinds[fastconv.nn.ShiftConv2d] == 9
    model = models.create("tsm_resnet18", segments=2)
    assert sum(isinstance(module, fastconv.nn.TemporalShift) for module in model.modules()) == 8


@pytest.mark.parametrize("name, options, shape", SMALL.values(), ids=SMALL)
def test_copies_and_pickles(name, options, shape):
    model = models.create(name, **options).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x), expected)


SERVED = ["resnet20", "shufflenet", "shift_resnet20", "tsm_resnet18", "mobilenet_v2", "efficientnet_b0"]
SERVED += ["convnext_t", "squeezenet1_0", "densenet121"]


@pytest.mark.parametrize("small", SERVED)
def test_optimize_serves_the_plain_network(small):
    name, options, shape = SMALL[small]
    model, x = models.create(name, **options, plain=True).eval(), torch.randn(shape)
    with torch.no_grad():
        calibrate(model, x)
        expected = model(x)
        fastconv.optimize(model)
        kinds = {type(module) for module in model.modules()}
        assert nn.Conv2d not in kinds and nn.ChannelShuffle not in kinds and fastconv.nn.Conv2d in kinds
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


COMMANDS = [
    ("resnet20", "4,3,16,16", ()),
    ("shufflenet_v1", "2,3,32,32", ("scale=0.25", "groups=2")),
    ("shift_resnet20", "2,3,16,16", ()),
    ("tsm_resnet18", "2,3,32,32", ("segments=2",)),
    ("mobilenet_v2", "2,3,32,32", ("width=0.25",)),
]


@pytest.mark.parametrize("name, size, settings", COMMANDS)
def test_commands(name, size, settings, capsys):
    arguments = [name, "--input-size", size, *(word for s in settings for word in ("--set", s))]
    assert cli.main(["cost", *arguments]) == 0
    assert "MACs" in capsys.readouterr().out
    threads = torch.get_num_threads()
    try:
        assert cli.main(["compare", *arguments, "--inference", "--rounds", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "PyTorch" in capsys.readouterr().out


def _layer(module, image):
    """The operator, the input's sizes, and what else a row of a benchmark says; None of what has no row."""
    if isinstance(module, nn.ChannelShuffle):
        return "channel_shuffle", *image, module.groups
    if isinstance(module, fastconv.nn.Shift2d):
        return "shift2d", *image, module.kernel_size[0]
    if isinstance(module, fastconv.nn.ShiftConv2d):
        return "shift_conv2d", *image, module.window[0], module.stride[0], module.out_channels
    if not isinstance(module, nn.Conv2d):
        return None
    window = module.kernel_size[0], module.stride[0], module.padding[0]
    if module.groups == module.in_channels > 1:
        return "depthwise_conv2d", *image, *window
    shuffled = isinstance(module, fastconv.nn.GroupConv2dShuffle)
    op = "group_conv2d_shuffle" if shuffled else "conv2d"
    return op, *image, *window, module.groups, module.out_channels


@pytest.mark.parametrize(
    "file, name, options, size",
    [
        ("shufflenet_v1", "shufflenet_v1", {"groups": 3}, 224),
        ("shufflenet_v1_g8", "shufflenet_v1", {"groups": 8}, 224),
        ("shift_resnet20", "shift_resnet20", {"expansion": 3}, 32),
    ],
)
def test_benchmarks_have_the_networks_layers(file, name, options, size):
    """Each step of the plain network, and what the library's own folds into one."""
    layers = collections.Counter()
    for plain in (True, False):
        model = models.create(name, **options, plain=plain)
        modules = dict(model.named_modules())
        for row in fastconv.cost(model, (3, size, size)).layers:
            layer = _layer(modules[row.name], row.input_shape[1:])
            if layer and (plain or layer[0] in ("group_conv2d_shuffle", "shift_conv2d")):
                layers[layer] += 1
    keys = {
        "channel_shuffle": ("groups",),
        "shift2d": ("kernel",),
        "depthwise_conv2d": ("kernel", "stride", "padding"),
        "conv2d": ("kernel", "stride", "padding", "groups", "filters"),
        "group_conv2d_shuffle": ("kernel", "stride", "padding", "groups", "filters"),
        "shift_conv2d": ("kernel", "stride", "filters"),
    }
    shapes, found = json.loads((SHAPES / f"{file}.json").read_text()), collections.Counter()
    for op, more in keys.items():
        for row in shapes.get(op, []):
            row = {"groups": 1, **row}
            found[(op, *(row[key] for key in ("channels", "height", "width", *more)))] += row["count"]
    assert found == layers


@pytest.mark.parametrize("name", ["mobilenet_v1", "shufflenet_v1", "resnet18"])
def test_fresh_activations_keep_their_size(name):
    """The depthwise layers' fan is that of one channel; with a dense layer's they would shrink by sqrt(C)."""
    model = models.create(name, plain=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


def test_list_and_create():
    assert "mobilenet_v1" in models.list()
    assert models.list() == sorted(models.list())
    with pytest.raises(ValueError, match="name must be one of .*mobilenet_v1.*, got 'mobilenet'"):
        models.create("mobilenet")
    with pytest.raises(TypeError, match="depth"):
        models.create("mobilenet_v1", depth=3)
    with pytest.raises(TypeError, match="width"):
        models.create("resnet18", width=3)


@pytest.mark.parametrize(
    "build, options, error, words",
    [
        (models.mobilenet_v1, {"width": 0}, ValueError, "width must be above 0, got 0"),
        (models.resnet, {"depth": 20}, ValueError, r"depth must be one of \(18, 34, 50, 101, 152\), got 20"),
        (
            models.resnet,
            {"depth": 50, "residual": False},
            ValueError,
            r"depth must be one of \(18, 34\), got 50",
        ),
        (models.cifar_resnet, {"depth": 18}, ValueError, "depth must be 6n . 2 .*, got 18"),
        (models.cifar_resnet, {"depth": 2}, ValueError, "depth must be 6n . 2 .*, got 2"),
        (models.shift_resnet, {"depth": 21}, ValueError, "depth must be 6n . 2 .*, got 21"),
        (models.shift_resnet, {"depth": 20, "expansion": 0.5}, ValueError, "expansion must be .*9/16.* 0.5"),
        (models.shufflenet_v1, {"scale": 0}, ValueError, "scale must be a number above 0, got 0"),
        (models.shufflenet_v1, {"scale": 0.001}, ValueError, "scale leaves no channels .* 0.001"),
        (models.shufflenet_v1, {"groups": 5}, ValueError, r"groups must be one of \(1, 2, 3, 4, 8\), got 5"),
        (models.tsm_resnet, {"depth": 20}, ValueError, r"depth must be one of \(18, 50\), got 20"),
        (models.tsm_resnet, {"depth": 18, "segments": 0}, ValueError, "segments must be at least 1, got 0"),
        (models.tsm_resnet, {"depth": 18, "fold_div": 1}, ValueError, "fold_div must be at least 2, got 1"),
        (models.stacked_resnet, {"depth": 18, "segments": 1.5}, TypeError, "segments must be an integer"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_errors(build, options, error, words, plain):
    with pytest.raises(error, match=words):
        build(**options, plain=plain)

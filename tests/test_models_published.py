"""Networks that torchvision has too: its parameters by name and shape, published figures, and their parts."""

import re

import pytest
import torch
from networks import parameters
from torch import nn

import fastconv
from fastconv import models
from fastconv.models._layers import SqueezeExcite, StochasticDepth, divisible
from fastconv.models.convnext import LayerNorm2d
from fastconv.models.efficientnet import VARIANTS


def create(name, **options):
    """Without the values of the parameters."""
    with torch.device("meta"):
        return models.create(name, **options)


# Parameters, and 10^9 MACs of one image, of torchvision's documentation and, where it says less, the papers.
FIGURES = {
    "mobilenet_v2": (3_504_872, 0.30),
    "squeezenet1_0": (1_248_424, 0.82),
    "densenet121": (7_978_856, 2.83),
    "densenet169": (14_149_480, 3.36),
    "densenet201": (20_013_928, 4.29),
    "densenet161": (28_681_000, 7.73),
    "efficientnet_b0": (5_288_548, 0.39),
    "efficientnet_b1": (7_794_184, 0.7),
    "efficientnet_b2": (9_109_994, 1.09),
    "efficientnet_b3": (12_233_232, 1.8),
    "efficientnet_b4": (19_341_616, 4.2),
    "efficientnet_b5": (30_389_784, 9.9),
    "efficientnet_b6": (43_040_704, 19.07),
    "efficientnet_b7": (66_347_960, 37.75),
    "convnext_t": (28_589_128, 4.46),
    "convnext_s": (50_223_688, 8.68),
    "convnext_b": (88_591_464, 15.36),
    "convnext_l": (197_767_336, 34.36),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    count, gigas = FIGURES[name]
    ours, plain = create(name), create(name, plain=True)
    assert parameters(ours) == parameters(plain) == count
    assert list(ours.state_dict()) == list(plain.state_dict())
    family, _, variant = name.partition("_")
    if family == "efficientnet" and variant > "b4":
        return  # its weights alone would take seconds
    size = VARIANTS[variant].image if family == "efficientnet" else 224
    if family == "convnext" and variant != "t":
        return
    table = fastconv.cost(models.create(name, plain=True), (3, size, size))
    assert table.macs == pytest.approx(gigas * 1e9, rel=0.05 if family == "efficientnet" else 0.02)


# Of torchvision's state_dicts: how many entries, and some of them.
KEYS = {
    "mobilenet_v2": (
        314,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.0.1.running_var": (32,),
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.1.conv.2.bias": (16,),
            "features.2.conv.0.0.weight": (96, 16, 1, 1),
            "features.2.conv.1.0.weight": (96, 1, 3, 3),
            "features.17.conv.2.weight": (320, 960, 1, 1),
            "features.17.conv.3.num_batches_tracked": (),
            "features.18.0.weight": (1280, 320, 1, 1),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "squeezenet1_0": (
        52,
        {
            "features.0.weight": (96, 3, 7, 7),
            "features.3.squeeze.weight": (16, 96, 1, 1),
            "features.3.expand1x1.bias": (64,),
            "features.12.expand3x3.weight": (256, 64, 3, 3),
            "classifier.1.weight": (1000, 512, 1, 1),
        },
    ),
    "densenet121": (
        727,
        {
            "features.conv0.weight": (64, 3, 7, 7),
            "features.norm0.running_mean": (64,),
            "features.denseblock1.denselayer1.norm1.weight": (64,),
            "features.denseblock1.denselayer6.conv1.weight": (128, 224, 1, 1),
            "features.denseblock4.denselayer16.conv2.weight": (32, 128, 3, 3),
            "features.transition1.norm.bias": (256,),
            "features.transition3.conv.weight": (512, 1024, 1, 1),
            "features.norm5.weight": (1024,),
            "classifier.bias": (1000,),
        },
    ),
    "efficientnet_b0": (
        360,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.0.block.0.0.weight": (32, 1, 3, 3),
            "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
            "features.1.0.block.2.1.running_mean": (16,),
            "features.2.0.block.0.0.weight": (96, 16, 1, 1),
            "features.2.0.block.2.fc2.bias": (96,),
            "features.3.1.block.1.0.weight": (240, 1, 5, 5),
            "features.7.0.block.3.0.weight": (320, 1152, 1, 1),
            "features.8.1.weight": (1280,),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "efficientnet_b5": (
        854,
        {
            "features.0.0.weight": (48, 3, 3, 3),
            "features.1.2.block.0.0.weight": (24, 1, 3, 3),
            "features.7.2.block.2.fc1.weight": (128, 3072, 1, 1),
            "classifier.1.weight": (1000, 2048),
        },
    ),
    "convnext_t": (
        182,
        {
            "features.0.0.weight": (96, 3, 4, 4),
            "features.0.1.bias": (96,),
            "features.1.0.layer_scale": (96, 1, 1),
            "features.1.0.block.0.weight": (96, 1, 7, 7),
            "features.1.0.block.2.weight": (96,),
            "features.1.0.block.3.weight": (384, 96),
            "features.5.8.block.5.bias": (384,),
            "features.6.0.weight": (384,),
            "features.6.1.weight": (768, 384, 2, 2),
            "classifier.0.weight": (768,),
            "classifier.2.weight": (1000, 768),
        },
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_torchvision(name):
    count, some = KEYS[name]
    shapes = {key: tuple(value.shape) for key, value in create(name).state_dict().items()}
    assert {key: shapes.get(key) for key in some} == some
    assert len(shapes) == count


def test_densenet_loads_published_files():
    """They have ``norm.1`` for ``norm1``, and no ``num_batches_tracked``."""
    source, model = models.densenet(121, 10), models.densenet(121, 10)
    published = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value
        for name, value in source.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert "features.denseblock2.denselayer3.norm.1.weight" in published
    model.load_state_dict(published)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters()))
    with pytest.raises(RuntimeError, match="denselayer3.norm3"):
        model.load_state_dict({**published, "features.denseblock1.denselayer3.norm3.weight": torch.ones(1)})


def test_convnext_is_the_one_of_transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=10)).eval()
    rules = [
        (r"convnext\.embeddings\.patch_embeddings", "features.0.0"),
        (r"convnext\.embeddings\.layernorm", "features.0.1"),
        (r"convnext\.encoder\.stages\.(\d)\.downsampling_layer", lambda m: f"features.{2 * int(m[1])}"),
        (r"convnext\.encoder\.stages\.(\d)\.layers", lambda m: f"features.{2 * int(m[1]) + 1}"),
        (r"convnext\.layernorm", "classifier.0"),
        (r"^classifier\.(weight|bias)", r"classifier.2.\1"),
        (r"layer_scale_parameter", "layer_scale"),
        (r"dwconv", "block.0"),
        (r"(\d)\.layernorm", r"\1.block.2"),
        (r"pwconv1", "block.3"),
        (r"pwconv2", "block.5"),
    ]
    for value in theirs.parameters():
        if value.dim() == 1:  # layer scales, norms, biases
            nn.init.uniform_(value, 0.5, 1.0)
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        state[name] = value[:, None, None] if name.endswith("layer_scale") else value
    model = models.convnext("t", num_classes=10).eval()
    model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_layer_norm_is_over_channels():
    norm = LayerNorm2d(5, eps=1e-6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    scaled = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), scaled * norm.weight[:, None, None] + norm.bias[:, None, None])


def test_stochastic_depth():
    """Whole images are dropped, and what is left is larger; in eval mode nothing happens."""
    layer, x = StochasticDepth(0.25), torch.rand(4000, 2, 1, 3) + 1
    y = layer.train()(x)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert float(dropped.all(1).float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(y[~dropped.all(1)], x[~dropped.all(1)] / 0.75)
    assert layer.eval()(x) is x
    assert StochasticDepth(0.0).train()(x) is x
    x = torch.ones(8, 1, 1, 1, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, (x.grad > 0) / 0.75)


@pytest.mark.parametrize(
    "name, blocks, last", [("efficientnet_b0", 16, 0.2 * 15 / 16), ("convnext_t", 18, 0.1)]
)
def test_stochastic_depth_grows(name, blocks, last):
    found = [m.probability for m in create(name).modules() if isinstance(m, StochasticDepth)]
    assert len(found) == blocks and found[0] == 0 and found[-1] == pytest.approx(last)
    steps = {round(b - a, 9) for a, b in zip(found, found[1:])}
    assert len(steps) == 1, "by the same at each block"


def test_large_efficientnets_have_norms_of_their_own():
    for name, eps, momentum in (("efficientnet_b4", 1e-5, 0.1), ("efficientnet_b5", 1e-3, 0.01)):
        norms = [module for module in create(name).modules() if isinstance(module, nn.BatchNorm2d)]
        assert {(norm.eps, norm.momentum) for norm in norms} == {(eps, momentum)}


def test_links_of_the_blocks():
    """Where a branch is silent, the output is the input."""
    x = torch.randn(2, 24, 6, 5)
    block = models.mobilenet_v2().eval().features[3]
    nn.init.zeros_(block.conv[3].weight)
    assert torch.equal(block(x), x)
    block = models.efficientnet("b0").eval().features[2][1]
    nn.init.zeros_(block.block[3][1].weight)
    assert torch.equal(block(x), x)
    x = torch.randn(2, 96, 6, 5)
    block = models.convnext("t").eval().features[1][0]
    nn.init.zeros_(block.layer_scale)
    assert torch.equal(block(x), x)
    block = models.densenet(121).eval().features.denseblock1
    assert torch.equal(block(x[:, :64])[:, :64], x[:, :64])


def test_divisible_keeps_nine_tenths():
    asked = (1, 8, 11, 12, 13, 20, 100.8, 38.4)
    assert [divisible(channels) for channels in asked] == [8, 8, 16, 16, 16, 24, 104, 40]


@pytest.mark.parametrize(
    "name, options, kinds",
    [
        ("mobilenet_v2", {}, {"DepthwiseConv2d": 17, "Conv2d": 35, "ReLU6": 35}),
        ("efficientnet_b0", {}, {"DepthwiseConv2d": 16, "Conv2d": 65, "SiLU": 49, "SqueezeExcite": 16}),
        ("convnext_t", {}, {"DepthwiseConv2d": 18, "Conv2d": 4, "GELU": 18}),
        ("squeezenet1_0", {}, {"Conv2d": 26, "Fire": 8, "MaxPool2d": 3}),
        ("densenet121", {}, {"Conv2d": 120, "ReLU": 120, "AvgPool2d": 3}),
    ],
)
def test_layers(name, options, kinds):
    for plain in (False, True):
        modules = list(create(name, **options, plain=plain).modules())
        found = {kind: sum(type(m).__name__ == kind for m in modules) for kind in kinds}
        filters = kinds.get("DepthwiseConv2d", 0)
        if plain and filters:
            expected = {**kinds, "DepthwiseConv2d": 0, "Conv2d": kinds["Conv2d"] + filters}
        else:
            expected = kinds
        assert found == expected
        ours = {type(m).__module__.startswith("fastconv.nn") for m in modules if isinstance(m, nn.Conv2d)}
        assert ours == {not plain}


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_optimize_finds_the_chains(name):
    """Each convolution but the last that squeezes and excites, with its normalisation and activation."""
    model = models.create(name, plain=True).eval()
    fastconv.optimize(model)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    excited = sum(isinstance(module, SqueezeExcite) for module in model.modules())
    chains = [row.chain for row in fastconv.report(model).chains]
    sums = sum(chain.endswith("+ sum") for chain in chains)
    assert len(chains) - sums == convolutions - excited
    assert sums == sum(getattr(module, "residual", False) for module in model.modules()) > 0


@pytest.mark.parametrize(
    "build, options, words",
    [
        (models.mobilenet_v2, {"width": 0}, "width must be above 0, got 0"),
        (models.efficientnet, {"variant": "b8"}, r"variant must be one of \('b0', .*, got 'b8'"),
        (models.efficientnet, {"variant": "b0", "stochastic_depth": 1}, "stochastic_depth must be .*, got 1"),
        (models.convnext, {"size": "tiny"}, r"size must be one of \('t', 's', 'b', 'l'\), got 'tiny'"),
        (models.convnext, {"size": "t", "stochastic_depth": -1}, "stochastic_depth must be at least 0"),
        (models.densenet, {"depth": 120}, r"depth must be one of \(121, 161, 169, 201\), got 120"),
    ],
)
def test_errors(build, options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)

"""torch.compile(model, backend="fastconv"): whole networks, and how their images lie in memory."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from compiled import Block, Compiled, close, images, needs_kernel, randomized, step
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv.ops._operator import memory_format_of

pytestmark = needs_kernel
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a download


def same_training_and_inference(model, x, rest="eager"):
    """Two steps and then inference; returns what compiled both."""
    ours = copy.deepcopy(model)
    training = Compiled(ours.train(), rest)
    for _ in range(2):
        for actual, expected in zip(step(training, ours, x), step(model.train(), model, x), strict=True):
            close(actual, expected)
    for actual, expected in zip(ours.buffers(), model.buffers(), strict=True):
        close(actual, expected)
    with torch.no_grad():
        expected = model.eval()(x)
        inference = Compiled(ours.eval(), rest)
        close(inference(x), expected)
    return training, inference


def test_mobilenet():
    network = fastconv.models.create("mobilenet_v1", width=0.125, num_classes=7, plain=True)
    model = randomized(network, torch.float64)
    x = images(2, 3, 64, 64, dtype=torch.float64)
    training, inference = same_training_and_inference(model, x)
    assert training.fused.count("conv_bn_act (batch_norm, relu)") == 27
    assert inference.fused.count("conv_bn_act (conv2d, batch_norm, relu)") == inference.calls("conv2d") + 13


def test_a_network_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48], depths=[1, 1], layer_type="basic"
    )

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.ResNetModel(config)

        def forward(self, x):
            return self.model(x).last_hidden_state

    model = randomized(Pooled(), torch.float64)
    training, inference = same_training_and_inference(model, images(4, 3, 64, 64, dtype=torch.float64))
    assert training.fused.count("conv_bn_act (batch_norm, iadd, relu)") == 2
    assert inference.fused.count("conv_bn_act (conv2d, batch_norm, iadd, relu)") == 2


# Memory formats


def read(compiled):
    """The memory formats of the images that the final graphs' convolutions read."""
    names = ("aten::convolution", "fastconv::conv2d", "fastconv::depthwise_conv2d")
    nodes = [node for graph in compiled.final for node in graph.graph.nodes if node.op == "call_function"]
    values = [
        node.args[0].meta["val"]
        for node in nodes
        if getattr(node.target, "_schema", None) and node.target._schema.name in names
    ]
    assert values
    return {memory_format_of(value) for value in values}


def run(function, *inputs):
    """Without gradients, with the function's results and strides."""
    with torch.no_grad():
        compiled = Compiled(function)
        for actual, expected in zip(
            tree_leaves(compiled(*inputs)), tree_leaves(function(*inputs)), strict=True
        ):
            close(actual, expected)
    return read(compiled)


@pytest.fixture
def weights():
    return [images(16, 16, 3, 3), images(16, 16, 3, 3)]


def test_images_are_converted_once(weights):
    x, other = images(2, 16, 9, 10), images(2, 16, 5, 6)
    first, second = weights

    def plain(x, other):
        y = F.conv2d(F.relu(F.conv2d(x, first)), second)
        return y, y * other, F.max_pool2d(y, 2).flatten(1), y.mean((2, 3)), x

    assert run(plain, x, other) == {torch.channels_last}
    assert run(plain, x.contiguous(memory_format=torch.channels_last), other) == {torch.channels_last}

    def viewed(x, other):  # of a view that channels_last has not
        y = F.conv2d(F.conv2d(x, first), second)
        return y.view(2, -1)

    def written(x, other):
        y = F.conv2d(F.conv2d(x, first), second)
        x.add_(0)
        return y

    def strided(x, other):
        y = F.conv2d(F.conv2d(x, first), second)
        return torch.as_strided(y, (4,), (1,))

    def returned_twice(x, other):
        y = F.conv2d(F.conv2d(x, first), second)
        return y, y.flatten(1)

    for function in (viewed, written, strided, returned_twice):
        assert run(function, x, other) == {torch.contiguous_format}, function.__name__

    def one(x, other):
        return F.conv2d(x, first)

    assert run(one, x, other) == {torch.contiguous_format}


def test_a_model_of_channels_last_weights():
    model = randomized(Block(16)).eval().to(memory_format=torch.channels_last)
    x = images(1, 16, 32, 32)
    with torch.no_grad():
        compiled = Compiled(model)
        close(compiled(x), model(x))
    assert read(compiled) == {torch.channels_last}


@pytest.mark.parametrize("algorithm", [None, "plain"])
def test_this_librarys_modules(algorithm):
    """Their convolutions are fused too, and packed before the graph; a kernel that was named stays."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                fastconv.nn.Conv2d(16, 32, 3, padding=1, algorithm=algorithm),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                fastconv.nn.DepthwiseConv2d(32, kernel_size=3, padding=1),
                nn.BatchNorm2d(32),
                nn.SiLU(),
            )

    model, x = randomized(Net()), images(1, 16, 32, 32)
    training, inference = same_training_and_inference(model, x)
    assert training.fused[1::2] == ["conv_bn_act (batch_norm, relu)", "conv_bn_act (batch_norm, silu)"]
    assert inference.fused == [
        "conv_bn_act (fastconv.conv2d, batch_norm, relu)",
        "conv_bn_act (fastconv.depthwise_conv2d, batch_norm, silu)",
    ]
    (graph,) = inference.final
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.fastconv.conv2d.default)
    assert node.args[4] is not None and node.args[-1] == (algorithm or "winograd_f4")

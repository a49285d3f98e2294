"""Chains of layers in models that nobody here wrote: networks of transformers, small, before and after."""

import os

import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.optimize._fused import Fused

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a download
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


NETWORKS = {
    "resnet": (
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
    ),
    "resnet_bottleneck": ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}),
    "regnet": (
        "RegNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4}
    ),
    "mobilenet_v1": ("MobileNetV1Model", {"depth_multiplier": 0.25, "tf_padding": False}),
    "mobilenet_v2": ("MobileNetV2Model", {"depth_multiplier": 0.25, "tf_padding": False}),
    "convnext": ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "segformer": ("SegformerForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16, "drop_path_rate": 0.0,
    }),
}  # fmt: skip


def model_of(name):
    kind, sizes = NETWORKS[name]
    kind = getattr(transformers, kind)
    return kind(kind.config_class(**sizes))


# How many chains each has.
CHAINS = {
    "resnet": 1 + 2 * 3 + 1,
    "resnet_bottleneck": 1 + 3 * 3 + 2,
    "regnet": 1 + 3 * 3 + 2,
    "mobilenet_v1": 1 + 2 * 13,
    "mobilenet_v2": 3 + 3 * 16 + 1,
    "convnext": 0,
    "segformer": 0,  # its head iterates over its input
}


def run(model, x):
    x = x.clone().requires_grad_()
    outputs = [t for t in model(x).values() if isinstance(t, torch.Tensor)]
    cotangents = [torch.cos(torch.arange(o.numel(), device=DEVICE).view(o.shape)).to(o) for o in outputs]
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("name", CHAINS)
def test_same_numbers(name):
    torch.manual_seed(0)
    model = model_of(name).to(DEVICE, torch.float64)
    for module in model.modules():  # random ones would let the values decay to nothing
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(4, 3, 64, 64, device=DEVICE, dtype=torch.float64)
    before, keys = [type(module) for module in model.modules()], list(model.state_dict())
    expected = {}
    for training in (True, False):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        expected[training] = run(model.train(training), x)
        expected[training] += [buffer.clone() for buffer in model.buffers()]
        model.load_state_dict(state)
    fastconv.optimize(model)
    chains = [row for row in fastconv.report(model).chains if row.layers]
    assert len(chains) == CHAINS[name]
    assert any(isinstance(module, Fused) for module in model.modules()) == bool(chains)
    assert list(model.state_dict()) == keys
    for training in (True, False):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        found = run(model.train(training), x) + [buffer.clone() for buffer in model.buffers()]
        model.load_state_dict(state)
        scale = max(float(wanted.double().norm()) for wanted in expected[training])
        for a, b in zip(found, expected[training], strict=True):
            a, b = a.double(), b.double()
            assert float((a - b).norm()) <= 1e-8 * max(float(b.norm()), 1e-3 * scale)
    fastconv.restore(model)
    assert [type(module) for module in model.modules()] == before

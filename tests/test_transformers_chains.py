"""Networks of transformers, tiny and with random weights: their chains are fused, their numbers the same."""

from __future__ import annotations

import os

import pytest
import torch
from cases import DEVICE
from test_transformers import close
from torch import nn

import fastconv

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a download
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The images are small: more threads would wait for each other most of the time."""
    threads(1)


def _detr_backbone():
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrConvEncoder

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage3", "stage4"]
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None
    )
    return DeformableDetrConvEncoder(config)


def _tiny(name, **options):
    return lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


# Each model, and the least number of its chains.
MODELS = {
    "resnet": (_tiny("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic"), 8),
    "mobilenet_v1": (_tiny("MobileNetV1", depth_multiplier=0.25), 27),
    "mobilenet_v2": (_tiny("MobileNetV2", depth_multiplier=0.35), 50),
    "convnext": (_tiny("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), 0),
    "efficientnet": (
        _tiny("EfficientNet", width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
        20,
    ),
    "regnet": (
        _tiny(
            "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="y"
        ),
        8,
    ),
    "segformer": (
        _tiny(
            "Segformer",
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
        ),
        0,
    ),
    "deformable_detr's backbone": (_detr_backbone, 0),
}


def arguments(name):
    images = torch.randn(2, 3, 64, 64, device=DEVICE, dtype=torch.float64)
    mask = torch.ones(2, 64, 64, dtype=torch.bool, device=DEVICE)
    return (images, mask) if "detr" in name else (images,)


def outputs_of(model, *given):
    result = model(*given)
    leaves = torch.utils._pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def run(model, *given):
    """Outputs, gradients of all parameters, and buffers after it; these come back as they were."""
    state = {key: buffer.clone() for key, buffer in model.named_buffers()}
    torch.manual_seed(2)  # dropout
    outputs = outputs_of(model, *given)
    parameters = [p for p in model.parameters() if p.requires_grad]
    cotangents = [torch.cos(torch.arange(o.numel(), device=DEVICE)).view(o.shape).to(o) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
    sums, weights = zip(*pairs) if pairs else ((), ())
    grads = torch.autograd.grad(sums, parameters, weights, allow_unused=True) if pairs else []
    moved = [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            buffer.copy_(state[key])
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None), *moved]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_numbers(name, training):
    torch.manual_seed(0)
    build, chains = MODELS[name]
    model = build().to(DEVICE, torch.float64).train(training)
    for module in model.modules():  # fresh statistics would let the values decay
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    given = arguments(name)
    expected = run(model, *given)
    with torch.no_grad():
        inference = outputs_of(model.eval(), *given)
    keys = list(model.train(training).state_dict())
    fastconv.optimize(model)
    assert len(fastconv.report(model).chains) >= chains and list(model.state_dict()) == keys
    close(run(model, *given), expected, 1e-8)
    with torch.no_grad():
        close(outputs_of(model.eval(), *given), inference, 1e-8)
    fastconv.restore(model)
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())
    assert all(map(torch.equal, run(model.train(training), *given), expected))

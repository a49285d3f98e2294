"""What the tests of networks share."""

from torch import nn

# Every family at a size that runs in a moment: name, options, input.
SMALL = {
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.25, "num_classes": 10, "in_channels": 1}, (4, 1, 32, 32)),
    "resnet18": ("resnet18", {"num_classes": 10}, (2, 3, 40, 48)),
    "resnet50": ("resnet50", {"num_classes": 10}, (2, 3, 33, 33)),
    "plain18": ("plain18", {"num_classes": 10}, (2, 3, 33, 33)),
    "resnet20": ("resnet20", {"in_channels": 1}, (4, 1, 16, 16)),
    "plain20": ("plain20", {}, (4, 3, 16, 16)),
    "shufflenet": ("shufflenet_v1", {"scale": 0.25, "groups": 2, "num_classes": 10}, (4, 3, 48, 48)),
    "shallow": (
        "shufflenet_v1",
        {"scale": 0.25, "shallow": True, "se": True, "num_classes": 10},
        (4, 3, 48, 48),
    ),
    "unshuffled": (
        "shufflenet_v1",
        {"scale": 0.25, "groups": 4, "shuffle": False, "num_classes": 10},
        (4, 3, 48, 48),
    ),
    "shift_resnet20": ("shift_resnet20", {"expansion": 3, "num_classes": 10}, (4, 3, 16, 16)),
    "tsm_resnet18": ("tsm_resnet18", {"segments": 3, "num_classes": 10}, (6, 3, 33, 33)),
    "stacked_resnet18": ("stacked_resnet18", {"segments": 3, "num_classes": 10}, (2, 3, 3, 33, 33)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.25, "num_classes": 10, "in_channels": 1}, (4, 1, 32, 32)),
    "efficientnet_b0": ("efficientnet_b0", {"num_classes": 10}, (4, 3, 33, 33)),
    # With the usual layer scale, 1e-6, the blocks would not be seen.
    "convnext_t": ("convnext_t", {"num_classes": 10, "layer_scale": 1.0}, (2, 3, 32, 40)),
    "squeezenet1_0": ("squeezenet1_0", {"num_classes": 10}, (2, 3, 40, 33)),
    "densenet121": ("densenet121", {"num_classes": 10, "dropout": 0.2}, (2, 3, 40, 33)),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def randomize_norms(model):
    """As if trained: weights, biases and statistics that all matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)

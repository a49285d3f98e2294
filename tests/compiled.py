"""Models compiled with backend="fastconv", and what was fused of them."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import DEVICE
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastconv

graphs = importlib.import_module("fastconv.optimize._graph")
fusion = importlib.import_module("fastconv.optimize._fusion")
needs_kernel = pytest.mark.skipif(
    DEVICE != "cpu" or fastconv.available("conv2d")[0] != "cpu", reason="no compiled CPU kernel here"
)


class Compiled:
    """A model or a function, compiled; what was fused, such as ``"conv_bn_act (conv2d, batch_norm, relu)"``.

    Args:
        rest: what compiles the graph in the end: ``"inductor"``, or ``"eager"``, which runs ATen's operators
            one by one and takes a tenth of the time. Then ``final`` has the graphs, gradients' too.
    """

    def __init__(self, function, rest="eager"):
        torch._dynamo.reset()
        self.graphs, self.left, self.final, self._rest = [], [], [], rest
        self._call = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, module, inputs):
        fuse = fusion.fuse

        def noted(*arguments):
            rows = fuse(*arguments)
            self.graphs.append([f"{row.op} ({row.idiom})" for row in rows if row.reason is None])
            self.left += [(row.idiom, row.reason) for row in rows if row.reason is not None]
            return rows

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fusion, "fuse", noted)
            if self._rest == "eager":
                patch.setattr(torch._dynamo, "lookup_backend", lambda name: self._eager)
            return graphs.compile_graph(module, inputs)

    def _eager(self, module, inputs, config_patches):
        return aot_autograd(fw_compiler=self._keep)(module, inputs)

    def _keep(self, module, inputs):
        self.final.append(module)
        return make_boxed_func(module.forward)

    def __call__(self, *inputs):
        return self._call(*inputs)

    @property
    def fused(self):
        """Of the only graph."""
        (found,) = self.graphs
        return found

    def calls(self, op):
        """How often the final graphs call an operator of this library."""
        target = getattr(torch.ops.fastconv, op).default
        return sum(node.target is target for graph in self.final for node in graph.graph.nodes)


class Block(nn.Module):
    """What residual networks are made of; the addition is as their authors write it."""

    def __init__(self, channels=3, filters=32, stride=1, affine=True, tracks=True, inplace=True):
        super().__init__()

        def norm():
            return nn.BatchNorm2d(filters, affine=affine, track_running_stats=tracks)

        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding="same")
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride), norm())
        self.norm1, self.norm2, self.act = norm(), norm(), nn.ReLU(inplace)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.act(y)


def randomized(model, dtype=torch.float32):
    """Numbers of batch normalisation that are not zeros and ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model.to(dtype)


def images(*shape, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def close(actual, expected):
    limits = {"rtol": 1e-9, "atol": 1e-9} if expected.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **limits)
    steps = (
        [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1] for t in (actual, expected)
    )
    assert next(steps) == next(steps)


def step(function, model, x):
    """Output, and gradients of everything."""
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = function(x)
    output.sin().mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

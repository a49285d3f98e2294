"""torch.compile(model, backend="fastconv"): found by its name, then Inductor with the idioms replaced."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from graphs import image
from torch import nn

import fastconv

ROOT = Path(__file__).resolve().parents[1]
compile_graph = importlib.import_module("fastconv.optimize._graph").compile_graph
needs_kernel = pytest.mark.skipif(
    fastconv.available("channel_shuffle", DEVICE)[0] not in ("cpu", "cuda"), reason="no compiled kernel here"
)


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def shift(x):
    out = torch.zeros_like(x)
    out[:, :4, 1:] = x[:, :4, :-1]
    out[:, 4:] = x[:, 4:]
    return out


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(12, 12, 1, groups=3, bias=False), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 12, 1, groups=3)

    def forward(self, x):
        return x + self.last(shift(shuffle(self.norm(self.first(x)).relu(), 3)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@needs_kernel
def test_by_name_without_importing_us(tmp_path):
    """As declared in pyproject.toml, whether or not this checkout is the one that is installed."""
    declared = re.search(r"^\[project\.entry-points\.(\w+)\]\n(\w+) = \"(.+)\"$", PYPROJECT, re.MULTILINE)
    info = tmp_path / "fastconv-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastconv\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*declared.groups()))
    code = (
        "import logging, sys, torch\n"
        "logging.basicConfig(level='INFO')\n"
        "logging.getLogger('torch').setLevel('ERROR')\n"
        "x = torch.randn(2, 6, 4, 5)\n"
        "f = lambda x: torch.nn.functional.channel_shuffle(x, 3)\n"
        "assert 'fastconv' in torch._dynamo.list_backends() and 'fastconv' not in sys.modules\n"
        "assert torch.equal(torch.compile(f, backend='fastconv', fullgraph=True)(x), f(x))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stderr
    assert "INFO:fastconv:graph: 1 channel_shuffle (channel_shuffle)" in result.stderr


PYPROJECT = (ROOT / "pyproject.toml").read_text()


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
def test_trains_as_the_original_does(channels_last, caplog):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model, ours = (Unit().to(DEVICE, memory_format=memory_format) for _ in range(2))
    ours.load_state_dict(model.state_dict())
    compiled = torch.compile(ours, backend=compile_graph, fullgraph=True)
    with caplog.at_level(logging.INFO, "fastconv"):
        for batch in (4, 5):
            x = image(batch, 12, 6, 5, channels_last=channels_last)
            for expected, actual in zip(step(model, x), step(compiled, x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    messages = [record.message for record in caplog.records if record.name == "fastconv"]
    found = [message for message in messages if re.match(r"graph: \d", message)]
    assert found == [
        "graph: 1 channel_shuffle (view, transpose, reshape), 1 shift2d (slices of zeros), "
        "1 conv_bn_act (batch_norm, relu)"
    ], "one graph, for all sizes"


def step(model, x):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)  # Inductor's convolutions want to know height and width
    output = model(x)
    output.sin().sum().backward()
    return output, x.grad, *(parameter.grad for parameter in model.parameters())


@needs_kernel
def test_in_eval_mode_with_options():
    model, x = Unit().to(DEVICE).eval(), image(2, 12, 6, 5)
    for given in ({"options": {"max_autotune": False}}, {"mode": "max-autotune-no-cudagraphs"}):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend=compile_graph, **given)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_stays_is_logged(caplog):
    def function(x):
        moved = x.view(2, 2, 3, 4, 5).transpose(1, 2)
        return moved.reshape(2, 6, 4, 5), moved

    with caplog.at_level(logging.INFO, "fastconv"):
        torch.compile(function, backend=compile_graph)(image(2, 6, 4, 5))
        torch._dynamo.reset()
        torch.compile(torch.sin, backend=compile_graph)(image(2, 6, 4, 5))
    messages = [record.message for record in caplog.records if record.name == "fastconv"]
    assert messages[0] == messages[2] == "graph: nothing replaced"
    assert re.fullmatch(
        r"graph: channel_shuffle at \S+test_compile_backend.py:\d+ stays with PyTorch: "
        r"\w+, which is part of it, is used elsewhere too",
        messages[1],
    )

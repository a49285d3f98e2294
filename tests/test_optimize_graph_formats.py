"""optimize_graph: PyTorch's views make channels_last contiguous; nobody may see that our operators do not."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from graphs import Graphs, check, dynamic, image, refused
from test_optimize_graph import (
    needs_kernel,
    reshape_permute_reshape,
    view_transpose_view,
    view_with_free_size,
)
from torch import fx, nn
from torch.nn import functional

import fastconv


class Net(nn.Module):
    def __init__(self, tail=lambda x: x.mean([2, 3])):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.tail = tail

    def forward(self, x):
        x = self.second(view_with_free_size(self.first(x).relu(), 3))
        return self.tail(reshape_permute_reshape(x, 8))


def net(**options):
    return Net(**options).to(DEVICE, memory_format=torch.channels_last).eval()


def same_as_before(function, x, graphs):
    """Numbers and strides, for the image as it is and in the other memory format."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        torch.manual_seed(0)
        expected = function(given.clone())
        torch.manual_seed(0)
        actual = graphs(given.clone())
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def written_through_reshape(x):
    y = view_transpose_view(x, 3)
    y.reshape(y.shape[0], -1).add_(1)
    return y.sum((2, 3))


def written_through_a_copy_or_not(x):
    y = view_transpose_view(x, 3)
    y.contiguous(memory_format=torch.channels_last).add_(1)
    return y.sum((2, 3))


SEEN = [
    lambda x: view_transpose_view(x, 3),
    lambda x: view_transpose_view(x, 3) * 2,
    lambda x: view_transpose_view(x, 3).view(x.shape[0], -1),
    lambda x: torch.as_strided(view_transpose_view(x, 3), (4,), (1,)),
    lambda x: functional.dropout(view_transpose_view(x, 3), 0.5, True).sum((2, 3)),
    written_through_reshape,
    written_through_a_copy_or_not,
]


@needs_kernel
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize("function", SEEN)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nobody_sees_another_memory_format(channels_last, function, symbols):
    x = image(2, 12, 5, 4, channels_last=channels_last)
    graphs = Graphs(function)
    graphs(dynamic(x) if symbols else x)
    assert graphs.names().count("fastconv.channel_shuffle") == 1
    same_as_before(function, x, graphs)


@needs_kernel
@pytest.mark.parametrize("function", SEEN[:3] + SEEN[4:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nor_in_graphs_that_do_not_guard_strides(channels_last, function):
    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    x = image(2, 12, 5, 4, channels_last=channels_last)
    traced = fx.symbolic_trace(Module())
    exported = torch.export.export(Module(), (x,)).module()
    for module, example in ((traced, x), (exported, None)):
        (row,) = fastconv.optimize_graph(module, example)
        assert row.reason is None
        same_as_before(function, x, module)


@needs_kernel
def test_networks_in_channels_last():
    model, x = net(), image(4, 3, 6, 10, channels_last=True)
    graphs = Graphs(model)
    torch.testing.assert_close(graphs(dynamic(x)), model(x), rtol=1e-4, atol=1e-5)
    assert graphs.names().count("fastconv.channel_shuffle") == 2


def pixels_first(x):
    n, c, h, w = x.shape
    return (
        x.permute(0, 2, 3, 1)
        .reshape(n, h, w, 2, c // 2)
        .transpose(3, 4)
        .reshape(n, h, w, c)
        .permute(0, 3, 1, 2)
    )


def columns_of_a_shuffle(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).permute(0, 2, 1, 4, 3).reshape(n, c, w, h).transpose(2, 3)


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_first_gives_channels_last(channels_last):
    x = image(2, 6, 4, 5, channels_last=channels_last)
    same_as_before(pixels_first, x, check(pixels_first, x, "channel_shuffle"))


@needs_kernel
def test_columns_before_rows_are_seen():
    (row,) = refused(columns_of_a_shuffle, image(2, 6, 4, 5))
    assert row.reason == "its result lies in memory as no operator's result does"

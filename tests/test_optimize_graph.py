"""optimize_graph: channel shuffles in graphs, what is one and what only looks like it."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path

import pytest
import torch
from cases import DEVICE
from graphs import Graphs, check, dynamic, image, names, refused
from torch import fx, nn
from torch.nn import functional

import fastconv

needs_kernel = pytest.mark.skipif(
    fastconv.available("channel_shuffle", DEVICE)[0] not in ("cpu", "cuda"), reason="no compiled kernel here"
)


# Shuffles of C channels in `groups`, as different programs spell them


def view_transpose_view(x, groups):
    """torchvision's, and most others'."""
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(n, c, h, w)


def view_with_free_size(x, groups):
    """Of old repositories: the sizes of .data, and -1."""
    n, _, h, w = x.data.size()
    return x.view(n, groups, -1, h, w).transpose(2, 1).contiguous().view(n, -1, h, w)


def reshape_permute_reshape(x, groups):
    """Of the first ShuffleNet, by its authors."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


def unflatten_flatten(x, groups):
    return x.unflatten(1, (groups, -1)).swapaxes(-3, 1).flatten(1, 2)


def unflatten_from_the_end(x, groups):
    return torch.unflatten(x, -3, (groups, x.shape[1] // groups)).movedim(1, 2).flatten(-4, -3)


def pixels_in_a_row(x, groups):
    n, c, h, w = x.shape
    x = x.view(n, groups, c // groups, h * w)
    return torch.permute(x, (0, 2, 1, 3)).clone(memory_format=torch.contiguous_format).view(n, c, h, w)


def everything_else_in_a_row(x, groups):
    n, c, h, w = x.shape
    return torch.reshape(x, (n, groups, c * h * w // groups)).view(n, groups, c // groups, -1).swapdims(
        dim0=1, dim1=2
    ).reshape(x.shape)  # fmt: skip


def more_factors_than_needed(x, groups):
    n, c, h, w = x.shape
    x = x.view(n, groups, c // groups, h, 1, w).squeeze(4).unsqueeze(0)
    return x.transpose(2, 3).reshape(1, n, c, h, w).squeeze(0)


def in_two_steps(x, groups):
    """Each of them moves what the other left in the wrong place."""
    n, c, h, w = x.shape
    x = x.view(n, groups, c // groups, h, w).permute(2, 0, 1, 4, 3)
    return x.permute(1, 0, 2, 4, 3).reshape(n, c, h, w)


SPELLINGS = [
    view_transpose_view,
    view_with_free_size,
    reshape_permute_reshape,
    unflatten_flatten,
    unflatten_from_the_end,
    pixels_in_a_row,
    everything_else_in_a_row,
    more_factors_than_needed,
    in_two_steps,
]
CALLS = [
    functional.channel_shuffle,
    lambda x, groups: torch.channel_shuffle(groups=groups, input=x),
    lambda x, groups: nn.ChannelShuffle(groups)(x),
]


@needs_kernel
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize("shuffle", [*SPELLINGS, *CALLS])
def test_one_call_takes_the_place(shuffle, symbols):
    dtype = torch.float64 if symbols else torch.float32
    x = image(2, 12, 4, 5, dtype=dtype)
    graphs = check(lambda x: shuffle(x, 3), x, "channel_shuffle", symbols=symbols)
    assert torch.equal(shuffle(x, 3), fastconv.channel_shuffle_reference(x, 3))
    if symbols:
        other = image(3, 12, 7, 2, dtype=dtype).requires_grad_()
        assert torch.equal(graphs(other), shuffle(other, 3))
        assert len(graphs.modules) == 1, "compiled once"


@needs_kernel
def test_three_factors_in_a_circle_are_a_shuffle():
    def circle(x):
        n, _, h, w = x.shape
        return x.view(n, 2, 3, 4, h, w).permute(0, 2, 3, 1, 4, 5).reshape(n, -1, h, w)

    x = image(2, 24, 3, 3)
    check(circle, x, "channel_shuffle")
    assert torch.equal(circle(x), fastconv.channel_shuffle(x, 2))


@needs_kernel
@pytest.mark.parametrize("first, second", [(2, 6), (6, 2), (3, 3)])
def test_the_inverse_has_the_other_groups(first, second):
    def function(x):
        return view_transpose_view(view_transpose_view(x, first).relu(), second)

    graphs = Graphs(function)
    x = image(2, 12, 4, 5)
    assert torch.equal(graphs(dynamic(x)), function(x))
    calls = [node for node in graphs.modules[0].graph.nodes if node.target is fastconv.channel_shuffle]
    assert [call.kwargs["groups"] for call in calls] == [first, second]


@needs_kernel
def test_the_row_says_what_and_where():
    (rows,) = check(lambda x: reshape_permute_reshape(x, 2), image(2, 4, 3, 3), "channel_shuffle").rows
    assert rows[0].idiom == "reshape, permute, reshape"
    file, line = rows[0].where.rsplit(":", 1)
    assert file == __file__ and "permute" in Path(file).read_text().splitlines()[int(line) - 1]


# What is none


def spatial(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).permute(0, 2, 1, 4, 3).reshape(n, c, h, w)


NO_SHUFFLE = {
    "rows and columns too": spatial,
    "rows and columns alone": lambda x: x.transpose(2, 3).reshape(x.shape),
    "the batch": lambda x: x.view(4, 2, 2, 4, 4).transpose(0, 1).reshape(x.shape),
    "channels of the batch": lambda x: x.view(2, 2, 4, 4, 4).transpose(0, 1).reshape(x.shape),
    "the batch becomes channels": lambda x: x.transpose(0, 1).reshape(1, 16, 4, 4),
    "rows into channels": lambda x: x.view(4, 2, 2, 4, 4).transpose(2, 3).reshape(x.shape),
    "another split": lambda x: x.view(4, 2, 8, 4).transpose(1, 2).reshape(x.shape),
    "pixels into channels": lambda x: x.view(4, 4, 2, 2, 4).permute(0, 2, 1, 3, 4).reshape(x.shape),
    "nothing moves": lambda x: x.view(4, 2, 2, 4, 4).contiguous().view(x.shape),
    "there and back": lambda x: x.view(4, 2, 2, 4, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "one group": lambda x: x.view(4, 1, 4, 4, 4).transpose(1, 2).reshape(x.shape),
    "one channel in each": lambda x: x.view(4, 4, 1, 4, 4).transpose(1, 2).reshape(x.shape),
    "four factors reversed": lambda x: (
        x.repeat(1, 2, 1, 1).view(4, 2, 2, 2, 4, 4).permute(0, 3, 2, 1, 4, 5).reshape(4, 8, 4, 4)
    ),
    "no image": lambda x: functional.channel_shuffle(x.flatten(2), 2),
    "other values in between": lambda x: x.view(4, 2, 2, 4, 4).transpose(1, 2).neg().reshape(x.shape),
    "another type": lambda x: x.view(4, 2, 2, 4, 4).transpose(1, 2).view(torch.int32).reshape(x.shape),
    "even and odd channels, by a view": lambda x: (
        x.reshape(8, 2, 16).permute(1, 0, 2).reshape(2, 4, 2, 4, 4).unbind()
    ),
}


@pytest.mark.parametrize("function", NO_SHUFFLE.values(), ids=NO_SHUFFLE)
def test_what_is_no_shuffle(function):
    """All sizes are 4, so that only the order tells the dimensions apart."""
    assert refused(function, image(4, 4, 4, 4)) == []


def test_types_that_no_kernel_serves():
    x = torch.arange(4 * 4 * 4 * 4, device=DEVICE).view(4, 4, 4, 4)
    for shuffle in (view_transpose_view, functional.channel_shuffle):
        assert refused(lambda x, shuffle=shuffle: shuffle(x, 2), x) == []


def mutated_source(x):
    y = x.clone()
    moved = y.view(2, 2, 3, 4, 5).transpose(1, 2).contiguous()
    y.mul_(2)
    return moved.view(2, 6, 4, 5), y


def mutated_by_index(x):
    y = x.clone()
    moved = y.view(2, 2, 3, 4, 5).transpose(1, 2)
    y[0] = 7
    return moved.reshape(2, 6, 4, 5)


def view_is_returned(x):
    view = x.view(2, 2, 3, 4, 5)
    return view.transpose(1, 2).reshape(2, 6, 4, 5), view


def copy_is_returned(x):
    copy = x.view(2, 2, 3, 4, 5).transpose(1, 2).contiguous()
    return copy.view(2, 6, 4, 5), copy


def copy_is_written_to(x):
    copy = x.view(2, 2, 3, 4, 5).transpose(1, 2).contiguous()
    y = copy.view(2, 6, 4, 5)
    copy.mul_(2)
    return y


def read_twice(x):
    moved = x.view(2, 2, 3, 4, 5).transpose(1, 2)
    return moved.reshape(2, 6, 4, 5) + moved.sum()


@needs_kernel
@pytest.mark.parametrize(
    "function, reason",
    [
        (mutated_source, "may write to what it reads"),
        (mutated_by_index, "may write to what it reads"),
        (view_is_returned, "is used elsewhere too"),
        (copy_is_returned, "is used elsewhere too"),
        (copy_is_written_to, "is used elsewhere too"),
        (read_twice, "is used elsewhere too"),
    ],
)
def test_shuffles_that_stay_and_why(function, reason):
    (row,) = refused(function, image(2, 6, 4, 5))
    assert row.op == "channel_shuffle" and reason in row.reason


@needs_kernel
def test_writes_before_and_after_do_not_matter():
    def function(x):
        y = x.clone().mul_(3)
        z = view_transpose_view(y, 2)
        y.mul_(2)
        z.add_(1)
        return z, y

    graphs, x = Graphs(function), image(2, 6, 4, 5)
    for actual, expected in zip(graphs(x), function(x), strict=True):
        assert torch.equal(actual, expected)
    assert "fastconv.channel_shuffle" in graphs.names() and "view" not in graphs.names()


def test_without_a_kernel_it_stays(monkeypatch):
    rewriting = importlib.import_module("fastconv.optimize._rewrite")
    monkeypatch.setattr(rewriting, "no_kernel", lambda op, backend, tensor: f"no {op} for {tensor.dtype}")
    (row,) = refused(lambda x: view_transpose_view(x, 2), image(2, 6, 4, 5))
    assert row.reason == "no channel_shuffle for torch.float32"


# Graphs of other origins


class Shuffles(nn.Module):
    def __init__(self):
        super().__init__()
        self.shuffle, self.conv = nn.ChannelShuffle(2), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return view_transpose_view(self.conv(functional.channel_shuffle(self.shuffle(x), 3)), 2)


@needs_kernel
def test_symbolic_trace_and_restore():
    model, x = Shuffles().to(DEVICE), image(2, 6, 4, 5)
    traced = fx.symbolic_trace(model)
    code = traced.code
    assert fastconv.optimize_graph(traced) == [], "it knows no shapes"
    rows = fastconv.optimize_graph(traced, x)
    assert [row.idiom for row in rows] == [
        "ChannelShuffle",
        "channel_shuffle",
        "view, transpose, contiguous, view",
    ]
    assert names(traced).count("fastconv.channel_shuffle") == 3 and "view" not in names(traced)
    for other in (x, image(3, 6, 2, 7)):
        assert torch.equal(traced(other), model(other))
    assert fastconv.optimize_graph(traced, x) == [], "nothing is left"
    assert fastconv.restore(traced).code == code
    assert torch.equal(traced(x), model(x))


class Broadcast(nn.Module):
    def forward(self, x):
        output = torch.zeros_like(x)
        output[:, :8, 1:].copy_(x[:, :8, :1])
        output[:, 8:].copy_(x[:, 8:])
        return output


def test_what_the_example_alone_makes_true_is_not_taken_for_true():
    """A broadcast of one row is a shift where there are two."""
    traced = fx.symbolic_trace(Broadcast())
    rows = fastconv.optimize_graph(traced, image(2, 12, 2, 4))
    assert all("example_input has fixed 2" in row.reason for row in rows)
    for x in (image(2, 12, 2, 4), image(3, 12, 5, 4)):
        assert torch.equal(traced(x), Broadcast()(x))


@pytest.mark.parametrize("shape", [(1, 6, 4, 5), (2, 6, 1, 5), (2, 6, 4, 1), (0, 6, 4, 5)])
def test_examples_of_one_are_refused(shape):
    """With one image or row a permutation of them is a shuffle of channels, too."""
    with pytest.raises(ValueError, match="example_input must have at least 2 images, rows and columns"):
        fastconv.optimize_graph(fx.symbolic_trace(Shuffles()), image(*shape))


@needs_kernel
def test_pickles_copies_and_new_traces():
    traced, x = fx.symbolic_trace(Shuffles().to(DEVICE)), image(2, 6, 4, 5)
    assert len(fastconv.optimize_graph(traced, x)) == 3
    for again in (pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced), fx.symbolic_trace(traced)):
        assert torch.equal(again(x), traced(x))


def test_the_module_is_left_alone():
    traced = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(6), nn.ChannelShuffle(3)).to(DEVICE))
    before = {name: value.clone() for name, value in traced.state_dict().items()}
    fastconv.optimize_graph(traced, image(2, 6, 4, 5))
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())


@needs_kernel
def test_exported():
    model, x = Shuffles().to(DEVICE), image(2, 6, 4, 5)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: free, 2: free, 3: free}})
    for module in (program.module(), program.run_decompositions({}).module()):
        rows = fastconv.optimize_graph(module)
        assert len(rows) == 3 and not any(row.reason for row in rows)
        other = image(3, 6, 2, 7)
        assert torch.equal(module(other), model(other))


@needs_kernel
def test_bodies_of_checkpoints():
    def function(x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: view_transpose_view(x, 2).sin(), x, use_reentrant=False
        )

    graphs, x = Graphs(function), image(2, 6, 4, 5).requires_grad_()
    expected = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(torch.autograd.grad(graphs(x).sum(), x)[0], expected[0])
    assert [row.reason for row in graphs.rows[0]] == [None]


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_keep_their_own(transform):
    """Their tensors are not what the graph's shapes say; nothing is replaced, and nothing breaks."""
    inner = lambda x: view_transpose_view(x, 2).sin().sum()  # noqa: E731
    x = image(2, 6, 4, 5)
    given = x.unsqueeze(0) if transform is torch.func.vmap else x
    assert refused(transform(inner), given) == []


@pytest.mark.parametrize(
    "watch",
    [
        lambda module: module.register_forward_hook(lambda module, args, output: output + 1),
        lambda module: module.register_forward_pre_hook(lambda module, args: None),
        lambda module: module.register_full_backward_hook(lambda module, grads, outputs: None),
        lambda module: module.register_full_backward_pre_hook(lambda module, grads: None),
        lambda module: setattr(module, "forward", lambda x: x),
    ],
)
def test_modules_that_are_watched_stay(watch):
    model = nn.Sequential(nn.ChannelShuffle(2))
    watch(model[0])
    traced = fx.symbolic_trace(model)
    assert fastconv.optimize_graph(traced, image(2, 6, 4, 5)) == []


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"graph_module must be a torch.fx.GraphModule, got Sequential"):
        fastconv.optimize_graph(nn.Sequential())


@needs_kernel
def test_sizes_of_what_is_gone():
    """They are no use of its values; a view that is left for its size is free."""

    def function(x):
        view = x.view(x.shape[0], 2, -1, *x.shape[2:])
        rest = view.transpose(1, 2)
        return rest.reshape(x.shape), torch.arange(view.shape[0] * rest.shape[3], device=x.device)

    graphs, x = Graphs(function), image(2, 6, 4, 5)
    for actual, expected in zip(graphs(dynamic(x)), function(x), strict=True):
        assert torch.equal(actual, expected)
    assert "fastconv.channel_shuffle" in graphs.names() and "reshape" not in graphs.names()

"""Runs a function as the graph that Dynamo makes of it, after optimize_graph."""

from __future__ import annotations

import importlib

import torch
from cases import DEVICE

import fastconv

_idioms = importlib.import_module("fastconv.optimize._idioms")
OLD = _idioms.VIEWS | _idioms.COPIES | _idioms.PERMUTATIONS | {"setitem", "copy_", "zeros_like", "zeros"}


def image(*shape, dtype=torch.float32, channels_last=False):
    values = torch.randn(shape, dtype=dtype, device=DEVICE)
    return values.to(memory_format=torch.channels_last) if channels_last else values


class Graphs:
    """A function, compiled; and of each graph the module and the rows of its report."""

    def __init__(self, function, rewrite=fastconv.optimize_graph):
        torch._dynamo.reset()
        self.modules, self.rows = [], []
        self._rewrite = rewrite
        self._compiled = torch.compile(function, backend=self._backend, fullgraph=True)

    def _backend(self, module, inputs):
        self.rows.append(self._rewrite(module))
        self.modules.append(module)
        return module

    def __call__(self, *inputs):
        return self._compiled(*inputs)

    def names(self):
        """Of all functions and methods that the graphs call; our own with the package in front."""
        return [name for module in self.modules for name in names(module)]


def names(module):
    """But for the memory format that is given to what ours returns."""
    found = []
    for node in module.graph.nodes:
        if _is_ours(node):
            found.append(f"fastconv.{node.target.__name__}")
        elif node.op == "call_method" and node.target == "contiguous" and _is_ours(node.args[0]):
            continue
        elif node.op in ("call_function", "call_method"):
            found.append(_idioms.name_of(node))
    return found


def _is_ours(node):
    return (getattr(node.target, "__module__", None) or "").startswith("fastconv.")


def dynamic(x):
    """A copy whose batch, height and width are symbols to Dynamo."""
    x = x.detach().clone()
    for dim in (0, 2, 3):
        torch._dynamo.mark_dynamic(x, dim)
    return x


def output_and_gradient(function, x):
    x = x.requires_grad_()
    output = function(x)
    return output.detach(), torch.autograd.grad(output.sin().sum(), x)[0]


def check(function, x, op, *, symbols=True):
    """Runs as one call of ours, and none of what it was, with the same output and gradient."""
    graphs = Graphs(function)
    expected = output_and_gradient(function, x.detach().clone())
    actual = output_and_gradient(graphs, dynamic(x) if symbols else x.detach().clone())
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert actual[0].stride() == expected[0].stride()
    called = graphs.names()
    assert [name for name in called if name.startswith("fastconv.")] == [f"fastconv.{op}"], graphs.rows
    assert not OLD & set(called)
    ((row,),) = graphs.rows
    assert (row.op, row.reason) == (op, None)
    return graphs


def refused(function, *inputs):
    """The report of a graph that stays as it is; its result is the function's."""
    graphs = Graphs(function)
    expected = function(*(x.clone() for x in inputs))
    torch.testing.assert_close(graphs(*(x.clone() for x in inputs)), expected, rtol=0, atol=0)
    assert not any(name.startswith("fastconv.") for name in graphs.names())
    (rows,) = graphs.rows
    return rows

"""What is folded into a convolution, shuffle, shift and another one: all kernels against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import LAYOUTS, Run, parametrized, points, runs
from convolutions import (
    Separable,
    Shifted,
    Shuffled,
    cached_problem,
    check,
    dtype_for,
    leaves_of,
    problem,
    serves,
)
from folded import SEPARABLE, SHIFTED, SHUFFLED, Cases
from tolerances import assert_close
from torch._subclasses import FakeTensorMode

from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import memory_format_of

OPS = {Shuffled.op: SHUFFLED, Shifted.op: SHIFTED, Separable.op: SEPARABLE}
DENSE = ["contiguous", "channels_last"]
NEEDED = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)]  # a gradient of input, weight, bias, and so on


def own(op: str) -> list[Run]:
    return runs(op, own=True)


def compiled(op: str) -> list[Run]:
    return [run for run in own(op) if not run.stands_in]


def each(
    which: Callable[[str], list[Run]], case: Callable[[Cases], tuple], **keywords
) -> pytest.MarkDecorator:
    """``for_runs`` over the runs and the cases of all operators."""
    found = []
    for op, cases in OPS.items():
        found += points(which(op), where=serves, case=case(cases), **keywords)
    return parametrized(["case", *(name for name in keywords if name != "cover")], found)


def test_every_run_has_cases():
    for op, cases in OPS.items():
        for run in runs(op):
            some = cases.few if run.slow else cases.geometry
            served = [serves(run, case, layout) for case in some for layout in DENSE]
            assert sum(served) >= 8, f"{run} serves {sum(served)} cases of {op}"


@each(runs, lambda of: (of.geometry, of.few), layout=(DENSE, ["channels_last"]))
def test_geometry(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run, torch.float64), layout, grad_output=layout))


@each(runs, lambda of: (of.edges, []), layout=(DENSE, []))
def test_edges_of_blocks(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout))


@each(
    compiled,
    lambda of: (of.large, []),
    layout=(DENSE, []),
    dtype=(DTYPES, []),
    cover=["dtype layout", "dtype case", "case layout"],
)
def test_several_blocks(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(
    runs,
    lambda of: (of.mixed, of.small),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    cover=["dtype layout", "dtype case", "case layout"],
)
def test_dtypes(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(
    runs,
    lambda of: (of.mixed, of.small[1:]),
    activation=(ACTIVATIONS, ["relu6", "gelu"]),
    layout=(DENSE, DENSE[1:]),
    cover=["activation layout", "case layout"],
)
def test_activations(case, activation, layout, run):
    case = case.replace(activation=activation)
    check(run, case, cached_problem(case, dtype_for(run), layout))


@each(runs, lambda of: (of.mixed, of.small[1:]), layout=(LAYOUTS, LAYOUTS), cover=["layout", "case"])
def test_layouts_and_memory_format(case, layout, run):
    """Whatever the strides; the output is dense, in the input's memory format."""
    given = cached_problem(case, dtype_for(run), layout, weight="stepped", grad_output="expanded_pixels")
    check(run, case, given)
    output = case.call(case.function, [given.tensors.get(name) for name in case.names], **run.keywords)
    expected = memory_format_of(given.tensors["input"])
    assert output.stride() == torch.empty(output.shape, memory_format=expected).stride()


def of_several_threads(op: str) -> list[tuple]:
    """The first two cases that a run serves: large where it is compiled, small where it stands in."""
    _, _, large, mixed, small, _ = OPS[op]
    found = []
    for run, layout in itertools.product(own(op), DENSE):
        some = small[1:] if run.slow else mixed[2:] if run.stands_in else [large[0], *mixed]
        found += [(run, case, layout) for case in some if serves(run, case, layout)][:2]
    return found


@parametrized(["case", "layout"], [point for op in OPS for point in of_several_threads(op)])
def test_same_bits_for_any_thread_count(case, layout, run, threads):
    given = cached_problem(case, dtype_for(run), layout, grad_output=layout)

    def bits():
        leaves = leaves_of(case, given)
        output = case.call(case.function, leaves, **run.keywords)
        return output, *torch.autograd.grad(output, leaves, given.grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@each(own, lambda of: (of.mixed, of.small[1:]), needed=(NEEDED, NEEDED[1:2]))
def test_only_needed_gradients(case, needed, run):
    given = cached_problem(case, dtype_for(run, torch.float64))
    needed = (2 * needed)[: len(case.names)]
    leaves = [t.requires_grad_(bool(need)) for t, need in zip(leaves_of(case, given), needed)]
    case.call(case.function, leaves, **run.keywords).backward(given.grad_output)
    for leaf, need, name in zip(leaves, needed, case.names):
        assert (leaf.grad is not None) == bool(need)
        if need:
            dtype, terms = given.grad_output.dtype, case.terms[name]
            assert_close(leaf.grad, given.expected[name], dtype, terms, name=name)


# One pixel or one channel: the strides alone do not tell contiguous from channels_last.
AMBIGUOUS = {
    Shuffled.op: [SHUFFLED.mixed[2], SHUFFLED.geometry[2], Shuffled((0, 6, 3, 4), 6, (1, 1), groups=2)],
    Shifted.op: [SHIFTED.small[1], Shifted((3, 9, 1, 1), 2), Shifted((2, 4, 3, 3), 1)],
    Separable.op: [SEPARABLE.small[0], Separable((3, 9, 1, 1), 2, (1, 1)), Separable((2, 4, 3, 3), 1)],
}


@each(
    own,
    lambda of: (AMBIGUOUS[of.mixed[0].op], of.small[1:]),
    layout=([*DENSE, "channels_last_channel_slice", "expanded_channels"], ["channels_last"]),
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    tensors, *_ = problem(case, dtype_for(run), layout)

    def output(convert):
        operands = case.operands([tensors.get(name) for name in case.names], run.algorithm)
        given = (convert(operand) if isinstance(operand, torch.Tensor) else operand for operand in operands)
        return run.operator(case.op)(*given)

    real, fake = output(lambda t: t), output(FakeTensorMode().from_tensor)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)

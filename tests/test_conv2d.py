"""Convolution: every backend and algorithm that can run here against the reference in float64."""

from __future__ import annotations

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, runs
from convolutions import (
    Convolution,
    cached_problem,
    check,
    check_not_finite,
    dtype_for,
    each,
    leaves_of,
    problem,
    serves,
)
from tolerances import assert_close
from torch._subclasses import FakeTensorMode

import fastconv
from fastconv import _library
from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import memory_format_of

OP = "conv2d"
DENSE = ["contiguous", "channels_last"]
NEEDS = list(itertools.product((False, True), repeat=3))  # a gradient of input, weight, bias
# A gradient of some of input, weight, bias and residual.
SOME = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 1)]
own = runs(OP, own=True)
compiled = [run for run in own if not run.stands_in]


Case = Convolution

ONE_BY_ONE = [  # what pointwise kernels serve, and what they do not
    Case((2, 3, 5, 7), 4, (1, 1)),
    Case((1, 5, 6, 4), 3, (1, 1), bias=False),
    Case((2, 6, 4, 5), 9, (1, 1), groups=3, residual=True),
    Case((1, 8, 1, 1), 8, (1, 1)),
    Case((3, 2, 1, 9), 2, (1, 1), groups=2),
    Case((1, 17, 5, 3), 33, (1, 1)),
    Case((2, 16, 7, 9), 24, (1, 1), activation="relu"),
    Case((1, 9, 8, 3), 8, (1, 1), dilation=2, activation="silu"),
    Case((0, 4, 3, 3), 2, (1, 1)),
    Case((1, 4, 7, 9), 5, (1, 1), stride=2),
    Case((1, 4, 4, 3), 5, (1, 1), padding=1),
]
THREE_BY_THREE = [  # around the tiles of 2, 4 and 6 outputs, with padding or none, in groups
    *(Case((1, 3, size, size + 1), 4, padding=1) for size in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13)),
    *(Case((2, 4, size + 3, size), 6, groups=2) for size in (3, 4, 5, 6, 7, 8)),
    Case((2, 3, 9, 7), 4, padding=(0, 1), residual=True),
    Case((1, 2, 5, 9), 3, padding=(4, 3), bias=False),
    Case((1, 3, 6, 7), 4, padding="same", activation="relu6", residual=True),
    Case((0, 3, 5, 6), 4, padding=1),
]
GROUPED = [  # narrow groups, wide ones, one channel or filter each
    Case((2, 8, 5, 6), 8, padding=1, groups=2),
    Case((1, 16, 6, 5), 16, padding=1, groups=4),
    Case((1, 16, 5, 5), 8, padding=1, groups=2, stride=2),
    Case((1, 24, 4, 5), 16, (1, 3), padding=(0, 1), groups=2, residual=True),
    Case((1, 32, 5, 4), 32, padding=1, groups=8),
    Case((1, 32, 4, 4), 64, padding=1, groups=2),
    Case((1, 64, 3, 4), 64, padding=1, groups=2),
    Case((2, 12, 5, 6), 12, padding=1, groups=12),
    Case((1, 4, 6, 5), 8, padding=1, groups=4, stride=(2, 1)),
    Case((1, 9, 5, 6), 3, padding=1, groups=3, dilation=2),
]
EIGHTS = [  # channels and filters of a group are multiples of 8, as tensor cores read them
    Case((1, 8, 5, 6), 16, padding=1),
    Case((2, 16, 4, 3), 8, (3, 2), stride=(2, 1), padding=(1, 2), residual=True),
    Case((1, 24, 6, 5), 40, (1, 1), bias=False),
    Case((1, 32, 5, 7), 32, padding=1, groups=2, activation="silu"),
    Case((1, 8, 9, 8), 8, (2, 4), padding="same", dilation=(3, 1)),
    Case((3, 72, 3, 3), 8, stride=2, padding=1),
    Case((0, 8, 3, 3), 8),
]
GEOMETRY = [
    *ONE_BY_ONE,
    *THREE_BY_THREE,
    *GROUPED,
    *EIGHTS,
    # kernels
    Case((1, 2, 9, 7), 3, (5, 5), padding=2),
    Case((2, 3, 10, 9), 2, (7, 7), stride=2, padding=3),
    Case((1, 2, 6, 11), 3, (1, 7), padding=(0, 3)),
    Case((2, 3, 9, 6), 4, (5, 2), padding=(2, 1)),
    Case((1, 2, 12, 13), 2, (11, 11), stride=4, padding=2),
    # strides: equal, unequal, longer than the kernel, leaving pixels over at the end
    Case((2, 3, 7, 8), 4, stride=2, padding=1),
    Case((2, 3, 8, 7), 4, stride=2),
    Case((1, 2, 11, 10), 3, stride=3, padding=1),
    Case((1, 2, 9, 8), 3, stride=(1, 2), padding=1),
    Case((1, 2, 11, 13), 3, (5, 5), stride=(2, 3), padding=(1, 2)),
    Case((1, 2, 9, 11), 3, (1, 2), stride=(3, 4)),
    Case((1, 2, 9, 11), 3, (2, 1), stride=(4, 3), padding=(1, 0)),
    # padding: unequal, wider than the kernel, even kernels (the extra zero is below and right)
    Case((1, 2, 5, 6), 3, (5, 5), padding=(2, 0)),
    Case((1, 2, 3, 4), 3, (2, 3), padding=(4, 5)),
    Case((2, 2, 5, 6), 3, (4, 2), padding="same"),
    Case((2, 2, 7, 9), 4, (2, 4), padding="same", dilation=(3, 1), groups=2),
    Case((2, 2, 6, 7), 3, (4, 3), padding="valid"),
    # dilation
    Case((1, 2, 8, 9), 3, dilation=2, padding=2),
    Case((1, 2, 9, 8), 3, dilation=(3, 1), padding=(0, 1), stride=2),
    Case((1, 2, 13, 14), 2, (5, 4), dilation=(3, 4), stride=(2, 1), padding=(1, 2)),
    # everything unequal
    Case((2, 6, 11, 14), 9, (4, 5), (2, 3), (3, 1), (2, 1), groups=3, residual=True),
    Case((2, 6, 14, 11), 4, (5, 4), (3, 2), (1, 3), (1, 2), groups=2, bias=False),
    # one pixel, one row, one column
    Case((1, 1, 1, 1), 1, (7, 7), padding=3, stride=2),
    Case((2, 3, 1, 9), 4, padding=1, stride=2),
    Case((2, 3, 9, 1), 4, (3, 1), padding=(1, 0)),
]
# Around the widths of vectors, blocks and tiles.
CHANNELS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)
EDGES = [
    *(Case((1, c, 3, 4), m, padding=1) for c, m in zip(CHANNELS, CHANNELS[3:] + CHANNELS[:3])),
    *(Case((1, c, 5, 3), m, (1, 1)) for c, m in zip(CHANNELS, CHANNELS[7:] + CHANNELS[:7])),
    *(Case((1, c, 4, 5), m, (3, 2), stride=2, padding=1) for c, m in zip(CHANNELS, CHANNELS[::-1])),
    *(Case((1, 3, 3, w), 9, padding=1) for w in (7, 8, 9, 15, 16, 17, 32, 33)),
    *(Case((1, 8 * c, 3, 3), 8 * c, padding=1, groups=c) for c in (2, 3, 5)),
]
# Several tiles and blocks each way: for kernels that are compiled.
LARGE = [
    Case((2, 35, 29, 33), 41, padding=1, activation="silu", residual=True),
    Case((1, 70, 14, 15), 130, (1, 1), activation="relu6"),
    Case((2, 3, 57, 63), 65, (7, 7), stride=2, padding=3, activation="relu"),
    Case((1, 64, 20, 19), 64, padding=1, groups=16),
    Case((1, 66, 17, 18), 34, padding=1, stride=2, groups=2),
    Case((1, 300, 5, 6), 20, (3, 2), padding=1),
]
# Too large for the caches, with what can be done to a sum before it is stored; one of no whole vectors.
HUGE = [
    Case((1, 32, 183, 181), 32, padding=1),
    Case((2, 24, 134, 131), 32, (1, 1), activation="relu", residual=True),
    Case((1, 32, 181, 183), 32, padding=1, activation="relu", residual=True),
    Case((1, 32, 182, 182), 32, padding=1, groups=8, activation="gelu", residual=True),
    Case((1, 3, 259, 263), 64, (5, 5), stride=2, padding=2, bias=False),
    Case((1, 8, 165, 163), 40, padding=1, activation="silu"),
]
MIXED = [  # of each kind one, for the tests of everything but the geometry
    Case((2, 6, 9, 7), 4, (3, 2), stride=(2, 1), padding=(1, 2), groups=2, residual=True),
    Case((2, 5, 7, 8), 6, padding=1, residual=True),
    Case((2, 5, 4, 6), 3, (1, 1), residual=True),
    Case((2, 16, 5, 4), 16, padding=1, groups=2, residual=True),
]
# One pixel or one channel: the strides alone do not tell contiguous from channels_last.
AMBIGUOUS = [
    Case((1, 2, 1, 1), 3, padding=1),
    Case((2, 1, 2, 3), 2, padding=1),
    Case((2, 3, 4, 5), 1, padding=1),
    Case((1, 1, 1, 1), 1, padding=1),
    Case((0, 3, 4, 5), 2, padding=1),
    Case((2, 1, 3, 2), 1, (1, 1)),
]
# Interpreted kernels take a second for a dozen programs: their cases are few, and small.
SMALL = [
    Case((1, 2, 5, 4), 2, (3, 2), stride=(2, 1), padding=(1, 2), groups=2, residual=True),
    Case((1, 2, 3, 4), 3, padding=1, residual=True),
    Case((1, 3, 2, 3), 2, (1, 1), residual=True),
]
FEW = [
    *SMALL,
    *(GEOMETRY[i] for i in (0, 2, 5, 6, 8)),
    Case((1, 2, 9, 11), 3, (1, 2), stride=(3, 4)),
    Case((1, 2, 3, 4), 3, (2, 3), padding=(4, 5)),
    Case((1, 2, 7, 9), 4, (2, 4), padding="same", dilation=(3, 1), groups=2),
    Case((1, 17, 3, 2), 18, (2, 1), stride=2, padding=1),
    Case((0, 3, 5, 6), 4, padding=1),
]


def test_every_run_has_cases():
    """What a variant cannot serve is not generated; this fails if that is nearly everything."""
    for run in runs(OP):
        served = [serves(run, case, layout) for case in (FEW if run.slow else GEOMETRY) for layout in DENSE]
        assert sum(served) >= 8, f"{run} serves {sum(served)} cases"


# The reference itself, once, against an outside oracle.


@pytest.mark.parametrize("case", [*GEOMETRY, *MIXED], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_reference_is_pytorchs_convolution(case):
    def theirs(*tensors, activation, residual):
        output = torch.nn.functional.conv2d(*tensors)
        output = output if residual is None else output + residual
        return output if activation is None else getattr(torch.nn.functional, activation)(output)

    given = cached_problem(case, torch.float64)
    leaves = leaves_of(case, given)
    output = case.call(theirs, leaves)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], given.grad_output)
    for (name, value), actual in zip(given.expected.items(), (output, *grads), strict=True):
        assert value.abs().sum() > 0 or 0 in case.input
        assert_close(actual, value, torch.float64, 1000, name=name)


# Every kernel against the reference.


@each(runs(OP), case=(GEOMETRY, FEW), layout=(DENSE, ["channels_last"]))
def test_geometry(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run, torch.float64), layout, grad_output=layout))


@each(runs(OP), case=(EDGES, []), layout=(DENSE, []))
def test_edges_of_blocks(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout))


@each(compiled, case=(LARGE, []), layout=(DENSE, []))
def test_several_blocks(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout))


@each([run for run in compiled if run.algorithm != "plain"], case=(HUGE, []), layout=(["channels_last"], []))
def test_beyond_the_caches(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout, residual=layout))


@each(
    runs(OP),
    case=(MIXED, SMALL),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    cover=["dtype layout", "dtype case", "case layout"],
)
def test_dtypes(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(
    runs(OP),
    case=(MIXED, SMALL[1:]),
    activation=(ACTIVATIONS, ["relu6", "gelu"]),
    layout=(DENSE, ["channels_last"]),
    cover=["activation layout", "case layout"],
)
def test_activations(case, activation, layout, run):
    case = case.replace(activation=activation)
    check(run, case, cached_problem(case, dtype_for(run), layout))


@each(runs(OP), case=(MIXED, SMALL[2:]), layout=(LAYOUTS, LAYOUTS), cover=["layout", "case"])
def test_layouts_of_input(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout))


@each(
    runs(OP),
    case=(MIXED, SMALL[2:]),
    layout=(DENSE, ["channels_last"]),
    other=([*list(LAYOUTS)[1::3], "stepped", "expanded_pixels"], ["contiguous", "expanded_pixels"]),
    cover=["layout other", "case"],
)
def test_layouts_of_the_others(case, layout, other, run):
    given = cached_problem(case, dtype_for(run), layout, weight=other, residual=other, grad_output=other)
    check(run, case, given)


@pytest.mark.parametrize("run", runs(OP), ids=str)
def test_layouts_of_bias(run):
    input, weight = (torch.randn(shape, device=DEVICE) for shape in ((1, 6, 2, 3), (6, 6, 1, 1)))
    values = torch.randn(12, device=DEVICE)
    for layout, bias in itertools.product(DENSE, (values[:1].expand(6), values[::2], values[5:-1])):
        if serves(run, Case((1, 6, 2, 3), 6, (1, 1)), layout, torch.float32):
            expected = fastconv.conv2d_reference(input.double(), weight.double(), bias.double())
            actual = fastconv.conv2d(LAYOUTS[layout](lambda _: input, ()), weight, bias, **run.keywords)
            assert_close(actual, expected, torch.float32, 6)


@each(runs(OP), case=(MIXED, SMALL[2:]), layout=(LAYOUTS, LAYOUTS), cover=["layout", "case"])
def test_memory_format(case, layout, run):
    """Output has the input's memory format, dense, whatever the strides of the input and the weight."""
    given = cached_problem(case, dtype_for(run), layout)
    expected = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    assert memory_format_of(given.tensors["input"]) == expected
    for weight_format in (torch.contiguous_format, torch.channels_last):
        tensors = [given.tensors.get(name) for name in case.names]
        tensors[1] = tensors[1].contiguous(memory_format=weight_format)
        output = case.call(fastconv.conv2d, tensors, **run.keywords)
        assert output.stride() == torch.empty(output.shape, memory_format=expected).stride()


@each(
    own,
    layout=([*DENSE, "channels_last_channel_slice", "stepped", "expanded_channels"], ["channels_last"]),
    case=([*MIXED, *AMBIGUOUS], [SMALL[2], *AMBIGUOUS[:2]]),
    cover=["layout", "case"],
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    tensors, grad_output, _ = problem(case, dtype_for(run), layout, grad_output=layout)
    forward, backward = run.operator(OP), run.operator(f"{OP}_backward")

    def every_output(convert):
        x, w, b, r = (t if t is None else convert(t) for t in map(tensors.get, case.names))
        yield forward(x, w, b, r, None, *case.geometry, None, run.algorithm)
        for need in NEEDS[-1:] if run.slow else NEEDS[::2]:
            yield from backward(convert(grad_output), x, w, *case.geometry, run.algorithm, *need)

    mode = FakeTensorMode()
    for real, fake in zip(every_output(lambda t: t), every_output(mode.from_tensor), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@each(
    own,
    case=(MIXED, SMALL[2:]),
    needed=(SOME, [(1, 0, 1, 0)]),
    activation=([None, "silu"], [None]),
    cover=["needed activation", "needed case"],
)
def test_only_needed_gradients(case, needed, activation, run):
    case = case.replace(activation=activation)
    given = cached_problem(case, dtype_for(run, torch.float64))
    leaves = [t.requires_grad_(bool(need)) for t, need in zip(leaves_of(case, given), needed)]
    dtype = given.grad_output.dtype
    case.call(fastconv.conv2d, leaves, **run.keywords).backward(given.grad_output)
    for leaf, need, name in zip(leaves, needed, case.names):
        if need:
            value = given.expected[name]
            assert_close(leaf.grad, value, dtype, case.terms[name], algorithm=run.algorithm, name=name)
        else:
            assert leaf.grad is None


@each(
    own,
    case=(MIXED, SMALL[2:]),
    layout=(DENSE, ["channels_last"]),
    needed=(NEEDS, NEEDS[3::4]),
    cover=["needed layout", "needed case"],
)
def test_backward_operator_computes_what_is_needed(case, layout, needed, run):
    given = cached_problem(case, dtype_for(run, torch.float64), layout)
    input, weight = given.tensors["input"], given.tensors["weight"]
    operator = run.operator(f"{OP}_backward")
    grads = operator(given.grad_output, input, weight, *case.geometry, run.algorithm, *needed)
    for name, grad, need in zip(case.names, grads, needed):
        if need:
            value = given.expected[name]
            assert_close(grad, value, grad.dtype, case.terms[name], algorithm=run.algorithm, name=name)
        else:
            assert grad.shape == (0,)


@each(own, case=([LARGE[0], LARGE[1], LARGE[3]], SMALL[2:]), layout=(DENSE, DENSE))
def test_same_bits_twice_and_for_any_thread_count(case, layout, run, threads):
    case = SMALL[2] if run.stands_in else case.replace(activation=None)  # PyTorch's gradient of it differs
    given = cached_problem(case, dtype_for(run), layout, grad_output=layout)

    def bits():
        leaves = leaves_of(case, given)
        output = case.call(fastconv.conv2d, leaves, **run.keywords)
        return output, *torch.autograd.grad(output, leaves[:3], given.grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        for a, b in zip(first, bits()):
            assert torch.equal(a, b)


@each(
    own,
    case=([*MIXED, Case((1, 3, 24, 23), 4, padding=1)], SMALL),
    layout=(DENSE, DENSE),
    value=([math.nan, math.inf, -math.inf], [math.nan, -math.inf]),
    cover=["case layout", "case value", "value layout"],
)
def test_nan_and_infinity_propagate(case, value, layout, run):
    """To the outputs whose window holds the pixel, from a border too, and to no other; as PyTorch's do."""
    given = problem(case, dtype_for(run), layout)
    given.tensors["input"][0, 0, 0, 0] = given.tensors["input"][-1, -1, -1, -1] = value
    tensors = [given.tensors.get(name) for name in case.names]
    expected = case.call(fastconv.conv2d_reference, [t if t is None else t.double() for t in tensors])
    check_not_finite(run, case, case.call(fastconv.conv2d, tensors, **run.keywords), expected)


# What the operators do beside the arithmetic.


@each([run for run in own if run.backend == "cpu"], case=([*MIXED, *GROUPED], []), layout=(DENSE, []))
def test_packed_weights(case, layout, run):
    """Packed once or in each call: the same bits."""
    tensors, *_ = cached_problem(case, dtype_for(run), layout)
    input, weight = tensors["input"], tensors["weight"]
    packed = torch.ops.fastconv.conv2d_pack_weight(weight, case.groups, run.algorithm)
    assert packed.dim() == 1 and packed.dtype == torch.float32

    def convolve(packed):
        rest = (*case.geometry, None, run.algorithm)
        return torch.ops.fastconv.conv2d(input, weight, None, None, packed, *rest)

    assert torch.equal(convolve(packed), convolve(None))
    for wrong in (packed[:-1], packed.double(), packed.view(1, -1)):
        with pytest.raises(RuntimeError, match="packed must"):
            convolve(wrong)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # packed for the wrong type: packed again
        rounded = (t.bfloat16() for t in (input, weight))
        expected = torch.ops.fastconv.conv2d(*rounded, None, None, None, *case.geometry, None, run.algorithm)
        assert torch.equal(convolve(packed), expected)


def test_precision():
    assert fastconv.get_precision() == "fast"
    with pytest.raises(ValueError, match="precision must be one of .*'exact'.*, got 'best'"):
        fastconv.set_precision("best")
    assert fastconv.get_precision() == "fast"


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.skipif(
    _library.host() is None or _library.host().cpu_capability() == "portable",
    reason="without vectors the choice is PyTorch's own",
)
def test_precision_decides_on_winograd():
    input, weight = torch.randn(1, 32, 32, 32), torch.randn(32, 32, 3, 3)
    exact = fastconv.conv2d(input, weight, padding=1, backend="cpu", algorithm="direct")
    winograd = fastconv.conv2d(input, weight, padding=1, backend="cpu", algorithm="winograd_f4")
    assert not torch.equal(exact, winograd)
    assert torch.equal(fastconv.conv2d(input, weight, padding=1), winograd)
    try:
        fastconv.set_precision("exact")
        assert torch.equal(fastconv.conv2d(input, weight, padding=1), exact)
    finally:
        fastconv.set_precision("fast")
    assert torch.equal(fastconv.conv2d(input, weight, padding=1), winograd)


@st.composite
def any_case(draw, run, largest: int) -> Case:
    """Any shape that an algorithm serves."""
    two = functools.partial(st.tuples)
    one_by_one = run.algorithm == "pointwise"
    three = (run.algorithm or "").startswith("winograd")
    kernel = (1, 1) if one_by_one else (3, 3) if three else draw(two(st.integers(1, 5), st.integers(1, 5)))
    fixed = one_by_one or three
    stride = 1 if fixed else draw(two(st.integers(1, 4), st.integers(1, 4)))
    dilation = (1, 1) if fixed else draw(two(st.integers(1, 3), st.integers(1, 3)))
    padding = (0, 0) if one_by_one else draw(two(st.integers(0, 4), st.integers(0, 4)))
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), d * (k - 1) + largest))
        for k, d, p in zip(kernel, dilation, padding)
    ]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = st.integers(1, 2 * largest)
    if dtype_for(run) == torch.float16:
        channels = st.sampled_from([8, 16, 24])
    return Case(
        (draw(st.integers(0, 3)), groups * draw(channels), *size),
        groups * draw(channels),
        kernel,
        *(stride, padding, dilation, groups),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "silu", "gelu"])),
    )


@pytest.mark.parametrize("run", own, ids=str)
def test_any_shape(run):
    @hypothesis.settings(max_examples=5 if run.slow else 15 if run.stands_in else 60)
    @hypothesis.given(
        any_case(run, 3 if run.slow else 12),
        st.sampled_from([dtype_for(run, dtype) for dtype in (torch.float64, torch.float32)]),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from(list(LAYOUTS)),
    )
    def property(case, dtype, layout, grad_layout):
        hypothesis.assume(serves(run, case, layout, dtype))
        check(run, case, problem(case, dtype, layout, grad_output=grad_layout))

    property()


@pytest.mark.parametrize("channels", [1, 3, 15])
def test_rows_that_read_padding_alone(channels):
    """Few channels, whose tile has padding; the first and the last row of outputs read no image row."""
    input, weight = torch.randn(1, channels, 1, 600), torch.randn(4, channels, 1, 3)
    output = fastconv.conv2d(input, weight, padding=(1, 1), backend=DEVICE, algorithm="direct")
    assert not output[:, :, 0].any() and not output[:, :, 2].any()
    expected = torch.nn.functional.conv2d(input.double(), weight.double(), padding=(1, 1))
    assert_close(output, expected, torch.float32, reduction=3 * channels)

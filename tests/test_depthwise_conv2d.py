"""Depthwise convolution: every backend and algorithm that can run here against the reference in float64."""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, Run, for_runs, runs
from tolerances import assert_close
from torch._subclasses import FakeTensorMode

from fastconv import BackendError, depthwise_conv2d, depthwise_conv2d_reference
from fastconv.ops._activation import ACTIVATIONS, FROM_OUTPUT, activate
from fastconv.ops._arguments import DTYPES, pair
from fastconv.ops._operator import memory_format_of

OP = "depthwise_conv2d"
each_run = pytest.mark.parametrize("run", runs(OP), ids=str)
compiled = [run for run in runs(OP, own=True) if not run.stands_in]
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
DENSE = ["contiguous", "channels_last"]
NEEDS = list(itertools.product((False, True), repeat=3))  # a gradient of input, weight, bias


class Case(NamedTuple):
    input: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    multiplier: int = 1
    bias: bool = True
    activation: str | None = None

    def __str__(self) -> str:
        changed = {k: v for k, v in self._asdict().items() if v != self._field_defaults.get(k)}
        return " ".join(f"{k}={v}".replace(" ", "") for k, v in changed.items())

    @property
    def geometry(self) -> tuple:
        return self.stride, self.padding, self.dilation


GEOMETRY = [
    # kernels
    Case((2, 3, 5, 7), (1, 1)),
    Case((2, 3, 6, 9), (3, 3), padding=1),
    Case((1, 2, 9, 7), (5, 5), padding=2),
    Case((2, 2, 10, 9), (7, 7), padding=3),
    Case((1, 2, 5, 12), (31, 31), padding=15),
    Case((1, 1, 33, 34), (31, 31)),
    Case((2, 3, 6, 11), (1, 7), padding=(0, 3)),
    Case((2, 3, 9, 6), (5, 2), padding=(2, 1)),
    # strides: equal, unequal, longer than the kernel, leaving pixels over at the end
    Case((2, 3, 7, 8), stride=2, padding=1),
    Case((2, 3, 8, 7), stride=2),
    Case((1, 2, 11, 10), stride=3, padding=1),
    Case((1, 2, 9, 8), stride=(1, 2), padding=1),
    Case((1, 2, 9, 8), stride=(3, 1), padding=1),
    Case((1, 2, 11, 13), (5, 5), stride=(2, 3), padding=(1, 2)),
    Case((1, 2, 9, 11), (1, 2), stride=(3, 4)),
    Case((1, 2, 9, 11), (2, 1), stride=(4, 3), padding=(1, 0)),
    # padding: unequal, wider than the kernel's half, even kernels (the extra zero is below and right)
    Case((1, 2, 5, 6), padding=(2, 0)),
    Case((1, 2, 5, 6), padding=(0, 2)),
    Case((1, 2, 3, 4), padding=(4, 5)),
    Case((2, 2, 5, 6), (4, 2), padding="same"),
    Case((2, 2, 7, 9), (2, 4), padding="same", dilation=(3, 1)),
    Case((2, 2, 5, 6), (5, 3), padding="same"),
    Case((2, 2, 6, 7), (4, 3), padding="valid"),
    # dilation
    Case((1, 2, 8, 9), dilation=2, padding=2),
    Case((1, 2, 9, 8), dilation=(1, 3), padding=(1, 3)),
    Case((1, 2, 9, 8), dilation=(3, 1), padding=(0, 1), stride=2),
    Case((1, 1, 13, 14), (5, 4), dilation=(3, 4), stride=(2, 1), padding=(1, 2)),
    # channel multiplier
    Case((2, 3, 6, 7), multiplier=2, padding=1),
    Case((1, 2, 7, 6), (5, 5), multiplier=3, padding=2, stride=2),
    Case((1, 1, 7, 6), (2, 3), multiplier=3, padding=1),
    # everything unequal
    Case((2, 3, 11, 14), (4, 5), stride=(2, 3), padding=(3, 1), dilation=(2, 1), multiplier=2),
    Case((2, 3, 14, 11), (5, 4), stride=(3, 2), padding=(1, 3), dilation=(1, 2), multiplier=3, bias=False),
    Case((2, 3, 6, 9), padding=1, bias=False),
    # one pixel, one row, one column
    Case((2, 3, 1, 1), (1, 1)),
    Case((2, 3, 1, 1), padding=1),
    Case((1, 1, 1, 1), (7, 7), padding=3, stride=2),
    Case((2, 3, 1, 9), padding=1),
    Case((2, 3, 9, 1), padding=1),
    # nothing
    Case((0, 3, 5, 6), padding=1),
    Case((2, 0, 5, 6), padding=1),
    Case((0, 0, 1, 1), padding=1),
]

# Around the widths of vectors, blocks and tiles.
SIZES = (7, 8, 9, 15, 16, 17, 31, 32, 33)
CHANNELS = (1, 3, 8, 15, 16, 17, 32, 33, 2)
EDGES = [
    *(Case((1, 2, h, w), padding=1) for h, w in zip(SIZES[::-1], SIZES)),
    *(Case((1, 1, h, w), (5, 5), stride=2, padding=2) for h, w in zip(SIZES, SIZES[4:] + SIZES[:4])),
    *(Case((2, c, 3, 4), padding=1) for c in CHANNELS),
    *(Case((1, c, 5, 3), stride=2, padding=1) for c in CHANNELS),
    *(Case((1, c, 2, 3), multiplier=2, padding=1) for c in (1, 4, 8, 17)),
]

# Several tiles each way: for kernels that are compiled.
LARGE = [
    Case((2, 9, 57, 63), padding=1, activation="relu6"),
    Case((1, 19, 29, 66), (5, 5), stride=2, padding=2, activation="silu"),
    Case((2, 9, 40, 41), (7, 7), padding=3, activation="gelu"),
    Case((1, 2, 40, 65), (31, 31), padding=15),
    Case((1, 35, 34, 18), (5, 3), dilation=2, padding=3, multiplier=2),
]

# Interpreted kernels take a second for a dozen planes: their cases are small.
SMALL = Case((1, 2, 5, 6), (3, 2), stride=(2, 1), padding=(1, 2), multiplier=2)
FEW = [
    SMALL,
    Case((2, 2, 4, 5), padding=1),
    Case((1, 1, 6, 7), (7, 7), padding=3),
    Case((1, 2, 4, 11), (1, 7), padding=(0, 3)),
    Case((1, 1, 9, 6), (5, 2), padding=(2, 1)),
    Case((1, 2, 3, 4), (1, 1)),
    Case((1, 2, 8, 7), stride=2),
    Case((1, 1, 11, 10), stride=3, padding=1),
    Case((1, 1, 9, 11), (1, 2), stride=(3, 4)),
    Case((1, 1, 3, 4), padding=(4, 5)),
    Case((1, 1, 7, 9), (2, 4), padding="same", dilation=(3, 1)),
    Case((1, 1, 9, 8), dilation=(3, 1), padding=(0, 1), stride=2),
    Case((1, 2, 11, 14), (4, 5), stride=(2, 3), padding=(3, 1), dilation=(2, 1), multiplier=2),
    Case((1, 2, 5, 4), multiplier=3, padding=1, bias=False),
    Case((1, 1, 1, 1), padding=1),
    Case((0, 3, 5, 6), padding=1),
    Case((2, 0, 5, 6), padding=1),
]
FEW_EDGES = [
    Case((1, 1, 9, 33), padding=1),
    Case((1, 1, 33, 17), (5, 5), stride=2, padding=2),
    Case((1, 17, 1, 2), (1, 2), padding=(0, 1)),
    Case((1, 9, 2, 3), (2, 1), multiplier=2, padding=1),
]

MIXED = Case((2, 5, 8, 9), (3, 4), stride=(2, 1), padding=(1, 2), multiplier=2)
DTYPE_CASES = [
    MIXED,
    Case((2, 9, 7, 17), (5, 5), padding=2),
    Case((2, 9, 9, 17), stride=2, padding=1),
]
LAYOUT_CASES = [
    Case((2, 5, 8, 9), padding=1),
    Case((2, 4, 6, 7), (5, 5), stride=2, padding=2, multiplier=2, activation="silu"),
    Case((2, 1, 4, 5), padding=1, multiplier=2),  # one channel can be channels_last, its outputs are two
]
# One pixel or one channel: the strides alone do not tell contiguous from channels_last.
AMBIGUOUS = [
    Case(shape, padding=1)
    for shape in ((1, 2, 1, 1), (2, 1, 2, 3), (1, 1, 1, 1), (1, 3, 1, 5), (0, 3, 4, 5), (2, 0, 4, 5))
]


class Problem(NamedTuple):
    tensors: tuple  # input, weight, bias, grad_output
    expected: dict[str, torch.Tensor]  # in float64: output and the gradients
    terms: dict[str, int]  # in each sum of the expected values


def problem(case: Case, dtype: torch.dtype, input: str = "contiguous", **layouts: str) -> Problem:
    """Random tensors of a case, laid out as named, and what the reference makes of them in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    whole = case.activation in FROM_OUTPUT

    def make(shape, scale=1.0):
        if whole:  # sums exact in every type: none falls on the other side of the activation's corner
            values = torch.randint(-2, 3, shape, generator=generator) * scale
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=DEVICE, dtype=dtype)

    def lay(name, shape):
        return LAYOUTS[layouts.get(name, "contiguous")](make, shape)

    filters = case.input[1] * case.multiplier
    layouts["input"] = input
    input, weight = lay("input", case.input), lay("weight", (filters, 1, *case.kernel))
    bias = make((filters,), 0.5) if case.bias else None
    exact = [None if t is None else t.double().requires_grad_() for t in (input, weight, bias)]
    output = depthwise_conv2d_reference(*exact, *case.geometry, activation=case.activation)
    grad_output = lay("grad_output", tuple(output.shape))
    names = ["grad_input", "grad_weight"] + ["grad_bias"] * case.bias
    grads = torch.autograd.grad(output, [t for t in exact if t is not None], grad_output.double())

    taps, outputs = case.kernel[0] * case.kernel[1], output.numel() // max(filters, 1)
    terms = {"output": taps, "grad_input": taps * case.multiplier}
    terms["grad_weight"] = terms["grad_bias"] = outputs
    return Problem(
        (input, weight, bias, grad_output), {"output": output.detach(), **dict(zip(names, grads))}, terms
    )


cached_problem = functools.lru_cache(maxsize=None)(problem)


def check(run: Run, case: Case, given: Problem) -> None:
    """Output and all gradients of one run."""
    *arguments, grad_output = given.tensors
    if run.backend == "aten" and case.input[1] == 0:
        with pytest.raises(BackendError, match="at least one channel"):
            depthwise_conv2d(*arguments, *case.geometry, **run.keywords)
        return
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    output = depthwise_conv2d(*leaves, *case.geometry, activation=case.activation, **run.keywords)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], grad_output)
    dtype = arguments[0].dtype
    # The reference adds in the tensors' own type.
    summed_in = dtype if run.backend == "reference" else None
    for (name, expected), actual in zip(given.expected.items(), (output, *grads)):
        assert_close(actual, expected, dtype, given.terms[name], summed_in=summed_in, name=name)


# The reference itself, once, against an outside oracle.


@pytest.mark.parametrize("case", [MIXED, *GEOMETRY[:-3]], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_reference_is_pytorchs_convolution(case):
    (input, weight, bias, grad_output), expected, _ = cached_problem(case, torch.float64)
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias) if t is not None]
    output = torch.nn.functional.conv2d(
        *leaves[:2], leaves[2] if case.bias else None, *case.geometry, groups=case.input[1]
    )
    grads = torch.autograd.grad(output, leaves, grad_output)
    for (name, value), actual in zip(expected.items(), (output, *grads)):
        assert value.abs().sum() > 0
        assert_close(actual, value, torch.float64, 1000, name=name)


# Every kernel against the reference.


@for_runs(runs(OP), case=(GEOMETRY, FEW))
def test_geometry(case, run):
    check(run, case, cached_problem(case, torch.float64))


@for_runs(compiled, case=(GEOMETRY, []))
def test_geometry_of_blocks_of_channels(case, run):
    """As many channels as vectors have lanes, and two more: read where they lie."""
    batch, channels, *size = case.input
    case = case._replace(input=(batch, 18 if channels else 0, *size))
    check(run, case, cached_problem(case, torch.float32, "channels_last", grad_output="channels_last"))


# A grad_input, and an output, too large for the caches; one whose channels are no whole vectors; and so many
# channels, or taps, that they are done in several groups of blocks.
HUGE = [
    Case((1, 32, 366, 363), stride=2, padding=1),
    Case((1, 32, 363, 366), padding=1, bias=False),
    Case((1, 40, 330, 330), padding=1, bias=False),
    Case((1, 32, 366, 364), padding=1, activation="silu"),
    Case((2, 70, 100, 11), stride=2, padding=1),
    Case((1, 50, 5, 5), (31, 31), padding=15),
]


@for_runs([run for run in compiled if run.algorithm != "plain"], case=(HUGE, []))
def test_beyond_the_caches(case, run):
    check(run, case, cached_problem(case, torch.float32, "channels_last", grad_output="channels_last"))


@for_runs(runs(OP), case=(EDGES, FEW_EDGES))
def test_edges_of_tiles(case, run):
    check(run, case, cached_problem(case, torch.float32))


@for_runs(runs(OP), layout=(DENSE, DENSE), case=(LARGE, []))
def test_several_tiles(case, layout, run):
    check(run, case, cached_problem(case, torch.float32, layout, grad_output=layout))


@for_runs(
    runs(OP),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    case=(DTYPE_CASES, [SMALL]),
    cover=["dtype layout", "dtype case", "case layout"],
    where=lambda run, dtype, **_: run.serves(dtype),  # test_backends.py holds which
)
def test_dtypes(case, layout, run, dtype):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@for_runs(
    runs(OP),
    activation=(ACTIVATIONS, ACTIVATIONS),
    dtype=([torch.float64, torch.float16], [torch.float16]),
    layout=(DENSE, ["channels_last"]),
    cover=["activation layout", "activation dtype", "dtype layout"],
)
def test_activations(activation, dtype, layout, run):
    case = (SMALL if run.slow else MIXED)._replace(activation=activation)
    check(run, case, cached_problem(case, dtype, layout))


@for_runs(runs(OP), case=(LAYOUT_CASES, [SMALL]), layout=(LAYOUTS, LAYOUTS))
def test_layouts_of_input(layout, case, run):
    check(run, case, cached_problem(case, torch.float32, layout))


@for_runs(runs(OP), input=(DENSE, DENSE), layout=(LAYOUTS, ["channels_last", "expanded_pixels"]))
def test_layouts_of_grad_output(layout, input, run):
    case = SMALL if run.slow else MIXED
    check(run, case, cached_problem(case, torch.float32, input, grad_output=layout))


@for_runs(
    runs(OP),
    layout=(
        ["channels_last", "stepped", "transposed_pixels", "expanded_batch", "expanded_pixels"],
        ["transposed_pixels"],
    ),
)
def test_layouts_of_weight(layout, run):
    case = SMALL if run.slow else MIXED
    check(run, case, cached_problem(case, torch.float32, "channels_last", weight=layout))


@each_run
def test_layouts_of_bias(run):
    input, weight = (torch.randn(shape, device=DEVICE) for shape in ((1, 6, 2, 3), (6, 1, 2, 2)))
    values = torch.randn(12, device=DEVICE)
    for bias in (values[:1].expand(6), values[::2], values[5:-1]):
        expected = depthwise_conv2d_reference(input.double(), weight.double(), bias.double())
        actual = depthwise_conv2d(input, weight, bias, **run.keywords)
        assert_close(actual, expected, torch.float32, 4)


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format(layout, run):
    """Output and gradient have the input's memory format, dense, whatever the strides of the input."""
    expected = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    ambiguous = AMBIGUOUS if run.backend == "reference" else []  # of the others: their fakes, below
    for case in [SMALL] if run.slow else [MIXED, LAYOUT_CASES[0], *ambiguous]:
        input, weight, bias, grad_output = cached_problem(case, torch.float32, layout).tensors
        memory_format = memory_format_of(input)
        assert memory_format == expected or case in ambiguous
        for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
            output = depthwise_conv2d(input, w, bias, *case.geometry, **run.keywords)
            assert output.stride() == torch.empty(output.shape, memory_format=memory_format).stride()


@for_runs(
    runs(OP, own=True),
    layout=(LAYOUTS, ["contiguous", "channels_last", "channels_last_channel_slice"]),
    case=([MIXED, *AMBIGUOUS], [SMALL, *AMBIGUOUS[:2]]),
    cover=["layout", "case"],
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    input, weight, bias, grad_output = problem(case, torch.float32, layout, grad_output=layout).tensors
    stride, padding, dilation = (pair(n, v, 0) for n, v in zip(case._fields[2:5], case.geometry))
    padding = (padding[0], padding[0], padding[1], padding[1])
    forward, backward = run.operator(OP), run.operator(f"{OP}_backward")

    def every_output(convert):
        x, w, b, g = (convert(t) for t in (input, weight, bias, grad_output))
        yield forward(x, w, b, stride, padding, dilation, None, run.algorithm)
        for need in NEEDS[:: 3 if run.slow else 1]:
            yield from backward(g, x, w, stride, padding, dilation, run.algorithm, *need)

    mode = FakeTensorMode()
    for real, fake in zip(every_output(lambda t: t), every_output(mode.from_tensor), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@for_runs(runs(OP), needed=(NEEDS[1:], NEEDS[1:]), activation=([None, "relu", "silu"], [None]))
def test_only_needed_gradients(needed, activation, run):
    case = (SMALL if run.slow else MIXED)._replace(activation=activation)
    (*arguments, grad_output), expected, terms = cached_problem(case, torch.float64)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(arguments, needed)]
    depthwise_conv2d(*leaves, *case.geometry, activation=activation, **run.keywords).backward(grad_output)
    for leaf, need, (name, value) in zip(leaves, needed, list(expected.items())[1:]):
        if need:
            assert_close(leaf.grad, value, torch.float64, terms[name], name=name)
        else:
            assert leaf.grad is None


@each_own_run
@pytest.mark.parametrize("needed", NEEDS, ids=str)
def test_backward_operator_computes_what_is_needed(needed, run):
    case = Case((1, 2, 4, 5), padding=1)
    (input, weight, _, grad_output), expected, terms = cached_problem(case, torch.float64)
    grads = run.operator(f"{OP}_backward")(
        grad_output, input, weight, (1, 1), (1, 1, 1, 1), (1, 1), run.algorithm, *needed
    )
    for grad, need, (name, value) in zip(grads, needed, list(expected.items())[1:], strict=True):
        if need:
            assert_close(grad, value, torch.float64, terms[name], name=name)
        else:
            assert grad.shape == (0,)


@each_own_run
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_twice_and_for_any_thread_count(layout, run, threads):
    case = SMALL if run.slow else FEW_EDGES[0] if run.stands_in else LARGE[0]._replace(activation=None)
    *arguments, grad_output = cached_problem(case, torch.float32, layout, grad_output=layout).tensors

    def bits():
        leaves = [t.detach().requires_grad_() for t in arguments]
        output = depthwise_conv2d(*leaves, *case.geometry, **run.keywords)
        return output, *torch.autograd.grad(output, leaves, grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@for_runs(
    runs(OP, own=True),
    layout=(DENSE, DENSE),
    activation=(ACTIVATIONS, [None, "relu6"]),
    value=([math.nan, math.inf, -math.inf], [math.nan, -math.inf]),
    cover=["activation value", "activation layout", "value layout"],
)
def test_nan_and_infinity_propagate(value, activation, layout, run):
    """As in PyTorch: to the outputs whose window holds the pixel, from a border too, and to no other."""
    case = SMALL if run.slow else MIXED
    (input, weight, bias, _), *_ = problem(case, torch.float32, layout)
    input[0, 0, 0, 0] = input[-1, -1, -1, -1] = value
    total = torch.nn.functional.conv2d(
        *(t.double() for t in (input, weight, bias)), *case.geometry, groups=input.shape[1]
    )
    assert 0 < (~total.isfinite()).sum() < total.numel() / 2
    actual = depthwise_conv2d(input, weight, bias, *case.geometry, activation=activation, **run.keywords)
    assert_close(actual, activate(total, activation), torch.float32, 12)


@pytest.mark.parametrize("run", [r for r in runs(OP, own=True) if r.backend == "cpu"], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_infinite_taps_meet_no_padding(layout, run):
    """0 * infinity is NaN: a pixel that is not there is not multiplied."""
    image = LAYOUTS[layout](torch.ones, (1, 16, 9, 9))
    weight = torch.ones(16, 1, 3, 3)
    weight[:, 0, 0, 0] = math.inf
    output = depthwise_conv2d(image, weight, padding=1, **run.keywords)
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[1:, 1:] = True
    assert (output.isinf() == inside).all() and not output.isnan().any()


@st.composite
def cases(draw, largest: int) -> Case:
    pairs = functools.partial(st.tuples)
    kernel = draw(pairs(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(pairs(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(pairs(st.integers(0, 4), st.integers(0, 4)))
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), d * (k - 1) + largest))
        for k, d, p in zip(kernel, dilation, padding)
    ]
    channels = st.integers(0, largest)
    if largest > 16:  # and whole blocks of channels, read where they lie
        channels |= st.sampled_from([16, 24, 32, 40])
    return Case(
        (draw(st.integers(0, 3)), draw(channels), *size),
        kernel,
        stride=draw(pairs(st.integers(1, 4), st.integers(1, 4))),
        padding=draw(st.sampled_from([padding, padding[0]])) if padding[0] >= padding[1] else padding,
        dilation=dilation,
        multiplier=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
    )


@each_own_run  # PyTorch 2.13's own crashes on some channels_last shapes whose windows lie in the padding
def test_any_shape(run):
    @hypothesis.settings(max_examples=6 if run.slow else 20 if run.stands_in else 60)
    @hypothesis.given(
        cases(3 if run.slow else 20),
        st.sampled_from([torch.float64, torch.float32]),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from(list(LAYOUTS)),
    )
    def property(case, dtype, layout, grad_layout):
        check(run, case, problem(case, dtype, layout, grad_output=grad_layout))

    property()

"""Transposed convolution: every backend and algorithm that can run here against the reference in float64."""

from __future__ import annotations

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, ELSEWHERE, LAYOUTS, runs
from convolutions import (
    Transposed,
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
from fastconv import BackendError, conv_transpose2d
from fastconv.backends import CHOICES
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import memory_format_of

OP = "conv_transpose2d"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
compiled = [run for run in own if not run.stands_in]
each_own_run = pytest.mark.parametrize("run", own, ids=str)
Case = Transposed
GEOMETRY = [
    # kernels of 1x1 and 3x3, strides of 1
    Case((2, 3, 5, 7), 4, (1, 1)),
    Case((1, 6, 4, 5), 9, (1, 1), groups=3),
    Case((1, 17, 5, 3), 33, (1, 1), bias=False),
    Case((0, 4, 3, 3), 2, (1, 1)),
    Case((1, 8, 1, 1), 8, (1, 1)),
    *(Case((1, 3, size, size + 1), 4, padding=1) for size in (1, 2, 3, 5, 6, 7, 12)),
    *(Case((2, 4, size, size + 3), 6, padding=0, groups=2) for size in (1, 4, 6)),
    Case((2, 3, 4, 5), 4, padding=2, bias=False),
    Case((1, 2, 9, 8), 3, padding=(3, 0)),  # more than the kernel's half
    # the usual ones: twice and eight times as many pixels a side
    Case((2, 3, 4, 5), 4, (2, 2), stride=2),
    Case((2, 4, 4, 3), 6, (4, 4), stride=2, padding=1, groups=2),
    Case((1, 3, 5, 4), 2, stride=2, padding=1, output_padding=1),
    Case((1, 2, 3, 4), 3, (5, 5), stride=2, padding=2, output_padding=(1, 0)),
    Case((1, 2, 3, 2), 2, (16, 16), stride=8, padding=4),
    # strides: unequal, longer than the kernel (pixels that nothing reaches hold the bias alone)
    Case((1, 2, 4, 5), 3, (2, 1), stride=(3, 2)),
    Case((1, 2, 4, 3), 3, (1, 2), stride=(1, 4), padding=(0, 1)),
    Case((2, 4, 3, 4), 2, (2, 2), stride=3, output_padding=2, groups=2),
    # dilation, alone and with a stride that shares a factor with it, or none
    Case((1, 2, 5, 4), 3, dilation=2, padding=2),
    Case((1, 2, 4, 5), 3, stride=2, dilation=2, padding=1),
    Case((1, 2, 4, 5), 3, stride=(2, 3), dilation=(3, 2), padding=(1, 2)),
    Case((1, 2, 3, 4), 2, stride=4, dilation=6, padding=3),
    # output_padding that the dilation allows, not the stride: a row that no input has reached
    Case((1, 2, 4, 3), 3, dilation=3, output_padding=2),
    Case((1, 4, 3, 4), 2, stride=(2, 1), dilation=4, output_padding=(3, 2), groups=2),
    Case((1, 2, 3, 4), 2, stride=2, dilation=3, padding=1, output_padding=2),
    # everything unequal
    Case((2, 6, 5, 4), 9, (4, 5), (2, 3), (3, 1), (2, 1), groups=3, output_padding=(1, 2)),
    Case((2, 6, 4, 5), 4, (5, 4), (3, 2), (1, 3), (1, 2), groups=2, bias=False, output_padding=(2, 1)),
    # groups: narrow, wide, one channel each
    Case((1, 16, 4, 5), 16, padding=1, groups=4),
    Case((1, 24, 4, 3), 16, (3, 2), stride=2, groups=2),
    Case((2, 5, 4, 3), 5, (4, 4), stride=2, padding=1, groups=5),
    # channels and filters of a group are multiples of 8, as tensor cores read them
    Case((1, 8, 5, 4), 16, padding=1),
    Case((2, 16, 3, 4), 8, (4, 4), stride=2, padding=1),
    Case((1, 24, 3, 5), 8, (1, 1), bias=False),
    Case((1, 16, 4, 3), 32, (2, 3), (2, 1), (0, 1), (1, 2), groups=2, output_padding=(1, 0)),
    # one pixel, one row, one column, nothing
    Case((1, 1, 1, 1), 1, (7, 7), padding=3),
    Case((2, 3, 1, 1), 4, (4, 4)),
    Case((1, 3, 1, 2), 2, (2, 2), stride=4),  # fewer outputs than phases
    Case((2, 3, 1, 6), 4, padding=1, stride=2, output_padding=(0, 1)),
    Case((2, 3, 6, 1), 4, (3, 1), padding=(1, 0)),
    Case((0, 3, 5, 6), 4, stride=2),
]
CHANNELS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33)
EDGES = [
    *(Case((1, c, 3, 4), m, padding=1) for c, m in zip(CHANNELS, CHANNELS[3:] + CHANNELS[:3])),
    *(Case((1, c, 2, 3), m, (4, 4), 2, 1) for c, m in zip(CHANNELS, CHANNELS[::-1])),
    *(Case((1, 3, 2, w), 9, (2, 2), stride=2) for w in (7, 8, 9, 16, 17, 33)),
]
LARGE = [
    Case((2, 35, 15, 17), 41, (4, 4), stride=2, padding=1),
    Case((1, 70, 14, 15), 130, (1, 1)),
    Case((1, 64, 20, 19), 64, padding=1, groups=16),
    Case((1, 300, 5, 6), 20, (3, 2), padding=1, dilation=2),
]
HUGE = [  # too large for the caches
    Case((1, 32, 92, 91), 32, (4, 4), stride=2, padding=1),
    Case((1, 32, 183, 181), 32, padding=1, bias=False),
]
MIXED = [  # of each kind one, for the tests of everything but the geometry
    Case((2, 6, 5, 4), 4, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, output_padding=(1, 0)),
    Case((2, 5, 4, 6), 6, padding=1),
    Case((2, 5, 4, 6), 3, (1, 1)),
    Case((2, 16, 3, 4), 16, (4, 4), stride=2, padding=1, groups=2),
]
AMBIGUOUS = [  # one pixel or one channel: the strides alone do not tell contiguous from channels_last
    Case((1, 2, 1, 1), 3),
    Case((2, 1, 2, 3), 2, padding=1),
    Case((2, 3, 4, 5), 1, padding=1),
    Case((1, 1, 1, 1), 1, (1, 1)),
    Case((0, 3, 4, 5), 2, padding=1),
]
# Interpreted kernels take a second for a dozen programs: their cases are few, and small.
SMALL = [
    Case((1, 2, 3, 2), 2, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, output_padding=(1, 0)),
    Case((1, 2, 3, 2), 3, padding=1),
    Case((1, 3, 2, 3), 2, (1, 1)),
]
FEW = [
    *SMALL,
    *GEOMETRY[:5],
    Case((1, 2, 2, 3), 2, (4, 4), stride=2, padding=1),
    Case((1, 2, 2, 3), 3, (2, 1), stride=(3, 2)),
    Case((1, 2, 3, 2), 2, dilation=3, output_padding=2),
]


def test_every_run_has_cases():
    for run in runs(OP):
        served = [serves(run, case, layout) for case in (FEW if run.slow else GEOMETRY) for layout in DENSE]
        assert sum(served) >= 8, f"{run} serves {sum(served)} cases"


# PyTorch's own crashes where nothing is left of what padding takes away; there is always something here.
@pytest.mark.parametrize("case", [*GEOMETRY, *MIXED], ids=str)
def test_reference_is_pytorchs_transposed_convolution(case):
    leaves = leaves_of(case, given := cached_problem(case, torch.float64))
    output = case.call(torch.nn.functional.conv_transpose2d, leaves)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], given.grad_output)
    for (name, value), actual in zip(given.expected.items(), (output, *grads), strict=True):
        assert value.abs().sum() > 0 or 0 in case.input
        assert_close(actual, value, torch.float64, 1000, name=name)


@pytest.mark.parametrize("case", GEOMETRY, ids=str)
def test_it_is_the_gradient_of_a_convolution(case):
    """Of one that reads the output's image; output_padding is what its last outputs do not reach."""
    if case.bias or 0 in case.input:
        case = case.replace(bias=False, input=(2, *case.input[1:]))
    (input, weight), *_ = (given.tensors.values() for given in [cached_problem(case, torch.float64)])
    image = torch.zeros(case.output, dtype=torch.float64, device=DEVICE, requires_grad=True)
    stride, padding, _, dilation, groups = case.geometry
    output = fastconv.conv2d_reference(image, weight, None, stride, padding, dilation, groups)
    output = output[:, :, : input.shape[2], : input.shape[3]]
    (grad,) = torch.autograd.grad(output, image, input)
    assert_close(case.call(case.reference, (input, weight)), grad, torch.float64, 1000)


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


@each([run for run in compiled if run.algorithm != "plain"], case=(HUGE, []), layout=(DENSE[1:], []))
def test_beyond_the_caches(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout))


@each(
    runs(OP),
    case=(MIXED, SMALL),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE[1:]),
    cover=["dtype layout", "dtype case", "case layout"],
)
def test_dtypes(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(runs(OP), case=(MIXED, SMALL[2:]), layout=(LAYOUTS, LAYOUTS), cover=["layout", "case"])
def test_layouts(case, layout, run):
    """Of the input; and the output has its memory format, whatever the weight's."""
    given = cached_problem(case, dtype_for(run), layout)
    check(run, case, given)
    expected = torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format
    assert memory_format_of(given.tensors["input"]) == expected
    for weight_format in (torch.contiguous_format, torch.channels_last):
        input, weight, bias = given.tensors.values()
        tensors = (input, weight.contiguous(memory_format=weight_format), bias)
        output = case.call(conv_transpose2d, tensors, **run.keywords)
        assert output.stride() == torch.empty(output.shape, memory_format=expected).stride()


@each(
    runs(OP),
    case=(MIXED, SMALL[2:]),
    layout=(DENSE, ["channels_last"]),
    other=([*list(LAYOUTS)[1::3], "stepped", "expanded_pixels"], ["expanded_pixels"]),
    cover=["layout other", "case"],
)
def test_layouts_of_the_others(case, layout, other, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, weight=other, grad_output=other))


@each(
    own,
    layout=(LAYOUTS, ["contiguous", "channels_last_channel_slice"]),
    case=([*MIXED, *AMBIGUOUS], [SMALL[2], AMBIGUOUS[0]]),
    cover=["layout", "case"],
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    tensors, *_ = problem(case, dtype_for(run), layout)

    def output(convert):
        given = (convert(t) for t in tensors.values())
        return run.operator(OP)(*given, None, *case.geometry, run.algorithm)

    real, fake = output(lambda t: t), output(FakeTensorMode().from_tensor)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@each(
    runs(OP),
    case=(MIXED, SMALL[2:]),
    layout=(DENSE, ["channels_last"]),
    needed=(list(itertools.product((False, True), repeat=3))[1:], [(True, False, True)]),
    cover=["needed case", "needed layout"],
)
def test_only_needed_gradients(case, layout, needed, run):
    given = cached_problem(case, dtype_for(run, torch.float64), layout)
    leaves = [t.requires_grad_(need) for t, need in zip(leaves_of(case, given), needed)]
    case.call(conv_transpose2d, leaves, **run.keywords).backward(given.grad_output)
    for leaf, need, name in zip(leaves, needed, case.names):
        if need:
            terms, expected = case.terms[name], given.expected[name]
            assert_close(leaf.grad, expected, leaf.dtype, terms, algorithm=run.algorithm, name=name)
        else:
            assert leaf.grad is None


@each(own, case=(LARGE[:3], SMALL[2:]), layout=(DENSE, DENSE))
def test_same_bits_twice_and_for_any_thread_count(case, layout, run, threads):
    case = SMALL[2] if run.stands_in else case
    given = cached_problem(case, dtype_for(run), layout, grad_output=layout)

    def bits():
        leaves = leaves_of(case, given)
        output = case.call(conv_transpose2d, leaves, **run.keywords)
        return output, *torch.autograd.grad(output, leaves[:2], given.grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@each(
    own,
    case=(MIXED, SMALL[:1]),
    layout=(DENSE, DENSE),
    value=([math.nan, math.inf, -math.inf], [math.nan, -math.inf]),
    cover=["case layout", "case value", "value layout"],
)
def test_nan_and_infinity_propagate(case, value, layout, run):
    """To the outputs that the pixel reaches, and to no other."""
    given = problem(case, dtype_for(run), layout)
    given.tensors["input"][0, 0, 0, 0] = value
    tensors = list(given.tensors.values())
    input, weight, bias = (t.double() for t in tensors)
    expected = case.call(case.reference, (input.nan_to_num(0, 0, 0), weight, bias))
    reached = case.call(case.reference, ((~input.isfinite()).double(), torch.ones_like(weight))) > 0
    # The reference multiplies the zeros between the pixels too.
    signs = case.call(case.reference, ((~input.isfinite()).double(), weight))
    expected[reached] = value * signs[reached]
    check_not_finite(run, case, case.call(conv_transpose2d, tensors, **run.keywords), expected)


@each([run for run in own if run.backend == "cpu"], case=([*GEOMETRY[9:], *LARGE], []), layout=(DENSE, []))
def test_packed_weights(case, layout, run):
    """Packed once, knowing no image, or in each call: the same bits."""
    tensors, *_ = cached_problem(case, dtype_for(run), layout)
    input, weight = tensors["input"], tensors["weight"]
    stride, padding, _, dilation, groups = case.geometry
    rest = (stride, padding, dilation, groups, run.algorithm)
    packed = torch.ops.fastconv.conv_transpose2d_pack_weight(weight, *rest)

    def convolve(packed):
        return torch.ops.fastconv.conv_transpose2d(input, weight, None, packed, *case.geometry, run.algorithm)

    assert torch.equal(convolve(packed), convolve(None))
    if input.numel():
        for wrong in (torch.cat([packed, packed]), packed.double(), packed.view(1, -1)):
            with pytest.raises(RuntimeError, match="packed must"):
                convolve(wrong)


@st.composite
def any_case(draw, run, largest: int) -> Case:
    """Any shape that an algorithm serves."""
    two = functools.partial(st.tuples)
    one_by_one = run.algorithm == "pointwise"
    fixed = one_by_one or (run.algorithm or "").startswith("winograd")
    kernel = (1, 1) if one_by_one else (3, 3) if fixed else draw(two(st.integers(1, 5), st.integers(1, 5)))
    stride = (1, 1) if fixed else draw(two(st.integers(1, 4), st.integers(1, 4)))
    dilation = (1, 1) if fixed else draw(two(st.integers(1, 3), st.integers(1, 3)))
    extra = tuple(0 if fixed else draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    size = [draw(st.integers(1, largest)) for _ in range(2)]
    padding = tuple(
        0 if one_by_one else draw(st.integers(0, min(4, ((n - 1) * s + d * (k - 1) + e) // 2)))
        for n, s, d, k, e in zip(size, stride, dilation, kernel, extra)
    )
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
        output_padding=extra,
    )


@each_own_run
def test_any_shape(run):
    @hypothesis.settings(max_examples=5 if run.slow else 15 if run.stands_in else 60)
    @hypothesis.given(
        any_case(run, 3 if run.slow else 10),
        st.sampled_from([dtype_for(run, dtype) for dtype in (torch.float64, torch.float32)]),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from(list(LAYOUTS)),
    )
    def property(case, dtype, layout, grad_layout):
        hypothesis.assume(serves(run, case, layout, dtype))
        check(run, case, problem(case, dtype, layout, grad_output=grad_layout))

    property()


# Bad input: each error names the argument, what it was, and what is allowed.

zeros = torch.zeros
BAD = {
    "input of rank 3": ({"input": zeros(4, 5, 7)}, ValueError, "input", "4 dimensions", "(4, 5, 7)"),
    "weight of other channels": ({"weight": zeros(6, 3, 3, 3)}, ValueError, "weight", "(4, M/G, KH, KW)"),
    "mixed weight": ({"weight": zeros(4, 3, 3, 3).double()}, TypeError, "weight", "float64", "float32"),
    "bias of the input's channels": ({"bias": zeros(4)}, ValueError, "bias", "(6,)", "(4,)"),
    "groups that do not divide": ({"groups": 3}, ValueError, "groups", "divide", "4", "3"),
    "groups 0": ({"groups": 0}, ValueError, "groups", "at least 1", "0"),
    "no channels": (
        {"input": zeros(2, 0, 5, 7), "weight": zeros(0, 3, 3, 3)},
        *(ValueError, "input", "weight", "at least one channel"),
    ),
    "no pixels": ({"input": zeros(2, 4, 5, 0)}, ValueError, "input", "one pixel of width"),
    "stride 0": ({"stride": 0}, ValueError, "stride", "at least 1", "0"),
    "padding -1": ({"padding": -1}, ValueError, "padding", "at least 0", "-1"),
    "padding that leaves nothing": ({"padding": (0, 5)}, ValueError, "padding", "width", "5"),
    "padding of a string": ({"padding": "same"}, TypeError, "padding", "integer", "'same'"),
    "output_padding -1": ({"output_padding": -1}, ValueError, "output_padding", "at least 0", "-1"),
    "output_padding of a stride": (
        {"output_padding": (1, 2), "stride": 2},
        *(ValueError, "output_padding", "(1, 2)", "stride=(2, 2)", "dilation=(1, 1)"),
    ),
    "dilation 0": ({"dilation": 0}, ValueError, "dilation", "at least 1", "0"),
    **{
        f"{name} 2**62": ({name: (1, 2**62)}, ValueError, name, "at most 2147483647", str(2**62))
        for name in ("stride", "padding", "output_padding", "dilation")
    },
    "algorithm unknown": ({"algorithm": "fft"}, BackendError, "algorithm", "'fft'", "plain"),
    "pointwise, strided": (
        {"algorithm": "pointwise", "backend": "triton", "weight": zeros(4, 3, 1, 1), "stride": 2},
        *(BackendError, "pointwise", "stride=(2, 2)"),
    ),
}


def good(changes):
    arguments = {"input": zeros(2, 4, 5, 7), "weight": zeros(4, 3, 3, 3), "bias": zeros(6), "groups": 2}
    arguments.update(changes)
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("changes, error, words", [(c, e, w) for c, e, *w in BAD.values()], ids=BAD)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as raised:
        conv_transpose2d(**good(changes))
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "backend, algorithm, dtype",
    [("cpu", "grouped", torch.float32), ("cuda", "implicit_gemm", torch.float16)],
)
def test_channels_and_filters_have_their_own_names(backend, algorithm, dtype):
    """The weight is (C, M/G, KH, KW), not (M, C/G, KH, KW)."""
    input, weight = zeros(1, 72, 5, 7, dtype=dtype), zeros(72, 4, 3, 3, dtype=dtype)
    reason = CHOICES[OP].why_not(backend, algorithm, input, weight, (1, 1), (0, 0), (0, 0), (1, 1), 2)
    assert "channels" in reason and reason.endswith("filters in a group, got 36 and 4")


OPERATOR_BAD = {
    "input of rank 3": {"input": zeros(4, 5, 7)},
    "weight of other channels": {"weight": zeros(6, 3, 3, 3)},
    "mixed types": {"weight": zeros(4, 3, 3, 3).double()},
    "bias too short": {"bias": zeros(5)},
    "packed of nothing": {"packed": zeros(3)},
    "no channels": {"input": zeros(2, 0, 5, 7), "weight": zeros(0, 3, 3, 3)},
    "no pixels": {"input": zeros(2, 4, 0, 7)},
    "stride 0": {"stride": (0, 1)},
    "padding of four": {"padding": (1, 1, 1, 1)},
    "padding that leaves nothing": {"padding": (4, 4)},
    "output_padding of a stride": {"output_padding": (1, 0)},
    "output_padding -1": {"output_padding": (0, -1)},
    "output_padding 2**62": {"output_padding": (0, 2**62), "stride": (1, 2**62)},
    "dilation 0": {"dilation": (1, 0)},
    "groups that do not divide": {"groups": 3},
    "groups 0": {"groups": 0},
    "algorithm unknown": {"algorithm": "fft"},
}


def operands(run):
    tensors = good({})
    return {
        **{name: tensors.get(name) for name in ("input", "weight", "bias", "packed")},
        "stride": (1, 1),
        "padding": (1, 1),
        "output_padding": (0, 0),
        "dilation": (1, 1),
        "groups": 2,
        "algorithm": run.algorithm
        if serves(run, Case((2, 4, 5, 7), 6, padding=1, groups=2), dtype=torch.float32)
        else None,
    }


@each_own_run
def test_operator_takes_what_is_good(run):
    run.operator(OP)(*operands(run).values())


@each_own_run
@pytest.mark.parametrize("changes", OPERATOR_BAD.values(), ids=OPERATOR_BAD)
def test_operator_refuses(changes, run):
    """Called by itself, it may not crash or read past the end."""
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run.operator(OP)(*good({**operands(run), **changes}).values())


@pytest.mark.parametrize("backend", sorted(ELSEWHERE & set(CHOICES[OP].algorithms)))
def test_backend_that_cannot_run_says_why(backend):
    with pytest.raises(BackendError, match=f"backend='{backend}' cannot run here: it needs .* tensors"):
        conv_transpose2d(**good({}), backend=backend)


@pytest.mark.parametrize("backend", [b for b in ("cuda", "emulator") if b not in ELSEWHERE])
def test_direct_refuses_what_does_not_fit_shared_memory(backend):
    """Left open, another kernel serves; asked for by name, none stands in silently."""
    case = Case((1, 2, 2, 2), 2, (2, 2), stride=1, padding=128, dilation=256)
    given = problem(case, torch.float32)
    tensors = list(given.tensors.values())
    output = case.call(conv_transpose2d, tensors, backend=backend)
    assert_close(output, given.expected["output"], torch.float32, case.terms["output"])
    with pytest.raises(RuntimeError, match="algorithm='direct' does not serve"):
        case.call(conv_transpose2d, tensors, backend=backend, algorithm="direct")


@pytest.mark.skipif(DEVICE != "cpu", reason="of a C++ kernel")
@pytest.mark.parametrize("channels, kernel", [(2, 71), (8, 41), (128, 9)])
def test_phases_whose_turns_of_channels_differ(channels, kernel):
    """A panel of im2col holds as many lines as the phase that needs most, which is not that of most taps."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(1, channels, 8, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    output = fastconv.conv_transpose2d(input, weight, stride=2, backend="cpu", algorithm="im2col")
    expected = fastconv.conv_transpose2d_reference(input, weight, stride=2)
    assert_close(output, expected, torch.float64, channels * (kernel // 2 + 1) ** 2)

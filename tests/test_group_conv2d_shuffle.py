"""group_conv2d_shuffle: every backend and algorithm that can run here against the reference in float64."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, global_bytes, runs
from convolutions import (
    Shuffled,
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
from fastconv import channel_shuffle, conv2d, group_conv2d_shuffle
from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import memory_format_of

OP = "group_conv2d_shuffle"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
compiled = [run for run in runs(OP) if not run.stands_in]
Case = Shuffled

ONE_BY_ONE = [
    Case((2, 6, 5, 7), 9, (1, 1), groups=3),
    Case((1, 8, 4, 3), 4, (1, 1), groups=2, bias=False),
    Case((1, 8, 3, 3), 8, (1, 1), groups=8),  # a channel and a filter each: the shuffle is the identity
    Case((1, 5, 3, 4), 7, (1, 1)),  # one group: nothing to shuffle
    Case((2, 12, 1, 1), 20, (1, 1), groups=4),
    Case((1, 16, 9, 8), 48, (1, 1), groups=2, activation="relu"),
    Case((0, 4, 3, 3), 8, (1, 1), groups=2),
    Case((1, 6, 7, 9), 6, (1, 1), stride=2, groups=2),
    Case((1, 6, 4, 3), 9, (1, 1), padding=1, groups=3),
]
GEOMETRY = [
    *ONE_BY_ONE,
    Case((2, 6, 5, 6), 9, padding=1, groups=3),
    Case((1, 4, 7, 8), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
    Case((1, 8, 6, 5), 12, (1, 3), (1, 2), (0, 1), groups=4, activation="silu"),
    Case((2, 6, 7, 6), 4, (4, 2), padding="same", groups=2),
    Case((1, 16, 5, 6), 32, padding=1, groups=2),
    Case((1, 24, 4, 5), 48, (1, 1), groups=3, bias=False),
    Case((2, 16, 3, 4), 16, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
]
# Around the widths of vectors, blocks and tiles.
EDGES = [
    *(
        Case((1, 3 * c, 3, 5), 3 * m, (1, 1), groups=3)
        for c, m in ((1, 5), (7, 6), (16, 7), (17, 12), (33, 13))
    ),
    *(Case((1, 2 * c, 4, 4), 2 * m, (1, 1), groups=2) for c, m in ((15, 8), (8, 15), (31, 16), (16, 33))),
    *(Case((1, 4, 1, w), 6, (1, 1), groups=2) for w in (7, 15, 16, 17, 31, 63, 64, 65, 129)),
    *(Case((2, 9, 7, w), 15, (1, 1), groups=3) for w in (8, 9, 10)),
    Case((1, 5120, 2, 3), 4, (1, 1), groups=1),
]
LARGE = [  # several tiles each way
    Case((2, 240, 14, 15), 60, (1, 1), groups=3),
    Case((1, 384, 9, 11), 96, (1, 1), groups=8, activation="silu"),
    Case((2, 64, 29, 33), 96, padding=1, groups=4),
]
MIXED = [
    Case((2, 6, 9, 7), 4, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
    Case((2, 6, 4, 6), 9, (1, 1), groups=3),
    Case((2, 16, 5, 4), 32, (1, 1), groups=2),
]
SMALL = [
    Case((1, 4, 3, 4), 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
    Case((1, 6, 2, 3), 9, (1, 1), groups=3),
]
FEW = [*SMALL, *ONE_BY_ONE[:5], Case((1, 64, 2, 2), 64, (1, 1), groups=2)]


def test_every_run_has_cases():
    for run in runs(OP):
        served = [serves(run, case, layout) for case in (FEW if run.slow else GEOMETRY) for layout in DENSE]
        assert sum(served) >= 8, f"{run} serves {sum(served)} cases"


@pytest.mark.parametrize("case", GEOMETRY, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_reference_is_pytorchs_convolution_and_shuffle(case):
    def theirs(*arguments, activation):
        output = torch.nn.functional.conv2d(*arguments)
        if activation is not None:
            output = getattr(torch.nn.functional, activation)(output)
        return torch.nn.functional.channel_shuffle(output, case.groups)

    given = cached_problem(case, torch.float64)
    assert_close(case.call(theirs, leaves_of(case, given)), given.expected["output"], torch.float64, 1000)


# Every kernel against the reference.


@each(runs(OP), case=(GEOMETRY, FEW), layout=(DENSE, ["channels_last"]))
def test_geometry(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run, torch.float64), layout, grad_output=layout))


@each(runs(OP), case=(EDGES, []), layout=(DENSE, []))
def test_edges_of_blocks(case, layout, run):
    check(run, case, cached_problem(case, dtype_for(run), layout, grad_output=layout))


@each(compiled, case=(LARGE, []), layout=(DENSE, []), dtype=(DTYPES, []))
def test_several_blocks(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(runs(OP), case=(MIXED, SMALL), dtype=(DTYPES, DTYPES), layout=(DENSE, DENSE))
def test_dtypes(case, dtype, layout, run):
    check(run, case, cached_problem(case, dtype, layout, grad_output=layout))


@each(
    runs(OP), case=(MIXED, SMALL[1:]), activation=(ACTIVATIONS, ["relu6", "gelu"]), layout=(DENSE, DENSE[1:])
)
def test_activations(case, activation, layout, run):
    case = case.replace(activation=activation)
    check(run, case, cached_problem(case, dtype_for(run), layout))


@each(runs(OP), case=(MIXED, SMALL[1:]), layout=(LAYOUTS, LAYOUTS))
def test_layouts_and_memory_format(case, layout, run):
    """Whatever the strides; the output is dense, in the input's memory format."""
    given = cached_problem(case, dtype_for(run), layout, weight="stepped", grad_output="expanded_pixels")
    check(run, case, given)
    output = case.call(group_conv2d_shuffle, [given.tensors.get(name) for name in case.names], **run.keywords)
    expected = memory_format_of(given.tensors["input"])
    assert output.stride() == torch.empty(output.shape, memory_format=expected).stride()


@each(
    [run for run in own if run.algorithm != "implicit_gemm"], case=(MIXED, SMALL), layout=(DENSE, DENSE[1:])
)
def test_is_the_composition(case, layout, run):
    """Bit for bit what the convolution of the same algorithm makes, in the shuffle's order."""
    given = cached_problem(case, torch.float32, layout)
    tensors = [given.tensors.get(name) for name in case.names]
    plain = case.call(conv2d, tensors, **run.keywords)
    assert torch.equal(
        case.call(group_conv2d_shuffle, tensors, **run.keywords),
        channel_shuffle(plain, case.groups, backend="reference"),
    )


@each(own, case=(MIXED, SMALL[1:]), layout=(DENSE, DENSE[1:]), value=([math.nan, -math.inf], [math.nan]))
def test_nan_and_infinity_propagate(case, value, layout, run):
    """To the outputs whose window holds the pixel, and to no other."""
    given = problem(case, dtype_for(run), layout)
    given.tensors["input"][0, 0, 0, 0] = given.tensors["input"][-1, -1, -1, -1] = value
    tensors = [given.tensors.get(name) for name in case.names]
    expected = case.call(case.reference, [t if t is None else t.double() for t in tensors])
    check_not_finite(run, case, case.call(group_conv2d_shuffle, tensors, **run.keywords), expected)


@each(own, case=([LARGE[0], MIXED[0]], SMALL[1:]), layout=(DENSE, DENSE))
def test_same_bits_for_any_thread_count(case, layout, run, threads):
    case = MIXED[0] if run.stands_in else case
    if not serves(run, case, layout):
        case = MIXED[2]
    given = cached_problem(case, dtype_for(run), layout, grad_output=layout)

    def bits():
        leaves = leaves_of(case, given)
        output = case.call(group_conv2d_shuffle, leaves, **run.keywords)
        return output, *torch.autograd.grad(output, leaves, given.grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@each(own, case=(MIXED, SMALL[1:]), needed=([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], [(0, 1, 0)]))
def test_only_needed_gradients(case, needed, run):
    given = cached_problem(case, dtype_for(run, torch.float64))
    leaves = [t.requires_grad_(bool(need)) for t, need in zip(leaves_of(case, given), needed)]
    case.call(group_conv2d_shuffle, leaves, **run.keywords).backward(given.grad_output)
    for leaf, need, name in zip(leaves, needed, case.names):
        assert (leaf.grad is not None) == bool(need)
        if need:
            dtype, terms = given.grad_output.dtype, case.terms[name]
            assert_close(leaf.grad, given.expected[name], dtype, terms, name=name)


@st.composite
def any_case(draw, run, largest: int) -> Case:
    """Any shape that an algorithm serves."""
    kernel = (1, 1) if run.algorithm == "pointwise" else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    one_by_one = kernel == (1, 1)
    padding = 0 if one_by_one else draw(st.integers(1, 3))
    groups = draw(st.integers(1, 5))
    channels = st.integers(1, 2 * largest)
    if dtype_for(run) == torch.float16:
        channels = st.sampled_from([8, 16, 24])
    return Case(
        (draw(st.integers(0, 3)), groups * draw(channels), *(draw(st.integers(2, largest)) for _ in "HW")),
        groups * draw(channels),
        kernel,
        1 if run.algorithm == "pointwise" else draw(st.integers(1, 3)),
        padding,
        groups=groups,
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "silu"])),
    )


@pytest.mark.parametrize("run", own, ids=str)
def test_any_shape(run):
    @hypothesis.settings(max_examples=5 if run.slow else 15 if run.stands_in else 80)
    @hypothesis.given(
        any_case(run, 3 if run.slow else 14), st.sampled_from(list(LAYOUTS)), st.sampled_from(DENSE)
    )
    def property(case, layout, grad_layout):
        dtype = dtype_for(run, torch.float64)
        check(run, case, problem(case, dtype, layout, grad_output=grad_layout))

    property()


# What the operator does beside the arithmetic; its gradients' gradients are in test_conv2d_autograd.py.


@each(
    own,
    layout=([*DENSE, "channels_last_channel_slice", "expanded_channels"], ["channels_last"]),
    case=([MIXED[2], ONE_BY_ONE[2], Case((0, 6, 3, 4), 6, (1, 1), groups=2)], [SMALL[1]]),
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    tensors, *_ = problem(case, dtype_for(run), layout)
    mode = FakeTensorMode()

    def output(convert):
        given = [convert(tensors[name]) for name in case.names]
        return run.operator(OP)(*case.operands(given, run.algorithm))

    real, fake = output(lambda t: t), output(mode.from_tensor)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("algorithm", ["im2col", "implicit_gemm"])
def test_bytes_are_those_of_the_convolution(algorithm, layout):
    case = Case((1, 48, 8, 9), 72, (1, 1), groups=3)
    given = cached_problem(case, torch.float16, layout)
    tensors = [given.tensors[name] for name in case.names]
    run = {"backend": "emulator", "algorithm": algorithm}
    fused = global_bytes(lambda: case.call(group_conv2d_shuffle, tensors, **run))
    bare = global_bytes(lambda: case.call(conv2d, tensors, **run))
    assert fused == bare and fused[1] == given.grad_output.nbytes


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.parametrize("algorithm", ["im2col", "plain"])
def test_packed_weights(algorithm):
    """Packed once or in each call: the same bits."""
    case = MIXED[2]
    tensors, *_ = cached_problem(case, torch.float32)
    packed = torch.ops.fastconv.conv2d_pack_weight(tensors["weight"], case.groups, algorithm)

    def convolve(packed):
        given = (tensors["input"], tensors["weight"], None, packed)
        return torch.ops.fastconv.group_conv2d_shuffle(*given, *case.geometry, None, algorithm)

    assert torch.equal(convolve(packed), convolve(None))
    with pytest.raises(RuntimeError, match="packed must"):
        convolve(packed[:-1])


# Bad input: each error names the argument, what it was, and what is allowed.

IMAGE, WEIGHT = torch.zeros(1, 6, 4, 5), torch.zeros(9, 2, 1, 1)
BAD = {
    "input of rank 3": ({"input": IMAGE[0]}, ValueError, "input", "4 dimensions"),
    "groups do not divide the channels": ({"groups": 4}, ValueError, "groups", "6 channels", "4"),
    "groups do not divide the filters": ({"weight": torch.zeros(8, 2, 1, 1)}, ValueError, "groups", "8", "3"),
    "no groups": ({"groups": 0}, ValueError, "groups", "0"),
    "a weight of other groups": ({"weight": torch.zeros(9, 3, 1, 1)}, ValueError, "weight", "(M, 2, KH, KW)"),
    "a weight of another type": ({"weight": WEIGHT.double()}, TypeError, "weight", "float64"),
    "a bias of another size": ({"bias": torch.zeros(8)}, ValueError, "bias", "(9,)", "(8,)"),
    "an unknown activation": ({"activation": "tanh"}, ValueError, "activation", "'tanh'"),
    "a kernel larger than the image": ({"weight": torch.zeros(9, 2, 7, 1)}, ValueError, "4", "7"),
    "an unknown backend": ({"backend": "fft"}, ValueError, "backend", "'fft'"),
    "an unknown algorithm": ({"backend": "reference", "algorithm": "fft"}, fastconv.BackendError, "'fft'"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    changed, error, *words = case
    arguments = {"input": IMAGE, "weight": WEIGHT, "bias": None, "groups": 3, **changed}
    with pytest.raises(error) as raised:
        group_conv2d_shuffle(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value

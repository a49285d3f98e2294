"""group_conv2d_shuffle: what it does not share with others; its arithmetic is in test_conv2d_folded.py."""

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
)
from folded import SHUFFLED
from tolerances import assert_close

import fastconv
from fastconv import channel_shuffle, conv2d, group_conv2d_shuffle

OP = "group_conv2d_shuffle"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
Case = Shuffled
GEOMETRY, MIXED, SMALL = SHUFFLED.geometry, SHUFFLED.mixed, SHUFFLED.small


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


# Every kernel.


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

"""shift_conv2d: what it does not share with others; its arithmetic is in test_conv2d_folded.py."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, global_bytes, runs
from convolutions import (
    Shifted,
    cached_problem,
    check_not_finite,
    dtype_for,
    each,
    problem,
)
from folded import SHIFTED
from tolerances import assert_close
from torch.func import vmap

import fastconv
from fastconv import conv2d, shift2d, shift2d_reference, shift_conv2d, shift_conv2d_reference
from fastconv.ops._arguments import DTYPES

OP = "shift_conv2d"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
Case = Shifted
GEOMETRY, MIXED, SMALL = SHIFTED.geometry, SHIFTED.mixed, SHIFTED.small


@pytest.mark.parametrize("case", GEOMETRY, ids=str)
def test_reference_is_a_convolution_with_one_hot_windows(case):
    """For offsets within 3 pixels: the weight at its channel's place of a 7x7 window."""
    if case.offsets == "far":
        case = case.replace(offsets="window")
    given = cached_problem(case, torch.float64)
    tensors = [given.tensors.get(name) for name in case.names]
    window = torch.zeros(case.filters, case.input[1], 7, 7, dtype=torch.float64, device=DEVICE)
    for channel, (dh, dw) in enumerate(case.shift.tolist()):
        window[:, channel, 3 + dh, 3 + dw] = tensors[1][:, channel, 0, 0]
    expected = torch.nn.functional.conv2d(tensors[0], window, tensors[2], case.stride, padding=3)
    if case.activation is not None:
        expected = getattr(torch.nn.functional, case.activation)(expected)
    assert_close(case.call(shift_conv2d_reference, tensors), expected, torch.float64, 1000)


# Every kernel.


@each(own, case=(MIXED, SMALL), layout=(DENSE, DENSE[1:]))
def test_is_the_composition(case, layout, run):
    """Bit for bit what the same kernel makes of the shifted image and no offsets."""
    given = cached_problem(case, dtype_for(run), layout)
    input, weight, bias = (given.tensors.get(name) for name in case.names)
    fused = case.call(shift_conv2d, (input, weight, bias), **run.keywords)
    shifted = shift2d(input, case.shift, backend="reference")
    nowhere = torch.zeros_like(case.shift)
    assert torch.equal(fused, shift_conv2d(shifted, nowhere, weight, bias, case.stride, **run.keywords))


@each(
    own,
    case=([MIXED[0], MIXED[0].replace(stride=2), MIXED[1], MIXED[3]], SMALL[:1]),
    layout=(DENSE, DENSE[1:]),
    value=([math.nan, -math.inf], [math.nan]),
)
def test_nan_and_infinity_propagate(case, value, layout, run):
    """To the outputs that read the pixel, and to no other."""
    given = problem(case, dtype_for(run), layout)
    given.tensors["input"][0, :, 2, 2] = value
    tensors = [given.tensors.get(name) for name in case.names]
    expected = case.call(case.reference, [t if t is None else t.double() for t in tensors])
    check_not_finite(run, case, case.call(shift_conv2d, tensors, **run.keywords), expected)


LEAST, MOST = -(2**63), 2**63 - 1
OWN_GRADIENTS = pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")


def backward_operands(given, case, *needed):
    tensors = given.tensors["input"], given.tensors["weight"]
    return given.grad_output, *tensors, case.shift, case.operands(tensors, None)[5], *needed


@OWN_GRADIENTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *MIXED,
        Case((5, 65, 40, 41), 20, bias=False),  # two images at a time
        Case((3, 70, 61, 65), 66, offsets="scattered", stride=2),  # more than a part takes; two panels
    ],
    ids=str,
)
def test_backward_operator(case, dtype):
    """Against the reference; and those that are needed alone have the same bits."""
    given = cached_problem(case, dtype, "channels_last", grad_output="channels_last")
    backward = torch.ops.fastconv.shift_conv2d_backward
    grads = backward(*backward_operands(given, case, True, True, True))
    for name, grad in zip(case.names, grads):
        if name in given.expected:
            assert_close(grad, given.expected[name], dtype, case.terms[name], name=name)
    for needed in [(True, False, False), (False, True, False), (False, True, True), (False, False, True)]:
        alone = backward(*backward_operands(given, case, *needed))
        for grad, whole, need in zip(alone, grads, needed):
            assert torch.equal(grad, whole) if need else grad.shape == (0,)


@OWN_GRADIENTS
@pytest.mark.parametrize("offset", [(LEAST, 0), (0, MOST), (LEAST, MOST), (4, -6), (-5, 5)], ids=str)
def test_backward_operator_far_away(offset):
    input, weight = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 1, 1, dtype=torch.float64)
    input, offsets = input.to(memory_format=torch.channels_last), torch.tensor([offset] * 3)
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    expected = torch.autograd.grad(shift_conv2d_reference(input, offsets, weight).sum(), leaves)
    actual = torch.autograd.grad(shift_conv2d(input, offsets, weight, backend="cpu").sum(), leaves)
    torch.testing.assert_close(actual, expected)


@OWN_GRADIENTS
def test_backward_operator_takes_any_stride():
    """One output for each image, and no work for each pixel that such a stride skips."""
    case = Case((2, 9, 5, 6), 4, stride=30)
    given = problem(case, torch.float64, "channels_last")
    *tensors, stride = backward_operands(given, case)
    backward = torch.ops.fastconv.shift_conv2d_backward
    grads = [backward(*tensors, far, True, True, True) for far in (stride, (2**31 - 1, 2**31 - 1))]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@OWN_GRADIENTS
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 3), (1, 2, 1), (3, 1, 1)], ids=str)
def test_gradients_of_gradients_of_few_values(size):
    """Cut out of a channels_last image: the strides say so, and those of a dense copy may not."""
    channels, height, width = size
    input = torch.randn(2, 5, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    input = input[:, :channels, :height, :width].requires_grad_()
    weight = torch.randn(2, channels, 1, 1, dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(channels, 2, dtype=torch.int64)
    torch.autograd.gradgradcheck(lambda *x: shift_conv2d(x[0], offsets, x[1], backend="cpu"), (input, weight))


@OWN_GRADIENTS
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_opcheck_of_backward(needed):
    case = Case((2, 9, 4, 5), 3, stride=(1, 2))
    given = problem(case, torch.float64, "channels_last", grad_output="channels_last")
    grad_output, input, weight, *rest = backward_operands(given, case, *needed)
    leaves = [t.detach().requires_grad_() for t in (grad_output, input, weight)]
    torch.library.opcheck(torch.ops.fastconv.shift_conv2d_backward, (*leaves, *rest))


@OWN_GRADIENTS
@pytest.mark.parametrize(
    "name, change, words",
    [
        ("input", lambda t: t.contiguous(), "input must be channels_last and not empty"),
        ("grad_output", lambda t: t[:, :2], "grad_output must have size 7 in dimension 1"),
        ("grad_output", lambda t: t.double(), "grad_output must"),
        ("weight", lambda t: t.expand(-1, -1, 3, 3), "weight must have size 1 in dimension 2, got 3"),
        ("offsets", lambda t: t[1:], "offsets must"),
        ("stride", lambda _: (1, 0), "stride must be at least 1, got 0"),
    ],
)
def test_backward_operator_refuses(name, change, words):
    case = MIXED[0]
    given = problem(case, torch.float32, "channels_last", grad_output="channels_last")
    operands = dict(
        zip(("grad_output", "input", "weight", "offsets", "stride"), backward_operands(given, case))
    )
    operands[name] = change(operands[name])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastconv.shift_conv2d_backward(*operands.values(), True, True, True)


@pytest.mark.parametrize("run", own, ids=str)
def test_any_shape_and_offsets(run):
    size = st.integers(1, 4 if run.slow else 20)
    channels, filters = st.integers(1, 6 if run.slow else 40), st.integers(1, 20)
    dtypes = [torch.float64, torch.float32]
    if dtype_for(run) == torch.float16:
        channels, filters, dtypes = *[st.sampled_from([8, 16, 24])] * 2, [torch.float16]

    @hypothesis.settings(max_examples=5 if run.slow else 15 if run.stands_in else 80)
    @hypothesis.given(
        st.tuples(st.integers(0, 2), channels, size, size),
        filters,
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from(dtypes),
        st.data(),
    )
    def property(shape, filters, stride, layout, dtype, data):
        offset = st.one_of(st.integers(-2, 2), st.integers(-22, 22), st.integers(LEAST, MOST))
        few = data.draw(st.lists(st.tuples(offset, offset), min_size=1, max_size=4))
        anyhow = st.lists(st.integers(0, len(few) - 1), min_size=shape[1], max_size=shape[1])
        offsets = torch.tensor([few[i] for i in data.draw(st.one_of(anyhow, anyhow.map(sorted)))])
        input = LAYOUTS[layout](lambda s: torch.randn(s, dtype=dtype, device=DEVICE), shape)
        weight = torch.randn(filters, shape[1], 1, 1, dtype=dtype, device=DEVICE)
        expected = shift_conv2d_reference(input.double(), offsets, weight.double(), None, stride)
        actual = shift_conv2d(input, offsets, weight, None, stride, **run.keywords)
        scale = max(math.sqrt(shape[1]), expected.abs().max().item() if expected.numel() else 0.0)
        assert_close(actual, expected, dtype, shape[1], scale)

    property()


# What the operator does beside the arithmetic; its gradients' gradients are in test_conv2d_autograd.py.


@pytest.mark.parametrize("run", [run for run in own if dtype_for(run) != torch.float16], ids=str)
def test_vmap_over_offsets(run):
    case = SMALL[0]
    input, weight, bias = problem(case, torch.float64).tensors.values()
    offsets = torch.stack([case.shift, -case.shift, 2 * case.shift])
    mapped = vmap(lambda o: shift_conv2d(input, o, weight, bias, **run.keywords))(offsets)
    for i, one in enumerate(offsets):
        assert_close(mapped[i], shift_conv2d_reference(input, one, weight, bias), torch.float64, 20)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("algorithm", ["implicit_gemm", "im2col", "plain"])
def test_bytes_are_those_of_the_convolution(algorithm, layout):
    """Without offsets those of the 1x1 convolution; with them less, for nothing outside is read."""
    case, dtype = Case((1, 40, 8, 9), 48), torch.float16
    given = cached_problem(case, dtype, layout)
    input, weight, bias = (given.tensors[name] for name in case.names)
    run = {"backend": "emulator", "algorithm": algorithm}
    nowhere = torch.zeros_like(case.shift)
    still = global_bytes(lambda: shift_conv2d(input, nowhere, weight, bias, **run))
    moved = global_bytes(lambda: shift_conv2d(input, case.shift, weight, bias, **run))
    if algorithm != "plain":
        assert still == global_bytes(lambda: conv2d(input, weight, bias, **run))
    inside = shift2d_reference(torch.ones_like(input), case.shift).sum().item()
    times = (still[0] - moved[0]) / (dtype.itemsize * (input.numel() - inside))  # that a value is read
    assert times == int(times) >= 1 and moved[1] == still[1] == given.grad_output.nbytes


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.parametrize("algorithm", ["direct", "im2col", "plain"])
def test_packed_weights(algorithm):
    """Packed once or in each call: the same bits."""
    case = MIXED[1]
    tensors, *_ = cached_problem(case, torch.float32)
    packed = torch.ops.fastconv.conv2d_pack_weight(tensors["weight"], 1, algorithm)
    operands = list(case.operands([tensors.get(name) for name in case.names], algorithm))

    def convolve(packed):
        operands[4] = packed
        return torch.ops.fastconv.shift_conv2d(*operands)

    assert torch.equal(convolve(packed), convolve(None))
    with pytest.raises(RuntimeError, match="packed must"):
        convolve(packed[:-1])


# Bad input: each error names the argument, what it was, and what is allowed.

IMAGE, WEIGHT, PAIRS = torch.zeros(1, 2, 4, 5), torch.zeros(3, 2, 1, 1), [(0, 1), (1, 0)]
BAD = {
    "input of rank 3": ({"input": IMAGE[0]}, ValueError, "input", "4 dimensions"),
    "a pair too few": ({"offsets": PAIRS[:1]}, ValueError, "offsets", "(2, 2)", "(1, 2)"),
    "offsets of floats": ({"offsets": torch.zeros(2, 2)}, TypeError, "offsets", "integers", "float32"),
    "offsets of bools": ({"offsets": [(True, False), (1, 0)]}, TypeError, "offsets[0]", "(True, False)"),
    "a weight with taps": ({"weight": torch.zeros(3, 2, 3, 3)}, ValueError, "weight", "(M, 2, 1, 1)", "3, 3"),
    "a weight of other channels": (
        {"weight": torch.zeros(3, 4, 1, 1)},
        ValueError,
        "weight must have shape (M, 2,",
        "(3, 4, 1, 1)",
    ),
    "a weight of another type": ({"weight": WEIGHT.double()}, TypeError, "weight", "float64"),
    "a bias of another size": ({"bias": torch.zeros(4)}, ValueError, "bias", "(3,)", "(4,)"),
    "no stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "an unknown activation": ({"activation": "tanh"}, ValueError, "activation", "'tanh'"),
    "an unknown backend": ({"backend": "fft"}, ValueError, "backend", "'fft'"),
    "a backend that it has not": ({"backend": "aten"}, fastconv.BackendError, "aten"),
    "an unknown algorithm": ({"backend": "reference", "algorithm": "fft"}, fastconv.BackendError, "'fft'"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    changed, error, *words = case
    arguments = {"input": IMAGE, "offsets": PAIRS, "weight": WEIGHT, "bias": None, **changed}
    with pytest.raises(error) as raised:
        shift_conv2d(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("channels, size", [(4104, (1, 1)), (8, (1, 32769))])
def test_more_than_a_launch_has_room_for(channels, size):
    """Offsets are parameters of a launch; the plain kernel takes several."""
    input, weight = torch.randn(1, channels, *size), torch.randn(8, channels, 1, 1) / channels**0.5
    offsets = torch.arange(channels * 2).reshape(-1, 2) % 3 - 1
    with pytest.raises(fastconv.BackendError, match="at most 4096 channels and images of 32767 rows"):
        shift_conv2d(input, offsets, weight, backend="emulator", algorithm="im2col")
    output = shift_conv2d(input, offsets, weight, backend="emulator", algorithm="plain")
    expected = shift_conv2d_reference(input.double(), offsets, weight.double())
    assert_close(output, expected, torch.float32, channels)

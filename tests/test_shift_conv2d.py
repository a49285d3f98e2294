"""shift_conv2d: every backend and algorithm that can run here against the reference in float64."""

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
from torch.func import vmap

import fastconv
from fastconv import conv2d, shift2d, shift2d_reference, shift_conv2d, shift_conv2d_reference
from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import memory_format_of

OP = "shift_conv2d"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
compiled = [run for run in runs(OP) if not run.stands_in]
Case = Shifted

GEOMETRY = [
    *(Case((2, 9, 5, 7), 4, offsets=offsets) for offsets in ("window", "scattered", "far")),
    *(Case((1, 18, 6, 5), 5, stride=stride) for stride in (2, (1, 2), (3, 1), (7, 9))),
    Case((2, 20, 7, 4), 9, stride=(2, 3), offsets="scattered", bias=False),
    Case((1, 1, 1, 1), 1),
    Case((3, 9, 1, 1), 2),
    Case((1, 7, 1, 9), 3, offsets="scattered"),
    Case((1, 7, 9, 1), 3, offsets="scattered", activation="relu"),
    Case((0, 9, 3, 3), 2),
    Case((1, 27, 8, 8), 16, activation="silu"),
    # channels and filters are multiples of 8, as tensor cores read them
    Case((1, 16, 5, 6), 8),
    Case((2, 72, 4, 5), 16, stride=2, offsets="scattered"),
    Case((1, 24, 3, 4), 40, activation="silu"),
    Case((1, 8, 7, 3), 8, stride=(1, 2), offsets="far"),
]
# Around the widths of vectors, blocks and tiles; runs of channels with one offset, and none.
CHANNELS = (1, 8, 15, 16, 17, 31, 33, 72, 135, 144, 153)
EDGES = [
    *(
        Case((1, c, 3, 5), 7 + c % 13, offsets=offsets)
        for c in CHANNELS
        for offsets in ("window", "scattered")
    ),
    *(Case((1, 9, 1, w), m) for w, m in zip((15, 16, 17, 63, 64, 65, 129), (1, 5, 6, 7, 12, 13, 17))),
    *(Case((2, 18, 7, w), 6, offsets="scattered") for w in (8, 9, 10)),
    *(Case((1, 18, 16, w), 6, stride=2) for w in (31, 32, 33)),
    Case((1, 2700, 2, 3), 4),
]
LARGE = [  # several tiles each way
    Case((2, 144, 29, 33), 70, activation="silu"),
    Case((1, 70, 23, 40), 130, stride=2, offsets="scattered"),
    Case((1, 300, 9, 11), 33, offsets="far"),
]
MIXED = [
    Case((2, 9, 5, 6), 7),
    Case((2, 20, 7, 8), 16, stride=(2, 1), offsets="scattered"),
    Case((1, 12, 4, 9), 6, stride=2, offsets="far"),
    Case((1, 16, 4, 5), 24, stride=(1, 2), offsets="scattered"),
]
SMALL = [Case((1, 9, 3, 4), 3), Case((1, 6, 5, 3), 2, stride=(2, 1), offsets="far")]
FEW = [*SMALL, *GEOMETRY[:4], GEOMETRY[8], Case((1, 17, 4, 3), 18, offsets="scattered")]


def test_every_run_has_cases():
    for run in runs(OP):
        served = [serves(run, case, layout) for case in (FEW if run.slow else GEOMETRY) for layout in DENSE]
        assert sum(served) >= 8, f"{run} serves {sum(served)} cases"


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
    output = case.call(shift_conv2d, [given.tensors.get(name) for name in case.names], **run.keywords)
    expected = memory_format_of(given.tensors["input"])
    assert output.stride() == torch.empty(output.shape, memory_format=expected).stride()


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


@each(own, case=([LARGE[0], MIXED[1], MIXED[3]], SMALL[1:]), layout=(DENSE, DENSE))
def test_same_bits_for_any_thread_count(case, layout, run, threads):
    case = MIXED[3] if run.stands_in else case
    given = cached_problem(case, dtype_for(run), layout, grad_output=layout)

    def bits():
        leaves = leaves_of(case, given)
        output = case.call(shift_conv2d, leaves, **run.keywords)
        return output, *torch.autograd.grad(output, leaves, given.grad_output)

    first = bits()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@each(own, case=(MIXED, SMALL[1:]), needed=([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], [(0, 1, 0)]))
def test_only_needed_gradients(case, needed, run):
    given = cached_problem(case, dtype_for(run, torch.float64))
    leaves = [t.requires_grad_(bool(need)) for t, need in zip(leaves_of(case, given), needed)]
    case.call(shift_conv2d, leaves, **run.keywords).backward(given.grad_output)
    for leaf, need, name in zip(leaves, needed, case.names):
        assert (leaf.grad is not None) == bool(need)
        if need:
            dtype, terms = given.grad_output.dtype, case.terms[name]
            assert_close(leaf.grad, given.expected[name], dtype, terms, name=name)


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
        ("input", lambda t: t.contiguous(), "input must be channels_last"),
        ("grad_output", lambda t: t[:, :2], "grad_output must have size 7 in dimension 1"),
        ("grad_output", lambda t: t.double(), "grad_output must"),
        ("offsets", lambda t: t[1:], "offsets must"),
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


@each(
    own,
    layout=([*DENSE, "channels_last_channel_slice", "expanded_channels"], ["channels_last"]),
    case=([SMALL[1], Case((3, 9, 1, 1), 2), Case((2, 4, 3, 3), 1)], [SMALL[1]]),
)
def test_strides_are_the_fakes(case, layout, run):
    """torch.compile plans memory by the fake's strides, and crashes on others."""
    tensors, *_ = problem(case, dtype_for(run), layout)
    mode = FakeTensorMode()

    def output(convert):
        given = [convert(tensors[name]) for name in case.names]
        input, offsets, *rest = case.operands(given, run.algorithm)
        return run.operator(OP)(input, convert(offsets), *rest)

    real, fake = output(lambda t: t), output(mode.from_tensor)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


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

"""shift2d: every backend and algorithm that can run here against the reference, bit for bit."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, global_bytes, of_each_backend, runs, zeros_beyond_32_bits
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastconv import BackendError, shift2d, shift2d_reference
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import OVERLOADS, memory_format_of

OP = "shift2d"
each_run = pytest.mark.parametrize("run", runs(OP), ids=str)
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
DENSE = ["contiguous", "channels_last"]
SAMPLES = [*DENSE, "stepped", "channel_slice"]
SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAST, MOST = -(2**63), 2**63 - 1


def make(shape, dtype=torch.float32):
    """Any bits: numbers, infinities and NaNs of every kind."""
    bits = torch.randint(LEAST, MOST, shape, dtype=torch.int64)
    return bits.to(SAME_SIZE[dtype.itemsize]).view(dtype).to(DEVICE)


def numbers(shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def directions(channels, kernel=3):
    """As ShiftNet has it: a run of neighbouring channels for each place in the kernel."""
    place = torch.arange(channels) * kernel**2 // max(channels, 1)
    return torch.stack([place // kernel, place % kernel], 1) - kernel // 2


def scattered(channels, most=3):
    return torch.randint(-most, most + 1, (channels, 2))


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = SAME_SIZE[expected.dtype.itemsize]
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def check(run, input, offsets):
    """Output and gradient; both dense, in the memory format of what they are made from."""
    leaf = input.detach().requires_grad_()
    output = shift2d(leaf, offsets, **run.keywords)
    offsets = torch.as_tensor(offsets).reshape(-1, 2)
    assert_same_bits(output.detach(), shift2d_reference(input, offsets))
    if input.numel():
        dense = torch.empty(input.shape, memory_format=memory_format_of(input))
        assert output.stride() == dense.stride()
        assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
    # The reference's own gradient adds zeros, which changes some bits: of what is no number, and of -0.
    exact = run.backend in OVERLOADS
    grad_output = make(output.shape, input.dtype) if exact else torch.randn_like(output).abs()
    (gradient,) = torch.autograd.grad(output, leaf, grad_output)
    assert_same_bits(gradient, shift2d_reference(grad_output, -offsets))


# The reference, once, against outside oracles and the formula.


@pytest.mark.parametrize("offsets", [directions(18), scattered(18), scattered(18, 9)])
def test_reference_is_a_convolution_with_one_hot_filters(offsets):
    input = numbers((2, 18, 6, 7))
    most = int(offsets.abs().max())
    weight = torch.zeros(18, 1, 2 * most + 1, 2 * most + 1, dtype=input.dtype, device=DEVICE)
    for channel, (dh, dw) in enumerate(offsets.tolist()):
        weight[channel, 0, most + dh, most + dw] = 1
    expected = torch.nn.functional.conv2d(input, weight, padding=most, groups=18)
    assert torch.equal(shift2d_reference(input, offsets), expected)


@pytest.mark.parametrize("dh", [-9, -5, -4, -1, 0, 2, 4, 5, 6, LEAST, MOST])
@pytest.mark.parametrize("dw", [-8, -7, -6, 0, 1, 6, 7, LEAST, MOST])
def test_reference_is_slices(dh, dw):
    input = make((2, 1, 5, 7))
    expected = torch.zeros_like(input)
    for h in range(5):
        for w in range(7):
            if 0 <= h + dh < 5 and 0 <= w + dw < 7:
                expected[:, :, h, w] = input[:, :, h + dh, w + dw]
    assert_same_bits(shift2d_reference(input, torch.tensor([[dh, dw]])), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_reference_of_any_type(dtype):
    input = torch.randint(0, 2, (1, 2, 3, 4), device=DEVICE).to(dtype)
    output = shift2d_reference(input, torch.tensor([[0, 1], [0, 0]]))
    assert torch.equal(output[:, 0, :, :-1], input[:, 0, :, 1:]) and not output[:, 0, :, -1].any()
    assert torch.equal(output[:, 1], input[:, 1])


# Every kernel against the reference.

# Channels: runs around a vector's width, one after the other, and more than a launch's table holds.
CHANNELS = [1, 2, 3, 8, 9, 18, 27, 45, 63, 72, 81, 135, 144, 153, 270, 300, 600]
FEW = [1, 9, 20]
SIZES = [(2, 5, 7), (1, 1, 1), (3, 1, 1), (1, 1, 9), (1, 9, 1), (2, 16, 20)]  # images, height, width


@for_runs(runs(OP), layout=(DENSE, DENSE), channels=(CHANNELS, FEW), offsets=([directions, scattered],) * 2)
def test_channels(channels, offsets, layout, run):
    check(run, LAYOUTS[layout](make, (2, channels, 3, 4)), offsets(channels))


@for_runs(runs(OP), layout=(DENSE, DENSE), shift=([0, -(2**40), 2**40, LEAST, MOST],) * 2)
def test_one_shift_for_all(shift, layout, run):
    """By zero, the identity; beyond the image, nothing."""
    input = LAYOUTS[layout](make, (2, 5, 4, 6))
    check(run, input, torch.full((5, 2), shift))
    output = shift2d(input, torch.full((5, 2), shift), **run.keywords)
    assert_same_bits(output, input if shift == 0 else torch.zeros_like(input))


@for_runs(runs(OP), layout=(DENSE, DENSE), kernel=([5, 7, 21], [21]))
def test_offsets_up_to_larger_than_the_image(kernel, layout, run):
    check(run, LAYOUTS[layout](make, (1, kernel**2, 6, 5)), directions(kernel**2, kernel))


@for_runs(
    runs(OP),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    offsets=([directions, scattered], [directions]),
    channels=([9, 40, 297], [9]),
    size=(SIZES, SIZES[:2]),
    cover=["dtype layout channels", "size layout", "size dtype", "size channels", "offsets layout dtype"],
    where=lambda run, dtype, **_: run.serves(dtype),  # test_backends.py holds which
)
def test_dtypes_and_sizes(size, channels, offsets, layout, dtype, run):
    shape = (size[0], channels, *size[1:])
    check(run, LAYOUTS[layout](functools.partial(make, dtype=dtype), shape), offsets(channels))


# One channel or one pixel: the strides alone do not tell contiguous from channels_last.
SHAPES = [(2, 6, 4, 5), (1, 1, 1, 2), (2, 3, 1, 1)]


@for_runs(runs(OP), shape=(SHAPES, SHAPES), layout=(LAYOUTS, LAYOUTS))
def test_layouts(layout, shape, run):
    check(run, LAYOUTS[layout](make, shape), scattered(shape[1]))


NOTHING = [(0, 6, 4, 5), (2, 0, 4, 5), (2, 6, 0, 5), (2, 6, 4, 0), (0, 0, 0, 0)]


@for_runs(runs(OP), shape=(NOTHING, NOTHING), layout=(DENSE, DENSE))
def test_nothing(layout, shape, run):
    check(run, LAYOUTS[layout](make, shape), scattered(shape[1]))


@pytest.mark.parametrize("run", runs(OP), ids=str)
def test_any_shape_and_offsets(run):
    sizes = st.tuples(
        st.integers(1, 2), st.integers(1, 6 if run.slow else 40), st.integers(1, 9), st.integers(1, 9)
    )

    @hypothesis.settings(max_examples=6 if run.slow else 30 if run.stands_in else 80)
    @hypothesis.given(sizes, st.sampled_from(sorted(LAYOUTS)), st.sampled_from(DTYPES), st.data())
    def same_as_reference(shape, layout, dtype, data):
        offset = st.one_of(st.integers(-2, 2), st.integers(-10, 10), st.integers(LEAST, MOST))
        few = data.draw(st.lists(st.tuples(offset, offset), min_size=1, max_size=4))
        offsets = [few[place] for place in data.draw(repeated(len(few), shape[1]))]
        if run.serves(dtype):
            check(run, LAYOUTS[layout](functools.partial(make, dtype=dtype), shape), offsets)

    same_as_reference()


def repeated(values, count):
    """Which of some values each of `count` channels has: in runs, or anyhow."""
    anyhow = st.lists(st.integers(0, values - 1), min_size=count, max_size=count)
    return st.one_of(anyhow, anyhow.map(sorted))


@each_own_run
def test_any_thread_count(run, threads):
    for count in (1, 2, 5):
        threads(count)
        for layout in DENSE:
            check(run, LAYOUTS[layout](make, (3, 18, 3, 5)), directions(18))


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint64])
def test_offsets_of_any_integers(dtype):
    input = make((1, 2, 3, 4))
    offsets = [[0, 1], [2, 3]]
    expected = shift2d(input, offsets)
    assert_same_bits(shift2d(input, torch.tensor(offsets).to(dtype)), expected)
    assert_same_bits(shift2d(input, torch.tensor(offsets, device=DEVICE).to(dtype)), expected)


def test_offsets_as_they_come():
    input = make((1, 3, 5, 4))
    offsets = [(1, -1), [0, 2], (-2, 1)]
    expected = shift2d(input, torch.tensor(offsets))
    stepped = torch.zeros(3, 4, dtype=torch.int64)
    stepped[:, ::2] = torch.tensor(offsets)
    for given in (offsets, tuple(offsets), np.array(offsets), torch.tensor(offsets).t().contiguous().t()):
        assert_same_bits(shift2d(input, given), expected)
    assert_same_bits(shift2d(input, stepped[:, ::2]), expected)
    far = shift2d(input, [(10**30, 0), (0, -(10**30)), (2**63, -(2**63))])
    assert_same_bits(far, torch.zeros_like(input))
    farther = torch.tensor([[2**64 - 1, 0], [0, 2**63], [0, 0]], dtype=torch.uint64)
    assert_same_bits(shift2d(input, farther)[:, :2], torch.zeros_like(input[:, :2]))


@each_own_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 6, 1, 1), (2, 1, 2, 3), (0, 6, 2, 3)])
def test_strides_are_the_fakes(shape, layout, run):
    input, offsets = LAYOUTS[layout](make, shape), scattered(shape[1])
    real = run.operator(OP)(input, offsets, run.algorithm)
    fakes = FakeTensorMode()
    fake = run.operator(OP)(fakes.from_tensor(input), fakes.from_tensor(offsets), run.algorithm)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# Differentiated, transformed, compiled.


@each_run
@pytest.mark.parametrize("layout", DENSE)
def test_gradcheck(layout, run):
    input = LAYOUTS[layout](numbers, (1, 3, 2, 3)).requires_grad_()
    f = functools.partial(shift2d, offsets=[(1, 0), (0, -1), (5, 5)], **run.keywords)
    assert torch.autograd.gradcheck(f, input, fast_mode=run.slow)
    assert torch.autograd.gradgradcheck(f, input, fast_mode=run.slow)


@each_run
@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_vmap_and_func_grad(in_dim, run):
    input = numbers((2, 6, 2, 3, 4))
    offsets = directions(input.movedim(in_dim, 0).shape[2])
    f = functools.partial(shift2d, offsets=offsets, **run.keywords)

    def each(f):
        return lambda x: (f(x), grad(lambda x: f(x).pow(3).sum())(x))

    reference = each(functools.partial(shift2d_reference, offsets=offsets))
    mapped = vmap(each(f), in_dim)(input)
    for i, one in enumerate(input.unbind(in_dim)):
        for a, e in zip(mapped, reference(one)):
            assert torch.equal(a[i], e)


@each_own_run
def test_vmap_over_offsets(run):
    input, offsets = numbers((2, 4, 3, 5)), torch.stack([directions(4), scattered(4), directions(4, 2)])
    mapped = vmap(lambda o: shift2d(input, o, **run.keywords))(offsets)
    for i, one in enumerate(offsets):
        assert_same_bits(mapped[i], shift2d_reference(input, one))


def test_offsets_changed_before_the_gradient_raise():
    offsets = directions(9)
    output = shift2d(numbers((1, 9, 3, 3)).requires_grad_(), offsets, **runs(OP, own=True)[0].keywords)
    offsets.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@for_runs(
    of_each_backend(runs(OP, own=True)),
    layout=(SAMPLES, SAMPLES),
    batch=([2, 0], [2, 0]),
    cover=["layout", "batch"],
)
def test_opcheck(batch, layout, run):
    input = LAYOUTS[layout](numbers, (batch, 6, 2, 3)).detach().requires_grad_()
    torch.library.opcheck(run.operator(OP), (input, scattered(6), run.algorithm))


@for_runs(of_each_backend(runs(OP)), layout=(DENSE, DENSE))
def test_compile_and_export(layout, run):
    offsets = directions(6)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("offsets", offsets)

        def forward(self, x):
            return shift2d(x, self.offsets, **run.keywords)

    listed = functools.partial(shift2d, offsets=offsets.tolist(), **run.keywords)
    for f in (Layer(), listed):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch, size in ((2, 3), (4, 5)):
            input = LAYOUTS[layout](numbers, (batch, 6, size, size)).requires_grad_()
            output = compiled(input)
            assert_same_bits(output.detach(), shift2d_reference(input, offsets).detach())
            assert output.stride() == torch.empty_like(input).stride()
            (gradient,) = torch.autograd.grad(output.square().sum(), input)
            expected = shift2d_reference(2 * shift2d_reference(input, offsets), -offsets)
            assert torch.equal(gradient, expected)
    exported = torch.export.export(Layer(), (input,)).module()
    assert_same_bits(exported(input).detach(), shift2d_reference(input, offsets).detach())


@each_run
def test_autocast_leaves_the_type_alone(run):
    with torch.autocast(DEVICE, dtype=torch.float16):
        output = shift2d(make((1, 6, 2, 3)), directions(6), **run.keywords)
    assert output.dtype == torch.float32


@each_own_run
def test_no_arithmetic(run):
    with FlopCounterMode(display=False) as counter:
        shift2d(make((1, 6, 2, 3)), directions(6), **run.keywords)
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("algorithm", ["tiled", "plain"])
def test_bytes_are_those_of_a_copy(algorithm, layout):
    """Nothing is read twice, and what leaves the image is not read at all."""
    input = LAYOUTS[layout](lambda shape: torch.randn(shape), (1, 288, 8, 8))
    read, written = global_bytes(
        lambda: shift2d(input, directions(288), backend="emulator", algorithm=algorithm)
    )
    assert written == input.nbytes
    assert read == 4 * shift2d_reference(torch.ones_like(input), directions(288)).sum()


# Bad input: each error names the argument, what it was, and what is allowed.

IMAGE = torch.zeros(1, 2, 3, 4)
PAIRS = [(0, 1), (1, 0)]
BAD = {
    "input is no tensor": ([[1.0]], PAIRS, TypeError, "input", "torch.Tensor", "list"),
    "input of rank 3": (IMAGE[0], PAIRS, ValueError, "input", "4 dimensions", "(2, 3, 4)"),
    "an image of integers": (IMAGE.int(), PAIRS, TypeError, "input", "float32", "int32"),
    "one pair too few": (IMAGE, PAIRS[:1], ValueError, "offsets", "(2, 2)", "(1, 2)"),
    "one pair too many": (IMAGE, [*PAIRS, (0, 0)], ValueError, "offsets", "(2, 2)", "(3, 2)"),
    "no pairs": (IMAGE, [], ValueError, "offsets", "(2, 2)", "(0, 2)"),
    "a triple": (IMAGE, [(0, 1), (1, 0, 2)], ValueError, "offsets", "a pair", "(1, 0, 2)"),
    "a tensor of triples": (IMAGE, torch.zeros(2, 3).int(), ValueError, "offsets", "(2, 2)", "(2, 3)"),
    "a flat tensor": (IMAGE, torch.zeros(4).int(), ValueError, "offsets", "(2, 2)", "(4,)"),
    "floats": (IMAGE, [(0, 1), (1.5, 0)], TypeError, "offsets[1]", "an integer", "1.5"),
    "a tensor of floats": (IMAGE, torch.zeros(2, 2), TypeError, "offsets", "integers", "float32"),
    "a tensor of bools": (IMAGE, torch.zeros(2, 2).bool(), TypeError, "offsets", "integers", "bool"),
    "bools": (IMAGE, [(0, 1), (True, 0)], TypeError, "offsets[1]", "integers", "(True, 0)"),
    "an array of bools": (IMAGE, np.zeros((2, 2), bool), TypeError, "offsets[0]", "integer", "False"),
    "tensors of bools": (IMAGE, [torch.zeros(2).bool()] * 2, TypeError, "offsets[0]", "integers", "False"),
    "a tensor without values": (IMAGE, torch.zeros(2, 2, device="meta").int(), TypeError, "offsets", "meta"),
    "a sparse tensor": (IMAGE, torch.zeros(2, 2).int().to_sparse(), TypeError, "offsets", "torch.sparse_coo"),
    "one number": (IMAGE, 1, TypeError, "offsets", "a sequence of pairs", "1"),
    "a flat list": (IMAGE, [0, 1], TypeError, "offsets", "a sequence of pairs", "[0, 1]"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    input, offsets, error, *words = case
    with pytest.raises(error) as raised:
        shift2d(input, offsets)
    assert all(word in str(raised.value) for word in words), raised.value


@each_run
def test_unknown_algorithm(run):
    with pytest.raises(BackendError, match="algorithm must be None or one of .*'fft'"):
        shift2d(make((1, 2, 2, 2)), PAIRS, backend=run.backend, algorithm="fft")


OPERATOR_BAD = {
    "input of rank 3": (IMAGE[0], torch.tensor(PAIRS)),
    "an image of integers": (IMAGE.int(), torch.tensor(PAIRS)),
    "offsets of rank 1": (IMAGE, torch.tensor(PAIRS).flatten()),
    "one pair too few": (IMAGE, torch.tensor(PAIRS[:1])),
    "triples": (IMAGE, torch.zeros(2, 3, dtype=torch.int64)),
    "32 bits": (IMAGE, torch.tensor(PAIRS, dtype=torch.int32)),
    "algorithm": (IMAGE, torch.tensor(PAIRS), "fft"),
}


@each_own_run
@pytest.mark.parametrize("bad", OPERATOR_BAD.values(), ids=OPERATOR_BAD)
def test_operator_refuses(bad, run):
    input, offsets, algorithm = (*bad, run.algorithm)[:3]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run.operator(OP)(input.to(DEVICE), offsets, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_2_to_the_31_elements(layout, run):
    image = zeros_beyond_32_bits(layout)
    image[0, 4, -1, -1] = 3.0
    output = shift2d(image, [(2, 1)] * 6, **run.keywords)
    assert output[0, 4, -3, -2] == 3.0 and output.count_nonzero() == 1

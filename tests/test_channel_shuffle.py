"""Channel shuffle: every backend and algorithm that can run here against the reference, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, of_each_backend, runs, zeros_beyond_32_bits
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastconv import BackendError, channel_shuffle, channel_shuffle_reference, emulator
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import OVERLOADS, memory_format_of

OP = "channel_shuffle"
each_run = pytest.mark.parametrize("run", runs(OP), ids=str)
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
DENSE = ["contiguous", "channels_last"]
SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def make(shape, dtype=torch.float32):
    """Any bits: numbers, infinities and NaNs of every kind."""
    bits = torch.randint(-(2**63), 2**63 - 1, shape, dtype=torch.int64)
    return bits.to(SAME_SIZE[dtype.itemsize]).view(dtype).to(DEVICE)


def numbers(shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def assert_same_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = SAME_SIZE[expected.dtype.itemsize]
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def check(run, input, groups):
    """Output and gradient; both dense, in the memory format of what they are made from."""
    expected = channel_shuffle_reference(input, groups)
    leaf = input.detach().requires_grad_()
    output = channel_shuffle(leaf, groups, **run.keywords)
    assert_same_bits(output.detach(), expected)
    if input.numel():
        dense = torch.empty(input.shape, memory_format=memory_format_of(input))
        assert output.stride() == dense.stride()
        assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
    # PyTorch's own gradients add zeros, which changes some bits that are no numbers.
    grad_output = make(output.shape, input.dtype) if run.backend in OVERLOADS else torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, leaf, grad_output)
    assert_same_bits(channel_shuffle_reference(gradient, groups), grad_output)


# The reference, once, against an outside oracle and the formula.


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_reference_is_pytorchs(groups):
    input = make((2, 12, 3, 4))
    output = channel_shuffle_reference(input, groups)
    assert_same_bits(output, torch.nn.functional.channel_shuffle(input, groups))
    for g in range(groups):
        for k in range(12 // groups):
            assert_same_bits(output[:, k * groups + g], input[:, g * (12 // groups) + k])


# Every kernel against the reference.

# (channels, groups): one group, a group for each channel, S groups or S channels in a group around a vector's
# width, and what is neither.
CHANNELS = [(6, 1), (6, 6), (12, 3), (1, 1)]
CHANNELS += [(s * n, g) for s in (2, 3, 4, 8) for n in (1, 7, 8, 9, 16, 17, 33, 65) for g in (s, n)]
CHANNELS += [(5 * 7, 5), (7 * 11, 11), (10 * 12, 10), (6 * 40, 6)]
FEW = [(6, 1), (6, 6), (12, 3), (12, 4), (35, 5)]
SHAPES = [(2, 5, 7), (1, 1, 1), (3, 1, 1), (1, 1, 9), (2, 16, 20)]  # images, height, width


@for_runs(runs(OP), layout=(DENSE, DENSE), channels=(CHANNELS, FEW))
def test_channels(channels, layout, run):
    count, groups = channels
    check(run, LAYOUTS[layout](make, (2, count, 2, 3)), groups)


@for_runs(
    runs(OP),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    channels=([(12, 3), (240, 3), (96, 32), (35, 5)], [(12, 3)]),
    size=(SHAPES, SHAPES[:2]),
    cover=["dtype layout channels", "size layout", "size dtype", "size channels"],
    where=lambda run, dtype, **_: run.serves(dtype),  # test_backends.py holds which
)
def test_dtypes_and_sizes(size, channels, layout, dtype, run):
    shape = (size[0], channels[0], *size[1:])
    check(run, LAYOUTS[layout](functools.partial(make, dtype=dtype), shape), channels[1])


@for_runs([run for run in runs(OP) if run.backend != "aten"], layout=(LAYOUTS, LAYOUTS))
def test_layouts_of_one_pixel(layout, run):
    check(run, LAYOUTS[layout](make, (2, 6, 1, 1)), 3)


@for_runs(runs(OP), layout=(LAYOUTS, LAYOUTS))
def test_layouts(layout, run):
    check(run, LAYOUTS[layout](make, (2, 6, 4, 5)), 3)


NOTHING = [(0, 6, 4, 5), (2, 0, 4, 5), (2, 6, 0, 5), (0, 0, 0, 0)]


@for_runs(runs(OP), shape=(NOTHING, NOTHING), layout=(DENSE, DENSE))
def test_nothing(layout, shape, run):
    if run.backend == "aten" and shape[1] == 0:
        with pytest.raises(BackendError, match="at least one channel"):
            channel_shuffle(make(shape), 3, **run.keywords)
        return
    check(run, LAYOUTS[layout](make, shape), 3)


@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.slow], ids=str)
@pytest.mark.parametrize("channels, groups", [(20000, 5), (60000, 4)])
def test_pixels_larger_than_a_tile(channels, groups, run):
    check(run, make((1, channels, 1, 2)).contiguous(memory_format=torch.channels_last), groups)


@each_own_run
def test_any_thread_count(run, threads):
    for count in (1, 2, 5):
        threads(count)
        for layout in DENSE:
            check(run, LAYOUTS[layout](make, (3, 12, 3, 5)), 4)


@each_own_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 6, 1, 1), (2, 1, 2, 3), (0, 6, 2, 3)])
def test_strides_are_the_fakes(shape, layout, run):
    input = LAYOUTS[layout](make, shape)
    real = run.operator(OP)(input, shape[1], run.algorithm)
    fake = run.operator(OP)(FakeTensorMode().from_tensor(input), shape[1], run.algorithm)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# Differentiated, transformed, compiled.


@each_run
@pytest.mark.parametrize("layout", DENSE)
def test_gradcheck(layout, run):
    input = LAYOUTS[layout](numbers, (1, 6, 1, 2)).requires_grad_()
    f = functools.partial(channel_shuffle, groups=3, **run.keywords)
    assert torch.autograd.gradcheck(f, input, fast_mode=run.slow)
    assert torch.autograd.gradgradcheck(f, input, fast_mode=run.slow)


@each_run
@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_vmap_and_func_grad(in_dim, run):
    input = numbers((2, 6, 2, 3, 4))
    f = functools.partial(channel_shuffle, groups=2, **run.keywords)

    def each(f):
        return lambda x: (f(x), grad(lambda x: f(x).pow(3).sum())(x))

    reference = each(functools.partial(channel_shuffle_reference, groups=2))
    mapped = vmap(each(f), in_dim)(input)
    for i, one in enumerate(input.unbind(in_dim)):
        for a, e in zip(mapped, reference(one)):
            assert_same_bits(a[i], e)


@each_own_run
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_opcheck(layout, run):
    input = LAYOUTS[layout](numbers, (2, 6, 2, 3)).detach().requires_grad_()
    torch.library.opcheck(run.operator(OP), (input, 3, run.algorithm))


@for_runs(of_each_backend(runs(OP)), layout=(DENSE, DENSE))
def test_compile_and_export(layout, run):
    f = functools.partial(channel_shuffle, groups=2, **run.keywords)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((2, 3), (4, 5)):
        input = LAYOUTS[layout](numbers, (batch, 6, size, size)).requires_grad_()
        output = compiled(input)
        assert_same_bits(output.detach(), channel_shuffle_reference(input, 2).detach())
        assert output.stride() == torch.empty_like(input).stride()
        (gradient,) = torch.autograd.grad(output.square().sum(), input)
        assert_same_bits(gradient, 2 * input.detach())

    class Layer(torch.nn.Module):
        def forward(self, x):
            return f(x)

    exported = torch.export.export(Layer(), (input,)).module()
    assert_same_bits(exported(input).detach(), channel_shuffle_reference(input, 2).detach())


@each_run
def test_autocast_leaves_the_type_alone(run):
    input = make((1, 6, 2, 3))
    with torch.autocast(DEVICE, dtype=torch.float16):
        output = channel_shuffle(input, 3, **run.keywords)
        theirs = torch.nn.functional.channel_shuffle(input, 3)
    assert output.dtype == theirs.dtype == torch.float32


@each_own_run
def test_no_arithmetic(run):
    with FlopCounterMode(display=False) as counter:
        channel_shuffle(make((1, 6, 2, 3)), 3, **run.keywords)
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("groups", [3, 8])
def test_tiled_kernel_wastes_no_sector(groups):
    """channels_last: plain asks for sectors that it reads a part of; tiled for whole ones."""
    input = torch.randn(1, 240, 8, 8).contiguous(memory_format=torch.channels_last)
    efficiency = {}
    for algorithm in ("plain", "tiled"):
        with emulator.count() as counters:
            channel_shuffle(input, groups, backend="emulator", algorithm=algorithm)
        (kernel,) = counters.values()
        assert kernel["store_efficiency"] == 1
        efficiency[algorithm] = kernel["load_efficiency"]
    assert efficiency["plain"] < 0.75 < efficiency["tiled"] == 1


# Bad input: each error names the argument, what it was, and what is allowed.

BAD = {
    "input is no tensor": ([[1.0]], 1, TypeError, "input", "torch.Tensor", "list"),
    "input of rank 3": (torch.zeros(6, 4, 5), 3, ValueError, "input", "4 dimensions", "(6, 4, 5)"),
    "integers": (torch.zeros(1, 6, 2, 2, dtype=torch.int32), 3, TypeError, "input", "float32", "int32"),
    "groups do not divide": (torch.zeros(1, 6, 2, 2), 4, ValueError, "groups", "6 channels", "4"),
    "more groups than channels": (torch.zeros(1, 6, 2, 2), 12, ValueError, "groups", "6 channels", "12"),
    "no groups": (torch.zeros(1, 6, 2, 2), 0, ValueError, "groups", "at least 1", "0"),
    "groups below 0": (torch.zeros(1, 6, 2, 2), -3, ValueError, "groups", "at least 1", "-3"),
    "groups of a float": (torch.zeros(1, 6, 2, 2), 3.0, TypeError, "groups", "an integer", "3.0"),
    "groups of a pair": (torch.zeros(1, 6, 2, 2), (3, 2), TypeError, "groups", "an integer", "(3, 2)"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    input, groups, error, *words = case
    with pytest.raises(error) as raised:
        channel_shuffle(input, groups)
    assert all(word in str(raised.value) for word in words), raised.value


@each_run
def test_unknown_algorithm(run):
    with pytest.raises(BackendError, match="algorithm must be None or one of .*'fft'"):
        channel_shuffle(make((1, 6, 2, 2)), 3, backend=run.backend, algorithm="fft")


OPERATOR_BAD = {
    **{name: case[:2] for name, case in BAD.items() if isinstance(case[0], torch.Tensor)},
    "algorithm": (torch.zeros(1, 6, 2, 2), 3, "fft"),
}


@each_own_run
@pytest.mark.parametrize("bad", OPERATOR_BAD.values(), ids=OPERATOR_BAD)
def test_operator_refuses(bad, run):
    input, groups, algorithm = (*bad, run.algorithm)[:3]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run.operator(OP)(input.to(DEVICE), groups, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_2_to_the_31_elements(layout, run):
    image = zeros_beyond_32_bits(layout)
    image[0, 3, -1, -1] = 3.0  # the second of the second group
    output = channel_shuffle(image, 3, **run.keywords)
    assert output[0, 4, -1, -1] == 3.0 and output.count_nonzero() == 1

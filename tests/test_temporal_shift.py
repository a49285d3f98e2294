"""temporal_shift: every backend and algorithm that can run here against the reference, bit for bit."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, of_each_backend, runs
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastconv import BackendError, emulator, temporal_shift, temporal_shift_reference
from fastconv.ops._arguments import DTYPES
from fastconv.ops._operator import OVERLOADS, memory_format_of

OP = "temporal_shift"
each_run = pytest.mark.parametrize("run", runs(OP), ids=str)
each_own_run = pytest.mark.parametrize("run", runs(OP, own=True), ids=str)
DENSE = ["contiguous", "channels_last"]
SAMPLES = [*DENSE, "stepped", "channel_slice"]
BOTH = [False, True]
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


def opposite(input, segments, fold_div, causal):
    """The gradient's formula: the shift of the clips that are read from their ends."""
    clips = input.unflatten(0, (input.shape[0] // segments, segments)).flip(1).flatten(0, 1)
    shifted = temporal_shift_reference(clips, segments, fold_div, causal=causal)
    return shifted.unflatten(0, (input.shape[0] // segments, segments)).flip(1).flatten(0, 1)


def check(run, input, segments, fold_div=8, causal=False):
    """Output and gradient; both dense, in the memory format of what they are made from."""
    leaf = input.detach().requires_grad_()
    output = temporal_shift(leaf, segments, fold_div, causal=causal, **run.keywords)
    assert_same_bits(output.detach(), temporal_shift_reference(input, segments, fold_div, causal=causal))
    if input.numel():
        dense = torch.empty(input.shape, memory_format=memory_format_of(input))
        assert output.stride() == dense.stride()
        assert output.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
    # The reference's own gradient adds zeros, which changes some bits: of what is no number, and of -0.
    exact = run.backend in OVERLOADS
    grad_output = make(output.shape, input.dtype) if exact else torch.randn_like(output).abs()
    (gradient,) = torch.autograd.grad(output, leaf, grad_output)
    assert_same_bits(gradient, opposite(grad_output, segments, fold_div, causal))


# The reference, once, against the formula.


@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("channels, fold_div", [(8, 8), (8, 4), (7, 3), (5, 2), (3, 8), (4, 100)])
@pytest.mark.parametrize("clips, segments", [(2, 4), (1, 3), (3, 1), (2, 2)])
def test_reference_is_the_formula(clips, segments, channels, fold_div, causal):
    input = make((clips * segments, channels, 2, 3))
    fold = channels // fold_div
    expected = torch.zeros_like(input)
    for clip in range(clips):
        for t in range(segments):
            for c in range(channels):
                step = 1 if c < fold else -1 if c < 2 * fold else 0
                if causal:
                    step = -1 if c < fold else 0
                if 0 <= t + step < segments:
                    expected[clip * segments + t, c] = input[clip * segments + t + step, c]
    assert_same_bits(temporal_shift_reference(input, segments, fold_div, causal=causal), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_reference_of_any_type(dtype):
    input = torch.randint(0, 2, (2, 8, 3, 4), device=DEVICE).to(dtype)
    output = temporal_shift_reference(input, 2)
    assert torch.equal(output[0, 0], input[1, 0]) and torch.equal(output[1, 1], input[0, 1])
    assert torch.equal(output[:, 2:], input[:, 2:]) and not output[1, 0].any() and not output[0, 1].any()


def test_one_fold_may_be_all_channels_if_causal():
    input = make((4, 3, 2, 2))
    for run in runs(OP):
        output = temporal_shift(input, 4, 1, causal=True, **run.keywords)
        assert_same_bits(output[1:], input[:-1])
        assert not output[0].any()


# Every kernel against the reference.

# Folds around the width of vectors, and rows that are whole vectors, or not.
FOLDS = [(1, 2), (2, 2), (3, 8), (8, 8), (16, 4), (24, 3), (31, 8), (32, 8), (48, 5), (64, 8), (65, 8)]
FOLDS += [(128, 8), (200, 7), (256, 3), (256, 8), (300, 8)]
FEW = [(8, 4), (20, 3)]
SIZES = [(6, 3, 5, 7), (1, 1, 1, 1), (3, 1, 1, 1), (4, 2, 1, 9), (2, 2, 9, 1), (4, 4, 16, 20)]  # B*T, T, H, W


@for_runs(runs(OP), layout=(DENSE, DENSE), causal=(BOTH, BOTH), folds=(FOLDS, FEW))
def test_folds(folds, causal, layout, run):
    channels, fold_div = folds
    check(run, LAYOUTS[layout](make, (6, channels, 3, 4)), 3, fold_div, causal)


@for_runs(
    runs(OP),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    causal=(BOTH, [False]),
    channels=([9, 40, 64], [9]),
    size=(SIZES, SIZES[:2]),
    cover=["dtype layout channels", "size layout", "size dtype", "size channels", "causal layout dtype"],
    where=lambda run, dtype, **_: run.serves(dtype),  # test_backends.py holds which
)
def test_dtypes_and_sizes(size, channels, causal, layout, dtype, run):
    frames, segments, height, width = size
    input = LAYOUTS[layout](functools.partial(make, dtype=dtype), (frames, channels, height, width))
    check(run, input, segments, 4, causal)


@for_runs(runs(OP), layout=(DENSE, DENSE), fold_div=([17, 10**30], [17, 10**30]))
def test_without_a_fold_nothing_moves(fold_div, layout, run):
    input = LAYOUTS[layout](make, (4, 16, 3, 5))
    check(run, input, 2, fold_div)
    assert_same_bits(temporal_shift(input, 2, fold_div, **run.keywords), input)


@for_runs(runs(OP), layout=(DENSE, DENSE), causal=(BOTH, BOTH))
def test_frames_without_neighbours(causal, layout, run):
    input = LAYOUTS[layout](make, (3, 16, 3, 5))
    output = temporal_shift(input, 1, causal=causal, **run.keywords)
    moved = 2 if causal else 4
    assert not output[:, :moved].any()
    assert_same_bits(output[:, moved:], input[:, moved:])


@for_runs(runs(OP), layout=(LAYOUTS, LAYOUTS))
def test_layouts(layout, run):
    check(run, LAYOUTS[layout](make, (4, 6, 4, 5)), 2, 3)
    check(run, LAYOUTS[layout](make, (1, 1, 1, 2)), 1, 2)  # one channel: the strides could be either's


NOTHING = [(0, 6, 4, 5), (2, 0, 4, 5), (2, 6, 0, 5), (2, 6, 4, 0), (0, 0, 0, 0)]


@for_runs(runs(OP), shape=(NOTHING, NOTHING), layout=(DENSE, DENSE), causal=(BOTH, [False]))
def test_nothing(causal, layout, shape, run):
    check(run, LAYOUTS[layout](make, shape), 2, causal=causal)


# On the CPU, outputs above 16 MiB are stored past the caches: whole vectors, rows with seams, and neither.
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(
    "shape, dtype, fold_div",
    [
        ((8, 256, 56, 56), torch.float32, 8),
        ((24, 64, 56, 56), torch.float32, 8),
        ((32, 96, 61, 61), torch.bfloat16, 5),
        ((16, 50, 75, 75), torch.float32, 8),
        ((8, 4096, 18, 18), torch.bfloat16, 100),
        ((6, 40000, 5, 5), torch.float32, 3),
    ],
)
def test_large_outputs(shape, dtype, fold_div, layout, causal, run):
    segments = shape[0] // 2
    input = LAYOUTS[layout](functools.partial(make, dtype=dtype), shape)
    assert input.nbytes > 16 << 20
    for step in (1, -1):
        fold = shape[1] // fold_div
        output = run.operator(OP)(input, segments, fold, step, not causal, run.algorithm)
        shift = temporal_shift_reference if (step == -1) == causal else opposite
        expected = shift(input, segments, fold_div, causal=causal)
        assert_same_bits(output, expected)


@pytest.mark.parametrize("run", runs(OP), ids=str)
def test_any_shape(run):
    few = run.slow
    sizes = st.tuples(st.integers(1, 8 if few else 100), st.integers(1, 9), st.integers(1, 9))

    @hypothesis.settings(max_examples=6 if run.slow else 30 if run.stands_in else 80)
    @hypothesis.given(
        st.integers(1, 3),
        st.integers(1, 3 if few else 9),
        sizes,
        st.integers(2, 20),
        st.booleans(),
        st.sampled_from(sorted(LAYOUTS)),
        st.sampled_from(DTYPES),
    )
    def same_as_reference(clips, segments, size, fold_div, causal, layout, dtype):
        if run.serves(dtype):
            shape = (clips * segments, *size)
            input = LAYOUTS[layout](functools.partial(make, dtype=dtype), shape)
            check(run, input, segments, fold_div, causal)

    same_as_reference()


@each_own_run
def test_any_thread_count(run, threads):
    for count in (1, 2, 5):
        threads(count)
        for layout in DENSE:
            check(run, LAYOUTS[layout](make, (6, 18, 3, 5)), 3, 4)


@each_own_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6, 1, 1), (2, 1, 2, 3), (0, 6, 2, 3)])
def test_strides_are_the_fakes(shape, layout, run):
    input = LAYOUTS[layout](make, shape)
    arguments = (2, 0 if shape[1] == 1 else 2, 1, True, run.algorithm)
    real = run.operator(OP)(input, *arguments)
    fake = run.operator(OP)(FakeTensorMode().from_tensor(input), *arguments)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# Differentiated, transformed, compiled.


@each_run
@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("layout", DENSE)
def test_gradcheck(layout, causal, run):
    input = LAYOUTS[layout](numbers, (6, 4, 1, 2)).requires_grad_()
    f = functools.partial(temporal_shift, segments=3, fold_div=3, causal=causal, **run.keywords)
    assert torch.autograd.gradcheck(f, input, fast_mode=run.slow)
    assert torch.autograd.gradgradcheck(f, input, fast_mode=run.slow)


@each_run
@pytest.mark.parametrize("in_dim", [0, 2, -1])
def test_vmap_and_func_grad(in_dim, run):
    shape = [4, 6, 2, 3]
    shape.insert(in_dim if in_dim >= 0 else 4, 2)
    input = numbers(shape)
    f = functools.partial(temporal_shift, segments=2, fold_div=3, **run.keywords)

    def each(f):
        return lambda x: (f(x), grad(lambda x: f(x).pow(3).sum())(x))

    reference = each(functools.partial(temporal_shift_reference, segments=2, fold_div=3))
    mapped = vmap(each(f), in_dim)(input)
    for i, one in enumerate(input.unbind(in_dim)):
        for a, e in zip(mapped, reference(one)):
            assert torch.equal(a[i], e)


@for_runs(
    of_each_backend(runs(OP, own=True)),
    layout=(SAMPLES, SAMPLES),
    batch=([4, 0], [4, 0]),
    cover=["layout", "batch"],
)
def test_opcheck(batch, layout, run):
    input = LAYOUTS[layout](numbers, (batch, 6, 2, 3)).detach().requires_grad_()
    for step, both in ((1, True), (-1, False)):
        torch.library.opcheck(run.operator(OP), (input, 2, 2, step, both, run.algorithm))


@for_runs(of_each_backend(runs(OP)), layout=(DENSE, DENSE), causal=(BOTH, BOTH), cover=["layout", "causal"])
def test_compile_and_export(layout, causal, run):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return temporal_shift(x, 2, 4, causal=causal, **run.keywords)

    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    for frames, size in ((2, 3), (4, 5)):
        input = LAYOUTS[layout](numbers, (frames, 8, size, size)).requires_grad_()
        output = compiled(input)
        expected = temporal_shift_reference(input, 2, 4, causal=causal).detach()
        assert_same_bits(output.detach(), expected)
        assert output.stride() == torch.empty_like(input).stride()
        (gradient,) = torch.autograd.grad(output.square().sum(), input)
        assert torch.equal(gradient, opposite(2 * expected, 2, 4, causal))
    exported = torch.export.export(Layer(), (input,)).module()
    assert_same_bits(exported(input).detach(), expected)


@each_run
def test_autocast_leaves_the_type_alone(run):
    with torch.autocast(DEVICE, dtype=torch.float16):
        output = temporal_shift(make((2, 8, 2, 3)), 2, **run.keywords)
    assert output.dtype == torch.float32


@each_own_run
def test_no_arithmetic(run):
    with FlopCounterMode(display=False) as counter:
        temporal_shift(make((2, 8, 2, 3)), 2, **run.keywords)
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("algorithm", ["vectorized", "plain"])
def test_bytes_are_those_of_a_copy(algorithm, layout, causal):
    """Nothing is read twice, and what leaves its clip is not read at all."""
    input = LAYOUTS[layout](lambda shape: torch.randn(shape), (6, 32, 8, 8))
    with emulator.count() as counters:
        temporal_shift(input, 3, causal=causal, backend="emulator", algorithm=algorithm)
    asked = {
        kind: sum(kernel[f"global_{kind}_bytes"] for kernel in counters.values())
        for kind in ("load", "store")
    }
    assert asked["store"] == input.nbytes
    assert asked["load"] == 4 * temporal_shift_reference(torch.ones_like(input), 3, causal=causal).sum()


# Bad input: each error names the argument, what it was, and what is allowed.

FRAMES = torch.zeros(6, 4, 2, 3)
BAD = {
    "input is no tensor": (([[1.0]], 2), {}, TypeError, "input", "torch.Tensor", "list"),
    "input of rank 5": ((FRAMES[None], 2), {}, ValueError, "input", "4 dimensions", "(1, 6, 4, 2, 3)"),
    "frames of integers": ((FRAMES.int(), 2), {}, TypeError, "input", "float32", "int32"),
    "segments do not divide": ((FRAMES, 4), {}, ValueError, "segments", "6 frames", "4"),
    "more segments than frames": ((FRAMES, 12), {}, ValueError, "segments", "6 frames", "12"),
    "no segments": ((FRAMES, 0), {}, ValueError, "segments", "at least 1", "0"),
    "fewer segments": ((FRAMES, -2), {}, ValueError, "segments", "at least 1", "-2"),
    "half a segment": ((FRAMES, 1.5), {}, TypeError, "segments", "an integer", "1.5"),
    "no fold_div": ((FRAMES, 2, 0), {}, ValueError, "fold_div", "at least 1", "0"),
    "half a fold_div": ((FRAMES, 2, 0.5), {}, TypeError, "fold_div", "an integer", "0.5"),
    "both folds are all": ((FRAMES, 2, 1), {}, ValueError, "fold_div", "at least 2", "1"),
    "no fold_div, causal": ((FRAMES, 2, 0), {"causal": True}, ValueError, "fold_div", "at least 1", "0"),
    "causal is a number": ((FRAMES, 2), {"causal": 1}, TypeError, "causal", "True or False", "1"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    arguments, options, error, *words = case
    with pytest.raises(error) as raised:
        temporal_shift(*arguments, **options)
    assert all(word in str(raised.value) for word in words), raised.value


@each_run
def test_unknown_algorithm(run):
    with pytest.raises(BackendError, match="algorithm must be None or one of .*'fft'"):
        temporal_shift(make((2, 2, 2, 2)), 2, backend=run.backend, algorithm="fft")


OPERATOR_BAD = {
    "input of rank 3": (FRAMES[0], 2, 1, 1, True),
    "frames of integers": (FRAMES.int(), 2, 1, 1, True),
    "segments do not divide": (FRAMES, 4, 1, 1, True),
    "no segments": (FRAMES, 0, 1, 1, True),
    "a negative fold": (FRAMES, 2, -1, 1, True),
    "folds too large": (FRAMES, 2, 3, 1, True),
    "a fold too large": (FRAMES, 2, 5, 1, False),
    "no step": (FRAMES, 2, 1, 0, True),
    "two steps": (FRAMES, 2, 1, 2, True),
    "algorithm": (FRAMES, 2, 1, 1, True, "fft"),
}


@each_own_run
@pytest.mark.parametrize("bad", OPERATOR_BAD.values(), ids=OPERATOR_BAD)
def test_operator_refuses(bad, run):
    input, *arguments = (*bad, run.algorithm)[:6]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run.operator(OP)(input.to(DEVICE), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_2_to_the_31_elements(layout, run):
    shape = (2, 3, 2**14, 2**15 // 3 + 11000)
    shape = shape if layout == "contiguous" else (shape[0], *shape[2:], shape[1])
    frames = torch.from_numpy(np.zeros(shape, dtype=np.float16)).to(DEVICE)
    frames = frames if layout == "contiguous" else frames.permute(0, 3, 1, 2)
    assert frames.numel() > 2**31
    frames[1, 0, -1, -1] = 3.0
    frames[0, 1, -1, -1] = 4.0
    output = temporal_shift(frames, 2, 3, **run.keywords)
    assert output[0, 0, -1, -1] == 3.0 and output[1, 1, -1, -1] == 4.0 and output.count_nonzero() == 2

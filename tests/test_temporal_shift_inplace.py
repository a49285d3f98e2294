"""temporal_shift(inplace=True): the input becomes its shift, and nothing else is written."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, of_each_backend, runs
from test_temporal_shift import (
    BAD,
    BOTH,
    DENSE,
    FEW,
    FOLDS,
    NOTHING,
    OP,
    OPERATOR_BAD,
    SIZES,
    assert_same_bits,
    each_own_run,
    each_run,
    make,
    numbers,
    opposite,
)

from fastconv import emulator, temporal_shift, temporal_shift_reference
from fastconv.ops._arguments import DTYPES

ALONE = {name: layout for name, layout in LAYOUTS.items() if not name.startswith("expanded")}
inplace_shift = functools.partial(temporal_shift, inplace=True)


def check(run, layout, shape, segments, fold_div=8, causal=False, dtype=torch.float32):
    """The input is the result, and what lies between its elements in memory stays as it was."""
    input = ALONE[layout](functools.partial(make, dtype=dtype), shape)
    memory = torch.empty(0, dtype=dtype, device=DEVICE).set_(input.untyped_storage())
    between = torch.ones_like(memory, dtype=torch.bool)
    between.as_strided(input.shape, input.stride(), input.storage_offset()).fill_(False)
    expected, before = temporal_shift_reference(input, segments, fold_div, causal=causal), memory.clone()
    strides, version = input.stride(), input._version
    output = inplace_shift(input, segments, fold_div, causal=causal, **run.keywords)
    assert output is input and input.stride() == strides and input._version > version
    assert_same_bits(input, expected)
    assert_same_bits(memory[between], before[between])


@for_runs(runs(OP), layout=(DENSE, DENSE), causal=(BOTH, BOTH), folds=(FOLDS, FEW))
def test_folds(folds, causal, layout, run):
    check(run, layout, (6, folds[0], 3, 4), 3, folds[1], causal)


@for_runs(
    runs(OP),
    dtype=(DTYPES, DTYPES),
    layout=(DENSE, DENSE),
    causal=(BOTH, [False]),
    size=(SIZES, SIZES[:2]),
    cover=["dtype layout", "size layout", "size dtype", "causal layout dtype"],
    where=lambda run, dtype, **_: run.serves(dtype),  # test_backends.py holds which
)
def test_dtypes_and_sizes(size, causal, layout, dtype, run):
    frames, segments, height, width = size
    check(run, layout, (frames, 40, height, width), segments, 4, causal, dtype)


@for_runs(runs(OP), layout=(ALONE, ALONE))
def test_layouts(layout, run):
    check(run, layout, (4, 6, 4, 5), 2, 3)
    check(run, layout, (1, 1, 1, 2), 1, 2)


@for_runs(runs(OP), layout=(DENSE, DENSE), fold_div=([8, 17], [8, 17]))
def test_clips_of_any_length(fold_div, layout, run):
    for segments in (1, 2, 4, 5, 9) if not run.slow else (1, 5):
        check(run, layout, (2 * segments, 16, 2, 3), segments, fold_div)


@for_runs(runs(OP), shape=(NOTHING, NOTHING), layout=(DENSE, DENSE))
def test_nothing(layout, shape, run):
    input = LAYOUTS[layout](make, shape)
    assert inplace_shift(input, 2, **run.keywords) is input


# Folds that are several of the C++ kernel's tiles, in both directions.
@pytest.mark.parametrize("run", [run for run in runs(OP, own=True) if not run.stands_in], ids=str)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(
    "shape, fold_div", [((8, 64, 56, 56), 8), ((4, 50, 75, 75), 3), ((6, 9000, 5, 5), 4)]
)
def test_many_tiles(shape, fold_div, layout, run):
    input = LAYOUTS[layout](make, shape)
    segments, fold = shape[0] // 2, shape[1] // fold_div
    for step, shift in ((1, temporal_shift_reference), (-1, opposite)):
        expected = shift(input, segments, fold_div, causal=False)
        run.operator("temporal_shift_")(input, segments, fold, step, True, run.algorithm)
        assert_same_bits(input, expected)


@pytest.mark.parametrize("run", runs(OP), ids=str)
def test_any_shape(run):
    most = 8 if run.slow else 100

    @hypothesis.settings(max_examples=6 if run.slow else 30 if run.stands_in else 80)
    @hypothesis.given(
        st.tuples(st.integers(1, 3), st.integers(1, 3 if run.slow else 9)),
        st.tuples(st.integers(1, most), st.integers(1, 9), st.integers(1, 9)),
        st.integers(2, 20),
        st.booleans(),
        st.sampled_from(sorted(ALONE)),
        st.sampled_from(DTYPES),
    )
    def same_as_reference(frames, size, fold_div, causal, layout, dtype):
        if run.serves(dtype):
            check(run, layout, (frames[0] * frames[1], *size), frames[1], fold_div, causal, dtype)

    same_as_reference()


@each_own_run
def test_any_thread_count(run, threads):
    for count in (1, 2, 5):
        threads(count)
        for layout in DENSE:
            check(run, layout, (12, 18, 3, 5), 3, 4)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")
@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("algorithm", ["vectorized", "plain"])
def test_bytes_are_those_of_the_folds(algorithm, layout, causal):
    """What moves is read once, but for what leaves its clip, and each value of a fold is written once."""
    input = LAYOUTS[layout](lambda shape: torch.randn(shape), (6, 32, 8, 8))
    moved = input[:, : 4 if causal else 8].nbytes
    with emulator.count() as counters:
        inplace_shift(input, 3, causal=causal, backend="emulator", algorithm=algorithm)
    (kernel,) = counters.values()
    assert kernel["global_store_bytes"] == moved
    assert kernel["global_load_bytes"] == moved * 2 // 3


# Gradients, transformations, compilers.


@each_run
def test_refuses_gradients(run):
    leaf = numbers((2, 8, 2, 3)).requires_grad_()
    for input in (leaf, leaf * 2):
        before = input.detach().clone()
        with pytest.raises(RuntimeError, match="inplace must be False where input requires a gradient"):
            inplace_shift(input, 2, **run.keywords)
        assert torch.equal(input, before)
    expected = temporal_shift_reference(leaf.detach(), 2)
    with torch.no_grad():
        inplace_shift(leaf, 2, **run.keywords)
    assert torch.equal(leaf, expected)


@each_own_run
def test_operator_refuses_gradients(run):
    leaf = numbers((2, 8, 2, 3)).requires_grad_()
    with pytest.raises(RuntimeError, match="temporal_shift_.* has no gradient"):
        run.operator("temporal_shift_")(leaf, 2, 1, 1, True, run.algorithm)


@each_run
def test_what_was_saved_for_a_gradient_is_missed(run):
    weight, input = numbers((2, 8, 2, 3)).requires_grad_(), numbers((2, 8, 2, 3))
    product = weight * input
    inplace_shift(input, 2, **run.keywords)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@each_run
def test_inference_mode(run):
    outside = make((2, 8, 2, 3))
    expected, version = temporal_shift_reference(outside, 2), outside._version
    with torch.inference_mode():
        assert_same_bits(inplace_shift(outside.clone(), 2, **run.keywords), expected)
        assert_same_bits(inplace_shift(outside, 2, **run.keywords), expected)
        inside = make((2, 8, 2, 3))
    assert outside._version > version
    with pytest.raises(RuntimeError, match="inplace must be False for an inference tensor outside"):
        inplace_shift(inside, 2, **run.keywords)


@each_run
@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_channels", "expanded_pixels"])
def test_elements_that_share_memory(layout, run):
    with pytest.raises(RuntimeError, match="inplace must be False where input's elements share memory"):
        inplace_shift(LAYOUTS[layout](make, (4, 8, 2, 3)), 2, **run.keywords)


@each_run
def test_frames_that_overlap(run):
    frames = make((100,)).as_strided((8, 16, 2, 2), (1, 2, 1, 1))
    with pytest.raises(RuntimeError, match="inplace must be False where input's elements share memory"):
        inplace_shift(frames, 2, **run.keywords)


@each_own_run
def test_transformations_raise(run):
    shift = functools.partial(inplace_shift, segments=2, **run.keywords)
    input = numbers((4, 8, 2, 3))
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda x: shift(x + 1))(torch.stack([input, input]))
    with pytest.raises(RuntimeError, match="inplace must be False"):
        torch.func.grad(lambda x: shift(x + 1).sum())(input)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: shift(x + 1), (input,), (input,))


@for_runs(
    of_each_backend(runs(OP, own=True)),
    layout=([*DENSE, "stepped", "channel_slice"],) * 2,
    batch=([4, 0], [4, 0]),
    cover=["layout", "batch"],
)
def test_opcheck(batch, layout, run):
    input = LAYOUTS[layout](numbers, (batch, 6, 2, 3))
    for step, both in ((1, True), (-1, False)):
        torch.library.opcheck(run.operator("temporal_shift_"), (input, 2, 2, step, both, run.algorithm))


@for_runs(of_each_backend(runs(OP)), layout=(DENSE, DENSE), causal=(BOTH, BOTH), cover=["layout", "causal"])
def test_compile_and_export(layout, causal, run):
    shift = functools.partial(inplace_shift, segments=2, fold_div=4, causal=causal, **run.keywords)

    class OfItsInput(torch.nn.Module):
        def forward(self, x):
            before = x + 0
            return shift(x) * 2 + before

    class OfItsOwn(torch.nn.Module):
        def forward(self, x):
            own = x + 1
            part = own[:, 1:]  # a view: what is written there has to arrive in `own`
            shift(part)
            return own * x

    for module in (OfItsInput(), OfItsOwn()):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for frames, size in ((2, 3), (4, 5)):
            input = LAYOUTS[layout](numbers, (frames, 9, size, size))
            mine, theirs = input.clone(), input.clone()
            assert torch.equal(compiled(mine), module(theirs))
            assert torch.equal(mine, theirs)
        exported = torch.export.export(module, (input.clone(),)).module()
        mine = input.clone()
        assert torch.equal(exported(mine), module(theirs.copy_(input)))
        assert torch.equal(mine, theirs)


@each_own_run
def test_compiled_refuses_gradients(run):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: inplace_shift(x * 2, 2, **run.keywords), backend="aot_eager")
    with pytest.raises(RuntimeError, match="inplace must be False"):
        compiled(numbers((4, 8, 2, 3)).requires_grad_())


# Bad input changes nothing.


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    arguments, options, error, *words = case
    with pytest.raises(error) as raised:
        inplace_shift(*arguments, **options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_inplace_is_true_or_false():
    with pytest.raises(TypeError, match="inplace must be True or False, got 1"):
        temporal_shift(make((2, 8, 2, 3)), 2, inplace=1)


@each_own_run
@pytest.mark.parametrize("bad", OPERATOR_BAD.values(), ids=OPERATOR_BAD)
def test_operator_refuses(bad, run):
    given, *arguments = (*bad, run.algorithm)[:6]
    input = (torch.arange(given.numel()).view(given.shape).to(given.dtype)).to(DEVICE)
    before = input.clone()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        run.operator("temporal_shift_")(input, *arguments)
    assert torch.equal(input, before)

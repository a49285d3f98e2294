"""fastconv.nn.TemporalShift: whole clips, and one frame after the other."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from cases import DEVICE, LAYOUTS
from torch import nn

import fastconv
from fastconv.nn import TemporalShift

BOTH = [False, True]


def frames(shape=(6, 8, 4, 5), layout="contiguous", dtype=torch.float64):
    return LAYOUTS[layout](lambda shape: torch.randn(shape, dtype=dtype, device=DEVICE), shape)


def conv(channels=8):
    return nn.Conv2d(channels, channels, 3, padding=1).to(DEVICE, torch.float64)


def of_each_frame(clips, segments):
    """(B*T, C, H, W) as T tensors (B, C, H, W)."""
    return clips.unflatten(0, (clips.shape[0] // segments, segments)).unbind(1)


def whole(outputs):
    """The same back again."""
    return torch.stack(outputs, 1).flatten(0, 1)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_is_the_block_of_the_shift(layout, causal, backend):
    block, x = conv(), frames(layout=layout).requires_grad_()
    layer = TemporalShift(block, 3, 4, causal=causal, backend=backend)
    expected = block(fastconv.temporal_shift_reference(x, 3, 4, causal=causal))
    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    tensors = [x, *block.parameters()]
    for a, e in zip(*(torch.autograd.grad(y, tensors, cotangent) for y in (actual, expected))):
        torch.testing.assert_close(a, e)


# Online: one frame after the other.


@pytest.mark.parametrize("fold_div", [1, 3, 8, 20])
@pytest.mark.parametrize("clips, segments", [(1, 1), (1, 5), (3, 2), (2, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_frame_by_frame_is_the_whole_clip(layout, clips, segments, fold_div):
    layer = TemporalShift(nn.Identity(), segments, fold_div, causal=True)
    x = frames((clips * segments, 8, 4, 5), layout)
    expected = layer(x)
    with layer.online() as online:
        assert online is layer
        assert torch.equal(whole([layer(frame) for frame in of_each_frame(x, segments)]), expected)
    assert torch.equal(layer(x), expected)  # and it is offline again
    assert torch.equal(whole([layer.step(frame) for frame in of_each_frame(x, segments)]), expected)
    layer.reset()
    assert torch.equal(whole([layer.step(frame) for frame in of_each_frame(x, segments)]), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_frame_by_frame_has_the_gradients_of_the_whole_clip(layout):
    layer, x = TemporalShift(conv(), 3, 2, causal=True), frames(layout=layout).requires_grad_()
    tensors = [x, *layer.parameters()]
    expected = layer(x)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, cotangent)
    with layer.online():
        actual = whole([layer(frame) for frame in of_each_frame(x, 3)])
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, tensors, cotangent), gradients):
        torch.testing.assert_close(a, e)


def test_a_network_online():
    model = nn.Sequential(
        TemporalShift(conv(), 4, causal=True), nn.ReLU(), TemporalShift(conv(), 4, causal=True)
    )
    x = frames((8, 8, 4, 5))
    expected = model(x)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if isinstance(module, TemporalShift):
                stack.enter_context(module.online())
        actual = whole([model(frame) for frame in of_each_frame(x, 4)])
    torch.testing.assert_close(actual, expected)


def test_reset_forgets():
    layer, x = TemporalShift(nn.Identity(), 2, causal=True), frames((1, 8, 4, 5))
    first = layer.step(x)
    assert not first[:, 0].any() and torch.equal(layer.step(x)[:, 0], x[:, 0])
    layer.reset()
    assert torch.equal(layer.step(x), first)
    with layer.online():
        assert torch.equal(layer(x), first)
    assert torch.equal(layer.step(x), first)


def test_online_ends_on_an_error():
    layer, x = TemporalShift(nn.Identity(), 2, causal=True), frames((2, 8, 4, 5))
    expected = layer(x)
    with pytest.raises(KeyError), layer.online():
        layer(x)
        raise KeyError
    assert torch.equal(layer(x), expected)


def test_a_frame_may_be_overwritten():
    layer, x = TemporalShift(nn.Identity(), 2, causal=True), frames((2, 8, 4, 5))
    expected, buffer = layer(x), torch.empty_like(x[:1])
    outputs = [layer.step(buffer.copy_(frame)).clone() for frame in x.split(1)]
    assert torch.equal(whole(outputs), expected)


@pytest.mark.parametrize("causal", BOTH)
def test_frames_that_do_not_follow(causal):
    layer, x = TemporalShift(nn.Identity(), 2, causal=causal), frames((1, 8, 4, 5))
    if not causal:
        for start in (lambda: layer.step(x), lambda: layer.online().__enter__()):
            with pytest.raises(ValueError, match="causal must be True to run frame by frame"):
                start()
        return
    layer.step(x)
    for other in (frames((2, 8, 4, 5)), frames((1, 8, 4, 6)), x.float()):
        with pytest.raises(ValueError, match=r"must be like the last frame's, which are \(1, 1, 4, 5\)"):
            layer.step(other)
    with pytest.raises(ValueError, match=r"frame must have 4 dimensions, got shape \(8, 4, 5\)"):
        layer.step(x[0])
    assert torch.equal(layer.step(x)[:, 0], x[:, 0])


# As a module.


def test_state_copies_and_files():
    layer, x = TemporalShift(conv(), 3, 4, causal=True, backend="reference"), frames()
    layer.step(x)  # what it remembers is no part of its state
    assert list(layer.state_dict()) == ["block.weight", "block.bias"]
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        settings = (other.shift.segments, other.shift.fold_div, other.shift.causal, other.shift.backend)
        assert settings == (3, 4, True, "reference")
        torch.testing.assert_close(other(x), expected)
    other = TemporalShift(conv(), 3, 4, causal=True)
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_from_the_last_frame(copied):
    """Not with the graph that the frame came from."""
    layer, first = TemporalShift(nn.Identity(), 2, causal=True), frames((1, 8, 4, 5)).requires_grad_()
    layer.step(2 * first)
    other = copied(layer)
    following = frames((1, 8, 4, 5))
    output = layer.step(following)
    assert not other._last.requires_grad
    assert torch.equal(other.step(following), output)
    (grad,) = torch.autograd.grad(output.sum(), first)  # the original still has it
    assert grad[:, 0].eq(2).all() and not grad[:, 1:].any()


def test_what_is_remembered_moves_with_the_module():
    layer, x = TemporalShift(nn.Identity(), 2, causal=True), frames((1, 8, 4, 5))
    layer.step(x)
    assert torch.equal(layer.float().step(x.float())[:, 0], x.float()[:, 0])


def test_repr():
    layer = TemporalShift(nn.ReLU(), 8, causal=True, backend="reference")
    assert "segments=8, fold_div=8, causal=True, backend='reference'" in repr(layer)
    assert "(block): ReLU()" in repr(layer)


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((torch.relu, 8), {}, TypeError, "block must be a torch.nn.Module, got builtin"),
        ((nn.ReLU(), 0), {}, ValueError, "segments must be at least 1, got 0"),
        ((nn.ReLU(), 2.0), {}, TypeError, "segments must be an integer, got 2.0"),
        ((nn.ReLU(), 8, 0), {}, ValueError, "fold_div must be at least 1, got 0"),
        ((nn.ReLU(), 8, 1), {}, ValueError, "fold_div must be at least 2 where channels move both ways"),
        ((nn.ReLU(), 8), {"causal": None}, TypeError, "causal must be True or False, got None"),
        ((nn.ReLU(), 8), {"inplace": 1}, TypeError, "inplace must be True or False, got 1"),
        ((nn.ReLU(), 8), {"backend": "gpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error, match=words):
        TemporalShift(*arguments, **options)


def test_frames_that_are_no_whole_clips():
    with pytest.raises(ValueError, match="segments must divide input's 6 frames, got 4"):
        TemporalShift(nn.ReLU(), 4)(frames())


@pytest.mark.parametrize("causal", BOTH)
@pytest.mark.parametrize("inplace", BOTH)
def test_cost_counts_the_bytes_of_the_shift(inplace, causal):
    """It has neither parameters nor multiplications; in place, what moves is read and written."""
    plain = nn.Sequential(conv()).float()
    shifted = nn.Sequential(TemporalShift(conv(), 3, 4, causal=causal, inplace=inplace)).float()
    before, after = (fastconv.cost(model, (6, 8, 4, 5)) for model in (plain, shifted))
    assert (before.macs, before.parameters) == (after.macs, after.parameters)
    shift, block = after.layers
    assert (shift.name, shift.macs, shift.parameters) == ("0.shift", 0, 0)
    assert (block.name, block.bytes) == ("0.block", before.bytes)
    channels = (2 if causal else 4) if inplace else 8
    assert shift.bytes == 2 * 4 * (6 * channels * 4 * 5)


@pytest.mark.parametrize("causal", BOTH)
def test_in_place(causal):
    layer = TemporalShift(nn.Identity(), 3, 4, causal=causal, inplace=True)
    assert "inplace=True" in repr(layer)
    x = frames()
    expected = fastconv.temporal_shift_reference(x, 3, 4, causal=causal)
    assert layer(x) is x and torch.equal(x, expected)
    with pytest.raises(RuntimeError, match="inplace must be False where input requires a gradient"):
        layer(frames().requires_grad_())


def test_optimize_reaches_into_the_block():
    model, x = nn.Sequential(TemporalShift(conv(), 3)).float(), frames(dtype=torch.float32)
    expected = model(x)
    fastconv.optimize(model, backend="reference")
    assert type(model[0].block) is fastconv.nn.Conv2d
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", BOTH)
def test_compiles_in_one_graph(causal):
    layer, x = TemporalShift(conv(), 3, causal=causal), frames()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))

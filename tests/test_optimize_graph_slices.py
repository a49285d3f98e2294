"""optimize_graph: shifts that are written as slices of zeros, in space and in time."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE
from graphs import check, image, names, refused

import fastconv

needs_kernel = pytest.mark.skipif(
    fastconv.available("shift2d", DEVICE)[0] not in ("cpu", "cuda"), reason="no compiled kernel here"
)


def four_directions(x):
    """ShiftViT's and others': a group to each side, the rest stays."""
    _, c, _, _ = x.shape
    g = c // 12
    out = torch.zeros_like(x)
    out[:, g * 0 : g * 1, :, :-1] = x[:, g * 0 : g * 1, :, 1:]
    out[:, g * 1 : g * 2, :, 1:] = x[:, g * 1 : g * 2, :, :-1]
    out[:, g * 2 : g * 3, :-1, :] = x[:, g * 2 : g * 3, 1:, :]
    out[:, g * 3 : g * 4, 1:, :] = x[:, g * 3 : g * 4, :-1, :]
    out[:, g * 4 :, :, :] = x[:, g * 4 :, :, :]
    return out


def nine_places(x):
    """The nine copies of a 3x3 window, each with a run of channels, in any order."""
    n, c, h, w = x.shape
    out, g = x.new_zeros(n, c, h, w), c // 9
    for place in (4, 0, 8, 2, 6, 1, 7, 3, 5):
        dh, dw = place // 3 - 1, place % 3 - 1
        end = c if place == 8 else (place + 1) * g
        to = slice(max(-dh, 0), h - max(dh, 0)), slice(max(-dw, 0), w - max(dw, 0))
        of = slice(max(dh, 0), h - max(-dh, 0)), slice(max(dw, 0), w - max(-dw, 0))
        out[:, place * g : end, to[0], to[1]] = x[:, place * g : end, of[0], of[1]]
    return out


def far_and_with_dots(x):
    out = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
    out[:, :5, 2:, :-1] = x[:, :5, :-2, 1:]
    out[:, 5:, ..., 3:] = x[:, 5:, ..., :-3]
    return out


def read_by_several(x):
    out = torch.zeros_like(x)
    out[..., 1:, :] = x[..., :-1, :]
    return out.sin() + out.narrow(3, 0, 1)


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize("shift", [four_directions, nine_places, far_and_with_dots, read_by_several])
def test_one_call_takes_the_place(shift, symbols, channels_last):
    dtype = torch.float64 if symbols else torch.float32
    x = image(3, 27, 4, 5, dtype=dtype, channels_last=channels_last)
    graphs = check(shift, x, "shift2d", symbols=symbols)
    if symbols:
        other = image(2, 27, 7, 6, dtype=dtype, channels_last=channels_last).requires_grad_()
        assert torch.equal(graphs(other), shift(other))
        assert len(graphs.modules) == 1, "compiled once"


@needs_kernel
@pytest.mark.parametrize("shift", [four_directions, nine_places])
def test_exported(shift):
    class Model(torch.nn.Module):
        def forward(self, x):
            return shift(x)

    free, x = torch.export.Dim.DYNAMIC, image(3, 27, 4, 5)
    module = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: free, 2: free, 3: free}}).module()
    (row,) = fastconv.optimize_graph(module)
    assert (row.op, row.reason) == ("shift2d", None) and "copy_" not in names(module)
    for other in (x, image(2, 27, 6, 7)):
        assert torch.equal(module(other), shift(other))


# In time


def tsm(x, segments=4, fold_div=8):
    """The TSM repository's."""
    nt, c, h, w = x.size()
    x = x.view(nt // segments, segments, c, h, w)
    fold = c // fold_div
    out = torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.view(nt, c, h, w)


def tsm_causal(x, segments=4, fold_div=8):
    """Its online form, on clips; the sizes are written otherwise."""
    x = x.unflatten(0, (-1, segments))
    out, fold = torch.zeros_like(x), x.shape[2] // fold_div
    out[:, 1:segments, :fold] = x[:, 0 : segments - 1, :fold]
    out[:, :, fold:] = x[:, :, fold:]
    return out.flatten(0, 1)


def tsm_rows_and_columns_in_one(x, segments=4, fold_div=3):
    nt, c, h, w = x.size()
    x = x.reshape(-1, segments, c, h * w)
    out, fold = x.new_zeros(x.shape), c // fold_div
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :-1, :fold] = x[:, 1:, :fold]
    return out.view(nt, c, h, w)


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize(
    "shift, options", [(tsm, (8, False)), (tsm_causal, (8, True)), (tsm_rows_and_columns_in_one, (3, False))]
)
def test_temporal_shift(shift, options, symbols, channels_last):
    dtype = torch.float64 if symbols else torch.float32
    x = image(8, 17, 2, 3, dtype=dtype, channels_last=channels_last)
    graphs = check(shift, x, "temporal_shift", symbols=symbols)
    fold_div, causal = options
    assert torch.equal(shift(x), fastconv.temporal_shift_reference(x, 4, fold_div, causal=causal))
    if symbols:
        other = image(12, 17, 5, 4, dtype=dtype, channels_last=channels_last).requires_grad_()
        assert torch.equal(graphs(other), shift(other))
        assert len(graphs.modules) == 1, "compiled once"


def test_what_is_no_temporal_shift():
    def backwards(x):  # the first channels come from the frame before, the next ones from the one after
        x = x.view(2, 4, 16, 2, 3)
        out = torch.zeros_like(x)
        out[:, 1:, :2] = x[:, :-1, :2]
        out[:, :-1, 2:4] = x[:, 1:, 2:4]
        out[:, :, 4:] = x[:, :, 4:]
        return out.view(8, 16, 2, 3)

    def whole_clips(x):
        x = x.view(2, 4, 16, 2, 3)
        out = torch.zeros_like(x)
        out[1:, :, :2] = x[:-1, :, :2]
        out[:, :, 2:] = x[:, :, 2:]
        return out.view(8, 16, 2, 3)

    def of_other_folds(x):
        x = x.view(2, 4, 16, 2, 3)
        out = torch.zeros_like(x)
        out[:, :-1, :6] = x[:, 1:, :6]
        out[:, 1:, 6:12] = x[:, :-1, 6:12]  # no fold_div has 16 // fold_div == 6
        out[:, :, 12:] = x[:, :, 12:]
        return out.view(8, 16, 2, 3)

    def never_an_image(x):
        x = x.view(2, 4, 16, 2, 3)
        out = torch.zeros_like(x)
        out[:, 1:, :2] = x[:, :-1, :2]
        out[:, :, 2:] = x[:, :, 2:]
        return out

    for function in (backwards, whole_clips, of_other_folds, never_an_image):
        assert refused(function, image(8, 16, 2, 3)) == [], function.__name__


# What is none


def write(*pairs, zeros=torch.zeros_like):
    def function(x):
        out = zeros(x)
        for to, of in pairs:
            out[to] = x[of]
        return out

    return function


ALL = slice(None)
UP, DOWN = slice(None, -1), slice(1, None)
FIRST, REST = slice(None, 2), slice(2, None)

NO_SHIFT = {
    "channels are missing": write(((ALL, FIRST, UP), (ALL, FIRST, DOWN))),
    "written twice": write(((ALL, ALL, UP), (ALL, ALL, DOWN)), ((ALL, FIRST), (ALL, FIRST))),
    "channels move": write(((ALL, FIRST), (ALL, slice(4, 6))), ((ALL, REST), (ALL, REST))),
    "the batch moves": write(((UP,), (DOWN,))),
    "a part only": write(((ALL, ALL, slice(1, 3)), (ALL, ALL, slice(2, 4)))),
    "nothing moves": write(((ALL, FIRST), (ALL, FIRST)), ((ALL, REST), (ALL, REST))),
    "steps": write(((ALL, ALL, slice(None, None, 2)), (ALL, ALL, slice(None, None, 2)))),
    "single rows": write(((ALL, ALL, 0), (ALL, ALL, 1))),
    "rows wrap around": write(((ALL, ALL, UP), (ALL, ALL, DOWN)), ((ALL, ALL, -1), (ALL, ALL, 0))),
    "ones": write(((ALL, ALL, UP), (ALL, ALL, DOWN)), zeros=torch.ones_like),
    "two sources": lambda x: two_sources(x, x + 1),
    "another type": write(((ALL, ALL, UP), (ALL, ALL, DOWN)), zeros=lambda x: torch.zeros_like(x).double()),
    "a number": lambda x: fill(x),
}


def two_sources(x, y):
    out = torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    out[:, 2:, 1:] = y[:, 2:, :-1]
    return out


def fill(x):
    out = torch.zeros_like(x)
    out[:, :, 1:] = 7
    return out + x


@pytest.mark.parametrize("function", NO_SHIFT.values(), ids=NO_SHIFT)
def test_what_is_no_shift(function):
    assert refused(function, image(6, 6, 6, 6)) == []


def read_too_early(x):
    out = torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    early = out.sum()
    out[:, 2:] = x[:, 2:]
    return out, early


def source_changes(x):
    x, out = x.clone(), torch.zeros_like(x)
    out[:, :2, 1:] = x[:, :2, :-1]
    x.mul_(2)
    out[:, 2:] = x[:, 2:]
    return out


def written_later(x):
    out = torch.zeros_like(x)
    out[:, :, 1:] = x[:, :, :-1]
    y = out.view(-1)
    out[0] = 3
    return y


def piece_is_returned(x):
    out, piece = torch.zeros_like(x), x[:, :, :-1]
    out[:, :, 1:] = piece
    return out, piece


@needs_kernel
@pytest.mark.parametrize("function", [read_too_early, source_changes, written_later, piece_is_returned])
def test_order_and_other_users(function):
    assert all(row.reason for row in refused(function, image(6, 6, 6, 6)))


@needs_kernel
def test_changes_afterwards_do_not_matter():
    def function(x):
        x, out = x * 3, torch.zeros_like(x)
        out[:, :, 1:] = x[:, :, :-1]
        x.mul_(2)
        out.add_(1)
        return out + x

    check(function, image(2, 6, 4, 5), "shift2d")

"""Shifts that a graph spells as slices written into zeros: ``out[:, :8, 1:] = x[:, :8, :-1]`` and so on."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ops.shift2d import shift2d
from ..ops.temporal_shift import temporal_shift
from ._idioms import (
    CUTS,
    VIEWS,
    Dims,
    Factor,
    Match,
    after,
    input_of,
    is_image,
    is_whole,
    known,
    merged,
    name_of,
    number,
    sizes_of,
    sources_of,
    value_of,
)

ZEROS = {"zeros_like", "zeros", "new_zeros"}
TIME, ROWS, COLUMNS = 0, 2, 3  # the dimensions of a source that something can move along

Ends = tuple[int, int]  # what a slice leaves out: so many in front, and, negative, at the end
Move = tuple[Ends, Ends]  # along one dimension: where to, and where from
Call = tuple[str, Callable[..., torch.Tensor], dict[str, Any]]  # name, operator, arguments after the input


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: the tensor, a slice for each dimension, and the nodes that cut it out."""

    whole: fx.Node
    slices: tuple[slice, ...]
    cuts: tuple[fx.Node, ...]


def written_slices(zeros: fx.Node) -> Match | None:
    """Runs of channels, each copied to a place some steps away."""
    if name_of(zeros) not in ZEROS:
        return None
    writes = [write for user in zeros.users if (write := _write(user))]
    pieces = [(_target(write), _piece(write.args[-1])) for write in writes]
    if not pieces or any(to is None or of is None for to, of in pieces):
        return None
    base, last = pieces[0][1].whole, max(writes)
    if any(of.whole is not base for _, of in pieces) or not _alike(value_of(base), value_of(zeros)):
        return None
    nodes = {zeros, *writes, *(cut for pair in pieces for piece in pair for cut in piece.cuts)}
    if any(user < last for user in zeros.users if user not in nodes):
        return None
    sizes = sizes_of(base)
    moves = [_moves(to.slices, of.slices, sizes) for to, of in pieces]
    if None in moves:
        return None
    for source, path, dims in sources_of(base):
        call = _call(dims, moves, value_of(source))
        views = _views_to_image(zeros, dims, nodes)
        if call is not None and views is not None:
            result = views[-1] if views else zeros
            return Match("slices of zeros", *call, source, frozenset([*nodes, *path, *views]), result, last)
    return None


def _write(user: fx.Node) -> fx.Node | None:
    """The copy into a slice that a node is, or that it cuts the slice for."""
    while name_of(user) in CUTS and len(user.users) == 1:
        user = next(iter(user.users))
    return user if name_of(user) in ("setitem", "copy_") else None


def _target(write: fx.Node) -> Piece | None:
    piece = _piece(write.args[0])
    return _cut(piece, write.args[1]) if piece and name_of(write) == "setitem" else piece


def _piece(node: Any) -> Piece | None:
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), torch.Tensor):
        return None
    if name_of(node) not in CUTS:
        return Piece(node, (slice(None),) * value_of(node).dim(), ())
    piece = _piece(input_of(node))
    if piece is None or node.kwargs:
        return None
    index = node.args[1]
    if name_of(node) == "slice":  # (input, dim, start, end, step)
        index = (*[slice(None)] * (index % len(piece.slices)), slice(*[*node.args[2:], None][:3]))
    return _cut(piece, index, node)


def _cut(piece: Piece, index: Any, *cuts: fx.Node) -> Piece | None:
    """A box of a box; None if it is none, or cuts one dimension twice."""
    index, rank = index if isinstance(index, tuple) else (index,), len(piece.slices)
    if any(part is ... for part in index):
        dots = next(i for i, part in enumerate(index) if part is ...)
        index = (*index[:dots], *[slice(None)] * (rank + 1 - len(index)), *index[dots + 1 :])
    if len(index) > rank or not all(isinstance(part, slice) for part in index):
        return None
    slices = list(piece.slices)
    for dim, part in enumerate(index):
        if _is_all(slices[dim]):
            slices[dim] = part
        elif not _is_all(part):
            return None
    return Piece(piece.whole, tuple(slices), (*piece.cuts, *cuts))


def _is_all(part: slice) -> bool:
    return part.start in (None, 0) and _is_open(part.stop) and part.step in (None, 1)


def _is_open(stop: Any) -> bool:
    return stop is None or (isinstance(stop, int) and stop >= sys.maxsize)


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dim() != b.dim():
        return False
    return (a.dtype, a.device) == (b.dtype, b.device) and all(known(m == n) for m, n in zip(a.shape, b.shape))


def _moves(to: Sequence[slice], of: Sequence[slice], sizes: Sequence[Any]) -> list[Move] | None:
    moves = [(_ends(a, size), _ends(b, size)) for a, b, size in zip(to, of, sizes)]
    return None if any(None in move for move in moves) else moves


def _ends(part: slice, size: Any) -> Ends | None:
    """None where they depend on a size that is a symbol."""
    start, stop = value_of(part.start), value_of(part.stop)
    if part.step not in (None, 1):
        return None
    if not any(isinstance(end, torch.SymInt) for end in (start, stop, size)):
        start, stop, _ = slice(start, stop).indices(size)
        return start, max(start, stop) - size
    if _is_open(stop):
        stop = 0
    elif not (isinstance(stop, int) and stop < 0):
        if not known(stop >= 0):  # a negative number would count from the end
            return None
        stop = number(stop - size)
    start = 0 if start is None else number(start)
    plain = isinstance(start, int) and isinstance(stop, int)
    return (start, stop) if plain and start >= 0 >= stop else None


def _call(dims: Dims, moves: list[list[Move]], image: torch.Tensor) -> Call | None:
    """The operator that moves an image's channels so, and its arguments; None if none does."""
    channels, runs, segments = image.shape[1], [], 0
    own = next((i for i, dim in enumerate(dims) if _is_all_of(dim, 1, channels)), None)
    if own is None:
        return None
    for move in moves:
        (begin, end), of = move[own]
        steps = {}
        for i, (to, source) in enumerate(move):
            step = source[0] - to[0]
            ahead, back = max(step, 0), max(-step, 0)
            if i == own or to == source == (0, 0):
                continue
            axis = next((axis for axis in (TIME, ROWS, COLUMNS) if _is_along(dims[i], axis, image)), None)
            if axis is None or to != (back, -ahead) or source != (ahead, -back):
                return None
            steps[axis] = step
            if axis == TIME:
                segments = merged(dims[i])[0][2]
        if of != (begin, end):
            return None
        if begin < channels + end:
            runs.append((begin, channels + end, steps))
    runs.sort(key=lambda run: run[:2])
    if [0, *(end for _, end, _ in runs)] != [*(begin for begin, _, _ in runs), channels]:
        return None  # some are written twice, or never
    each = [steps for begin, end, steps in runs for _ in range(end - begin)]
    axes = {axis for steps in each for axis in steps}
    if axes and axes <= {ROWS, COLUMNS}:
        offsets = [(steps.get(ROWS, 0), steps.get(COLUMNS, 0)) for steps in each]
        return "shift2d", shift2d, {"offsets": offsets}
    return _temporal(segments, [steps.get(TIME, 0) for steps in each]) if axes == {TIME} else None


def _temporal(segments: int, steps: list[int]) -> Call | None:
    """The call that has each channel read so many frames later."""
    channels, fold = len(steps), len(list(itertools.takewhile(steps[0].__eq__, steps)))
    fold_div = channels // fold
    both = [1] * fold + [-1] * fold + [0] * (channels - 2 * fold)
    causal = [-1] * fold + [0] * (channels - fold)
    if channels // fold_div != fold or steps not in (both, causal):
        return None
    arguments = {"segments": segments, "fold_div": fold_div, "causal": steps == causal}
    return "temporal_shift", temporal_shift, arguments


def _is_all_of(dim: Sequence[Factor], origin: int, size: Any) -> bool:
    """It is the source's dimension ``origin``, and all of it."""
    factors = merged(dim)
    return len(factors) == 1 and is_whole(factors, origin) and known(factors[0][2] == size)


def _is_along(dim: Sequence[Factor], axis: int, image: torch.Tensor) -> bool:
    if axis == TIME:  # the frames of a clip follow each other in the batch
        factors = merged(dim)
        return len(factors) == 1 and is_whole(factors, TIME) and isinstance(factors[0][2], int)
    return _is_all_of(dim, axis, image.shape[axis])


def _views_to_image(zeros: fx.Node, dims: Dims, nodes: set[fx.Node]) -> list[fx.Node] | None:
    """The views, none perhaps, that make an image of what was written; None if something else reads it."""
    node, views = zeros, []
    while not (is_image(value_of(node)) and all(is_whole(dim, i) for i, dim in enumerate(dims))):
        readers = [user for user in node.users if user not in nodes]
        if len(readers) != 1 or name_of(readers[0]) not in VIEWS:
            return None
        (node,) = readers
        dims = after(node, dims)
        if dims is None:
            return None
        views.append(node)
    return views

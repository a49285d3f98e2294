"""What a network's time is made of: its operators by kind, each beside its floor, and what is between them.

The operators are those that the network calls, as PyTorch's profiler sees them. Nothing is hooked or wrapped,
so the same kernels run as without it. What is between them is Python: modules, checks, choices. The profiler
does not tell the shapes in a list of tensors: to put such side by side has no floor here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastconv.ceilings import Ceilings

KINDS = {  # of operators without weights, by words in their names
    "pool": ("pool", "mean"),
    "norm": ("norm",),
    "shuffle, cat, copy": ("shuffle", "shift", "cat", "clone", "contiguous", "copy"),
    "view": ("permute", "view", "transpose", "flatten", "select", "slice", "squeeze", "split", "chunk"),
}
ELEMENTWISE = "activation, sum"
BYTES = 4  # float32


def measure(call: Callable[[], Any], ceilings: Ceilings, repeats: int = 5) -> dict[str, Any]:
    """Times and profiles a call, medians over the repeats.

    Returns:
        ``kinds``, the slowest first, each with ``calls``, ``seconds`` and ``floor_seconds``; and
        ``between_seconds``, the call's time without a profiler less that of all operators.
    """
    walls = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        walls.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(repeats + 1):  # the first one warms up
            call()
    events = sorted(
        (event for event in profiler.events() if event.cpu_parent is None),
        key=lambda event: event.time_range.start,
    )
    length, rest = divmod(len(events), repeats + 1)
    if rest:
        raise RuntimeError(f"{len(events)} operators in {repeats + 1} calls: they are not all the same")
    kinds: dict[str, dict[str, Any]] = {}
    for index in range(length):
        same = events[index::length]
        kind, macs, nbytes = work(same[0].name, *_arguments(same[0]))
        row = kinds.setdefault(kind, {"kind": kind, "calls": 0, "seconds": 0.0, "floor_seconds": 0.0})
        row["calls"] += 1
        row["seconds"] += statistics.median(event.cpu_time_total for event in same[1:]) * 1e-6
        row["floor_seconds"] += ceilings.floor_time(2 * macs, nbytes)
    rows = sorted(kinds.values(), key=lambda row: -row["seconds"])
    between = statistics.median(walls[1:]) - sum(row["seconds"] for row in rows)
    return {"kinds": rows, "between_seconds": max(0.0, between)}


def _arguments(event: Any) -> tuple[dict[str, list], dict[str, Any]]:
    """By name: the shapes of the tensors, and the values of all else."""
    shapes, values = event.input_shapes, event.concrete_inputs
    names = [str(i) for i in range(len(shapes))]
    for schema in torch._C._jit_get_schemas_for_operator(event.name):
        if len(schema.arguments) == len(shapes):
            names = [argument.name for argument in schema.arguments]
            break
    return {n: shape for n, shape in zip(names, shapes) if shape}, dict(zip(names, values))


def work(name: str, shapes: dict[str, list], values: dict[str, Any]) -> tuple[str, int, int]:
    """The kind of an operator, its multiply-adds, and its bytes: what it reads and writes, once each."""
    input = shapes.get("input", [])
    weights = [s for argument, s in shapes.items() if argument.endswith("weight") and len(s) == 4]
    if weights and len(input) == 4:
        return _convolution(input, weights, values)
    if name == "aten::linear":
        (filters, channels), pixels = shapes["weight"], math.prod(input[:-1])
        moved = pixels * (channels + filters) + filters * channels
        return "linear", pixels * filters * channels, BYTES * moved
    sizes = [math.prod(shape) for shape in shapes.values()]
    kind = next((kind for kind, words in KINDS.items() if any(w in name for w in words)), ELEMENTWISE)
    if kind == "view":
        return kind, 0, 0
    output = 0 if kind == "pool" else max(sizes, default=0)
    return kind, 0, BYTES * (sum(sizes) + output)


def _convolution(
    input: Sequence[int], weights: Sequence[Sequence[int]], values: dict[str, Any]
) -> tuple[str, int, int]:
    """One convolution, or several in one call, the last of which makes the output's channels."""
    batch, channels, *image = input
    window = max(weights, key=lambda shape: shape[2] * shape[3])
    stride, dilation = ((values.get(name) or [1, 1]) for name in ("stride", "dilation"))
    padding = values.get("padding") or [0, 0]
    sides = padding if len(padding) == 4 else [p for p in padding for _ in (0, 1)]
    pixels = math.prod(
        (size + before + after - d * (k - 1) - 1) // s + 1
        for size, before, after, d, k, s in zip(image, sides[::2], sides[1::2], dilation, window[2:], stride)
    )
    filters = sum(map(math.prod, weights))
    moved = math.prod(input) + filters + batch * pixels * weights[-1][0]
    size = "x".join(map(str, window[2:]))
    if len(weights) > 1:
        kind = f"separable {size}"
    elif window[1] == 1 < channels:
        kind = f"depthwise {size}"
    else:
        kind = f"{'dense' if window[1] == channels else 'grouped'} {size}"
    return kind, batch * pixels * filters, BYTES * moved

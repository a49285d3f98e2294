"""Tables of whole networks: every contender, ratios, goals, and what the time is made of."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from .harness import PASSES
from .report import entry, goals

OP = "models"  # the name of the results' file
OURS = {"optimize": "fastconv", 'backend="fastconv"': "fastconv.compile"}
PEERS = {
    "eager": ("torch",),
    "compile": ("torch.compile", "torch.compile freezing"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
}
MODES = {"forward": "inference", "backward": "training step"}


def seconds(group: dict, kernels: Iterable[str], layout: str | None = None) -> float | None:
    """Of the fastest of some contenders; None if none was timed."""
    found = [entry(group, kernel, layout) for kernel in kernels]
    return min((one["seconds"] for one in found if one), default=None)


def ratios(group: dict) -> dict[str, float]:
    """How many times as fast as each peer the library's fastest way is; peers that were timed."""
    ours = seconds(group, OURS.values())
    theirs = {peer: seconds(group, kernels) for peer, kernels in PEERS.items()}
    return {peer: time / ours for peer, time in theirs.items() if time and ours}


def means(groups: list[dict]) -> dict[str, float]:
    """Geometric means of :func:`ratios` over the groups that have them."""
    found: dict[str, list[float]] = {}
    for group in groups:
        for peer, ratio in ratios(group).items():
            found.setdefault(peer, []).append(math.log(ratio))
    return {peer: math.exp(sum(logs) / len(logs)) for peer, logs in found.items()}


def wanted(group: dict) -> dict[str, float]:
    """The group's goals: peers, and how many times as fast as these to be."""
    return goals(OP, "cpu", group["dtype"]).get(_title(group), {}).get(group["pass"], {})


def _title(group: dict) -> str:
    return f"{group['network']}, {group['layer']}"


def _milliseconds(time: float | None) -> str:
    return "-" if time is None else f"{time * 1e3:.2f}"


# For the terminal.


def console(result: dict, width: int = 100) -> str:
    """All tables as text."""
    out = Console(file=io.StringIO(), width=width)
    out.print(table(result))
    for lines in (_mean_lines(result["groups"]), attribution_lines(result["groups"])):
        out.print("\n".join(lines), markup=False, highlight=False)
    return out.file.getvalue()


def table(result: dict) -> Table:
    """Every contender of every network."""
    shown = Table(
        title=f"whole networks on {result['device']}, {result['dtype']}",
        caption="blue: the limit of the layers that multiply (Winograd multiplies less); x: times as fast as",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
    )
    shown.add_column("")
    for name in ("ms", *(f"x {peer}" for peer in PEERS), "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for group in result["groups"]:
        goal = [f">= {wanted(group)[peer]:g}" if peer in wanted(group) else "" for peer in PEERS]
        limit = _milliseconds(group["floor_seconds"])
        shown.add_row(f"{_title(group)}, {MODES[group['pass']]}", limit, *goal, style="cyan")
        peers = {peer: seconds(group, kernels) for peer, kernels in PEERS.items()}
        for contender in group["contenders"]:
            name, time = f"  {contender['name']}", contender["seconds"]
            if not time:
                shown.add_row(name, "refused", style="red")
                continue
            cells = [f"{theirs / time:.2f}" if theirs else "-" for theirs in peers.values()]
            error = f"{contender['max_error']:.0e}"
            style = "bold" if contender["kernel"] in OURS.values() else None
            shown.add_row(name, _milliseconds(time), *cells, error, style=style)
        shown.add_section()
    return shown


def _mean_lines(groups: list[dict]) -> list[str]:
    lines = []
    for direction in PASSES:
        of_pass = [group for group in groups if group["pass"] == direction]
        if found := means(of_pass):
            text = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in found.items())
            lines.append(f"Geometric mean, {MODES[direction]}, {len(of_pass)} rows: {text}.")
    return lines


def attribution_lines(groups: list[dict]) -> list[str]:
    """What the time of each optimized network is made of, beside the floor of each part."""
    lines = []
    for group in groups:
        found = group.get("attribution")
        if not found:
            continue
        parts = [
            f"{row['kind']} {_milliseconds(row['seconds'])} (limit {_milliseconds(row['floor_seconds'])})"
            for row in found["kinds"]
            if row["seconds"] >= 0.005 * found["seconds"]
        ]
        parts.append(f"between operators {_milliseconds(found['between_seconds'])}")
        whole = f"{found['name']}, {_milliseconds(found['seconds'])} ms"
        lines.append(f"{_title(group)}, {whole}: {'; '.join(parts)}.")
    return lines


# For README.md.


def markdown(result: dict) -> str:
    """The tables of a result file, for both passes."""
    parts = [_table_of(result["groups"], direction) for direction in PASSES]
    parts += _mean_lines(result["groups"])
    parts.append(
        'The ratios are those of the faster of `optimize` and `backend="fastconv"`, each in its best layout, '
        "to a peer's best. Bold: the goal, in brackets, is reached. Limit: of the layers that multiply, one "
        "after the other; Winograd multiplies less."
    )
    lines = attribution_lines(result["groups"])
    if lines:
        parts.append("What the time of `optimize`'s networks is made of, in ms:")
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(part for part in parts if part)


def _table_of(groups: list[dict], direction: str) -> str:
    groups = [group for group in groups if group["pass"] == direction]
    if not groups:
        return ""
    peers = [peer for peer in PEERS if direction == "forward" or peer in ("eager", "compile")]
    columns = {
        "eager NCHW / NHWC": ("torch", True),
        "compile": ("torch.compile", False),
        "freezing": ("torch.compile freezing", False),
        "onnxruntime": ("onnxruntime", False),
        "openvino": ("openvino", False),
        **{f"`{name}` NCHW / NHWC": (kernel, True) for name, kernel in OURS.items()},
    }
    if direction == "backward":
        columns = {name: value for name, value in columns.items() if value[0] not in _INFERENCE_ONLY}
    head = [f"{MODES[direction]}, ms", "limit", *columns, *(f"to {peer}" for peer in peers)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group in groups:
        cells = [_title(group), _milliseconds(group["floor_seconds"])]
        for kernel, both in columns.values():
            layouts = ("nchw", "nhwc") if both else (None,)
            cells.append(" / ".join(_milliseconds(seconds(group, [kernel], layout)) for layout in layouts))
        cells += [_against(ratios(group).get(peer), wanted(group).get(peer)) for peer in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_INFERENCE_ONLY = ("torch.compile freezing", "onnxruntime", "openvino")


def _against(ratio: float | None, goal: float | None) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio:.2f}x" if goal is None or ratio < goal else f"**{ratio:.2f}x**"
    return text if goal is None else f"{text} ({goal:g}x)"

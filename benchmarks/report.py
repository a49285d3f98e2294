"""Tables and plots from result files; the table in README.md stands between two markers."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastconv.ceilings import Ceilings
from fastconv.cli._roofline import draw_roof

from .harness import FOLDER, PASSES

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LANDMARKS = "landmarks"


def goals(op: str, device_type: str, dtype: str) -> dict[str, dict[str, dict[str, float]]]:
    """``{layer: {pass: {"best" | "nchw" | "percent_of_limit": at least}}}``, from ``goals.json``.

    ``best``: how many times as fast as PyTorch, each in its best layout; ``nchw``: both contiguous.
    """
    return json.loads((FOLDER / "goals.json").read_text()).get(op, {}).get(device_type, {}).get(dtype, {})


def entry(group: dict, kernel: str, layout: str | None = None) -> dict | None:
    """The fastest timed contender of a kernel (``"torch"``, ``"fastconv"``), in one layout or in any."""
    timed = [
        contender
        for contender in group["contenders"]
        if contender["kernel"] == kernel and contender["seconds"] and layout in (None, contender["layout"])
    ]
    return min(timed, key=lambda contender: contender["seconds"], default=None)


def ratio(group: dict, layout: str | None = None) -> float | None:
    """PyTorch's time over fastconv's, each in its best layout or both in one."""
    ours, theirs = entry(group, "fastconv", layout), entry(group, "torch", layout)
    return theirs["seconds"] / ours["seconds"] if ours and theirs else None


# For the terminal.


def table(result: dict) -> Table:
    """Every contender of every group, for ``rich``."""
    shown = Table(
        title=f"{result['op']} on {result['device']}, {result['dtype']}",
        caption="blue: the limit of the formula (Winograd multiplies less); % limit: limit / ms; "
        "x best, x same: PyTorch in its best layout, in this; error: of the largest value; bold: the "
        "library's own choice",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
    )
    shown.add_column("")
    for name in ("ms", "GFLOP/s", "% limit", "x best", "x same", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for group in result["groups"]:
        limit = f"{group['floor_seconds'] * 1e3:.3f}"
        shown.add_row(f"{group['network']}/{group['layer']} {group['pass']}", limit, style="cyan")
        for contender in group["contenders"]:
            if contender["refused"]:
                shown.add_row(f"  {contender['name']}", "refused", style="red")
            else:
                shown.add_row(f"  {contender['name']}", *_cells(contender), style=_style(contender))
        shown.add_section()
    return shown


def refusals(result: dict) -> list[str]:
    """Who was not timed, and why."""
    return [
        f"{group['network']}/{group['layer']} {group['pass']}, {contender['name']}: {contender['refused']}"
        for group in result["groups"]
        for contender in group["contenders"]
        if contender["refused"]
    ]


def left_out(result: dict) -> list[str]:
    """Which kernels do not serve some layer, and why; each reason once."""
    reasons = (item for group in result["groups"] for item in group.get("left_out", {}).items())
    return [f"{name}: {reason}" for name, reason in dict.fromkeys(reasons)]


def _cells(contender: dict) -> list[str]:
    ratios = (contender["ratio"], contender["ratio_same_layout"])
    return [
        f"{contender['seconds'] * 1e3:.3f}",
        f"{contender['gflops']:.1f}",
        f"{contender['percent_of_limit']:.0f}",
        *("-" if value is None else f"{value:.2f}" for value in ratios),
        f"{contender['max_error']:.0e}",
    ]


def doubts(result: dict) -> list[str]:
    """What makes the figures doubtful: other programs that ran beside, and times below the floor."""
    found = []
    if 0 < result["threads"] < result["load"] - 1:  # a GPU's times do not mind
        found.append(f"the machine was busy with other work: load {result['load']:.1f}")
    over = [
        f"{contender['name']} of {group['layer']} {group['pass']}"
        for group in result["groups"]
        for contender in group["contenders"]
        if contender["seconds"] and contender["percent_of_limit"] > 105 * group.get("products_saved", 1)
    ]
    if over:
        found.append(f"above the measured limit, which must then be too low: {', '.join(over)}")
    return found


def _style(contender: dict) -> str | None:
    return "bold" if contender["kernel"] == "fastconv" else None


def console(result: dict, width: int = 100) -> str:
    """:func:`table` as text."""
    out = Console(file=io.StringIO(), width=width)
    out.print(table(result))
    return out.file.getvalue()


# For README.md.


def markdown(results: list[dict], pictures: bool = True) -> str:
    """What stands between the markers: for each machine its limits, the landmark layers and the networks."""
    if not results:
        return "No results yet: `python -m fastconv bench --save`."
    from . import network_report

    parts: list[str] = []
    for device in dict.fromkeys(result["device"] for result in results):
        of_device = [result for result in results if result["device"] == device]
        of_device.sort(key=lambda result: result["op"] != network_report.OP)  # whole networks come first
        parts += [f"### {device}", _machine(of_device[0])]
        for result in of_device:
            if result["op"] == network_report.OP:
                parts += [f"**Whole networks**, {result['dtype']}", network_report.markdown(result)]
                continue
            parts += [f"**{result['op']}**, {result['dtype']}", _landmarks(result), _networks(result)]
            parts += [_pictures(result)] if pictures else []
    return "\n\n".join(part for part in parts if part)


def _machine(result: dict) -> str:
    ceilings = Ceilings.from_dict(result["ceilings"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = f"{ceilings.threads} threads, " if ceilings.threads else ""
    cached = max([*ceilings.copy_rates.values(), ceilings.bytes_per_second])
    in_cache = f", {cached / 1e9:.0f} in cache" if cached > 1.5 * ceilings.bytes_per_second else ""
    return (
        f"{ceilings.capability}, {threads}limits measured in the same run: "
        f"{_rate(ceilings.flops_per_second)} of float32 multiply-adds, "
        f"{ceilings.bytes_per_second / 1e9:.0f} GB/s of copying{in_cache}. {versions}; "
        f"commit {result['commit'] or 'unknown'}, {result['date'][:10]}."
        + "".join(f" **{doubt}.**" for doubt in doubts(result))
    )


def _rate(flops_per_second: float) -> str:
    if flops_per_second >= 1e13:
        return f"{flops_per_second / 1e12:.0f} TFLOP/s"
    return f"{flops_per_second / 1e9:.0f} GFLOP/s"


def _landmarks(result: dict) -> str:
    device_type = "cpu" if result["ceilings"]["device"] == "cpu" else "cuda"
    wanted = goals(result["op"], device_type, result["dtype"])
    groups = [group for group in result["groups"] if group["network"] in (LANDMARKS, "gpu")]
    if not groups:
        return ""
    head = "layer | pass | PyTorch NCHW / NHWC, ms | fastconv NCHW / NHWC, ms | speed-up | goal | "
    head += "NCHW only | goal | of the limit | goal"
    lines = [f"| {head} |", "|---" * head.count("|") + "|---|"]
    for group in groups:
        goal = wanted.get(group["layer"], {}).get(group["pass"], {})
        best = entry(group, "fastconv")
        percent = best["percent_of_limit"] if best else None
        size = f"{group['layer']}, batch {group['sizes']['batch']}"
        cells = [size, group["pass"], _times(group, "torch"), _times(group, "fastconv")]
        cells += _against(ratio(group), goal.get("best"), "{:.2f}x", "{:g}x")
        cells += _against(ratio(group, "nchw"), goal.get("nchw"), "{:.2f}x", "{:g}x")
        cells += _against(percent, goal.get("percent_of_limit"), "{:.0f} %", "{:g} %")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Speed-up: PyTorch in its best layout over fastconv in its best. Bold: the goal is reached.",
    ]
    return "\n".join(lines)


def _times(group: dict, kernel: str) -> str:
    found = (entry(group, kernel, layout) for layout in ("nchw", "nhwc"))
    return " / ".join("-" if one is None else f"{one['seconds'] * 1e3:.3f}" for one in found)


def _against(value: float | None, goal: float | None, form: str, goal_form: str) -> list[str]:
    shown = "-" if value is None else form.format(value)
    if goal is None:
        return [shown, ""]
    if value is not None and value >= goal:
        shown = f"**{shown}**"
    return [shown, f">= {goal_form.format(goal)}"]


def _networks(result: dict) -> str:
    """All layers of a network together, each as often as the network has it, each side in its best layout."""
    names = dict.fromkeys(group["network"] for group in result["groups"])
    rows = []
    for name in names:
        if name in (LANDMARKS, "gpu"):
            continue
        for direction in PASSES:
            groups = [g for g in result["groups"] if g["network"] == name and g["pass"] == direction]
            theirs, ours = _total(groups, "torch"), _total(groups, "fastconv")
            if theirs and ours:
                row = f"{name} | {direction} | {theirs * 1e3:.2f} | {ours * 1e3:.2f} | {theirs / ours:.2f}x"
                rows.append(f"| {row} |")
    if not rows:
        return ""
    head = ["| all layers of | pass | PyTorch, ms | fastconv, ms | speed-up |", "|---|---|---|---|---|"]
    return "\n".join(head + rows)


def _total(groups: list[dict], kernel: str) -> float | None:
    """Seconds for all layers in the better of the two layouts; None if a layer was not timed."""
    totals = []
    for layout in ("nchw", "nhwc"):
        found = [(entry(group, kernel, layout), group["sizes"].get("count", 1)) for group in groups]
        if found and all(one for one, _ in found):
            totals.append(sum(one["seconds"] * count for one, count in found))
    return min(totals, default=None)


def _pictures(result: dict) -> str:
    folder = f"benchmarks/results/{result['device']}"
    return "\n".join(f"![{kind}]({folder}/{_picture(result, kind)})" for kind in ("roofline", "ratio"))


def _picture(result: dict, kind: str) -> str:
    suffix = "" if result["dtype"] == "float32" else f"-{result['dtype']}"
    return f"{result['op']}{suffix}-{kind}.png"


def rewrite(text: str, results: list[dict]) -> str:
    """A README with the table of these results between its markers.

    Raises:
        ValueError: the text lacks the markers, or has them more than once or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must hold {BEGIN} and then {END}, each once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{markdown(results)}\n\n{END}{after}"


# Pictures.


def plot(result: dict, folder: Path) -> list[Path]:
    """Draws the roofline and the bars of ratios of an operator; returns the files."""
    from . import network_report

    if result["op"] == network_report.OP:
        return []
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, draw in (("roofline", _roofline), ("ratio", _bars)):
        figure = draw(result)
        paths.append(folder / _picture(result, kind))
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        matplotlib.pyplot.close(figure)
    return paths


def _roofline(result: dict) -> Any:
    import matplotlib.pyplot as plt

    ceilings = Ceilings.from_dict(result["ceilings"])
    peak = ceilings.arithmetic_rate(result["dtype"])
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities: list[float] = []
    for kernel, direction, marker, color in (
        ("torch", "forward", "o", "tab:orange"),
        ("torch", "backward", "s", "tab:orange"),
        ("fastconv", "forward", "o", "tab:blue"),
        ("fastconv", "backward", "s", "tab:blue"),
    ):
        points = [
            (group["flops_inside"] / group["bytes"], group["flops_inside"] / best["seconds"] / 1e9)
            for group in result["groups"]
            if group["pass"] == direction and group["flops_inside"] and (best := entry(group, kernel))
        ]
        if points:
            x, y = zip(*points)
            intensities += x
            axes.scatter(x, y, marker=marker, color=color, alpha=0.7, label=f"{kernel}, {direction}")
    draw_roof(axes, ceilings, peak, intensities)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs per byte (each tensor moved once)",
        ylabel="GFLOP/s",
        title=f"{result['op']}, {result['dtype']}, {result['device']}",
    )
    if intensities:  # a shuffle multiplies nothing
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _bars(result: dict) -> Any:
    import matplotlib.pyplot as plt

    # A layer that several networks share is drawn once.
    labels = dict.fromkeys(f"{g['layer']}, batch {g['sizes']['batch']}" for g in result["groups"])
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.34 * max(1, len(labels))))
    for offset, (direction, color) in enumerate(zip(PASSES, ("tab:blue", "tab:green"))):
        values = {}
        for group in result["groups"]:
            if group["pass"] == direction and ratio(group):
                label = f"{group['layer']}, batch {group['sizes']['batch']}"
                values.setdefault(label, []).append(math.log(ratio(group)))
        positions = [i + 0.4 * offset for i, label in enumerate(labels) if label in values]
        widths = [math.exp(sum(values[label]) / len(values[label])) for label in labels if label in values]
        axes.barh(positions, widths, height=0.38, color=color, label=direction)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([i + 0.2 for i in range(len(labels))], labels=list(labels), fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlabel="times as fast as PyTorch, each in its best layout",
        title=f"{result['op']}, {result['dtype']}, {result['device']}",
    )
    for each in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        each("{x:g}")
    axes.legend(fontsize=8)
    return figure

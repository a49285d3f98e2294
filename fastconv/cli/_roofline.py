"""The picture of ``compare``: each layer's speed, before and after, under the machine's two ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import UserError


def draw(reports: dict[str, Any], title: str, path: Path) -> None:
    """One panel for each mode, FLOP/s over FLOPs a byte; arrows lead from PyTorch to the kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(reports), figsize=(6.5 * len(reports), 5), squeeze=False)
    for panel, (mode, report) in zip(panels[0], reports.items()):
        ceilings = report.measure_ceilings()
        layers = [row for row in report.rows if row.seconds_after and row.timed_macs]
        points = [(2 * row.timed_macs / row.timed_bytes, row) for row in layers]
        if ceilings is not None:
            draw_roof(panel, ceilings, ceilings.flops_per_second, [x for x, _ in points])
        for x, row in points:
            before, after = (2e-9 * row.timed_macs / s for s in (row.seconds_before, row.seconds_after))
            colour = "tab:green" if row.kernel else "tab:red"
            arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.5}
            panel.annotate("", xy=(x, after), xytext=(x, before), arrowprops=arrow)
            panel.plot(x, before, "o", color="tab:gray", markersize=5)
            panel.plot(x, after, "o" if row.kernel else "x", color=colour, markersize=6)
        for marker, colour, label in (
            ("o", "tab:gray", "PyTorch"),
            ("o", "tab:green", "fastconv, swapped"),
            ("x", "tab:red", "fastconv, slower: left to PyTorch"),
        ):
            panel.plot([], [], marker, color=colour, label=label)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="FLOPs a byte moved",
            ylabel="GFLOP/s",
            title=f"{title}: {mode}",
        )
        panel.grid(True, which="both", alpha=0.2)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {error}") from None
    finally:
        pyplot.close(figure)


def draw_roof(panel: Any, ceilings: Any, peak: float, intensities: list[float]) -> None:
    """The limits of memory, cache (dotted) and ``peak`` FLOP/s, as wide as the intensities reach."""
    rate = ceilings.bytes_per_second
    ridge = peak / rate
    left, right = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    panel.plot([left, ridge, right], [1e-9 * left * rate, 1e-9 * peak, 1e-9 * peak], color="black")
    panel.annotate(f"{1e-9 * peak:.0f} GFLOP/s", (right, 1e-9 * peak), ha="right", va="bottom", fontsize=8)
    panel.annotate(f"{1e-9 * rate:.1f} GB/s from memory", (left, 1e-9 * left * rate), va="top", fontsize=8)
    fast = max(ceilings.copy_rates.values(), default=rate)
    if fast > 1.2 * rate:
        ridge = peak / fast
        panel.plot([left, ridge], [1e-9 * left * fast, 1e-9 * peak], color="black", linestyle=":")
        panel.annotate(
            f"{1e-9 * fast:.0f} GB/s from cache", (left, 1e-9 * left * fast), va="bottom", fontsize=8
        )

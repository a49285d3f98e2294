"""How tables, numbers and progress are printed."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def count(number: float) -> str:
    """Such as 569 M: three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return f"{number:.3g}"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, the columns as wide as they need to be."""
    lines = [list(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def rich_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[str] = ()
) -> Any:
    """A ``rich.table.Table``; numbers stand to the right, the last row below a line is the sum."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    style = {"header_style": "bold", "title_justify": "left", "box": SIMPLE_HEAD}
    table = Table(title=title, pad_edge=False, padding=(0, 1, 0, 0), **style)
    for column in columns:
        # On a narrow terminal the words are cut short, not the numbers.
        if column in text_columns:
            table.add_column(column, overflow="ellipsis")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), end_section=index == len(rows) - 2)
    return table


def progress_bars(console: Any) -> Any:
    """A ``rich.progress.Progress``, which draws on a terminal only and leaves nothing behind."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def progress_on_terminal(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """``progress(done, total, name)`` moves a bar; not without a terminal and rich."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda *_: None
        return
    from rich.console import Console

    with progress_bars(Console(stderr=True)) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total, name: bars.update(
            task, completed=done, total=total, description=f"{what}: {name}"
        )

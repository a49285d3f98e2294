"""Makes tables and plots from benchmarks/results/, and puts the table into README.md between its markers."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import UserError
from .bench import suite


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=Path, help="the folder of result files (default: benchmarks/results)")
    add("--readme", type=Path, help="the file with the markers (default: README.md)")
    add(
        "--check",
        action="store_true",
        help="write nothing; fail if the table there is not that of the results",
    )
    add("--print", action="store_true", help="print the table and write nothing")


def run(args: argparse.Namespace) -> int:
    report, results = suite("report"), suite("results")
    folder = args.results or results.RESULTS
    readme = args.readme or results.FOLDER.parent / "README.md"
    try:
        found = results.read_all(folder)
        if args.print:
            print(report.markdown(found))
            return 0
        before = readme.read_text()
        after = report.rewrite(before, found)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    if args.check:
        if before == after:
            return 0
        print(f"{readme.name} does not show the results in {_shown(folder)}/; run: python -m fastconv report")
        return 1
    for result in found:
        for path in report.plot(result, folder / result["device"]):
            print(path)
    if before != after:
        readme.write_text(after)
    print(readme)
    return 0


def _shown(folder: Path) -> Path:
    """As the user would type it here."""
    folder = folder.resolve()
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder

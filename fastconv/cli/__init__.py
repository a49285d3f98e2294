"""Command line of fastconv: python -m fastconv COMMAND.

Each command is a module of this folder: its docstring is the help, ``configure(parser)`` adds its arguments,
and ``run(args)`` does the work and returns the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

COMMANDS = {
    "doctor": "what is built and can run here, and the one command that mends what is missing",
    "compare": "optimize a model, check it, and time it against the original",
    "cost": "MACs, parameters, bytes, receptive field and floor time of a model's layers",
    "bench": "time an operator's kernels against PyTorch's",
    "ladder": "an operator's kernels from the plainest to the fastest",
    "report": "tables and plots from the benchmarks' raw results",
}


class UserError(Exception):
    """Something that the user can mend; printed without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 for a mistake of the user's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m fastconv", description="Convolution kernels for PyTorch."
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        # Only the command that is asked for is imported: the others may need what is not installed.
        module = importlib.import_module(f".{name}", __name__) if argv[:1] == [name] else None
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__ if module else summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            module.configure(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        with _terminating_interrupts():
            return args.run(args)
    except UserError as error:
        print(f"python -m fastconv {args.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "matplotlib"):
            raise
        print(f"{error.name} is not installed; install it with: pip install {error.name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as: ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def _terminating_interrupts() -> Iterator[None]:
    """Within the block, SIGTERM is as Ctrl-C: a command that is stopped shows what it has."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

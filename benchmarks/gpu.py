"""Everything that needs a GPU, in one go: build, tests, sanitizers, benchmarks. ``make gpu`` runs it.

    python -m benchmarks.gpu [--out FOLDER] [--minutes 9.5] [--only STEP ...]

Each step is a command with a time of its own, and none can stop the others: what fails or runs out of time is
written down. In the folder (``$OUT``, or ``benchmarks/results/<device>/``) lie then ``gpu.json`` with every
step's outcome, ``gpu.md`` to read, a log of each kind of step, and the raw result files of the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import report, results
from .harness import FOLDER, operators

ROOT = FOLDER.parent


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: what it is called in the report.
        command: program and arguments.
        seconds: the longest it may take.
        log: the file its output is added to.
        environment: variables beside those of this process.
        needs: a program that must be on the path; without it the step is skipped.
    """

    name: str
    command: Sequence[str]
    seconds: float
    log: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


def steps(out: Path) -> list[Step]:
    """What ``make gpu`` does, the most important first; the operators share the benchmarks' time."""
    ops = operators()
    python = sys.executable
    quiet = {"PYTHONUNBUFFERED": "1", "FASTCONV_TEST_DEVICE": "cuda"}
    install = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    found = [Step("build", install, 180, "build.log", {"PIP_ROOT_USER_ACTION": "ignore"})]
    found += [Step("doctor", [python, "-m", "fastconv", "doctor"], 30, "build.log", quiet)]
    found += [_bench(out, op, "bfloat16", 120 / len(ops), quiet) for op in ops]
    tests = [python, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider"]
    found += [Step("tests", tests, 150, "tests.log", quiet)]
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [python, "-m", "benchmarks.sanitize"]
        # PyTorch's allocator hands out parts of large blocks, in which no access is out of bounds.
        environment = {**quiet, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found += [Step(tool, command, 40, "sanitizer.log", environment, needs="compute-sanitizer")]
    found += [_bench(out, op, "float32", 60 / len(ops), quiet) for op in ops]
    return found


def _bench(out: Path, op: str, dtype: str, seconds: float, environment: dict[str, str]) -> Step:
    command = [sys.executable, "-m", "fastconv", "bench", op, "--device", "cuda", "--dtype", dtype]
    command += ["--shapes", "gpu", "landmarks", "--peers", "torch", "torch.compile", "--seconds", "2"]
    # It stops by itself in time to write what it has.
    command += ["--within", str(int(seconds * 0.8)), "--json", str(out / _result_name(op, dtype))]
    return Step(f"benchmark {op} {dtype}", command, seconds, "benchmark.log", environment)


def _result_name(op: str, dtype: str) -> str:
    return f"{op}.json" if dtype == "float32" else f"{op}-{dtype}.json"


def run_step(step: Step, out: Path, seconds_left: float) -> dict:
    """Runs a step within its own time and what is left of the whole; returns its outcome. Never raises."""
    outcome = {"name": step.name, "outcome": "skipped", "seconds": 0.0, "detail": ""}
    if step.needs and shutil.which(step.needs) is None:
        return {**outcome, "detail": f"{step.needs} is not installed"}
    allowed = min(step.seconds, seconds_left)
    if allowed < 1:
        return {**outcome, "detail": "no time was left"}
    start = time.perf_counter()
    log = out / step.log
    before = log.stat().st_size if log.exists() else 0
    with log.open("a") as sink:
        try:
            process = subprocess.Popen(
                list(step.command),
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            return {**outcome, "outcome": "failed", "detail": str(error)}
        try:
            code = process.wait(allowed)
            outcome["outcome"] = "passed" if code == 0 else "failed"
            outcome["detail"] = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome.update(outcome="out of time", detail=f"ended after {allowed:.0f} s")
    outcome["seconds"] = round(time.perf_counter() - start, 1)
    with log.open(errors="replace") as source:
        source.seek(before)
        outcome["tail"] = source.read()[-2000:]
    return outcome


def run_steps(todo: Sequence[Step], out: Path, seconds: float) -> list[dict]:
    """Runs the steps one after the other, within a time for all; prints each one's outcome."""
    deadline = time.perf_counter() + seconds
    outcomes = []
    for number, step in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {step.name} ...", end=" ", flush=True)
        outcome = run_step(step, out, deadline - time.perf_counter())
        outcomes.append(outcome)
        print(f"{outcome['outcome']}, {outcome['seconds']:.0f} s {outcome['detail']}", flush=True)
    return outcomes


def write(out: Path, outcomes: list[dict], machine: dict) -> str:
    """Writes ``gpu.json`` and ``gpu.md``; returns the text of the latter."""
    commit, dirty = results.revision()
    summary = {"machine": machine, "commit": commit, "uncommitted_changes": dirty, "steps": outcomes}
    (out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"# {machine['name']}", "", "| step | outcome | s | |", "|---|---|---|---|"]
    for outcome in outcomes:
        lines.append(
            f"| {outcome['name']} | {outcome['outcome']} | {outcome['seconds']:.0f} | {outcome['detail']} |"
        )
    found, broken = [], []
    for path in sorted(out.glob("*.json")):
        if path.name == "gpu.json":
            continue
        try:
            found.append(results.read(path))
        except ValueError as error:
            broken.append(str(error))
    if found:
        lines += ["", report.markdown(found, pictures=False)]
    refused = [line for result in found for line in report.refusals(result)]
    lines += ["", *(f"- refused: {line}" for line in refused), *(f"- unreadable: {line}" for line in broken)]
    for outcome in outcomes:
        if outcome["outcome"] in ("failed", "out of time"):
            lines += ["", f"## {outcome['name']}", "", "```", outcome.get("tail", "").strip(), "```"]
    text = "\n".join(lines).rstrip() + "\n"
    (out / "gpu.md").write_text(text)
    return text


def why_no_gpu() -> str | None:
    """Why nothing here can run on a GPU, or None."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or no driver for it"
    return None


def machine() -> dict:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": results.versions(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the results go (default: $OUT, or by device)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together (default: 9.5)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="only these steps")
    args = parser.parse_args(arguments)
    obstacle = why_no_gpu()
    if obstacle:
        print(f"make gpu needs a CUDA GPU: {obstacle}", file=sys.stderr)
        return 2
    described = machine()
    default = os.environ.get("OUT") or results.RESULTS / results.slug(described["name"])
    out = (args.out or Path(default)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [step for step in steps(out) if not args.only or step.name in args.only]
    if not todo:
        print(f"--only must name some of {[step.name for step in steps(out)]}", file=sys.stderr)
        return 2
    for name in {step.log for step in todo}:
        (out / name).unlink(missing_ok=True)
    outcomes = run_steps(todo, out, 60 * args.minutes)
    print(write(out, outcomes, described))
    return 0 if all(outcome["outcome"] in ("passed", "skipped") for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

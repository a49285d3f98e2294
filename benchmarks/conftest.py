"""Makes ``pytest benchmarks/`` the performance suite.

pytest-benchmark times one test after another; compared sides must alternate. So the first test of a group
measures all contenders of that group that were selected, interleaved (:meth:`.harness.Problem.measure`), and
every test of the group then plays its own rounds back: its benchmark runs on a clock that the recorded times
move forward. PyTorch's own sides always run along, so that a ratio exists whatever was selected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from fastconv.ceilings import measure

from . import network_report, report, results
from .harness import PASSES, Contender, Problem, contenders, layers, load
from .networks import NetworkProblem


class PlaybackClock:
    """A clock that stands still until a recorded time has passed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def play(self, times: list[float]) -> None:
        self.seconds += times.pop(0)


CLOCK = PlaybackClock()


@dataclass
class Entry:
    """What one test is about."""

    op: str
    problem: Problem | NetworkProblem
    contender: Contender
    peers: list[Contender]  # PyTorch's own sides


def pytest_addoption(parser):
    group = parser.getgroup("fastconv")
    add = group.addoption
    add("--shapes", nargs="+", metavar="NET", help="networks or layers (landmarks/144@56 k3); default: all")
    add("--backends", nargs="+", metavar="NAME", help="backends; default: all that run compiled kernels here")
    add("--passes", nargs="+", choices=PASSES, default=PASSES)
    add("--dtype", default="float32", help="float32 (default), bfloat16, float16, float64")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--batch", type=int, default=4, help="images, where the shape file does not say (default: 4)")
    add("--image", type=int, default=224, help="height and width for whole networks (default: 224)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--quick", action="store_true", help="only PyTorch and the library's own choice, few rounds")
    add("--rounds", type=int, default=20, help="turns of each contender (default: 20)")
    add(
        "--seconds",
        type=float,
        default=3.0,
        help="longest time for a group, beyond three rounds (default: 3)",
    )
    add("--save", action="store_true", help="write the raw results to benchmarks/results/<device>/")
    add("--device-name", help="the folder's name there (default: made from the processor's)")


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    config.stash[GROUPS] = {}


GROUPS = pytest.StashKey[dict]()


def pytest_generate_tests(metafunc):
    if "contest" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    of_networks = hasattr(metafunc.module, "problems")
    parameters = []
    for entry in (_of_networks if of_networks else _of_operator)(metafunc.module, option):
        mark = pytest.mark.benchmark(group=str(entry.problem), timer=CLOCK.now)
        name = f"{entry.problem} {entry.contender.name}".replace(" ", "-")
        parameters.append(pytest.param(entry, id=name, marks=mark))
    metafunc.parametrize("contest", parameters, indirect=True)


def _of_operator(module, option) -> Iterator[Entry]:
    benchmark, device = load(module.BENCHMARK.op), option("device")
    entries = contenders(benchmark.op, device, backends_wanted=option("backends"), quick=option("quick"))
    peers = [entry for entry in contenders(benchmark.op, device, quick=True) if entry.side == "torch"]
    for layer in layers(benchmark.op, option("shapes"), option("batch")):
        for direction in option("passes"):
            problem = Problem(benchmark, layer, direction, getattr(torch, option("dtype")), device)
            for entry in entries:
                yield Entry(benchmark.op, problem, entry, peers)


def _of_networks(module, option) -> Iterator[Entry]:
    for problem in module.problems(option):
        entries = module.contenders(option, problem)
        peers = [entry for entry in entries if entry.side == "torch"]
        for entry in entries:
            yield Entry(network_report.OP, problem, entry, peers)


@pytest.fixture
def contest(request, benchmark):
    """``contest()``: checks and times the group if that is not done, and reports this test's contender."""

    def run() -> None:
        entry: Entry = request.param
        group = _measured(request, entry)
        if reason := group["left_out"].get(entry.contender.name):
            pytest.skip(reason)
        figures = next(e for e in group["contenders"] if e["name"] == entry.contender.name)
        benchmark.extra_info.update({key: value for key, value in figures.items() if key != "rounds"})
        benchmark.extra_info["versions"] = results.versions()
        if figures["refused"]:
            pytest.fail(f"not timed: {figures['refused']}", pytrace=False)
        times = list(figures["rounds"])
        benchmark.pedantic(CLOCK.play, args=(times,), rounds=len(times))

    return run


def _measured(request, wanted: Entry) -> dict:
    problem = wanted.problem
    groups = request.config.stash[GROUPS].setdefault(wanted.op, {})
    if str(problem) not in groups:
        option = request.config.getoption
        selected = list(wanted.peers)
        for item in request.session.items:
            entry = item.callspec.params.get("contest") if hasattr(item, "callspec") else None
            if not isinstance(entry, Entry):  # an operator without such layers
                continue
            if str(entry.problem) == str(problem) and entry.contender not in selected:
                selected.append(entry.contender)
        groups[str(problem)] = problem.measure(
            selected,
            rounds=min(option("rounds"), 5) if option("quick") else option("rounds"),
            seconds=option("seconds"),
            ceilings=measure(option("device")),
        )
    return groups[str(problem)]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """``--benchmark-json`` also says what the machine can do."""
    output_json["ceilings"] = measure(config.getoption("device")).as_dict()


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter, config):
    for op, groups in config.stash[GROUPS].items():
        if not groups:
            continue
        ceilings = measure(config.getoption("device"))
        result = results.collect(
            op, list(groups.values()), ceilings, config.getoption("dtype"), config.getoption("device_name")
        )
        shown = network_report if op == network_report.OP else report
        terminalreporter.write_line(shown.console(result))
        if config.getoption("save"):
            terminalreporter.write_line(f"raw results: {results.save(result)}")

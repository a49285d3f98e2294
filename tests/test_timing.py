"""The timer: turns, rounds and time limits, and whether other programs disturb it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastconv import _timing
from fastconv._timing import interleave, wall_clock


def test_interleave_gives_each_a_turn_a_round_and_moves_the_order_on():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def stopwatch(call, times):
        for _ in range(times):
            call()
        return 1.0

    times = interleave(calls, 3, stopwatch=stopwatch)
    assert times == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_interleave_calls_often_enough_to_fill_a_turn():
    counted = []
    interleave({"a": lambda: None}, 1, turn=1.0, stopwatch=lambda _, times: counted.append(times) or 0.25)
    assert counted == [1, 4]


def test_interleave_stops_in_time_after_three_rounds():
    assert len(interleave({"a": lambda: None}, 1000, seconds=0, turn=0)["a"]) == 3


def test_interleave_refuses_bad_arguments():
    with pytest.raises(ValueError, match="contenders must have at least one"):
        interleave({})
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleave({"a": lambda: None}, 0)


@pytest.mark.parametrize("others, threads, warns", [(0.5, 2, False), (1.5, 2, True), (0.5, 1, False)])
def test_busy_warns_when_others_need_the_cores(monkeypatch, others, threads, warns):
    monkeypatch.setattr(_timing.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(_timing, "cores_of_others", lambda: others)
    warning = _timing.busy(threads)
    assert (warning is not None) == warns
    assert warning is None or warning.startswith("other programs keep 1.5 of 2 cores busy")


def test_cores_of_others_leaves_this_process_out(monkeypatch):
    """The machine works 3 s in each of 2 s, and this process 1 s of these."""
    machine, own, clock = (iter(values) for values in ((10.0, 13.0), (4.0, 5.0), (0.0, 2.0)))
    monkeypatch.setattr(_timing, "_busy_seconds", lambda: next(machine))
    monkeypatch.setattr(_timing.time, "process_time", lambda: next(own))
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(clock))
    assert _timing.cores_of_others(0) == 1.0
    monkeypatch.undo()
    assert 0 <= _timing.cores_of_others(0.05) < 2 * os.cpu_count()


def test_wall_clock_counts_calls():
    calls = []
    assert wall_clock(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt and page faults are Linux's")
def test_freed_memory_is_kept():
    script = """
import resource, torch
from fastconv._timing import keep_freed_memory
keep_freed_memory()
for _ in range(20):
    torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 4096  # one pass over 16 MiB: 4,096 pages

"""Times things against each other: in one run, in turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h

Stopwatch = Callable[[Callable[[], Any], int], float]


def wall_clock(call: Callable[[], Any], times: int) -> float:
    """Seconds a call, over ``times`` calls, by the host's clock; a call returns when its work is done."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def busy(threads: int) -> str | None:
    """A warning, if other programs leave too little of the machine to time ``threads`` threads well."""
    others, cores = cores_of_others(), os.cpu_count() or 1
    if others + threads <= cores + 0.5 * threads:
        return None
    return f"other programs keep {others:.1f} of {cores} cores busy: times will be noisy"


def cores_of_others(seconds: float = 0.2) -> float:
    """How many cores other programs keep busy meanwhile; where the system does not tell, its load."""
    try:
        before = _busy_seconds() - time.process_time(), time.perf_counter()
        time.sleep(seconds)
        after = _busy_seconds() - time.process_time(), time.perf_counter()
    except OSError:
        return os.getloadavg()[0]
    return max(0.0, (after[0] - before[0]) / (after[1] - before[1]))


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine started."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, irq, softirq, stolen = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int = 20,
    *,
    seconds: float | None = None,
    turn: float = 2e-3,
    stopwatch: Stopwatch = wall_clock,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one figure a round; compare their medians.

    In every round each contender has one turn: an untimed call, which brings its own data back into the
    caches, then as many timed calls as fill ``turn`` seconds. The order moves on by one each round.

    Args:
        contenders: what to call, by name.
        rounds: how often each has its turn, at most.
        seconds: stop after this long once three rounds are done; None: never.
        turn: the least length of a turn, in seconds.
        stopwatch: ``stopwatch(call, times) -> seconds a call``, such as :func:`wall_clock`.
        progress: called with (rounds done, rounds) after each round.

    Raises:
        ValueError: there are no contenders, or ``rounds`` is below 1.
    """
    if not contenders:
        raise ValueError("contenders must have at least one entry, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    start = time.perf_counter()
    times = {}
    for name, call in contenders.items():
        call()  # first calls compile, allocate and choose
        times[name] = max(1, round(turn / max(stopwatch(call, 1), 1e-9)))
    names = list(contenders)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            contenders[name]()
            measured[name].append(stopwatch(contenders[name], times[name]))
        if progress is not None:
            progress(done + 1, rounds)
        if seconds is not None and done >= 2 and time.perf_counter() - start > seconds:
            break
    return measured


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what a process frees, for the rest of the process; elsewhere nothing.

    By default a large tensor may go back to the system and come again page by page: a fault for every 4 KiB,
    more than many a kernel takes, and which of two contenders pays is luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28), (M_MMAP_MAX, 0)):
            mallopt(parameter, value)

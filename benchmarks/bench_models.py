"""Whole networks under pytest-benchmark; ``python -m fastconv bench models`` measures the same.

``--shapes`` takes names of :data:`.networks.NETWORKS`; ``--seconds`` is the time of each contender.
"""

from __future__ import annotations

from . import networks


def problems(option):
    """What the options select; names of other benchmarks' layers are not for this one."""
    names = option("shapes")
    known = names and [name for name in names if name in (*networks.NETWORKS, "all")]
    if names and not known:
        return []
    return networks.problems(known, [option("batch")], option("passes"), image=option("image"))


def contenders(option, problem):
    return networks.contenders(problem.direction, quick=option("quick"))


def test_models(contest):
    contest()

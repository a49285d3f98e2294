"""The machine's limits: figures that exist and make sense, whatever the machine is busy with."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastconv import _library, ceilings
from fastconv.ceilings import Ceilings

MADE_UP = Ceilings("cpu", "avx2", 2, 100e9, 10e9, {2**20: 80e9, 2**24: 40e9, 2**28: 10e9}, {"float64": 50e9})


@pytest.fixture(scope="module")
def host():
    if _library.host() is None:
        pytest.skip("fastconv._host is not built")
    return _library.host()


def test_every_rate_is_positive_and_finite(host):
    found = ceilings.measure("cpu", 1)
    rates = [found.flops_per_second, found.bytes_per_second, *found.copy_rates.values()]
    assert all(rate > 0 and math.isfinite(rate) for rate in [*rates, *found.dtype_flops_per_second.values()])
    assert found.threads == 1
    assert found.capability in host.cpu_capabilities()


def test_measured_once_in_a_process(host):
    assert ceilings.measure("cpu", 1) is ceilings.measure(torch.device("cpu"), 1)


def test_capabilities_begin_with_the_plainest(host):
    names = host.cpu_capabilities()
    assert names[0] == "portable"
    assert names == [name for name in ("portable", "avx2", "avx512") if name in names]
    assert host.cpu_capability() in names


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("fma_peak", (0, 0.01), "threads must be between 1 and 4096, got 0"),
        ("fma_peak_double", (1, 0.0), "seconds must be above 0"),
        ("copy_rate", (1, 1, 0.01), "bytes must be at least 128, got 1"),
    ],
)
def test_host_refuses_bad_arguments(host, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(host, function)(*arguments)


def test_unbuilt_host_names_the_command(monkeypatch):
    monkeypatch.setattr(_library, "host", lambda: None)
    with pytest.raises(RuntimeError, match="build it with: pip install --no-build-isolation"):
        ceilings.measure("cpu", 4000)  # a count that nothing has measured yet


def test_bad_arguments():
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        ceilings.measure("cpu", 0)
    with pytest.raises(ValueError, match="device must be a CPU or CUDA device, got meta"):
        ceilings.measure("meta")


def test_floor_is_the_larger_of_two_times():
    assert MADE_UP.floor_time(100e9, 1) == 1.0
    assert MADE_UP.bound(100e9, 1) == "arithmetic"
    assert MADE_UP.floor_time(1, 10e9) == 1.0
    assert MADE_UP.bound(1, 10e9) == "memory"
    assert MADE_UP.floor_time(100e9, 1, torch.float64) == 2.0


def test_small_copies_are_held_against_the_caches():
    assert MADE_UP.copy_rate(2**18) == 80e9
    assert MADE_UP.copy_rate(2**20) == 80e9
    assert MADE_UP.copy_rate(2**21) == 40e9
    assert MADE_UP.copy_rate(2**40) == 10e9


def test_survives_json():
    assert Ceilings.from_dict(json.loads(json.dumps(MADE_UP.as_dict()))) == MADE_UP

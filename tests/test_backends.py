"""The choice of a backend, for every operator."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import DEVICE, ELSEWHERE, runs

import fastconv
from fastconv.backends import BACKENDS, CHOICES, why_not
from fastconv.ops._arguments import DTYPES

OP = "depthwise_conv2d"


@pytest.mark.parametrize("op", CHOICES)
def test_nothing_is_left_out(op):
    """The other tests run what can run here; this one fails if that is less than it should be."""
    missing = {b: why_not(b, DEVICE) for b in CHOICES[op].algorithms if b not in ELSEWHERE}
    assert not {b: reason for b, reason in missing.items() if reason is not None}
    assert {run.backend for run in runs(op)} == set(CHOICES[op].algorithms) - ELSEWHERE


@pytest.mark.parametrize("op", CHOICES)
def test_every_dtype_is_served(op):
    """All but one: Triton's interpreter computes bfloat16 wrongly."""
    unserved = {(run.backend, dtype) for run in runs(op) for dtype in DTYPES if not run.serves(dtype)}
    assert unserved == ({("triton", torch.bfloat16)} if DEVICE == "cpu" else set())


def test_unwritten_memory_shows():
    """The fixture on which the tests of all kernels rely."""
    for dtype in DTYPES:
        assert torch.empty(100, dtype=dtype, device=DEVICE).isnan().all()


def test_use_backend_nests():
    def chosen():
        return CHOICES[OP](None, None, torch.zeros(1, 1, 1, 1, device=DEVICE), None, None, None)

    measured_best = chosen()
    with fastconv.use_backend("aten"):
        assert chosen() == "aten"
        with fastconv.use_backend("reference"):
            assert chosen() == "reference"
            with fastconv.use_backend(None):
                assert chosen() == measured_best
            assert chosen() == "reference"
        assert chosen() == "aten"
    assert chosen() == measured_best


def test_use_backend_ends_on_an_error():
    before = fastconv.backends._state.backend
    with pytest.raises(KeyError), fastconv.use_backend("reference"):
        raise KeyError
    assert fastconv.backends._state.backend == before


def test_use_backend_is_of_one_thread():
    seen = []
    with fastconv.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(fastconv.backends._state.backend))
        thread.start()
        thread.join()
    assert seen == [None]


def test_use_backend_rejects_unknown_names():
    with pytest.raises(ValueError, match="'cudnn'") as error, fastconv.use_backend("cudnn"):
        pass
    assert all(name in str(error.value) for name in BACKENDS)


@pytest.mark.parametrize("op", CHOICES)
def test_available(op):
    here = fastconv.available(op, DEVICE)
    assert set(here) <= set(CHOICES[op].algorithms)
    assert "reference" in here
    assert "cuda" not in fastconv.available(op, "cpu")
    assert not {"cpu", "emulator"} & set(fastconv.available(op, "cuda"))


def test_available_rejects_unknown_operators():
    with pytest.raises(ValueError, match="op must be one of .*'convolve'"):
        fastconv.available("convolve")

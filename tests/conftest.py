"""Fixtures of every test. Importing `cases` first turns Triton's interpreter on where there is no GPU."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from cases import DEVICE

# Autouse fixtures here do not depend on the example, so Hypothesis need not reset them for each.
_calm = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
}
hypothesis.settings.register_profile("default", **_calm)
hypothesis.settings.register_profile("ci", derandomize=True, **_calm)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that need many GiB or minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: needs many GiB or minutes; runs with --slow")
    # The fixture `deterministic` below asks for these warnings.
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*:UserWarning")


def pytest_report_header() -> str:
    return f"fastconv: tensors on {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs many GiB or minutes: --slow"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def deterministic():
    """New memory is filled with NaN, so that an output which a kernel did not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """``threads(n)`` sets PyTorch's thread count until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

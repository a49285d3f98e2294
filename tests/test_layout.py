"""One name, one layer: each operator has its files, and the layers keep apart."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv.backends import CHOICES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("csrc", "kernels", "fastconv", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu")
)
# Files that are longer than LONGEST lines, and why they are not split.
LONGEST = 500
LONG: dict[str, str] = {}


@pytest.mark.parametrize("op", CHOICES)
def test_an_operator_has_its_files(op):
    """`git ls-files '*<op>*'` prints the whole operator."""
    for file in (
        f"csrc/{op}/{op}.h",
        f"csrc/{op}/{op}.cpp",
        f"kernels/{op}.py",
        f"fastconv/ops/{op}.py",
        f"tests/test_{op}.py",
        f"tests/launches_{op}.py",
        f"benchmarks/bench_{op}.py",
        f"docs/{op}.md",
    ):
        assert (ROOT / file).is_file(), f"{file} is missing"
    for pattern in (f"csrc/{op}/{op}*_cpu.cpp", f"csrc/{op}/{op}*_cuda.cu"):
        assert list(ROOT.glob(pattern)), f"no file is called {pattern}"


@pytest.mark.parametrize("op", CHOICES)
def test_an_operator_is_in_the_readmes_table(op):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(op in row for row in rows)


def test_every_folder_of_kernels_is_an_operators():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders == {*CHOICES, "common", "emulator"}


def test_kernels_know_no_tensors():
    kernels = [path for path in SOURCES if path.name.endswith(("_cpu.cpp", "_cuda.cu"))]
    assert kernels
    for path in kernels:
        assert not includes_torch(path), f"{path.relative_to(ROOT)} includes a header of torch"


def includes_torch(path: Path) -> bool:
    """Directly, or through a header of this repository."""
    for header in re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.MULTILINE):
        if header.startswith(("torch/", "ATen/", "c10/")):
            return True
        beside = path.parent / header
        if beside.is_file() and includes_torch(beside):
            return True
    return False


def test_the_rule_on_torch_can_fail():
    assert all(includes_torch(ROOT / f"csrc/{op}/{op}.cpp") for op in CHOICES)


def test_files_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    too_long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert {name: length for name, length in too_long.items() if name not in LONG} == {}
    assert LONG.keys() <= too_long.keys(), "no longer long"


def test_import_is_light():
    """Our Triton kernels, Matplotlib and Rich are imported by what uses them.

    Not Triton itself: torch.utils.flop_counter, where formulas are registered, imports it.
    """
    heavy = ("fastconv.kernels", "matplotlib", "rich")
    code = f"import sys, fastconv; print(*[m for m in sys.modules if m.startswith({heavy})])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_public_names_are_there():
    import fastconv

    assert list(fastconv.__all__) == sorted(fastconv.__all__)
    assert all(hasattr(fastconv, name) for name in fastconv.__all__)
    for op in CHOICES:
        assert {op, f"{op}_reference"} <= set(fastconv.__all__)

"""Every CUDA kernel compiles for each architecture, without a GPU, and keeps its values in registers.

Registers, stack and shared memory of every kernel are compared with ``resources/cuda.json``. Registers
depend on the compiler, so with another nvcc than that file's, names and "no spills" alone are. After a change
that is meant,

    python tests/test_compile_gate_cuda.py --write

writes that file again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = Path(__file__).parent / "resources" / "cuda.json"
REWRITE = "python tests/test_compile_gate_cuda.py --write"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The largest first, so that the last to run are short.
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"), key=lambda path: -path.stat().st_size)

# One kernel in the report of ptxas.
REPORT = re.compile(
    r"Function properties for (?P<name>\S+)\s*"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\s*"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    return re.search(r"V(\d+\.\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def readable(names: list[str]) -> list[str]:
    """Such as ``scale_kernel<float, 3>``, of mangled names."""
    plain = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [
        re.sub(r"\(anonymous namespace\)::|fastconv::|\(int\)|^void ", "", name).split("(")[0]
        for name in plain.splitlines()
    ]


def compile_kernels(source: Path, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Kernel -> what it takes, of one file for one architecture."""
    target = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "--resource-usage", "-o"]
    result = subprocess.run([*command, str(target), str(source)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"{source.name} does not compile for {architecture}:\n{result.stderr}{result.stdout}"
        )
    found = list(REPORT.finditer(result.stderr + result.stdout))
    names = readable([match["name"] for match in found])
    return {
        name: {
            "registers": int(match["registers"]),
            "stack_bytes": int(match["stack"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
            "static_shared_bytes": int(match["shared"] or 0),
        }
        for name, match in zip(names, found)
    }


def compile_all(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> what it takes."""
    tasks = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda task: compile_kernels(*task, folder), tasks))
    table: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in ARCHITECTURES}
    for (_, architecture), kernels in zip(tasks, results):
        table[architecture].update(kernels)
    return {architecture: dict(sorted(kernels.items())) for architecture, kernels in table.items()}


def write(kernels: dict[str, dict[str, dict[str, int]]]) -> None:
    lines = [f'{{\n "nvcc": "{nvcc_version()}",\n "kernels": {{']
    for i, (architecture, table) in enumerate(kernels.items()):
        lines.append(f'  "{architecture}": {{')
        lines += [f'   "{name}": {json.dumps(values)},' for name, values in table.items()]
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  }" + ("," if i + 1 < len(kernels) else ""))
    RESOURCES.parent.mkdir(exist_ok=True)
    RESOURCES.write_text("\n".join([*lines, " }", "}"]) + "\n")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if nvcc_version() is None:
        pytest.skip("nvcc is not on the path")
    return compile_all(tmp_path_factory.mktemp("cubins"))


def test_report_is_read():
    text = (
        "ptxas info    : Compiling entry function '_Z6kernelIfLi3EEvPT_' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z6kernelIfLi3EEvPT_\n"
        "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, "
        "1024 bytes smem\n"
        "ptxas info    : Function properties for _Z5plainv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    first, second = REPORT.finditer(text)
    assert first["name"] == "_Z6kernelIfLi3EEvPT_"
    assert [int(first[key]) for key in ("stack", "stores", "loads", "registers", "shared")] == [
        16,
        12,
        20,
        80,
        1024,
    ]
    assert (second["name"], second["registers"], second["shared"]) == ("_Z5plainv", "8", None)
    if shutil.which("c++filt"):
        assert readable(["_Z6kernelIfLi3EEvPT_", "_Z5plainv"]) == ["kernel<float, 3>", "plain"]


def test_no_kernel_spills(kernels):
    spilled = {
        f"{name} on {architecture}": values["spill_bytes"]
        for architecture, table in kernels.items()
        for name, values in table.items()
        if values["spill_bytes"] > 0
    }
    assert not spilled, f"registers spill to memory (bytes): {spilled}"


def test_resources_are_the_committed_ones(kernels):
    committed = json.loads(RESOURCES.read_text())
    for architecture in ARCHITECTURES:
        now, before = kernels[architecture], committed["kernels"][architecture]
        assert sorted(now) == sorted(before), f"other kernels than in {RESOURCES.name}; if meant: {REWRITE}"
        if committed["nvcc"] != nvcc_version():
            continue
        changed = {name: (before[name], now[name]) for name in now if now[name] != before[name]}
        assert not changed, (
            f"{architecture}: not as in {RESOURCES.name} (before, now); if meant: {REWRITE}\n{changed}"
        )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REWRITE}")
    with tempfile.TemporaryDirectory() as folder:
        write(compile_all(Path(folder)))
    print(f"wrote {RESOURCES}")

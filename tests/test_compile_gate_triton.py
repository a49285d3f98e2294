"""Every Triton kernel compiles ahead of time, without a GPU, and keeps its values in registers.

The launches of ``launches_<op>.py`` run on tensors without storage and each is compiled instead, as it would
be launched: a change of a heuristic shows here too. Registers and shared memory are compared with
``resources/triton.json``. After a change that is meant,

    python tests/test_compile_gate_triton.py --write

writes that file again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

RESOURCES = Path(__file__).parent / "resources" / "triton.json"
REWRITE = "python tests/test_compile_gate_triton.py --write"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiled_kernels_use_the_resources_on_record() -> None:
    # Another process, for here the kernels are interpreted: Triton decides when it is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"a Triton kernel does not compile:\n{run.stderr}"
    found, recorded = json.loads(run.stdout), json.loads(RESOURCES.read_text())

    spilled = {name: use for name, use in found["kernels"].items() if use["stack_bytes"]}
    assert not spilled, f"registers are spilled to memory: {spilled}"
    if found["triton"] != recorded["triton"]:
        return  # another compiler: other registers
    changed = [
        f"{name}: {recorded['kernels'].get(name, 'not on record')} -> {found['kernels'].get(name, 'gone')}"
        for name in sorted(found["kernels"].keys() | recorded["kernels"].keys())
        if found["kernels"].get(name) != recorded["kernels"].get(name)
    ]
    assert not changed, "\n".join([f"{RESOURCES.name} is out of date; if this is meant: {REWRITE}", *changed])


def test_spills_would_be_seen() -> None:
    """The line of cuobjdump that the gate reads, with a spill in it."""
    line = " Function kernel:\n  REG:128 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:640 TEXTURE:0"
    assert parse_resources(line) == {"registers": 128, "stack_bytes": 8}


def parse_resources(text: str) -> dict[str, int]:
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack_bytes": int(stack)}


class Recorder:
    """Stands in for a kernel: compiles what would be launched, and notes what it uses."""

    def __init__(self, kernel: Any, capability: int, found: dict[str, dict[str, int]]) -> None:
        self.kernel, self.capability, self.found = kernel, capability, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: Any, **keywords: Any) -> None:
        import torch
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        values = {**dict(zip(names, arguments)), **keywords}
        options = {name: values.pop(name) for name in keywords if name not in names}
        pointers = {
            torch.bfloat16: "*bf16",
            torch.float16: "*fp16",
            torch.float32: "*fp32",
            torch.float64: "*fp64",
            torch.int64: "*i64",
        }
        signature, constants, divisible = {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, self.kernel.params)):
            value = values[name]
            # As a launch specialises its arguments: on None, on 1, and on multiples of 16.
            specialised = not parameter.do_not_specialize
            is_one = specialised and type(value) is int and value == 1
            if parameter.is_constexpr or value is None or is_one:
                signature[name], constants[name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = pointers[value.dtype] if is_tensor else "i32" if value < 2**31 else "i64"
            if is_tensor or (specialised and value % 16 == 0):
                divisible[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        name = self.kernel.fn.__name__
        self.found[name] = {**resources(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        return parse_resources(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def launches() -> list[tuple[str, int]]:
    """(module, number) of every launch: ``tests/launches_<op>.py`` lists an operator's."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("launches_*.py"))
    return [(name, i) for name in modules for i in range(len(importlib.import_module(name).LAUNCHES))]


def compile_launch(place: tuple[str, int]) -> dict[str, dict[str, int]]:
    """Every kernel that one launch starts."""
    module, number = place
    launch = importlib.import_module(module).LAUNCHES[number]
    launchers = importlib.import_module(f"fastconv.kernels.{module.removeprefix('launches_')}")
    found: dict[str, dict[str, int]] = {}
    kernels = {name: kernel for name, kernel in vars(launchers).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(launchers, name, Recorder(kernel, launch.capability, found))
        launch.run(launchers)
    finally:
        for name, kernel in kernels.items():
            setattr(launchers, name, kernel)
    return {f"{name}, {launch}": use for name, use in found.items()}


def compile_all() -> dict[str, Any]:
    import triton

    found: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        for kernels in pool.map(compile_launch, launches()):
            found.update(kernels)
    return {"triton": triton.__version__, "kernels": dict(sorted(found.items()))}


def main(arguments: list[str]) -> None:
    found = compile_all()
    if arguments != ["--write"]:
        print(json.dumps(found))
        return
    # One kernel a line, so that a change reads as one.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(use)}" for name, use in found["kernels"].items())
    RESOURCES.parent.mkdir(exist_ok=True)
    RESOURCES.write_text(f'{{\n "triton": "{found["triton"]}",\n "kernels": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])

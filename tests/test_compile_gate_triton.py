"""Every Triton kernel compiles ahead of time, without a GPU, and keeps its values in registers.

The launchers run on tensors without storage and each launch is compiled instead, as it would be launched: a
change of a heuristic shows here too. Registers and shared memory are compared with ``resources/triton.json``.
After a change that is meant,

    python tests/test_compile_gate_triton.py --write

writes that file again.
"""

from __future__ import annotations

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
from typing import Any, NamedTuple

import pytest

RESOURCES = Path(__file__).parent / "resources" / "triton.json"
REWRITE = "python tests/test_compile_gate_triton.py --write"


class Layer(NamedTuple):
    """A layer of a real network, a type, and an architecture."""

    shape: tuple[int, int, int, int]
    kernel: int
    stride: int = 1
    channels_last: bool = True
    dtype: str = "bfloat16"
    capability: int = 90
    algorithm: str = "tiled"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        kernel = f"{self.kernel}x{self.kernel}" + (f" stride {self.stride}" if self.stride > 1 else "")
        place = f"{self.shape[1]}@{self.shape[2]}"
        return f"sm_{self.capability} {self.dtype} {layout} {kernel} on {place}, {self.algorithm}"


EARLY, LATE = (64, 96, 56, 56), (64, 768, 7, 7)
LAYERS = [
    Layer(EARLY, 7, 1, True, "float32"),  # the slowest to compile come first
    Layer(EARLY, 7, 1, True),
    Layer((64, 384, 14, 14), 31),
    Layer(EARLY, 7, 1, False, "float32"),
    Layer(EARLY, 7, 1, False),
    Layer(EARLY, 3, 1, True, "float32"),
    Layer(EARLY, 3, 1, True),
    Layer(EARLY, 3, 1, False, "float32"),
    Layer(EARLY, 3, 1, False),
    Layer(EARLY, 3, 2, True),
    Layer(EARLY, 3, 2, False),
    Layer(LATE, 3, 1, True, "float16"),
    Layer(EARLY, 3, 1, True, capability=80),
    Layer(EARLY, 3, 1, False, capability=80),
    Layer(EARLY, 3, 1, True, algorithm="plain"),
    Layer(EARLY, 3, 1, False, algorithm="plain"),
    Layer(EARLY, 3, 1, True, capability=80, algorithm="plain"),
]


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


def compile_layer(layer: Layer) -> dict[str, dict[str, int]]:
    """Every kernel that the layer's forward and backward launch."""
    import torch
    from fastconv.kernels import depthwise_conv2d as launchers

    found: dict[str, dict[str, int]] = {}
    kernels = {name: kernel for name, kernel in vars(launchers).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(launchers, name, Recorder(kernel, layer.capability, found))
        memory_format = torch.channels_last if layer.channels_last else torch.contiguous_format
        options = {"dtype": getattr(torch, layer.dtype), "device": "meta"}
        input = torch.empty(layer.shape, memory_format=memory_format, **options)
        weight = torch.empty(layer.shape[1], 1, layer.kernel, layer.kernel, **options)
        bias = torch.empty(layer.shape[1], **options)
        geometry = (layer.stride,) * 2, ((layer.kernel - 1) // 2,) * 4, (1, 1)
        output = launchers.depthwise_conv2d_forward_triton(
            input, weight, bias, *geometry, "gelu", layer.algorithm
        )
        launchers.depthwise_conv2d_backward_triton(
            output, input, weight, *geometry, layer.algorithm, True, True, True
        )
    finally:
        for name, kernel in kernels.items():
            setattr(launchers, name, kernel)
    return {f"{name}, {layer}": use for name, use in found.items()}


def compile_all() -> dict[str, Any]:
    import triton

    found: dict[str, dict[str, int]] = {}
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        for kernels in pool.map(compile_layer, LAYERS):
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

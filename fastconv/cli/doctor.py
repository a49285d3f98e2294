"""What is built and can run here, and for each thing that is missing the one command that mends it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__, _library, backends


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from ._model import console

    out = console()
    table = Table(title=f"fastconv {__version__}", title_justify="left", show_header=False)
    repairs: list[tuple[str, str]] = []
    for what, found, repair in findings():
        table.add_row(what, Text(found))
        if repair:
            repairs.append((what, repair))
    out.print(table)
    table = Table(title="Which backend can run which operator", title_justify="left")
    for column in ("operator", "device", *backends.BACKENDS):
        table.add_column(column)
    reasons: dict[tuple[str, str], str] = {}
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op, choice in sorted(backends.CHOICES.items()):
        for device in devices:
            cells = []
            for backend in backends.BACKENDS:
                reason = backends.why_not(backend, device)
                if backend == "cuda" and device == "cpu":
                    reason = _library.problem("cuda") or reason
                if backend not in choice.algorithms:
                    cells.append(Text("-", style="dim"))
                elif reason is None:
                    cells.append(Text("yes", style="green"))
                else:
                    cells.append(Text("no", style="red"))
                    reasons.setdefault((device, backend), reason)
            table.add_row(op, device, *cells)
    out.print(table)
    for (device, backend), reason in reasons.items():
        out.print(Text(f"{backend} on {device} tensors: {reason}"), style="dim", soft_wrap=True)
    out.print()
    for line in verdict(repairs, bool(reasons)):
        out.print(Text(line), soft_wrap=True)  # a command that is copied must be one line
    return 0


def verdict(repairs: list[tuple[str, str]], some_cannot: bool) -> list[str]:
    """The last lines: the commands that mend what is missing, or that there is nothing to mend."""
    mends: dict[str, list[str]] = {}
    for what, repair in repairs:
        mends.setdefault(repair, []).append(what)
    if mends:
        return ["To mend:", *(f"  {', '.join(what)}: {repair}" for repair, what in mends.items())]
    if some_cannot:
        return ['Nothing to mend; the reason for each "no" stands above.']
    return ["Nothing is missing: every backend can run here."]


def findings() -> Iterator[tuple[str, str, str | None]]:
    """(what, what was found, the command that mends it or None)."""
    build = _library.build_command()
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", None
    yield (
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
        None,
    )
    yield _package("triton", "pip install triton")
    yield _package("rich", "pip install rich")
    yield _package("matplotlib", "pip install matplotlib")
    yield (
        "C++ compiler",
        *_program(os.environ.get("CXX", "c++"), "install a C++ compiler (apt-get install g++)"),
    )
    cuda = torch.version.cuda
    yield "nvcc", *_nvcc(cuda)
    for name, what in (("kernels", "C++ kernels"), ("emulator", "CUDA emulator")):
        problem = _library.load(name)
        yield what, problem or f"libfastconv_{name}.so", build if problem else None
    host = _library.host()
    if host is None:
        yield "instruction sets", "fastconv._host is not built", build
        return
    forced = os.environ.get("FASTCONV_CPU_CAPABILITY")
    try:
        chosen = host.cpu_capability() + (" (FASTCONV_CPU_CAPABILITY)" if forced else "")
        yield "instruction sets", f"{', '.join(host.cpu_capabilities())}; chosen: {chosen}", None
    except RuntimeError as error:  # the variable names none that this processor has
        yield "instruction sets", str(error), "unset FASTCONV_CPU_CAPABILITY"
    if host.built_with_cuda():
        problem = _library.problem("cuda")
        yield "CUDA kernels", problem or f"built for {_architectures()}", None
    elif cuda is None:
        yield "CUDA kernels", "not built: this torch is a CPU build", None
    else:
        yield "CUDA kernels", "not built", f"with nvcc {cuda} on the path: {build}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}", None
    else:
        yield "GPU", "none is visible to torch", None


def _package(name: str, repair: str) -> tuple[str, str, str | None]:
    try:
        return name, version(name), None
    except PackageNotFoundError:
        return name, "not installed", repair


def _program(name: str, repair: str) -> tuple[str, str | None]:
    path = shutil.which(name)
    if path is None:
        return f"{name} is not on the path", repair
    first = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return first[0] if first else path, None


def _nvcc(cuda: str | None) -> tuple[str, str | None]:
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.path.exists(path):
        repair = f"install the CUDA toolkit {cuda}, and set CUDA_HOME to it" if cuda else None
        return "not found" + ("" if cuda else " (not needed: this torch is a CPU build)"), repair
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    found = release[1] if release else "of unknown version"
    if cuda is not None and found != cuda:
        return (
            f"{found}, but torch has CUDA {cuda}",
            f"set CUDA_HOME to a toolkit of CUDA {cuda}, then: {_library.build_command()}",
        )
    return found, None


def _architectures() -> str:
    """The GPU architectures in the library, as the CUDA toolkit's or Triton's cuobjdump lists them."""
    spec = importlib.util.find_spec("triton")
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    places += (
        [f"{path}/backends/nvidia/bin" for path in (spec.submodule_search_locations or [])] if spec else []
    )
    program = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))
    if program is None:
        return "unknown architectures (no cuobjdump here)"
    library = Path(_library.__file__).with_name("libfastconv_kernels.so")
    listing = subprocess.run([program, "--list-elf", str(library)], capture_output=True, text=True).stdout
    return (
        ", ".join(sorted(set(re.findall(r"sm_\d+[a-z]?", listing)))) or "no architecture that cuobjdump knows"
    )

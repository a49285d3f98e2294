"""Builds what the machine can build, and says in one line what it could not.

Without torch or a C++ compiler: pure Python. With torch: the C++ library (libfastconv_kernels.so), the
CUDA emulator (libfastconv_emulator.so) and the extension module _host. With an nvcc of torch's CUDA
version: the CUDA kernels too, for TORCH_CUDA_ARCH_LIST, else for the GPUs here, else for sm_80, sm_90
and sm_100.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_CAPABILITIES = {  # compiler flags of each instruction set
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
}
BF16_FLAGS = CPU_CAPABILITIES["avx512"] + " -mavx512bf16"  # of *_bf16_cpu.cpp, which are for x86 alone
WARNINGS = "-Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas -Wno-psabi"
WARNINGS += " -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC's own AVX-512 headers set them off
COMMON = f"-std=c++20 -O3 -falign-loops=64 -fPIC -fvisibility=hidden {WARNINGS}"
COMMON += " -ffp-contract=fast -fno-math-errno"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the library runs on every torch since 2.11


def why_pure_python() -> str | None:
    if os.environ.get("FASTCONV_PURE_PYTHON") == "1":
        return "FASTCONV_PURE_PYTHON=1"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable here (install it first, then use --no-build-isolation)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "there is no C++ compiler"
    if ninja() is None:
        return "ninja is not installed"
    return None


def ninja() -> str | None:
    """Ninja's program: beside this Python, from the ninja package, or on the path."""
    beside = Path(sys.executable).with_name("ninja")
    if beside.exists():
        return str(beside)
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja")


def find_nvcc() -> str | None:
    """An nvcc whose CUDA version is torch's, or None; FASTCONV_CUDA=0 turns CUDA off."""
    import torch

    if os.environ.get("FASTCONV_CUDA") == "0" or torch.version.cuda is None:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        say(f"no nvcc found: building without CUDA (torch has CUDA {torch.version.cuda})")
        return None
    release = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != torch.version.cuda:
        say(f"nvcc is {release and release[1]}, torch has CUDA {torch.version.cuda}: building without CUDA")
        return None
    return nvcc


def cuda_architectures() -> list[str]:
    """Such as ["80", "90a"]; an architecture's own instructions need the suffix a."""
    import torch

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return [name.replace(".", "").removesuffix("+PTX") for name in re.split(r"[ ;]+", listed.strip())]
    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return sorted(f"{major}{minor}" for major, minor in capabilities)
    return ["80", "90", "100"]


def say(message: str) -> None:
    print(f"fastconv: {message}", file=sys.stderr)


def jobs() -> int:
    """MAX_JOBS, else one compiler for each core and each 2 GiB of memory."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // 2**31))


class NinjaFile:
    """Collects compile and link steps, and writes them as build.ninja."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def compile(self, command: str, source: Path, target: str) -> str:
        self.steps.append(f"build {target}: compile {source}\n  command_line = {command}")
        return target

    def link(self, command: str, objects: list[str], target: Path) -> None:
        self.steps.append(f"build {target}: link {' '.join(objects)}\n  command_line = {command}")

    def write(self, path: Path) -> None:
        rules = (
            "rule compile\n  command = $command_line -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out\n"
            "rule link\n  command = $command_line $in -o $out $libraries\n  description = link $out\n"
        )
        path.write_text(rules + "\n".join(self.steps) + "\n")


class BuildNative(build_ext):
    """Compiles csrc/ with ninja, each C++ kernel file once for each instruction set."""

    def run(self) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        inplace = self.inplace or getattr(self, "editable_mode", False)
        output = ROOT / "fastconv" if inplace else Path(self.build_lib).resolve() / "fastconv"
        output.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-torch{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)

        cxx = os.environ.get("CXX", "c++")
        nvcc = find_nvcc()
        torch_flags = " ".join(f"-isystem {path}" for path in include_paths()) + f" {STABLE_ABI}"
        with_cuda = "-DFASTCONV_WITH_CUDA -DUSE_CUDA" if nvcc else ""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        capabilities = CPU_CAPABILITIES if x86 else {"portable": ""}
        operators = sorted(
            folder for folder in (ROOT / "csrc").iterdir() if folder.name not in ("common", "emulator")
        )
        file = NinjaFile()

        def stem(source: Path) -> str:
            return source.relative_to(ROOT / "csrc").with_suffix("").as_posix().replace("/", "-")

        def compile(command: str, source: Path, suffix: str = "o") -> str:
            return file.compile(command, source, f"{stem(source)}.{suffix}")

        kernels, emulator = [], []
        for source in [ROOT / "csrc/common/cpu.cpp", *(op / f"{op.name}.cpp" for op in operators)]:
            kernels.append(compile(f"{cxx} {COMMON} {torch_flags} {with_cuda}", source))
        # The linker keeps the first of an inline function's copies: the plainest comes first.
        sources = sorted(ROOT.glob("csrc/*/*_cpu.cpp"), key=lambda p: (p.stem.endswith("_bf16_cpu"), p))
        for source in sources:
            if source.stem.endswith("_bf16_cpu"):
                wanted = {"avx512_bf16": BF16_FLAGS} if x86 else {}
            else:
                wanted = capabilities
            for name, flags in wanted.items():
                command = f"{cxx} {COMMON} {flags} -DFASTCONV_CPU_CAPABILITY={name}"
                kernels.append(compile(command, source, f"{name}.o"))
        if nvcc:
            architectures = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in cuda_architectures())
            command = f"{nvcc} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden {architectures}"
            for source in sorted(ROOT.glob("csrc/*/*_cuda.cu")):
                kernels.append(compile(command, source, "cu.o"))

        emulated = f"{cxx} {COMMON} -DFASTCONV_EMULATOR -I{ROOT}/csrc/emulator"
        for source in sorted((ROOT / "csrc/emulator").glob("*.cpp")):
            emulator.append(compile(emulated, source))
        for op in operators:
            emulator.append(compile(f"{emulated} {torch_flags}", op / f"{op.name}.cpp", "emulator.o"))
        for source in sorted(ROOT.glob("csrc/*/*_cuda.cu")):
            emulator.append(compile(f"{emulated} -x c++", source, "emulator.o"))

        torch_link = " ".join(f"-L{path}" for path in library_paths())
        libraries = "-ltorch_cpu -lc10" + (
            f" -ltorch_cuda -L{Path(nvcc).resolve().parents[1]}/lib64 -lcudart" if nvcc else ""
        )
        # torch is loaded before these libraries are, so they need no run path of their own.
        shared = f"{cxx} -shared -Wl,--as-needed"
        for name, objects in (("kernels", kernels), ("emulator", emulator)):
            file.link(shared, objects, output / f"libfastconv_{name}.so")
            file.steps[-1] += f"\n  libraries = {torch_link} {libraries}"
        python_include = sysconfig.get_paths()["include"]
        host = file.compile(
            f"{cxx} {COMMON} -I{python_include} -isystem {pybind11.get_include()} {with_cuda}",
            ROOT / "csrc/common/host.cpp",
            "host.o",
        )
        peaks = [
            file.compile(
                f"{cxx} {COMMON} {flags} -DFASTCONV_CPU_CAPABILITY={name}",
                ROOT / "csrc/common/peak.cpp",
                f"peak.{name}.o",
            )
            for name, flags in capabilities.items()
        ]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        file.link(shared, [host, *peaks, "common-cpu.o"], output / f"_host{suffix}")
        file.steps[-1] += "\n  libraries = -ldl -pthread"

        file.write(build / "build.ninja")
        subprocess.run([ninja(), "-C", str(build), "-j", str(jobs())], check=True)
        self.built = [str(path) for path in output.glob("*.so")]

    def get_outputs(self) -> list[str]:
        return getattr(self, "built", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]


reason = why_pure_python()
if reason:
    say(f"installing without compiled kernels: {reason}")

packages = ["fastconv", "fastconv.kernels"] + [
    f"fastconv.{path.parent.name}" for path in sorted((ROOT / "fastconv").glob("*/__init__.py"))
]
setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "fastconv/__init__.py").read_text())[1],
    packages=packages,
    package_dir={"fastconv": "fastconv", "fastconv.kernels": "kernels"},
    ext_modules=[] if reason else [Extension("fastconv._host", sources=[])],
    cmdclass={"build_ext": BuildNative},
)

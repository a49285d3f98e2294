"""Loads the compiled libraries, and says why one is not there."""

from __future__ import annotations

import functools
import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).resolve().parent


@functools.cache
def build_command() -> str:
    """The command that builds what is missing, by how this package came here: a checkout, or an install."""
    pip = "pip install --no-build-isolation"
    if (PACKAGE.parent / "setup.py").exists():
        return f"{pip} -e {shlex.quote(str(PACKAGE.parent))}"
    source = _installed_from()
    return f"{pip} {source}" if source else f"{pip} .  (in a checkout of fastconv's repository)"


def _installed_from() -> str | None:
    """What pip was given when it installed this package: a folder that is still there, or a repository."""
    try:
        installed = metadata.distribution("fastconv")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    if Path(installed.locate_file("fastconv")).resolve() != PACKAGE:  # of another copy
        return None
    url = origin.get("url", "")
    if "vcs_info" in origin:
        # Or pip takes the same version for the same build.
        return f"--force-reinstall --no-deps {shlex.quote(origin['vcs_info']['vcs'] + '+' + url)}"
    folder = Path(url2pathname(urlsplit(url).path))
    return shlex.quote(str(folder)) if "dir_info" in origin and (folder / "setup.py").exists() else None


def _build() -> str:
    return f"build it with: {build_command()}"


@functools.cache
def load(name: str) -> str | None:
    """Loads ``fastconv/lib<name>.so``, which registers its kernels; returns what went wrong, or None."""
    path = PACKAGE / f"libfastconv_{name}.so"
    if not path.exists():
        return f"{path.name} is not built; {_build()}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}); {_build()}"
    return None


@functools.cache
def host():
    """The torch-free extension module ``fastconv._host``, or None if it is not built."""
    try:
        from . import _host
    except ImportError:
        return None
    return _host


# A plain dictionary: torch.compile looks through functools.cache, and cannot trace what is behind it.
_problems: dict[str, str | None] = {}


def problem(backend: str) -> str | None:
    """Why a compiled backend (``"cpu"``, ``"cuda"``, ``"emulator"``) cannot run here, or None."""
    if backend not in _problems:
        _problems[backend] = _find_problem(backend)
    return _problems[backend]


def _find_problem(backend: str) -> str | None:
    if backend == "emulator":
        return load("emulator")
    error = load("kernels")
    if error is not None or backend == "cpu":
        return error
    if host() is None or not host().built_with_cuda():
        needs = f"nvcc {torch.version.cuda}" if torch.version.cuda else "nvcc and a CUDA PyTorch"
        return f"the library was built without CUDA; with {needs} at hand, {_build()}"
    return None

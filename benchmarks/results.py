"""Result files: what was measured, on which machine, with which versions. One file an operator and type."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastconv
from fastconv.ceilings import Ceilings

from .harness import FOLDER

SCHEMA = 1
RESULTS = FOLDER / "results"
ZEN = {  # (family, highest model) -> name, by AMD's model numbers
    23: ((0x2F, "zen"), (0xFF, "zen2")),
    25: ((0x0F, "zen3"), (0x1F, "zen4"), (0x5F, "zen3"), (0x8F, "zen4"), (0xAF, "zen4")),
    26: ((0xFF, "zen5"),),
}


def collect(op: str, groups: list[dict], ceilings: Ceilings, dtype: str, device_name: str | None) -> dict:
    """One result file: the groups of :meth:`.harness.Problem.measure`, and what they were run on."""
    return {
        "schema": SCHEMA,
        "op": op,
        "device": device_name or name_of_device(ceilings),
        "dtype": dtype,
        **moment(),
        "threads": ceilings.threads,
        "versions": versions(),
        "ceilings": ceilings.as_dict(),
        "groups": groups,
    }


def moment() -> dict:
    """When a measurement is made, of which commit, and how busy the machine is."""
    commit, dirty = revision()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": dirty,
        "load": os.getloadavg()[0],
    }


def with_earlier(result: dict, path: Path | None = None) -> dict:
    """A result, and of the file that it will replace the groups that it has not measured again.

    Raises:
        ValueError: that file is no result, or of something else.
    """
    path = path or default_path(result)
    if not path.exists():
        return result
    earlier = read(path)
    for key in ("op", "device", "dtype"):
        if earlier[key] != result[key]:
            raise ValueError(f"{path}: {key} must be {result[key]!r}, got {earlier[key]!r}")

    def name(group: dict) -> tuple:
        return group["network"], group["layer"], group["pass"]

    new = {name(group) for group in result["groups"]}
    kept = [group for group in earlier["groups"] if name(group) not in new]
    return {**result, "groups": kept + result["groups"]}


def save(result: dict, path: Path | None = None) -> Path:
    """Writes a result file, by default ``results/<device>/<op>[-<dtype>].json``; returns where."""
    check(result)
    path = path or default_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(result), indent=1)
    # A line for each list of rounds, not for each round.
    text = re.sub(r"\[[-\d.e+,\s]+\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")
    return path


def default_path(result: dict) -> Path:
    suffix = "" if result["dtype"] == "float32" else f"-{result['dtype']}"
    return RESULTS / result["device"] / f"{result['op']}{suffix}.json"


def read(path: Path) -> dict:
    """Reads and checks a result file.

    Raises:
        ValueError: it is no result file; the message names the file and what is wrong.
    """
    try:
        result = json.loads(path.read_text())
        check(result)
    except (json.JSONDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return result


def read_all(folder: Path = RESULTS) -> list[dict]:
    """Every result file below a folder, in order of device and operator."""
    return [read(path) for path in sorted(folder.glob("*/*.json"))]


FIELDS = {
    "schema": int,
    "op": str,
    "device": str,
    "dtype": str,
    "date": str,
    "commit": (str, type(None)),
    "uncommitted_changes": bool,
    "threads": int,
    "load": (int, float),
    "versions": dict,
    "ceilings": dict,
    "groups": list,
}
GROUP_FIELDS = {
    "network": str,
    "layer": str,
    "sizes": dict,
    "pass": str,
    "dtype": str,
    "flops": (int, float),
    "flops_inside": (int, float),
    "bytes": (int, float),
    "floor_seconds": (int, float),
    "bound": str,
    "contenders": list,
}
_NUMBER = (int, float, type(None))
CONTENDER_FIELDS = {
    "name": str,
    "kernel": str,
    "side": str,
    "layout": str,
    "max_error": _NUMBER,
    "refused": (str, type(None)),
    "seconds": _NUMBER,
    "gflops": _NUMBER,
    "gbytes": _NUMBER,
    "percent_of_limit": _NUMBER,
    "rounds": list,
    "ratio": _NUMBER,
    "ratio_same_layout": _NUMBER,
}


def check(result: dict) -> None:
    """Raises ValueError if a result lacks a field, or one is of the wrong type."""
    _check_fields(result, FIELDS, "result")
    if result["schema"] != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {result['schema']}")
    Ceilings.from_dict(result["ceilings"])
    for group in result["groups"]:
        _check_fields(group, GROUP_FIELDS, "group")
        for contender in group["contenders"]:
            _check_fields(contender, CONTENDER_FIELDS, f"contender of {group['layer']}")
            if (contender["seconds"] is None) != (not contender["rounds"]):
                raise ValueError(f"{contender['name']} of {group['layer']} must have both seconds and rounds")


def _check_fields(values: Any, fields: dict, what: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be an object, got {type(values).__name__}")
    for name, kind in fields.items():
        if name not in values:
            raise ValueError(f"{what} lacks {name!r}")
        if not isinstance(values[name], kind):
            raise ValueError(f"{name!r} of {what} has the wrong type {type(values[name]).__name__}")


def _rounded(value: Any) -> Any:
    """Five significant digits are more than any clock here gives."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def name_of_device(ceilings: Ceilings) -> str:
    """A folder's name for the machine: ``"amd-epyc-zen4-2cores"``, ``"nvidia-h200"``."""
    if ceilings.device != "cpu":
        return slug(ceilings.device)
    return name_of_cpu(_read_text("/proc/cpuinfo"), ceilings.threads)


def name_of_cpu(cpuinfo: str, threads: int) -> str:
    """``"amd-epyc-zen4-2cores"`` from the text of ``/proc/cpuinfo``, or without it from what Python knows."""

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*: (.+)$", cpuinfo, re.MULTILINE)
        return found[1].strip() if found else ""

    words = slug(value("model name") or platform.processor() or platform.machine())
    words = re.sub(r"-(processor|cpu|r|tm|\d+-core)\b|-\d-\d+ghz", "", words)
    if value("vendor_id") == "AuthenticAMD":
        generations = ZEN.get(int(value("cpu family")), ())
        model = int(value("model"))
        words += next((f"-{name}" for highest, name in generations if model <= highest), "")
    return f"{words}-{threads}core{'s' if threads > 1 else ''}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str]:
    """The versions of everything that a time depends on."""
    found = {
        "python": platform.python_version(),
        "fastconv": fastconv.__version__,
        "torch": torch.__version__,
    }
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    if onednn:
        found["onednn"] = onednn[1]
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def revision() -> tuple[str | None, bool]:
    """The commit that is checked out, and whether tracked files differ from it; (None, False) without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTCONV_COMMIT"), False


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

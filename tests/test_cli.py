"""python -m fastconv: what the commands print, write and refuse, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastconv import _library, cli

needs_host = pytest.mark.skipif(_library.host() is None, reason="fastconv._host is not built")
COMMANDS = ["doctor", "compare", "cost", "bench", "ladder", "report"]
FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def needs(argument):
    pass

def number():
    return 3
"""


def fastconv(*arguments, cwd=None, **environment):
    """In a process of its own, as a user calls it."""
    variables = {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "COLUMNS": "150", **environment}
    return subprocess.run(
        [sys.executable, "-m", "fastconv", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, **variables},
    )


@pytest.fixture
def here(capsys, monkeypatch, folder):
    """``here(*arguments)`` runs a command in this process: (exit status, stdout, stderr)."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "mynetwork", raising=False)

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's own
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mynetwork.py").write_text(FACTORY)
    return tmp_path


def test_help_names_every_command(here):
    status, out, _ = here("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)
    assert here()[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(here, command):
    status, out, _ = here(command, "--help")
    assert status == 0
    assert f"python -m fastconv {command}" in out


def test_importing_the_library_is_light():
    code = "import sys, fastconv; print([m for m in ('matplotlib', 'rich', 'sklearn') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_doctor():
    result = fastconv("doctor")
    assert result.returncode == 0, result.stderr
    for word in ("Python", "torch", "triton", "nvcc", "C++ kernels", "depthwise_conv2d", "emulator"):
        assert word in result.stdout, word


@needs_host
@pytest.mark.parametrize(
    "name, words",
    [("portable", "chosen: portable (FASTCONV_CPU_CAPABILITY)"), ("sse9", "unset FASTCONV_CPU_CAPABILITY")],
)
def test_doctor_and_a_forced_instruction_set(name, words):
    result = fastconv("doctor", FASTCONV_CPU_CAPABILITY=name)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


def test_doctor_names_the_command_for_what_is_missing(tmp_path):
    """Without the compiled libraries: copies of the Python files alone."""
    import shutil

    import fastconv as package

    source = os.path.dirname(package.__file__)
    shutil.copytree(source, tmp_path / "fastconv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = fastconv("doctor", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "libfastconv_kernels.so is not built" in result.stdout
    # Whoever runs these copies has no checkout, whatever is installed beside them.
    (mend,) = [line for line in result.stdout.splitlines() if "  C++ kernels, CUDA emulator" in line]
    assert "pip install --no-build-isolation .  (in a checkout of" in mend
    assert "To mend:" in result.stdout and "Nothing" not in result.stdout


def test_doctor_has_nothing_to_mend_but_says_why_no():
    from fastconv.cli.doctor import verdict

    assert verdict([], False) == ["Nothing is missing: every backend can run here."]
    assert verdict([], True) == ['Nothing to mend; the reason for each "no" stands above.']
    repairs = [("nvcc", "install it"), ("C++ kernels", "build"), ("CUDA emulator", "build")]
    assert verdict(repairs, True) == ["To mend:", "  nvcc: install it", "  C++ kernels, CUDA emulator: build"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``installed(direct_url)``: a package without a checkout, which pip installed from there."""
    package = tmp_path / "site/fastconv"
    record = tmp_path / "site/fastconv-0.1.0.dist-info"
    for folder in (package, record):
        folder.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fastconv\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(_library, "PACKAGE", package)

    def command(direct_url):
        (record / "direct_url.json").write_text(json.dumps(direct_url))
        return _library.build_command.__wrapped__()

    return command


def test_build_command_follows_how_it_was_installed(installed, tmp_path, monkeypatch):
    pip = "pip install --no-build-isolation"
    source = tmp_path / "my source"
    from_folder = {"url": source.as_uri(), "dir_info": {}}
    assert installed(from_folder) == f"{pip} .  (in a checkout of fastconv's repository)"  # it is gone
    source.mkdir()
    (source / "setup.py").touch()
    assert installed(from_folder) == f"{pip} '{source}'"
    from_git = {"url": "https://example.org/fastconv.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    assert installed(from_git) == f"{pip} --force-reinstall --no-deps git+https://example.org/fastconv.git"
    monkeypatch.setattr(_library, "PACKAGE", source / "fastconv")
    assert installed(from_git) == f"{pip} -e '{source}'"


@needs_host
def test_cost(folder):
    result = fastconv("cost", "mynetwork:build", "--input-size", "2,3,8,8", cwd=folder)
    assert result.returncode == 0, result.stderr
    macs = 2 * 64 * (8 * 27 + 8 * 9) + 2 * 8 * 4
    assert f"{macs:,} MACs, {8 * 28 + 16 + 72 + 16 + 36:,} parameters" in result.stdout
    assert "AdaptiveAvgPool2d" in result.stdout


@needs_host
def test_cost_of_a_network_of_the_library(here):
    _, out, _ = here("cost", "mobilenet_v1", "--set", "width=0.25", "--batch", 2)
    assert f"{2 * 41_030_272:,} MACs, 470,072 parameters" in out


@pytest.mark.parametrize("options", [["--inference"], ["--train", "--layout", "nhwc", "--dtype", "bfloat16"]])
def test_compare(folder, here, options):
    arguments = [
        "compare",
        "mynetwork:build",
        "--input-size",
        "3,16,16",
        "--batch",
        4,
        "--rounds",
        3,
        "--threads",
        1,
    ]
    files = ["--json", folder / "figures.json", "--plot", folder / "out/plots/roofline.png"]
    if options == ["--inference"]:
        result = fastconv(*arguments, *options, *files, cwd=folder)
        status, out, errors = result.returncode, result.stdout, result.stderr
    else:
        status, out, errors = here(*arguments, *options, *files)
    assert status == 0, out + errors
    mode = "training" if "--train" in options else "inference"
    assert f"{mode} (forward" in out and "batch 4, 1 threads" in out
    assert "BatchNorm2d + ReLU: in one call" in out
    assert f"of the kernel, {'forward and backward' if '--train' in options else 'forward'}; ratio:" in out
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["input_size"] == [4, 3, 16, 16] and list(figures["modes"]) == [mode]
    assert figures["layout"] == ("nhwc" if "nhwc" in options else "nchw")
    measured = figures["modes"][mode]
    assert len(measured["seconds_before"]) == len(measured["seconds_after"]) == 3
    assert min(measured["seconds_before"]) > 0 and measured["ratio"] > 0
    (depthwise,) = [layer for layer in measured["layers"] if layer["name"] == "3"]
    assert depthwise["macs"] == 4 * 8 * 9 * 256
    assert depthwise["kernel"] or depthwise["reason"]
    assert (folder / "out/plots/roofline.png").read_bytes()[:4] == b"\x89PNG"


@needs_host
def test_bench_that_is_terminated_shows_what_it_has():
    """SIGTERM is as Ctrl-C; a line on stderr for each pass that is done tells a log how far it is."""
    options = ["--device", "cpu", "--batch", "1", "--rounds", "1", "--seconds", "0.01"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastconv", "bench", "channel_shuffle", *options, "--backends", "reference"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "COLUMNS": "150"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as bench:
        second = next((line for line in bench.stderr if line.startswith("2 of ")), "")
        bench.terminate()
        out, errors = bench.communicate(timeout=120)
    assert " s: " in second and second.endswith(("forward\n", "backward\n")), second + errors
    assert bench.returncode == 130, errors
    assert "interrupted: partial, " in out and "of channel_shuffle; no raw results are written" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["cost", "resnet"], "name must be one of"),
        (["cost", "mobilenet_v1", "--set", "depth=3"], "depth"),
        (["cost", "mobilenet_v1", "--set", "width"], "--set must be NAME=VALUE, got 'width'"),
        (["cost", "mobilenet_v1", "--input-size", "a,b"], "must be positive integers such as 1,3,224,224"),
        (
            ["cost", "mobilenet_v1", "--input-size", "1,4,32,32"],
            "does not take an input of size (1, 4, 32, 32)",
        ),
        (["compare", "mobilenet_v1", "--input-size", "1,4,32,32"], "does not take an input of size"),
        (["compare", "nothere.at_all:build"], "there is no module 'nothere'"),
        (["compare", "mynetwork:nothing"], "mynetwork has no callable 'nothing'"),
        (["compare", "mynetwork:needs"], "cannot be called without arguments"),
        (["compare", "mynetwork:number"], "must return a torch.nn.Module, got int"),
        (["compare", "mynetwork:build", "--set", "a=1"], "--set is for the library's networks"),
        (["compare", "mynetwork:build", "--batch", "0"], "must be an integer of at least 1"),
        (["compare", "mynetwork:build", "--json", "mynetwork.py/x.json"], "cannot write mynetwork.py/x.json"),
        (["compare", "mynetwork:build", "--backend", "gpu"], "invalid choice: 'gpu'"),
        (["compare", "mynetwork:build", "--device", "tpu"], "--device tpu"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_mistakes_are_told(here, arguments, words):
    status, _, errors = here(*arguments)
    assert status == 2
    assert words in " ".join(errors.split())


def test_help_of_the_example():
    example = Path(__file__).parents[1] / "examples/digits.py"
    result = subprocess.run([sys.executable, str(example), "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--epochs" in result.stdout


def test_mistakes_have_no_traceback():
    result = fastconv("compare", "nothere:build")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["python -m fastconv compare: MODEL: there is no module 'nothere'"]

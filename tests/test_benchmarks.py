"""The performance suite itself: it refuses wrong results, counts right, and its reports repeat."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from fastconv import cli
from fastconv.ceilings import Ceilings
from fastconv.cli import UserError
from fastconv.cli import bench as bench_command
from fastconv.cli import ladder as ladder_command
from fastconv.cli import report as report_command

harness = bench_command.suite("harness")
results = bench_command.suite("results")
report = bench_command.suite("report")
gpu = bench_command.suite("gpu")
sanitize = bench_command.suite("sanitize")

OPERATORS = harness.operators()
LIMITS = Ceilings("cpu", "avx2", 2, 100e9, 10e9, {2**20: 80e9, 2**28: 10e9})
TORCH = harness.Contender("torch", "nchw")
OURS = harness.Contender("fastconv", "nchw", "reference")


def tiny(op: str, direction: str = "forward", dtype: torch.dtype = torch.float32, **changes):
    """One pass over an operator's tiny layer; ``changes`` replace parts of its benchmark."""
    benchmark = dataclasses.replace(harness.load(op), **changes)
    return harness.Problem(benchmark, harness.Layer("landmarks", "tiny", benchmark.tiny), direction, dtype)


def measured(op: str, direction: str = "forward") -> dict:
    contenders = harness.contenders(op, backends_wanted=["reference"])
    return tiny(op, direction).measure(contenders, rounds=2, seconds=0.05, ceilings=LIMITS)


def result_file(op: str) -> dict:
    groups = [measured(op, direction) for direction in harness.PASSES]
    return results.collect(op, groups, LIMITS, "float32", "a-machine")


@pytest.fixture(scope="module")
def result():
    return result_file("depthwise_conv2d")


# What is measured.


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("direction", harness.PASSES)
def test_right_contenders_are_timed(op, direction):
    group = measured(op, direction)
    results.check(results.collect(op, [group], LIMITS, "float32", None))
    for contender in group["contenders"]:
        assert contender["refused"] is None, contender
        assert contender["rounds"] and contender["seconds"] > 0 and contender["ratio"] > 0
        assert contender["max_error"] < 1e-5
    assert {contender["kernel"] for contender in group["contenders"]} == {"torch", "fastconv", "reference"}


def _ours(op, change):
    right = harness.load(op).ours
    return lambda *arguments, **choice: change(right(*arguments, **choice))


WRONG = {
    "off by a thousandth": lambda output: output + 1e-3 * output.abs().max(),
    "one value wrong": lambda output: output + torch.zeros_like(output).index_fill(-1, torch.tensor([0]), 1),
    "not a number": lambda output: output * float("nan"),
    "scaled": lambda output: output * 1.01,
    "a row too few": lambda output: output[:, :, :-1],
}


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_contender_is_refused_and_not_timed(op, wrong):
    group = tiny(op, ours=_ours(op, WRONG[wrong])).measure(
        [TORCH, OURS], rounds=1, seconds=0, ceilings=LIMITS
    )
    peer, ours = group["contenders"]
    assert peer["refused"] is None and peer["seconds"] > 0
    assert "wrong" in ours["refused"]
    assert ours["seconds"] is None and not ours["rounds"] and ours["ratio"] is None


@pytest.mark.parametrize("op", OPERATORS)
def test_wrong_gradient_is_refused(op):
    doubled = _ours(
        op, lambda output: output + (output - output.detach())
    )  # the value right, the gradient not
    peer, ours = tiny(op, "backward", ours=doubled).check([TORCH, OURS])
    assert peer["refused"] is None
    assert "wrong result" in ours["refused"]


@pytest.mark.parametrize("op", OPERATORS)
def test_raising_contender_is_refused(op):
    def fail(*_, **__):
        raise RuntimeError("no such kernel")

    peer, ours = tiny(op, ours=fail).check([TORCH, OURS])
    assert peer["refused"] is None
    assert ours["refused"] == "RuntimeError: no such kernel"


def test_half_types_have_their_own_tolerance():
    exact = harness.tolerance(torch.float64, 100)
    single = harness.tolerance(torch.float32, 100)
    assert exact < 1e-13 < single < 1e-4 < harness.tolerance(torch.float16, 100)
    assert harness.tolerance(torch.float16, 100) < harness.tolerance(torch.bfloat16, 100) < 0.05
    for entry in tiny("depthwise_conv2d", "backward", torch.bfloat16).check([TORCH, OURS]):
        assert entry["refused"] is None


@pytest.mark.parametrize("layer", harness.layers("depthwise_conv2d", ["landmarks", "mobilenet_v1"]), ids=str)
def test_depthwise_multiply_adds_are_what_ones_count(layer):
    sizes = {**layer.sizes, "batch": 1, "channels": 1}
    benchmark = harness.load("depthwise_conv2d")
    image = torch.ones(1, 1, sizes["height"], sizes["width"])
    weight = torch.ones(1, 1, sizes["kernel"], sizes["kernel"])
    output = benchmark.peer(sizes, image, weight)
    assert benchmark.macs_inside(sizes) == output.sum().item()
    assert benchmark.macs(sizes) == output.numel() * weight.numel()


def test_floor_counts_no_padding_and_each_tensor_once():
    problem = tiny("depthwise_conv2d", "backward")
    group = problem.measure([TORCH], rounds=1, seconds=0, ceilings=LIMITS)
    sizes = problem.layer.sizes
    assert group["flops_inside"] == 4 * problem.benchmark.macs_inside(sizes)
    image, weight = 4 * 6 * 5, 4 * 9  # of the tiny layer; its output is as large as its input
    assert group["bytes"] == 4 * (3 * image + 2 * weight)


# What is chosen.


@pytest.mark.parametrize("op", OPERATORS)
def test_every_goal_has_its_layer(op):
    for device_type, network in (("cpu", "landmarks"), ("cuda", "gpu")):
        names = {layer.name for layer in harness.layers(op, [network])}
        for dtype in ("float32", "bfloat16"):
            assert set(report.goals(op, device_type, dtype)) <= names


@pytest.mark.parametrize("op", OPERATORS)
def test_slow_backends_run_only_when_named(op):
    kernels = {contender.backend for contender in harness.contenders(op)}
    assert not kernels & {"reference", "emulator", "triton", "aten"}
    named = harness.contenders(op, backends_wanted=["reference"], layouts=["nchw"])
    assert [contender.name for contender in named] == ["torch nchw", "fastconv nchw", "reference nchw"]
    quick = {contender.backend for contender in harness.contenders(op, quick=True)}
    assert quick == {None}


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match="op must be one of"):
        harness.load("nothing")
    with pytest.raises(ValueError, match="shapes must be among"):
        harness.layers("depthwise_conv2d", ["nothing"])
    with pytest.raises(ValueError, match="landmarks has .*got '1@1'"):
        harness.layers("depthwise_conv2d", ["landmarks/1@1"])
    assert harness.layers("depthwise_conv2d", ["landmarks/240@28 g3"]) == []  # another operator's
    with pytest.raises(ValueError, match="backends must be among .* got 'cuda': it needs CUDA tensors"):
        harness.contenders("depthwise_conv2d", backends_wanted=["cuda"])
    with pytest.raises(ValueError, match="direction must be one of"):
        tiny("depthwise_conv2d", "sideways")


# Result files.


def test_result_file_is_read_back(result, tmp_path):
    path = results.save(result, tmp_path / "deep/depthwise_conv2d.json")
    again = results.read(path)
    assert [group["layer"] for group in again["groups"]] == [group["layer"] for group in result["groups"]]
    assert Ceilings.from_dict(again["ceilings"]) == LIMITS
    times = result["groups"][0]["contenders"][0]["rounds"]
    assert again["groups"][0]["contenders"][0]["rounds"] == pytest.approx(times, rel=1e-4)
    assert results.default_path(result).parts[-2:] == ("a-machine", "depthwise_conv2d.json")


@pytest.mark.parametrize("place", ["result", "group", "contender"])
def test_result_file_needs_every_field(result, place):
    fields = {
        "result": results.FIELDS,
        "group": results.GROUP_FIELDS,
        "contender": results.CONTENDER_FIELDS,
    }[place]
    for name in fields:
        broken = copy.deepcopy(result)
        group = broken["groups"][0]
        holder = {"result": broken, "group": group, "contender": group["contenders"][0]}[place]
        del holder[name]
        with pytest.raises(ValueError, match=name):
            results.check(broken)
        holder[name] = object()
        with pytest.raises(ValueError, match=name):
            results.check(broken)


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: "):
        results.read(path)


def test_committed_results_are_valid():
    for path in sorted(results.RESULTS.glob("*/*.json")):
        if path.name != "gpu.json":
            assert results.default_path(results.read(path)) == path


CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
"""


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "expected"),
    [
        ("AuthenticAMD", 25, 17, "AMD EPYC", "amd-epyc-zen4-2cores"),
        ("AuthenticAMD", 25, 33, "AMD Ryzen 9 5950X 16-Core Processor", "amd-ryzen-9-5950x-zen3-2cores"),
        ("AuthenticAMD", 99, 1, "AMD New", "amd-new-2cores"),
        (
            "GenuineIntel",
            6,
            143,
            "Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz",
            "intel-xeon-platinum-8480c-2cores",
        ),
    ],
)
def test_name_of_cpu(vendor, family, model, name, expected):
    text = CPUINFO.format(vendor=vendor, family=family, model=model, name=name)
    assert results.name_of_cpu(text, 2) == expected
    assert results.name_of_cpu(text, 1) == expected.replace("2cores", "1core")


# Reports.


README = f"# Title\n\nbefore\n\n{report.BEGIN}\nout of date\n{report.END}\n\nafter\n"


def test_report_is_idempotent_and_keeps_the_rest(result):
    once = report.rewrite(README, [result])
    assert report.rewrite(once, [result]) == once
    assert once.startswith("# Title\n\nbefore") and once.endswith("\n\nafter\n") and "out of date" not in once
    assert "### a-machine" in once
    assert report.rewrite(once, []).count(report.BEGIN) == 1


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}", README + README])
def test_report_needs_its_markers_once(text):
    with pytest.raises(ValueError, match="each once"):
        report.rewrite(text, [])


def test_report_shows_goals_won_and_lost(result):
    one = copy.deepcopy(result)
    group = one["groups"][0]
    group["layer"] = "144@56 k3"  # its goal: 1.1 times as fast, 2.2 times on contiguous tensors
    for contender in group["contenders"]:
        contender["seconds"] = 0.003 if contender["kernel"] == "torch" else 0.002
    text = report.markdown([one])
    assert "| **1.50x** | >= 1.1x | 1.50x | >= 2.2x |" in text


def test_report_says_what_is_doubtful(result):
    quiet, busy = copy.deepcopy(result), copy.deepcopy(result)
    for one, load, percent in ((quiet, 2.0, 100.0), (busy, 3.5, 106.0)):
        one["load"] = load
        for contender in one["groups"][0]["contenders"]:
            contender["percent_of_limit"] = percent
    assert report.doubts(quiet) == []
    saved = copy.deepcopy(busy)
    for group in saved["groups"]:
        group["products_saved"] = 2.0  # an algorithm with half the multiplications
    assert "torch nchw of tiny forward" not in "".join(report.doubts(saved))
    assert "load 3.5" in report.doubts(busy)[0] and "torch nchw of tiny forward" in report.doubts(busy)[1]
    assert "**the machine was busy" in report.markdown([busy])


def test_report_sums_a_network_in_one_layout():
    def group(layout_times, count):
        contenders = [
            {"kernel": kernel, "layout": layout, "seconds": seconds}
            for kernel, times in layout_times.items()
            for layout, seconds in zip(("nchw", "nhwc"), times)
        ]
        return {
            "network": "net",
            "layer": "x",
            "pass": "forward",
            "sizes": {"count": count},
            "contenders": contenders,
        }

    groups = [
        group({"torch": (1e-3, 2e-3), "fastconv": (1e-3, 1e-3)}, 3),
        group({"torch": (5e-3, 1e-3), "fastconv": (1e-3, 1e-3)}, 1),
    ]
    # PyTorch: 3 * 1 + 5 = 8 in the one layout, 3 * 2 + 1 = 7 in the other.
    assert "| net | forward | 7.00 | 4.00 | 1.75x |" in report._networks({"groups": groups})


def test_tables_and_pictures(result, tmp_path):
    one = copy.deepcopy(result)
    one["groups"][0]["contenders"][-1].update(refused="wrong result: [x]", seconds=None, rounds=[])
    assert "refused" in report.console(one) and "torch nchw" in report.console(one)
    assert "% limit: limit / ms; x best, x same:" in " ".join(report.console(one).split())
    assert "wrong result: [x]" in report.refusals(one)[0]
    for path in report.plot(one, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


# Commands.


def call(module, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.configure(parser)
    return module.run(parser.parse_args(arguments))


def test_report_command_writes_and_checks(result, tmp_path, monkeypatch, capsys):
    results.save(result, tmp_path / "results/a-machine/depthwise_conv2d.json")
    readme = tmp_path / "README.md"
    readme.write_text(README)
    where = ("--results", str(tmp_path / "results"), "--readme", str(readme))
    assert call(report_command, *where, "--check") == 1
    assert f"does not show the results in {tmp_path / 'results'}/; run" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert call(report_command, *where, "--check") == 1
    assert "does not show the results in results/; run" in capsys.readouterr().out
    assert readme.read_text() == README
    assert call(report_command, *where) == 0
    assert (tmp_path / "results/a-machine/depthwise_conv2d-roofline.png").exists()
    assert call(report_command, *where, "--check") == 0
    assert call(report_command, *where, "--print") == 0
    assert "### a-machine" in capsys.readouterr().out
    readme.write_text("no markers")
    with pytest.raises(UserError, match="each once"):
        call(report_command, *where)


@pytest.fixture
def made_up_limits(monkeypatch):
    monkeypatch.setattr("fastconv.ceilings.measure", lambda *_: LIMITS)


SMALL = ("--device", "cpu", "--batch", "1", "--rounds", "1", "--seconds", "0.01")


def test_bench_command(made_up_limits, tmp_path, capsys):
    path = tmp_path / "x.json"
    layer = ("--shapes", "landmarks/768@7 k7", "--passes", "forward", "--quick")
    assert call(bench_command, "depthwise_conv2d", *layer, *SMALL, "--json", str(path)) == 0
    assert [group["layer"] for group in results.read(path)["groups"]] == ["768@7 k7"]
    assert "fastconv nhwc" in capsys.readouterr().out
    with pytest.raises(UserError, match="op must be one of"):
        call(bench_command, "nothing", *SMALL)


def test_interrupted_bench_shows_what_it_has(made_up_limits, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second pass: the table of the first, and no file."""
    right, seen = harness.Problem.measure, []

    def measure(self, *arguments, **options):
        seen.append(self)
        if len(seen) % 2 == 0:
            raise KeyboardInterrupt
        return right(self, *arguments, **options)

    monkeypatch.setattr(harness.Problem, "measure", measure)
    path = tmp_path / "x.json"
    arguments = ("--shapes", "landmarks/768@7 k7", "--quick", *SMALL, "--json", str(path))
    assert cli.main(["bench", "depthwise_conv2d", *arguments]) == 130
    out = capsys.readouterr().out
    assert "landmarks/768@7 k7 forward" in out and "backward" not in out
    assert "interrupted: partial, 1 of 2 passes of depthwise_conv2d; no raw results" in " ".join(out.split())
    assert not path.exists()
    seen.append(None)  # now in the first pass
    assert cli.main(["bench", "depthwise_conv2d", *arguments]) == 130
    captured = capsys.readouterr()
    assert "interrupted" not in captured.out and captured.err == "stopped\n"


def test_ladder_command(made_up_limits, capsys):
    layer = ("--layer", "landmarks/768@7 k7", "--passes", "forward", "backward", "--layout", "nchw")
    assert call(ladder_command, "depthwise_conv2d", *layer, *SMALL) == 0
    out = capsys.readouterr().out
    assert {"reference", "torch"} <= set(out.split())
    assert "forward, float32" in out and "backward, float32" in out
    assert "gain: over the step before" in " ".join(out.split())
    with pytest.raises(UserError, match="--layer must be one of depthwise_conv2d, got"):
        call(ladder_command, "depthwise_conv2d", "--layer", "landmarks/240@28 g3", *SMALL)


def test_pytest_suite(tmp_path):
    """``pytest benchmarks/`` in a process of its own, on the smallest layer."""
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--quick"]
    command += ["--shapes", "landmarks/768@7 k7", "--passes", "forward", "--batch", "1", "--rounds", "2"]
    command += ["--seconds", "0.1", "--benchmark-json", str(path)]
    done = subprocess.run(command, cwd=harness.FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert Ceilings.from_dict(written["ceilings"]).flops_per_second > 0
    by_name = {entry["extra_info"]["name"]: entry for entry in written["benchmarks"]}
    assert {"torch nchw", "torch nhwc", "fastconv nchw", "fastconv nhwc"} <= set(by_name)
    for entry in by_name.values():  # the played-back clock reports what was measured in turns
        assert entry["stats"]["median"] == pytest.approx(entry["extra_info"]["seconds"], rel=1e-6)
        assert {"gflops", "gbytes", "percent_of_limit", "max_error", "versions"} <= set(entry["extra_info"])


# make gpu, without one.


def step(name: str, code: str, **more) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], more.pop("seconds", 20), "x.log", **more)


def test_gpu_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "make gpu needs a CUDA GPU: " in capsys.readouterr().err


def test_gpu_steps_fail_alone_and_in_time(tmp_path, capsys):
    todo = [
        step("good", "import os; print('hello', os.environ['WHO'])", environment={"WHO": "you"}),
        step("bad", "print('what broke'); raise SystemExit(3)"),
        step("slow", "import time; time.sleep(60)", seconds=1.5),
        step("absent", "", needs="no-such-program"),
        gpu.Step("no program", ["no-such-program"], 5, "x.log"),
        step("late", "", seconds=0.5),
    ]
    outcomes = gpu.run_steps(todo, tmp_path, 60)
    assert [outcome["outcome"] for outcome in outcomes] == [
        "passed",
        "failed",
        "out of time",
        "skipped",
        "failed",
        "skipped",
    ]
    assert outcomes[0]["tail"] == "hello you\n"
    assert outcomes[1]["detail"] == "exit code 3" and outcomes[1]["tail"] == "what broke\n"
    assert "no-such-program is not installed" in outcomes[3]["detail"]
    assert "[6/6] late ..." in capsys.readouterr().out


def test_gpu_report(result, tmp_path):
    results.save(result, tmp_path / "depthwise_conv2d.json")
    (tmp_path / "broken.json").write_text("{}")
    outcomes = [
        {"name": "tests", "outcome": "failed", "seconds": 2.0, "detail": "exit code 1", "tail": "boom"}
    ]
    text = gpu.write(tmp_path, outcomes, {"name": "A GPU", "versions": {}})
    assert text == (tmp_path / "gpu.md").read_text()
    for part in ("# A GPU", "| tests | failed | 2 | exit code 1 |", "### a-machine", "boom", "unreadable: "):
        assert part in text
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"][0]["outcome"] == "failed"


def test_gpu_steps_fit_their_time(tmp_path):
    todo = gpu.steps(tmp_path)
    benchmarks = {f"benchmark {op} {dtype}" for op in OPERATORS for dtype in ("bfloat16", "float32")}
    assert {"build", "tests", "memcheck", *benchmarks} <= {step.name for step in todo}
    assert all(step.seconds <= 180 for step in todo)
    for step_ in todo:
        if step_.name in benchmarks:  # the arguments are ones that the command knows
            bench_command.configure(parser := argparse.ArgumentParser())
            args = parser.parse_args(step_.command[4:])
            assert args.within < step_.seconds and harness.layers(args.op, args.shapes)


def test_sanitize_runs_every_shape(capsys):
    assert sanitize.main(["--device", "cpu", "--backends", "reference"]) == 0
    assert "refused" not in capsys.readouterr().out
    assert sanitize.main(["--device", "cpu", "--backends", "nothing"]) == 2

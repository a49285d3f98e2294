"""The benchmark of whole networks: wrong answers are refused, missing engines named, and figures right."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastconv
from fastconv.ceilings import Ceilings
from fastconv.cli import UserError
from fastconv.cli import bench as bench_command
from fastconv.cost import bytes_moved

networks = bench_command.suite("networks")
network_report = bench_command.suite("network_report")
attribution = bench_command.suite("attribution")
engines = bench_command.suite("engines")
harness = bench_command.suite("harness")
report = bench_command.suite("report")
results = bench_command.suite("results")

LIMITS = Ceilings("cpu", "avx2", 2, 100e9, 10e9, {2**20: 80e9, 2**28: 10e9})
TORCH, OURS = harness.Contender("torch", "nchw"), harness.Contender("fastconv", "nhwc")


def small(direction="forward"):
    return networks.NetworkProblem("mobilenet_v1", 2, direction, 64, {"width": 0.25})


@pytest.fixture(scope="module")
def groups():
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "optimize_with_progress", lambda model, *_: fastconv.optimize(model))
        for problem in (small(), small("backward")):
            chosen = networks.contenders(problem.direction, quick=True)
            found.append(problem.measure(chosen, rounds=1, seconds=0.0, ceilings=LIMITS))
    return found


@pytest.fixture
def result(groups):
    return results.collect("models", copy.deepcopy(groups), LIMITS, "float32", "a-machine")


def test_right_contenders_are_timed(result):
    results.check(result)
    for group in result["groups"]:
        names = [contender["name"] for contender in group["contenders"]]
        assert names == ["torch nchw", "torch nhwc", "fastconv nchw", "fastconv nhwc"]
        for contender in group["contenders"]:
            assert contender["refused"] is None and contender["seconds"] > 0, contender
            assert contender["max_error"] < 0.1
        assert set(network_report.ratios(group)) == {"eager"}
    inference, step = result["groups"]
    assert inference["flops"] == pytest.approx(2 * 2 * 41e6 * (64 / 224) ** 2, rel=0.1)
    assert step["flops"] == 3 * inference["flops"]
    assert "attribution" in inference and "attribution" not in step


def test_contenders():
    names = [contender.name for contender in networks.contenders("forward")]
    assert names[:2] == ["torch nchw", "torch nhwc"] and names[-2:] == ["fastconv nchw", "fastconv nhwc"]
    engines_and_compilers = {"torch.compile freezing nchw", "onnxruntime nchw", "openvino nchw"}
    assert engines_and_compilers < set(names)
    training = {contender.name for contender in networks.contenders("backward")}
    assert set(names) - training == engines_and_compilers


@pytest.mark.parametrize("direction", harness.PASSES)
def test_wrong_network_is_refused(direction, monkeypatch):
    def spoil(model, *_):
        with torch.no_grad():
            model.classifier[1].weight.mul_(1.2)

    monkeypatch.setattr(networks, "optimize_with_progress", spoil)
    group = small(direction).measure([TORCH, OURS], rounds=1, seconds=0.0, ceilings=LIMITS)
    peer, ours = group["contenders"]
    assert peer["refused"] is None and peer["seconds"] > 0
    assert "wrong result" in ours["refused"] and ours["seconds"] is None
    assert "attribution" not in group
    assert "refused" in network_report.console(results.collect("models", [group], LIMITS, "float32", "x"))


def test_raising_network_is_refused(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(networks, "optimize_with_progress", fail)
    group = small().measure([TORCH, OURS], rounds=1, seconds=0.0, ceilings=LIMITS)
    assert group["contenders"][1]["refused"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_engine_is_left_out(missing, monkeypatch):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    engine = harness.Contender("openvino", "nchw")
    group = small().measure([TORCH, engine], rounds=1, seconds=0.0, ceilings=LIMITS)
    assert [contender["name"] for contender in group["contenders"]] == ["torch nchw"]
    assert "pip install 'fastconv[engines]'" in group["left_out"]["openvino nchw"]


def test_versions_of_engines(monkeypatch):
    for name in engines.ENGINES:
        monkeypatch.setitem(sys.modules, name, None)
    assert engines.versions() == {}
    monkeypatch.setitem(sys.modules, "openvino", argparse.Namespace(__version__="2026.4-17-x"))
    assert engines.versions() == {"openvino": "2026.4"}


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_engines_agree(engine):
    for name in ("onnx", "onnxscript", engine):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'fastconv[engines]'")
    chosen = [TORCH, harness.Contender(engine, "nchw")]
    group = small().measure(chosen, rounds=1, seconds=0.0, ceilings=LIMITS)
    assert [contender["refused"] for contender in group["contenders"]] == [None, None]
    assert group["contenders"][1]["max_error"] < 1e-4


def test_each_compiled_contender_has_code_of_its_own():
    model = nn.Linear(2, 3)
    first, second = networks._alone(model), networks._alone(model)
    assert first.__code__ is not second.__code__
    x = torch.randn(4, 2)
    assert torch.equal(first(x), model(x))


def test_problems():
    every = networks.problems(None, (1, 4), harness.PASSES)
    assert len(every) == 2 * (2 * 6 + 1)
    assert {p.direction for p in every if p.network == "shufflenet_v1"} == {"backward"}
    assert [str(p) for p in networks.problems(["resnet18"], (1,), ("forward",))] == [
        "resnet18, batch 1, forward"
    ]
    assert str(small()) == "mobilenet_v1, batch 2, 64x64, forward"
    with pytest.raises(ValueError, match="shapes must be among .*got 'resnet19'"):
        networks.problems(["resnet19"], (1,), ("forward",))
    with pytest.raises(ValueError, match="direction must be one of"):
        small("sideways")
    goals = json.loads((harness.FOLDER / "goals.json").read_text())["models"]["cpu"]["float32"]
    rows = {(f"{p.network}, batch {p.batch}", p.direction) for p in every}
    assert {(name, direction) for name, passes in goals.items() for direction in passes} == rows
    assert all(set(g) <= set(network_report.PEERS) for passes in goals.values() for g in passes.values())


# What time is made of.


@pytest.mark.parametrize(
    "layer, shape, kind",
    [
        (nn.Conv2d(8, 12, 3, 2, 1), (2, 8, 11, 9), "dense 3x3"),
        (nn.Conv2d(8, 8, 5, 1, (2, 1), groups=8), (2, 8, 11, 9), "depthwise 5x5"),
        (nn.Conv2d(8, 16, 1, groups=2, bias=False), (2, 8, 11, 9), "grouped 1x1"),
        (nn.Conv2d(4, 4, (1, 3), dilation=2), (1, 4, 11, 9), "dense 1x3"),
        (nn.Linear(8, 5), (2, 7, 8), "linear"),
        (nn.MaxPool2d(2), (2, 8, 12, 8), "pool"),
        (nn.BatchNorm2d(8).eval(), (2, 8, 12, 8), "norm"),
        (nn.GELU(), (2, 8, 12, 8), "activation, sum"),
        (nn.ChannelShuffle(2), (2, 8, 12, 8), "shuffle, cat, copy"),
        (nn.Flatten(), (2, 8, 12, 8), "view"),
    ],
)
def test_attribution_of_a_layer(layer, shape, kind):
    """Kind, multiply-adds and bytes are those of the layer's cost."""
    x, limits = torch.randn(shape), Ceilings("cpu", "avx2", 2, 1.0, 1e30)
    with torch.no_grad():
        found = attribution.measure(lambda: layer(x), limits, repeats=1)
        (row,) = found["kinds"]
        assert row["kind"] == kind and row["calls"] == 1
        flops = 2 * fastconv.cost(layer, shape).macs
        assert row["floor_seconds"] == pytest.approx(flops, abs=1e-9)
        nbytes = attribution.measure(lambda: layer(x), Ceilings("cpu", "avx2", 2, 1e30, 1.0), 1)["kinds"][0]
        bias = getattr(layer, "bias", None)
        unread = bias.nbytes if kind not in ("norm",) and bias is not None else 0
        if kind == "view":
            expected = 0
        elif kind == "pool":
            expected = x.nbytes
        else:
            expected = bytes_moved(layer, x, layer(x)) - unread
        assert nbytes["floor_seconds"] == pytest.approx(expected)


def test_attribution_of_cat_and_of_what_is_between():
    x = torch.randn(2, 3, 4, 5)

    def call():
        sum(range(200_000))  # Python, between operators
        return torch.cat([x, x], 1)

    found = attribution.measure(call, Ceilings("cpu", "avx2", 2, 1e30, 1.0), repeats=2)
    assert [row["kind"] for row in found["kinds"]] == ["shuffle, cat, copy"]
    assert found["kinds"][0]["floor_seconds"] == 0  # its shapes are not known
    assert found["between_seconds"] > 1e-4


# Reports.


def test_report(result):
    inference, step = result["groups"]
    for contender in inference["contenders"]:
        contender["seconds"] = 0.002 if contender["side"] == "fastconv" else 0.005
    for contender in step["contenders"]:
        contender["seconds"] = 0.004 if contender["side"] == "fastconv" else 0.006
    for group in (inference, step):
        group["layer"] = "batch 1"  # its goal: 2 times as fast in training
    engine = {**inference["contenders"][0], "kernel": "onnxruntime", "side": "onnxruntime", "seconds": 0.003}
    inference["contenders"].append(engine)
    text = report.markdown([result])
    assert "**Whole networks**, float32" in text and "### a-machine" in text
    assert "| 5.00 / 5.00 | - | - | 3.00 | - | 2.00 / 2.00 | - / - | 2.50x | - | **1.50x** (1x) | - |" in text
    assert "| 6.00 / 6.00 | - | 4.00 / 4.00 | - / - | 1.50x (2x) | - |" in text
    assert "Geometric mean, inference, 1 rows: 2.50x eager, 1.50x onnxruntime." in text
    assert "What the time of `optimize`'s networks is made of" in text and "depthwise 3x3" in text
    assert "fastconv nhwc" in network_report.console(result)
    assert report.plot(result, harness.FOLDER / "nowhere") == []
    readme = f"a\n{report.BEGIN}\n{report.END}\nb\n"
    once = report.rewrite(readme, [result])
    assert report.rewrite(once, [result]) == once


def test_rows_of_other_networks_stay(result, tmp_path):
    path = tmp_path / "models.json"
    assert results.with_earlier(result, path) == result
    results.save(result, path)
    other = copy.deepcopy(result)
    other["groups"] = other["groups"][:1]
    other["groups"][0]["network"] = "resnet18"
    merged = results.with_earlier(other, path)
    assert [(g["network"], g["pass"]) for g in merged["groups"]] == [
        ("mobilenet_v1", "forward"),
        ("mobilenet_v1", "backward"),
        ("resnet18", "forward"),
    ]
    again = copy.deepcopy(result)
    again["groups"][0]["flops"] = 7
    merged = results.with_earlier(again, path)["groups"]
    assert sorted(group["flops"] == 7 for group in merged) == [False, True]
    with pytest.raises(ValueError, match="op must be 'conv2d', got 'models'"):
        results.with_earlier({**result, "op": "conv2d"}, path)


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench_command.configure(parser)
    return bench_command.run(parser.parse_args(["models", "--device", "cpu", *arguments]))


def test_command(groups, tmp_path, monkeypatch, capsys):
    """A run that is cut keeps what it has measured."""
    monkeypatch.setattr("fastconv.ceilings.measure", lambda *_: LIMITS)
    path, seen = tmp_path / "x.json", []

    def measure(self, contenders, **options):
        seen.append((str(self), len(contenders), options["seconds"]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {**groups[0], "layer": f"batch {self.batch}"}

    monkeypatch.setattr(networks.NetworkProblem, "measure", measure)
    chosen = ("--shapes", "mobilenet_v1", "resnet18", "--passes", "forward", "--json", str(path))
    assert call(*chosen, "--quick", "--seconds", "0.5", "--batch", "1,2") == 130
    assert seen[:2] == [
        ("mobilenet_v1, batch 1, forward", 4, 0.5),
        ("mobilenet_v1, batch 2, forward", 4, 0.5),
    ]
    written = results.read(path)["groups"]
    assert [group["layer"] for group in written] == ["batch 1", "batch 2"]
    assert {"commit", "date", "load"} <= set(written[0])
    with pytest.raises(UserError, match="device must be 'else'"):
        call(*chosen, "--device-name", "else")
    out = capsys.readouterr().out
    assert "interrupted: partial, 2 of 4" in out and "fastconv nhwc" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--shapes", "nothing"), "shapes must be among"),
        (("--shapes", "shufflenet_v1", "--passes", "forward"), "nothing is measured of"),
        (("--dtype", "bfloat16"), "whole networks are measured with"),
    ],
)
def test_command_refuses(arguments, words):
    with pytest.raises(UserError, match=words):
        call(*arguments)


def test_an_operator_takes_one_batch():
    parser = argparse.ArgumentParser()
    bench_command.configure(parser)
    with pytest.raises(UserError, match="--batch must be one number"):
        bench_command.run(parser.parse_args(["shift2d", "--device", "cpu", "--batch", "1,4"]))


def test_pytest_suite(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_models.py", "-q", "-p", "no:cacheprovider"]
    command += ["--shapes", "mobilenet_v1", "--image", "64", "--passes", "forward", "--batch", "1", "--quick"]
    command += ["--seconds", "0", "--benchmark-json", str(path)]
    done = subprocess.run(command, cwd=harness.FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())["benchmarks"]
    names = {entry["extra_info"]["name"] for entry in written}
    assert names == {"torch nchw", "torch nhwc", "fastconv nchw", "fastconv nhwc"}
    for entry in written:
        assert entry["stats"]["median"] == pytest.approx(entry["extra_info"]["seconds"], rel=1e-6)

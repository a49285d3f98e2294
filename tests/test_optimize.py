"""optimize, restore, report: what changes hands, what must not change, and on what proof."""

import copy
import io
import random
import sys
import warnings

import numpy
import pytest
import torch
from cases import DEVICE
from torch import nn

import fastconv
from fastconv.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d

SWAP = sys.modules["fastconv.optimize._swap"]
TRIAL = sys.modules["fastconv.optimize._trial"]
HAS_KERNEL = fastconv.available("depthwise_conv2d", DEVICE)[0] in ("cpu", "cuda")
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no compiled kernel here")


def network(multiplier=1):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8 * multiplier, 3, stride=2, padding=1, groups=8),
        nn.Dropout(0.25),
        nn.Conv2d(8 * multiplier, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 16, 5, padding="same", groups=16, bias=False),
    ).to(DEVICE)


def images(count=2):
    return torch.randn(count, 3, 12, 12, device=DEVICE)


def row(model, name):
    (found,) = [row for row in fastconv.report(model).rows if row.name == name]
    return found


@pytest.fixture
def times(monkeypatch):
    """``times(before, after)``: every layer takes so many seconds with PyTorch, and with the kernel."""

    def set_times(before, after):
        def interleave(contenders, *_, **__):
            for call in contenders.values():
                call()
            return {"before": [before], "after": [after]}

        monkeypatch.setattr(TRIAL, "interleave", interleave)
        monkeypatch.setattr(SWAP, "busy", lambda threads: None)

    set_times(2.0, 1.0)
    return set_times


# What does not change hands, and what the report says


def test_reasons():
    model = network()
    nn.utils.parametrizations.spectral_norm(model[3])
    model.append(nn.Linear(12, 2)).append(nn.Conv2d(1, 1, 1))
    model.append(nn.Conv2d(2, 2, 1, groups=2, dtype=torch.complex64))
    model.append(nn.ConvTranspose2d(2, 2, 1, dtype=torch.complex64)).append(nn.LazyConvTranspose2d(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch initialises nothing, and says so
        model.append(nn.Conv2d(2, 0, 1)).append(nn.Conv1d(2, 2, 1))
    fastconv.optimize(model, backend="reference")
    reasons = {row.name: row.reason for row in fastconv.report(model).rows}
    for name in "0568":
        assert reasons[name] is None and row(model, name).kernel == "reference"
    assert reasons["1"] == "no kernel for BatchNorm2d yet"
    assert reasons["3"] == "its type is ParametrizedConv2d, not exactly Conv2d"
    assert reasons["7"] == "no kernel for Linear yet"
    assert reasons["9"] == reasons["10"] == "no kernel for complex64 weights"
    assert reasons["11"] == "its type is LazyConvTranspose2d, not exactly ConvTranspose2d"
    assert reasons["12"] == "no kernel for empty weights, of shape (0, 2, 1, 1)"
    assert reasons["13"] == "no kernel for Conv1d yet"
    assert type(model[3]).__name__ == "ParametrizedConv2d"


def test_a_forward_of_its_own_is_respected():
    model = network()
    model[3].forward = lambda x: x[:, :, ::2, ::2]
    fastconv.optimize(model, backend="reference")
    assert type(model[3]) is nn.Conv2d
    assert row(model, "3").reason == "its forward is replaced on the instance"


def test_old_style_norms_work_by_hooks_and_are_swapped():
    model = network().eval()
    nn.utils.spectral_norm(model[3])
    nn.utils.weight_norm(model[6])
    expected = model(images())
    torch.manual_seed(0)
    model = network().eval()
    nn.utils.spectral_norm(model[3])
    nn.utils.weight_norm(model[6])
    fastconv.optimize(model, backend="reference")
    assert type(model[3]) is type(model[6]) is DepthwiseConv2d
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)


def test_parametrized_after_optimize_cannot_be_restored_unseen():
    model = fastconv.optimize(network(), backend="reference")
    nn.utils.parametrizations.weight_norm(model[3])
    with pytest.raises(TypeError, match="3 became a ParametrizedDepthwiseConv2d after optimize"):
        fastconv.restore(model)
    nn.utils.parametrize.remove_parametrizations(model[3], "weight")
    assert type(fastconv.restore(model)[3]) is nn.Conv2d


@pytest.mark.parametrize(
    "options, swapped",
    [
        ({"only": "3"}, ["3"]),
        ({"only": ["3", "6"]}, ["3", "6"]),
        ({"only": lambda name, module: getattr(module, "kernel_size", None) == (5, 5)}, ["6"]),
        ({"only": nn.BatchNorm2d}, []),
        ({"exclude": "[0-5]"}, ["6"]),
        ({"exclude": nn.Conv2d}, []),
        ({"only": nn.Conv2d, "exclude": "6"}, ["0", "3", "5"]),
    ],
)
def test_only_and_exclude(options, swapped):
    model = fastconv.optimize(network(), backend="reference", **options)
    assert [row.name for row in fastconv.report(model).swapped] == swapped
    assert [name for name, m in model.named_modules() if type(m) in (Conv2d, DepthwiseConv2d)] == swapped
    for name in {"0", "3", "5", "6"} - set(swapped):
        assert row(model, name).reason == "left out by only= or exclude="


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        fastconv.optimize([])
    with pytest.raises(ValueError, match="backend must be None or one of"):
        fastconv.optimize(network(), backend="gpu")
    with pytest.raises(ValueError, match="only='features.*' matches no module"):
        fastconv.optimize(network(), only="features.*")
    with pytest.raises(TypeError, match="exclude must be globs, types or callables, got 3"):
        fastconv.optimize(network(), exclude=[3])
    with pytest.raises(TypeError, match="must return floating-point tensors"):
        fastconv.optimize(nn.Flatten(), torch.ones(2, 2, dtype=torch.int64))


def test_a_second_call_adds_and_looks_again():
    model = fastconv.optimize(network(), only="3", backend="reference")
    fastconv.optimize(model, only="6", backend="aten")
    assert (model[3].backend, model[6].backend) == ("reference", "aten")
    assert [(row.name, row.kernel) for row in fastconv.report(model).swapped] == [
        ("3", "reference"),
        ("6", "aten"),
    ]
    fastconv.optimize(model, only="3", backend="aten")
    assert model[3].backend == "aten"
    fastconv.restore(model)
    assert type(model[3]) is type(model[6]) is nn.Conv2d


def test_named_backend_that_cannot_run():
    name = "cuda" if DEVICE == "cpu" else "cpu"
    model = fastconv.optimize(network(), backend=name)
    assert not fastconv.report(model).swapped
    assert f"backend {name!r} cannot run here" in row(model, "3").reason
    with pytest.raises(fastconv.OptimizeError, match=f"3: .*{name}.* cannot run here"):
        fastconv.optimize(model, backend=name, strict=True)


# With an example: proof, time, and no traces


def test_winners_stay_and_losers_go(times):
    model, x = network().eval(), images()
    fastconv.optimize(model, x, backend="reference")
    assert type(model[3]) is type(model[6]) is DepthwiseConv2d
    assert row(model, "3").kernel == "reference" and row(model, "3").speedup == 2.0
    assert fastconv.report(model).parity.holds
    times(1.0, 0.99)
    fastconv.optimize(model, x, backend="reference")
    assert type(model[3]) is nn.Conv2d
    assert row(model, "3").reason == "not faster: 990.000 ms, PyTorch 1000.000 ms (reference)"
    with pytest.raises(fastconv.OptimizeError, match="6: not faster"):
        fastconv.optimize(model, x, backend="reference", strict=True)
    assert type(model[3]) is nn.Conv2d


def test_strict_leaves_the_model_as_it_was(times):
    model = fastconv.optimize(network(), only="3", backend="reference")
    times(1.0, 3.0)
    with pytest.raises(fastconv.OptimizeError):
        fastconv.optimize(model, images(), strict=True, backend="aten")
    assert type(model[3]) is DepthwiseConv2d and model[3].backend == "reference"
    assert type(model[6]) is nn.Conv2d


def test_strict_gives_an_earlier_kernel_back():
    model = fastconv.optimize(network(), only="3", backend="reference")
    model[6].forward = model[6].forward
    with pytest.raises(fastconv.OptimizeError, match="6: its forward is replaced"):
        fastconv.optimize(model, strict=True, backend="aten")
    assert type(model[3]) is DepthwiseConv2d and model[3].backend == "reference"


def test_no_traces(times):
    model, x = network().train(), images().requires_grad_()
    model[1].eval()
    model(x).sum().backward()
    model[0].register_forward_hook(lambda *_: None)
    names = [name for name, _ in model.named_buffers()]
    state = {
        name: (tensor, tensor.clone(), tensor._version)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    grads = [(p.grad, p.grad.clone()) for p in (*model.parameters(), x)]
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    fastconv.optimize(model, x, backend="reference")
    assert type(model[3]) is DepthwiseConv2d
    for name, tensor in model.state_dict(keep_vars=True).items():
        same, value, version = state[name]
        assert tensor is same and torch.equal(tensor, value), name
        assert tensor._version == version or name in names
    for tensor, (grad, value) in zip((*model.parameters(), x), grads):
        assert tensor.grad is grad and torch.equal(grad, value)
    assert flags == [module.training for module in model.modules()]
    assert hooks == [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.array_equal(numpy.random.get_state()[1], generators[2])


def test_batch_norm_in_training_mode_keeps_its_statistics(times):
    model = network().train()
    before = copy.deepcopy(model[1].state_dict())
    fastconv.optimize(model, images(), backend="reference")
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_kernel_is_found(times, monkeypatch, fault):
    right = DepthwiseConv2d._conv_forward

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-3)

    def wrong(self, input, weight, bias):
        y = right(self, input, weight, bias)
        if self.kernel_size != (5, 5):
            return y
        return y * (1 + 1e-3) if fault == "output" else WrongGradient.apply(y)

    monkeypatch.setattr(DepthwiseConv2d, "_conv_forward", wrong)
    model = fastconv.optimize(network().train(), images(), backend="reference")
    assert type(model[3]) is DepthwiseConv2d and type(model[6]) is nn.Conv2d
    assert f"its {fault}" in row(model, "6").reason and "is off by" in row(model, "6").reason
    with pytest.raises(fastconv.OptimizeError, match="6: its .* is off by"):
        fastconv.optimize(model, images(), backend="reference", strict=True)


def test_the_whole_model_is_checked_too(times, monkeypatch):
    right = DepthwiseConv2d._conv_forward
    monkeypatch.setattr(DepthwiseConv2d, "_conv_forward", lambda *a: right(*a) * (1 + 1e-3))
    monkeypatch.setattr(TRIAL.LayerTrial, "why_not_exact", lambda self: None)
    model = fastconv.optimize(network(), images(), backend="reference")
    assert type(model[3]) is type(model[6]) is nn.Conv2d
    assert row(model, "3").reason.startswith("the whole model differs: outputs differ by 1")
    assert not fastconv.report(model).parity.holds


def test_a_kernel_that_raises_is_reported(times, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(DepthwiseConv2d, "_conv_forward", broken)
    model = fastconv.optimize(network(), images(), backend="reference")
    assert type(model[3]) is nn.Conv2d
    assert row(model, "3").reason == "the kernel raised RuntimeError: out of registers"


def test_a_model_that_raises_is_left_as_it_was():
    model = fastconv.optimize(network(), only="3", backend="aten")
    with pytest.raises(RuntimeError, match="channels"):
        fastconv.optimize(model, torch.randn(1, 5, 8, 8, device=DEVICE))
    assert model[3].backend == "aten"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_shared_layers_count_each_call(times):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.again = self.layer
            self.unused = nn.Conv2d(4, 4, 3, groups=4)

        def forward(self, x, *, scale):
            return {"y": self.again(input=self.layer(self.layer(x))[..., 1:]) * scale}

    model = Twice().to(DEVICE)
    x = torch.randn(1, 4, 8, 8, device=DEVICE)
    fastconv.optimize(model, {"x": x, "scale": 2.0}, backend="reference")
    found = row(model, "layer")
    assert [r.name for r in fastconv.report(model).rows] == ["layer", "unused"]
    assert (found.calls, found.macs, found.seconds_before) == (3, 4 * 9 * (64 + 64 + 56), 6.0)
    assert model.again is model.layer and type(model.layer) is DepthwiseConv2d
    assert row(model, "unused").reason == "example_input does not reach it"
    assert type(model.unused) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_other_types_and_layouts(times, dtype, training):
    model = network(2).to(dtype).to(memory_format=torch.channels_last).train(training)
    x = images(4).to(dtype).to(memory_format=torch.channels_last)
    fastconv.optimize(model, x, backend="reference", strict=True)
    assert len(fastconv.report(model).swapped) == 4
    assert row(model, "3").trained == row(model, "5").trained == training


def test_autocast_and_no_grad(times):
    model, x = network().eval(), images()
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        fastconv.optimize(model, x, backend="reference", strict=True)
    assert fastconv.report(model).parity.gradient_error is None


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_pass_the_proof(times, training):
    model = fastconv.models.create("mobilenet_v1", width=0.25, num_classes=10, plain=True).to(DEVICE)
    x = torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        model.train()(x)
    depthwise = [name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1]
    fastconv.optimize(model.train(training), x, strict=True, only=depthwise)
    report = fastconv.report(model)
    assert len(report.swapped) == 13
    assert all(row.kernel.split("/")[0] in ("cpu", "cuda") for row in report.swapped)
    assert report.parity.holds and report.parity.gradient_error < 1e-3


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_dense_and_transposed_kernels_pass_the_proof(times, training):
    backend = "cpu" if DEVICE == "cpu" else "triton"
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 12, (3, 1), padding="same", groups=2, dilation=2),
        nn.ConvTranspose2d(12, 8, 4, 2, 1, bias=False),
        nn.Conv2d(8, 4, 1),
    ).to(DEVICE)
    fastconv.optimize(model.train(training), images(), strict=True, backend=backend)
    report = fastconv.report(model)
    assert [type(model[i]) for i in (0, 3, 4, 5)] == [Conv2d, Conv2d, ConvTranspose2d, Conv2d]
    for row in report.swapped:
        kernel, algorithm = row.kernel.split("/")
        assert kernel == backend and algorithm in fastconv.backends.CHOICES["conv2d"].algorithms[backend]
    assert len(report.swapped) == 4 and report.parity.holds and report.parity.gradient_error < 1e-3
    assert row.macs == 2 * 8 * 4 * 144 and report.swapped[2].macs == 2 * 12 * 36 * 8 * 16


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_what_pytorch_does_best_is_left_to_it(times, monkeypatch, kind):
    for op in ("conv2d", "conv_transpose2d"):
        monkeypatch.setitem(fastconv.backends.CHOICES[op].__dict__, "prefer", lambda *_: ("aten",))
    model = fastconv.optimize(nn.Sequential(kind(3, 4, 3)).to(DEVICE), images())
    assert type(model[0]) is kind
    assert row(model, "0").reason == "PyTorch's own kernel is the best here"
    with pytest.raises(fastconv.OptimizeError, match="0: PyTorch's own kernel is the best here"):
        fastconv.optimize(model, images(), strict=True)


@needs_kernel
def test_real_timing():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16)).to(DEVICE).train()
    fastconv.optimize(model, torch.randn(1, 16, 16, 16, device=DEVICE))
    found = row(model, "0")
    assert 0 < found.seconds_before < 1 and 0 < found.seconds_after < 1
    assert (found.kernel is not None) == (found.seconds_after < 0.98 * found.seconds_before)
    assert found.trained and found.timed_macs == 2 * found.macs  # the input takes no gradient


def test_report_prints(times):
    model = fastconv.optimize(network().train(), images(), exclude="6", backend="reference")
    report = fastconv.report(model)
    report.ceilings = type("C", (), {"floor_time": staticmethod(lambda flops, nbytes, dtype: 0.25)})
    text = str(report)
    line = next(line for line in text.splitlines() if line.startswith("3 "))
    for word in ("Conv2d", "2x8x12x12", "reference", "2000.000", "1000.000", "2.00x", "5.18 k", "25"):
        assert word in line, word
    assert "1 x Dropout" not in text and "no kernel for BatchNorm2d" not in text
    assert "1 x Conv2d + BatchNorm2d + ReLU: in one call" in text
    assert "3 swapped" in text and "whole model: outputs differ by" in text
    found = row(model, "3")
    assert found.macs == 2 * 8 * 9 * 36 and found.timed_macs == 3 * found.macs
    moved_in, moved_out, own = 4 * 2 * 8 * 144, 4 * 2 * 8 * 36, 4 * (8 * 9 + 8)
    assert found.bytes == moved_in + moved_out + own
    assert found.timed_bytes == 3 * moved_in + 2 * moved_out + 3 * own
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, file=io.StringIO())
    console.print(report)
    assert "reference" in console.file.getvalue()
    assert report.as_dict()["layers"][2]["kernel"] == "reference"


def test_measuring_warns_once_on_a_busy_machine(times, monkeypatch):
    monkeypatch.setattr(SWAP, "busy", lambda threads: "others are busy")
    with pytest.warns(UserWarning, match="others are busy") as caught:
        fastconv.optimize(network(), images(), backend="reference")
    assert len([warning for warning in caught if "others are busy" in str(warning.message)]) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastconv.optimize(network(), backend="reference")  # it measures nothing


@pytest.mark.parametrize("terminal", [True, False])
def test_measuring_shows_its_progress_on_a_terminal(times, monkeypatch, capsys, terminal):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    fastconv.optimize(network(), images(), backend="reference")
    captured = capsys.readouterr()
    assert ("layers: 6" in captured.err and "4/4" in captured.err) == terminal
    assert captured.out == "" and (terminal or captured.err == "")


def test_report_says_a_reason_once_for_all_layers_it_holds_for():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, groups=4) for _ in range(13)), nn.Linear(2, 2)).to(DEVICE)
    names = ", ".join(map(str, range(1, 13)))
    lines = str(fastconv.report(model)).splitlines()
    assert lines[-2] == f"13 layers: not optimized (0, {names})"
    assert sum("not optimized" in line for line in lines) == 1
    model[0].forward = model[0].forward
    fastconv.optimize(model, backend="reference")
    assert fastconv.report(model).remarks() == [
        "0: its forward is replaced on the instance",
        "1 x Linear: no kernel for Linear yet",
    ]


def test_report_explains_its_columns_and_why_one_is_empty(times, monkeypatch):
    from fastconv import _library, ceilings

    monkeypatch.setattr(_library, "host", lambda: None)
    monkeypatch.setattr(ceilings, "_measure_cpu", ceilings._measure_cpu.__wrapped__)
    model = fastconv.optimize(network(), images(), backend="reference")
    lines = str(fastconv.report(model)).splitlines()
    (legend,) = [line for line in lines if line.startswith("before, after: ")]
    assert "forward and backward; ratio: before / after" in legend
    (reason,) = [line for line in lines if line.startswith("no % limit: ")]
    assert "fastconv._host, which is not built" in reason
    fastconv.optimize(model.eval(), images(), backend="reference")
    assert "of the kernel, forward; ratio" in str(fastconv.report(model))


def test_report_of_a_model_never_seen():
    rows = {row.name: row.reason for row in fastconv.report(network()).rows}
    assert rows["0"] == rows["3"] == "not optimized" and rows["1"] == "no kernel for BatchNorm2d yet"

"""Channel shuffle in models: fastconv.nn.ChannelShuffle, optimize, enable, and which backend None takes."""

import copy
import io
import pickle
import sys

import pytest
import torch
from cases import DEVICE, LAYOUTS
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv.nn import ChannelShuffle
from fastconv.ops._arguments import DTYPES
from fastconv.ops.channel_shuffle import choose

ELSEWHERE = "cuda" if DEVICE == "cpu" else "cpu"  # a backend that cannot run on these tensors
HAS_KERNEL = fastconv.available("channel_shuffle", DEVICE)[0] in ("cpu", "cuda")
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="no compiled kernel here")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's backends")


class Calls(TorchDispatchMode):
    """The names of the operators that run, such as ``aten::index``."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


def names_of(call):
    with Calls() as calls, torch.no_grad():
        call()
    return calls.names


def image(channels=6, layout="channels_last"):
    return LAYOUTS[layout](lambda shape: torch.randn(shape, device=DEVICE), (2, channels, 4, 5))


def unit():
    """A part of ShuffleNet."""
    return nn.Sequential(
        nn.Conv2d(6, 6, 1, groups=3), nn.ChannelShuffle(3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
    ).to(DEVICE, memory_format=torch.channels_last)


def row(model, name):
    (found,) = [row for row in fastconv.report(model).rows if row.name == name]
    return found


# The module


@pytest.mark.parametrize("backend", [None, "reference", "aten"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_as_the_function_and_as_pytorchs(layout, groups, backend):
    plain, ours = nn.ChannelShuffle(groups), ChannelShuffle(groups, backend=backend)
    x = image(layout=layout).requires_grad_()
    y = ours(x)
    assert torch.equal(y, plain(x)) and torch.equal(y, fastconv.channel_shuffle(x, groups))
    assert y.stride() == plain(x).stride()
    cotangent = torch.randn_like(y)
    expected, actual = (torch.autograd.grad(out, x, cotangent)[0] for out in (plain(x), y))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 2, 3, 4), (2, 6, 1, 2, 3, 2), (0, 6, 5), (2, 6, 0)])
def test_sequences_and_volumes(shape, backend):
    x = torch.randn(shape, device=DEVICE)
    plain, ours = nn.ChannelShuffle(3), ChannelShuffle(3, backend=backend)
    inputs = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    if x.dim() == 5:
        inputs.append(x.contiguous(memory_format=torch.channels_last_3d))
    for input in inputs:
        assert torch.equal(ours(input), plain(input))
        assert ours(input).stride() == plain(input).stride()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_other_types_are_pytorchs_alone(dtype):
    x = torch.randint(0, 2, (2, 6, 3, 3), device=DEVICE).to(dtype)
    for backend in (None, "aten"):
        assert torch.equal(ChannelShuffle(3, backend=backend)(x), nn.ChannelShuffle(3)(x))
    with pytest.raises(fastconv.BackendError, match=f"no kernel for {str(dtype).removeprefix('torch.')}"):
        ChannelShuffle(3, backend="reference")(x)


def test_state_copies_and_files():
    layer, x = ChannelShuffle(3, backend="reference"), image()
    assert not layer.state_dict() and not nn.ChannelShuffle(3).state_dict()
    assert str(layer.load_state_dict(nn.ChannelShuffle(3).state_dict())) == "<All keys matched successfully>"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert type(other) is ChannelShuffle and (other.groups, other.backend) == (3, "reference")
        assert torch.equal(other(x), layer(x))


def test_repr():
    assert repr(ChannelShuffle(3)) == "ChannelShuffle(groups=3)"
    assert repr(ChannelShuffle(3, backend="aten")) == "ChannelShuffle(groups=3, backend='aten')"


@pytest.mark.parametrize(
    "groups, options, error, words",
    [
        (0, {}, ValueError, "groups must be at least 1, got 0"),
        (-2, {}, ValueError, "groups must be at least 1, got -2"),
        (2.0, {}, TypeError, "groups must be an integer, got 2.0"),
        ((3, 2), {}, TypeError, r"groups must be an integer, got \(3, 2\)"),
        (3, {"backend": "gpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_arguments(groups, options, error, words):
    with pytest.raises(error, match=words):
        ChannelShuffle(groups, **options)


def test_bad_inputs():
    with pytest.raises(ValueError, match="groups must divide input's 6 channels, got 4"):
        ChannelShuffle(4)(image())
    with pytest.raises(ValueError, match=r"input must have at least 3 dimensions .* got shape \(2, 6\)"):
        ChannelShuffle(3)(torch.zeros(2, 6, device=DEVICE))
    with pytest.raises(fastconv.BackendError, match="cannot run here"):
        ChannelShuffle(3, backend=ELSEWHERE)(image())


# Which backend None takes


@on_cpu
@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_groups_are_pytorchs_if_contiguous_and_the_kernels_if_channels_last(layout):
    x = image(layout=layout)
    backend = "cpu" if layout.startswith("channels_last") else "aten"
    assert choose(None, None, x, 3) == backend
    ran = "fastconv::channel_shuffle" in names_of(lambda: fastconv.channel_shuffle(x, 3))
    assert ran == (backend == "cpu")
    assert ChannelShuffle(3).kernel(x)[0] == backend
    assert choose(None, "plain", x, 3) == "cpu"  # an algorithm is the kernels'
    with fastconv.use_backend("cpu"):
        assert choose(None, None, x, 3) == "cpu"


@on_cpu
@needs_kernel
@pytest.mark.parametrize(
    "channels, groups, float32, others",
    [
        (240, 3, "cpu", "cpu"),
        (240, 80, "cpu", "cpu"),  # the gradient's
        (24, 2, "aten", "cpu"),
        (24, 12, "aten", "cpu"),
        (40, 4, "aten", "cpu"),
        (40, 8, "aten", "cpu"),
        (35, 5, "aten", "aten"),
        (6, 1, "aten", "aten"),
    ],
)
def test_channels_last_is_the_kernels_where_they_win(channels, groups, float32, others):
    x = image(channels)
    assert choose(None, None, x, groups) == float32
    assert {choose(None, None, x.to(dtype), groups) for dtype in DTYPES if dtype != x.dtype} == {others}
    assert choose(None, None, x.contiguous(), groups) == "aten"


@on_cpu
@needs_kernel
def test_without_channels_there_is_a_kernel():
    assert choose(None, None, torch.zeros(2, 0, 3, 3), 3) == "cpu"


# optimize, restore, report


@pytest.mark.parametrize("backend", [None, "reference"])
def test_swap_and_restore(backend):
    if backend is None and not HAS_KERNEL:
        pytest.skip("no compiled kernel here")
    model, x = unit().eval(), image()
    content, expected = dict(model[1].__dict__), model(x)
    assert row(model, "1").reason == "not optimized"
    fastconv.optimize(model, only="1", backend=backend)
    assert type(model[1]) is ChannelShuffle
    assert torch.equal(model(x), expected)
    found = row(model, "1")
    assert (found.type, found.kernel) == ("ChannelShuffle", backend or "chosen at each call")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert type(fastconv.restore(other)[1]) is nn.ChannelShuffle
    fastconv.restore(model)
    assert type(model[1]) is nn.ChannelShuffle
    assert model[1].__dict__ == content and list(model[1].__dict__) == list(content)


@on_cpu
def test_a_gpu_may_hold_the_input(monkeypatch):
    """Nothing of the module tells its device, so a backend serves it if it serves any tensor here."""
    assert "it needs CUDA tensors, got cpu" in ChannelShuffle(3, backend="cuda").why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "got cpu" not in str(ChannelShuffle(3, backend="cuda").why_not())


@on_cpu
def test_named_backend_that_cannot_run_swaps_nothing():
    model = fastconv.optimize(nn.Sequential(nn.ChannelShuffle(3)), backend=ELSEWHERE)
    assert f"backend {ELSEWHERE!r} cannot run here" in row(model, "0").reason
    assert type(model[0]) is nn.ChannelShuffle


def test_subclasses_stay():
    class Mine(nn.ChannelShuffle):
        pass

    model = fastconv.optimize(nn.Sequential(Mine(3), ChannelShuffle(3)), backend="reference")
    assert row(model, "0").reason == "its type is Mine, not exactly ChannelShuffle"
    assert row(model, "1").reason == "it is a module of this library already"


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_report_with_an_example(monkeypatch, training):
    def interleave(contenders, *_, **__):
        for call in contenders.values():
            call()
        return {"before": [2.0], "after": [1.0]}

    monkeypatch.setattr(sys.modules["fastconv.optimize._trial"], "interleave", interleave)
    model = unit().train(training)
    fastconv.optimize(model, image(), only="1", strict=True)
    found = row(model, "1")
    assert found.kernel.split("/")[0] in ("cpu", "cuda") and found.speedup == 2.0
    assert (found.shape, found.calls, found.macs) == ((2, 6, 4, 5), 1, 0)
    assert found.bytes == 2 * 4 * 2 * 6 * 4 * 5 and found.trained == training
    report = fastconv.report(model)
    report.ceilings = type("C", (), {"floor_time": staticmethod(lambda flops, nbytes, dtype: 0.25)})
    line = next(line for line in str(report).splitlines() if line.startswith("1 "))
    for word in ("ChannelShuffle", "2x6x4x5", found.kernel, "2.00x", "1.92 k"):
        assert word in line, word
    assert report.parity.holds


@on_cpu
@needs_kernel
def test_contiguous_inputs_stay_with_pytorch():
    for x in (image(layout="contiguous"), torch.zeros(2, 6, 3, 3, dtype=torch.int32)):
        model = nn.Sequential(nn.ChannelShuffle(3), nn.Threshold(0, 0), _Float())
        fastconv.optimize(model, x)
        assert row(model, "0").reason == "PyTorch's own kernel is the best here"
        assert type(model[0]) is nn.ChannelShuffle


class _Float(nn.Module):
    def forward(self, x):
        return x.float()


def test_cost_is_the_same_before_and_after():
    before = fastconv.cost(unit(), (6, 4, 5))
    after = fastconv.cost(fastconv.optimize(unit(), backend="reference"), (6, 4, 5))
    assert (
        [layer.name for layer in before.layers] == [layer.name for layer in after.layers] == ["0", "1", "2"]
    )
    assert before.storage_bits == after.storage_bits


@needs_kernel
def test_compiles_in_one_graph():
    model, x = unit().eval(), image()
    expected = model(x)
    compiled = torch.compile(fastconv.optimize(model), fullgraph=True, backend="aot_eager")
    for input in (x, x.contiguous()):
        torch.testing.assert_close(compiled(input), expected, rtol=1e-4, atol=1e-5)


# enable


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.channel_shuffle(x, 3),
        lambda x: torch.channel_shuffle(input=x, groups=3),
        lambda x: nn.ChannelShuffle(3)(x),
    ],
)
def test_enable_serves_calls_of_pytorchs_function(call):
    x = image()
    expected = call(x)
    with fastconv.enable("reference"):
        names = names_of(lambda: call(x))
        assert torch.equal(call(x), expected)
    assert "aten::index" in names and not any("shuffle" in name for name in names)
    with fastconv.enable(ELSEWHERE), pytest.raises(fastconv.BackendError, match="cannot run here"):
        call(x)


@needs_kernel
def test_enable_takes_the_compiled_kernel():
    with fastconv.enable():
        assert "fastconv::channel_shuffle" in names_of(lambda: functional.channel_shuffle(image(), 3))


def test_enable_leaves_other_calls_to_pytorch():
    x = image()
    with fastconv.enable(ELSEWHERE):  # which would raise, were it asked
        for other in (x.flatten(2), x.unsqueeze(-1), x.int()):
            assert functional.channel_shuffle(other, 3).shape == other.shape
        with pytest.raises(RuntimeError, match="> 2 dims"):
            functional.channel_shuffle(x[0, :, 0], 3)

"""Convolution and its relatives, differentiated, mapped, compiled: what every kernel shares with PyTorch."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch._dynamo.testing
from cases import DEVICE, LAYOUTS, of_each_backend, runs
from convolutions import Convolution, Shifted, Shuffled, Transposed
from tolerances import assert_close
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fastconv.ops import conv2d, conv_transpose2d
from fastconv.ops._activation import ACTIVATIONS

# Of each kind that some kernel is made for, one small case: everything unequal; 3x3; 1x1.
CASES = [
    Convolution((2, 4, 5, 4), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, residual=True),
    Convolution((1, 2, 4, 3), 3, padding=1, residual=True),
    Convolution((2, 3, 2, 3), 2, (1, 1), residual=True),
    Transposed((1, 4, 3, 2), 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, output_padding=(1, 0)),
    Transposed((1, 3, 2, 3), 2, padding=1),
    Transposed((2, 3, 2, 3), 2, (1, 1)),
    Shuffled((1, 4, 5, 4), 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
    Shuffled((2, 6, 2, 3), 6, (1, 1), groups=3),
    Shifted((2, 3, 4, 3), 2, stride=(2, 1), offsets="scattered"),
    Shifted((1, 9, 2, 3), 2),
]
OPS = dict.fromkeys(case.op for case in CASES)
DENSE = ["contiguous", "channels_last"]


def pairs(*, own=True, cases=CASES, first=False):
    """Every run of each operator, with those of the cases that it serves, or the first of them.

    Not the interpreted kernels, which take a second for a dozen programs: what they do not share with others
    is in test_conv2d.py.
    """
    found = []
    for op, layout in itertools.product(OPS, DENSE):
        for run in runs(op, own=own):
            if run.slow or (run.backend != "cpu" and layout == "contiguous"):
                continue
            served = [c for c in cases if c.op == op and c.serves(run, torch.float64, layout)]
            found += [(run, case, layout) for case in served[: 1 if first else None]]
    return pytest.mark.parametrize("run, case, layout", found, ids=str)


def tensors(case, layout="contiguous", dtype=torch.float64):
    def make(shape):
        return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)

    given = [make(shape) for shape in case.shapes().values()]
    return [LAYOUTS[layout](make, case.input), *given[1:]]


def ours(run, case):
    return lambda *t: case.call(case.function, t, **run.keywords)


def reference(case):
    return lambda *t: case.call(case.reference, t)


def assert_all_close(run, actual, expected, terms=500, dtype=torch.float64, **keywords):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.double(), dtype, terms, algorithm=run.algorithm, **keywords)


# Against finite differences.


@pairs()
def test_gradcheck(case, layout, run):
    given = [t.detach().requires_grad_() for t in tensors(case, layout)]
    assert torch.autograd.gradcheck(ours(run, case), given, fast_mode=run.stands_in)


@pairs()
def test_gradgradcheck(case, layout, run):
    given = [t.detach().requires_grad_() for t in tensors(case, layout)]
    assert torch.autograd.gradgradcheck(ours(run, case), given, fast_mode=True)


@pairs(cases=[*CASES[:3], *CASES[6:]])
def test_activations(case, layout, run):
    for activation in ACTIVATIONS[1:]:
        f = ours(run, case.replace(activation=activation))
        given = [t.detach().requires_grad_() for t in tensors(case, layout)]
        assert torch.autograd.gradcheck(f, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


@pairs()
def test_second_gradients_of_some(case, layout, run):
    """Where only some tensors need a gradient, the double backward meets gradients that do not exist."""
    given = tensors(case, layout)

    def second(f, leaves):
        first = torch.autograd.grad(f(*given).pow(3).sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for needed in ((0,), (1,), (2,), (0, 1)):
        for index, tensor in enumerate(given):
            tensor.requires_grad_(index in needed)
        leaves = [t for t in given if t.requires_grad]
        for actual, expected in zip(second(ours(run, case), leaves), second(reference(case), leaves)):
            assert_all_close(run, actual, expected)


# torch.func.


@pairs(own=False)
def test_func_grad(case, layout, run):
    """And its own gradient."""
    given = tensors(case, layout)
    each = tuple(range(len(given)))

    def gradients(f):
        def inner(*t):
            return sum(g.pow(2).sum() for g in grad(lambda *t: f(*t).pow(3).sum(), (0, 1))(*t))

        return *grad(lambda *t: f(*t).pow(3).sum(), each)(*given), *grad(inner, (0, 1))(*given)

    assert_all_close(run, gradients(ours(run, case)), gradients(reference(case)), 5000)


IN_DIMS = [
    (0, None, None, None),
    (3, None, None, 1),
    (None, 0, None, None),
    (None, 4, 0, 0),
    (1, 0, 1, None),
    (None, None, 0, None),
    (0, 2, None, 4),
]


def both(f, count):
    """Output and all gradients."""
    return lambda *t: (f(*t), *grad(lambda *t: f(*t).pow(2).sum(), tuple(range(count)))(*t))


@pairs(own=False)
def test_vmap(case, layout, run):
    """Mapped arguments against a loop: output and gradients."""
    for in_dims in IN_DIMS:
        given = tensors(case, layout)
        in_dims, count = in_dims[: len(given)], len(given)
        if all(d is None for d in in_dims):
            continue
        mapped = [
            t if d is None else torch.stack([t, 2 * t, t.cos()]).movedim(0, d) for t, d in zip(given, in_dims)
        ]
        actual = vmap(both(ours(run, case), count), in_dims)(*mapped)
        for i in range(3):
            one = [t if d is None else t.select(d, i) for t, d in zip(mapped, in_dims)]
            assert_all_close(run, [a[i] for a in actual], both(reference(case), count)(*one), 5000)


@pytest.mark.parametrize(
    "case, in_dims",
    [
        (case, in_dims[: len(case.shapes())])
        for case in (CASES[0], CASES[3])
        for in_dims in IN_DIMS
        if any(d is not None for d in in_dims[: len(case.shapes())])
    ],
    ids=str,
)
def test_vmap_in_a_loop(case, in_dims, monkeypatch):
    """Where an algorithm does not serve what maps fold into."""
    run = runs(case.op, own=True)[0]
    given = tensors(case)
    mapped = [t if d is None else torch.stack([t, t.cos()]).movedim(0, d) for t, d in zip(given, in_dims)]
    folded = vmap(both(ours(run, case), len(given)), in_dims)(*mapped)

    def why_not(backend, algorithm, input, weight, *_):
        return None if (input.shape, weight.shape) == (case.input, case.weight) else "not folded"

    for module in (conv2d, conv_transpose2d):
        monkeypatch.setattr(module, "why_not" if module is conv2d else "_why_not", why_not)
    looped = vmap(both(ours(run, case), len(given)), in_dims)(*mapped)
    assert_all_close(run, looped, folded)


# torch.compile, and the dispatcher.


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()


def output_and_gradients(f, given):
    leaves = [t.detach().requires_grad_() for t in given]
    output = f(*leaves)
    return output, *torch.autograd.grad(output.sin().sum(), leaves)


@pairs(own=False, cases=[CASES[0].replace(activation="silu"), *CASES[1:]], first=True)
def test_compile(case, layout, run, fresh_compiler):
    given = tensors(case, layout)
    compiled = torch.compile(ours(run, case), fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(reference(case), given)
    assert_all_close(run, output_and_gradients(compiled, given), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_compile_makes_the_choice(case, fresh_compiler):
    """For any size, of one graph."""
    run = runs(case.op, own=True)[0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = functools.partial(case.call, case.function)
    compiled = torch.compile(lambda *t: f(t), fullgraph=True, dynamic=True, backend=counter)
    for batch, *size in ((5, 15, 17), (7, 21, 25)):  # none that another tensor has too
        sized = case.replace(input=(batch, case.input[1], *size))
        given = tensors(sized)
        expected = output_and_gradients(reference(sized), given)
        assert_all_close(run, output_and_gradients(compiled, given), expected)
    assert counter.frame_count == 1


SLOW = Convolution((1, 1, 2, 2), 1, (2, 1))
SAMPLES = [
    *((layout, 2) for layout in (*DENSE, "channels_last_channel_slice", "stepped")),
    ("contiguous", 0),
]


def samples():
    """Of each operator one case and one algorithm of each backend, as the input may lie and with no image."""
    found = [(run, SLOW, SAMPLES[1]) for run in runs("conv2d", own=True) if run.slow][:1]
    for case in (
        CASES[0].replace(activation="gelu"),
        CASES[3],
        CASES[6].replace(activation="silu"),
        CASES[8],
    ):
        compiled = [run for run in runs(case.op, own=True) if not run.slow]
        for run, sample in itertools.product(of_each_backend(compiled), SAMPLES):
            if case.serves(run, torch.float64, sample[0]):
                found.append((run, case, sample))
    return pytest.mark.parametrize("run, case, sample", found, ids=str)


@samples()
def test_opcheck(case, sample, run):
    layout, batch = sample
    case = case.replace(input=(batch, *case.input[1:]))
    input, weight, *rest = (t.detach().requires_grad_() for t in tensors(case, layout))
    operator = run.operator(case.op)
    arguments = case.operands((input, weight, *rest), run.algorithm)
    torch.library.opcheck(operator, arguments)
    if case.op != "conv2d":  # the others' gradients are made of operators that are checked already
        return
    grad_output = operator(*arguments).detach().requires_grad_()
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        arguments = (grad_output, input, weight, *case.geometry, run.algorithm, *need)
        torch.library.opcheck(run.operator(f"{case.op}_backward"), arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
def test_opcheck_of_packing():
    weight = torch.randn(6, 2, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.fastconv.conv2d_pack_weight.default, (weight, 2, "plain"))
    geometry = ((2, 1), (1, 0), (1, 2), 2)
    torch.library.opcheck(
        torch.ops.fastconv.conv_transpose2d_pack_weight.default, (weight, *geometry, "plain")
    )


# Autocast, FLOPs.


@pairs(own=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, layout, run, dtype):
    """The output has the type that torch.nn.functional.conv2d gives, the gradients those of the tensors."""
    given = tensors(case, layout, torch.float32)
    leaves = [t.requires_grad_() for t in given]
    with torch.autocast(DEVICE, dtype=dtype):
        output = ours(run, case)(*leaves)
    assert output.dtype == dtype
    grads = torch.autograd.grad(output.sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in given]
    expected = reference(case)(*rounded)
    wanted = torch.autograd.grad(expected.sum(), rounded)
    for a, e in zip((output, *grads), (expected, *wanted), strict=True):
        assert_close(a.to(dtype), e, dtype, 200, summed_in=dtype)


@pairs(cases=[case.replace(bias=False, residual=False) for case in CASES])
def test_flops_are_those_of_pytorchs_convolution(case, layout, run):
    def theirs(input, *arguments, activation=None, residual=None):
        if case.op == "shift_conv2d":
            arguments = arguments[1:]
        transposed = case.op == "conv_transpose2d"
        convolve = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
        return convolve(input, *arguments)

    def flops(f):
        input, weight = tensors(case, layout, torch.float32)
        with FlopCounterMode(display=False) as forward:
            output = f((input.requires_grad_(), weight))
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    actual = flops(functools.partial(case.call, case.function, **run.keywords))
    assert actual == flops(functools.partial(case.call, theirs))
    assert actual[0] == actual[1] > 0


# Weights in channels_last: filters, channels, height, width; around a vector of 16 or 8 lanes.
WEIGHTS = [
    (2, 1, 3, 3),
    (1, 2, 3, 3),
    (3, 15, 3, 3),
    (17, 16, 3, 3),
    (5, 17, 3, 3),
    (16, 33, 1, 2),
    (4, 8, 5, 5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "emulator"])
def test_a_weight_in_channels_last_gives_the_same_bits(backend, shape, dtype):
    if DEVICE == "cuda":
        pytest.skip("of kernels that run on CPU tensors")
    algorithms = ["direct"] if backend == "emulator" else ["direct", "plain"]
    if backend == "cpu" and shape[2:] == (3, 3):
        algorithms += ["winograd_f2", "winograd_f4"]
    input = torch.randn(2, shape[1], 6, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape, dtype=dtype, requires_grad=True)
    other = weight.detach().contiguous(memory_format=torch.channels_last).clone().requires_grad_()
    for algorithm in algorithms:
        results = []
        for w in (weight, other):
            output = conv2d.conv2d(input, w, padding=1, backend=backend, algorithm=algorithm)
            grads = torch.autograd.grad(output, (input, w), torch.ones_like(output))
            assert grads[1].stride() == w.stride() or grads[1].is_contiguous() and w.is_contiguous()
            results.append((output, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_transposed_convolution_whose_pixels_no_input_reaches():
    """The padding cuts off all that the input gives; output_padding adds pixels of nothing."""
    input, weight = (torch.randn(1, 1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    arguments = {"stride": 1, "dilation": 6, "padding": 2, "output_padding": 5}
    output = conv_transpose2d.conv_transpose2d(input, weight, backend=DEVICE, **arguments)
    assert output.shape == (1, 1, 2, 2) and not output.any()
    assert not any(g.any() for g in torch.autograd.grad(output.sum(), (input, weight)))


# What PyTorch's own convolution returns is finished in place only where nobody else looks at it.

ATEN = {"stride": 1, "padding": 1, "backend": "aten"}


def small():
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, 4, 5), (3, 3, 3, 3), (2, 3, 4, 5)
    input, weight, residual = (torch.randn(s, generator=generator).to(DEVICE) for s in shapes)
    return input, weight, residual, torch.nn.functional.conv2d(input, weight, padding=1)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_residual_of_another_type(activation):
    input, weight, residual, sums = small()
    both_of_it = TwoTensor(residual, 2 * residual)
    output = conv2d.conv2d(input, weight, **ATEN, residual=both_of_it, activation=activation)
    act = getattr(torch.nn.functional, activation) if activation else lambda x: x
    torch.testing.assert_close(output.a, act(sums + residual))
    torch.testing.assert_close(output.b, act(sums + 2 * residual))


def test_selective_checkpoint():
    input, weight, residual, _ = small()
    leaf = input.requires_grad_()
    sums = torch.nn.functional.conv2d(leaf, weight, padding=1)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])

    def block(x):
        return conv2d.conv2d(x, weight, **ATEN, residual=residual, activation="relu")

    output = checkpoint(block, leaf, use_reentrant=False, context_fn=contexts)
    (actual,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(actual, torch.autograd.grad((sums + residual).relu().sum(), leaf)[0])


@pytest.mark.parametrize("base", [TorchDispatchMode, TorchFunctionMode])
def test_mode_that_keeps_results(base):
    class Keeps(base):
        def _run(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                kept.append((result, result.clone()))
            return result

        __torch_dispatch__ = __torch_function__ = _run

    input, weight, residual, _ = small()
    kept = []
    with Keeps():
        conv2d.conv2d(input, weight, **ATEN, residual=residual, activation="relu")
    assert kept and all(torch.equal(result, copy) for result, copy in kept)

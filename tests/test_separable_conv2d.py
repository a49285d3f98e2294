"""separable_conv2d: what it does not share with others; its arithmetic is in test_conv2d_folded.py."""

from __future__ import annotations

import functools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, of_each_backend, runs
from convolutions import Separable, cached_problem, check, check_not_finite, each, leaves_of, problem
from folded import SEPARABLE
from tolerances import assert_close
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import conv2d, depthwise_conv2d, separable_conv2d, separable_conv2d_reference
from fastconv.ops import _packed_weights
from fastconv.ops import separable_conv2d as module
from fastconv.ops._activation import ACTIVATIONS

OP = "separable_conv2d"
DENSE = ["contiguous", "channels_last"]
own = runs(OP, own=True)
compiled = [run for run in own if not run.stands_in]
GEOMETRY, MIXED, SMALL = SEPARABLE.geometry, SEPARABLE.mixed, SEPARABLE.small


@pytest.mark.parametrize("case", [*GEOMETRY, *MIXED], ids=str)
def test_reference_is_pytorchs_convolutions(case):
    given = cached_problem(case, torch.float64)
    tensors = {name: given.tensors.get(name) for name in case.names}
    functional = torch.nn.functional

    def act(x, name):
        return x if name is None else getattr(functional, name.removesuffix("_tanh"))(
            x, **({"approximate": "tanh"} if name.endswith("_tanh") else {})
        )  # fmt: skip

    stride, (top, bottom, left, right), dilation, _ = case.geometry
    padded = functional.pad(tensors["input"], (left, right, top, bottom))
    middle = functional.conv2d(
        *(padded, tensors["depthwise_weight"], tensors["depthwise_bias"], stride, 0, dilation),
        groups=case.input[1],
    )
    output = functional.conv2d(
        act(middle, case.mid_activation), tensors["pointwise_weight"], tensors["pointwise_bias"]
    )
    output = output if tensors["residual"] is None else output + tensors["residual"]
    assert_close(act(output, case.activation), given.expected["output"], torch.float64, 1000)


# Every kernel.


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("case", SEPARABLE.large, ids=str)
def test_strips_are_the_two_operators(case, layout):
    """Bit for bit: the kernels are those of depthwise_conv2d and conv2d, over the same sums.

    Not the last activation, of which a run's last values are not computed in vectors.
    """
    case = case.replace(activation=None)
    given = cached_problem(case, torch.float32, layout)
    x, dw, pw, db, pb, residual = given.tensors.values()
    keywords = {"backend": "cpu", "activation": case.mid_activation, "algorithm": "vectorized"}
    middle = depthwise_conv2d(x, dw, db, case.stride, case.padding, **keywords)
    expected = conv2d(middle, pw, pb, residual=residual, backend="cpu", algorithm="direct")
    actual = case.call(separable_conv2d, given.tensors.values(), backend="cpu", algorithm="strips")
    assert torch.equal(actual, expected)


@each(own, case=(MIXED, SMALL[:1]), layout=(DENSE, DENSE[1:]), value=([math.nan, -math.inf], [math.nan]))
def test_nan_and_infinity_propagate(case, value, layout, run):
    """To the outputs that read the pixel, and to no other."""
    case = case.replace(mid_activation=None, input=(2, *case.input[1:2], 9, 9))
    given = problem(case, torch.float32, layout)
    given.tensors["input"][0, :, 1, 1] = value
    tensors = [given.tensors.get(name) for name in case.names]
    expected = case.call(case.reference, [t.double() for t in tensors])
    check_not_finite(run, case, case.call(separable_conv2d, tensors, **run.keywords), expected)


@pytest.mark.parametrize("run", own, ids=str)
def test_any_shape(run):
    size = st.integers(1, 5 if run.slow else 20)
    channels = st.integers(1, 5 if run.slow else 40)
    two, three = st.integers(1, 2), st.integers(1, 3)

    @hypothesis.settings(max_examples=5 if run.slow else 15 if run.stands_in else 60)
    @hypothesis.given(
        st.tuples(st.integers(0, 2), channels, size, size),
        st.integers(1, 5 if run.slow else 70),
        *(st.tuples(three, three), st.tuples(three, three), st.tuples(two, two)),
        st.tuples(st.integers(0, 3), st.integers(0, 3)),
        st.integers(1, 2),
        st.sampled_from(ACTIVATIONS),
        st.sampled_from(list(LAYOUTS)),
        st.sampled_from([torch.float64, torch.float32]),
    )
    def property(shape, filters, kernel, stride, dilation, padding, multiplier, mid, layout, dtype):
        spans = (d * (k - 1) + 1 for d, k in zip(dilation, kernel))
        hypothesis.assume(all(n + 2 * p >= s for n, p, s in zip(shape[2:], padding, spans)))
        case = Separable(
            *(shape, filters, kernel, stride, padding, dilation),
            multiplier=multiplier, mid_activation=mid, residual=False,
        )  # fmt: skip
        given = problem(case, dtype, layout)
        actual = case.call(separable_conv2d, list(given.tensors.values()), **run.keywords)
        expected = given.expected["output"]
        scale = max(math.sqrt(case.terms["output"]), expected.abs().max().item() if actual.numel() else 0.0)
        assert_close(actual, expected, dtype, case.terms["output"], scale)

    property()


# Differentiated, mapped, compiled.

TINY = Separable((2, 3, 5, 4), 4, (3, 2), (2, 1), (1, 2), (1, 2), multiplier=2, activation="silu")
fast = [run for run in own if not run.slow]


def tensors_of(case, layout="contiguous", dtype=torch.float64):
    def make(shape):
        return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)

    given = [make(shape) for shape in case.shapes().values()]
    return [LAYOUTS[layout](make, case.input), *given[1:]]


def ours(run, case):
    return lambda *t: case.call(separable_conv2d, t, **run.keywords)


def reference(case):
    return lambda *t: case.call(separable_conv2d_reference, t)


def assert_all_close(actual, expected, terms=5000):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64, terms)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("mid_activation", ACTIVATIONS)
@pytest.mark.parametrize("run", fast, ids=str)
def test_gradcheck(run, mid_activation, layout):
    case = TINY.replace(mid_activation=mid_activation)
    leaves = [t.requires_grad_() for t in tensors_of(case, layout)]
    assert torch.autograd.gradcheck(ours(run, case), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(run, case), leaves, fast_mode=True)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("run", fast, ids=str)
def test_second_gradients_of_some(run, needed):
    given = tensors_of(TINY)
    leaves = [given[i].requires_grad_() for i in needed]

    def second(f):
        first = torch.autograd.grad(f(*given).pow(3).sum(), leaves, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    assert_all_close(second(ours(run, TINY)), second(reference(TINY)))


@pytest.mark.parametrize("run", fast, ids=str)
def test_func_grad(run):
    given = tensors_of(TINY)

    def gradients(f):
        def inner(*t):
            return sum(g.pow(2).sum() for g in grad(lambda *t: f(*t).pow(3).sum(), (0, 1, 2))(*t))

        return *grad(lambda *t: f(*t).pow(3).sum(), tuple(range(6)))(*given), *grad(inner, (0, 2))(*given)

    assert_all_close(gradients(ours(run, TINY)), gradients(reference(TINY)), 50000)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None, None, None), (1, None, None, None, None, 2), (None, 0, 2, 0, 1, None)]
)
@pytest.mark.parametrize("run", fast, ids=str)
def test_vmap(run, in_dims, residual):
    """Mapped arguments against a loop: output and gradients."""
    case = TINY.replace(residual=residual)
    given = tensors_of(case)
    in_dims = in_dims[: len(given)]
    mapped = [
        t if d is None else torch.stack([t, 2 * t, t.cos()]).movedim(0, d) for t, d in zip(given, in_dims)
    ]

    def both(f):
        return lambda *t: (f(*t), *grad(lambda *t: f(*t).pow(2).sum(), tuple(range(len(t))))(*t))

    actual = vmap(both(ours(run, case)), in_dims)(*mapped)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(mapped, in_dims)]
        assert_all_close([a[i] for a in actual], both(reference(case))(*one))


def output_and_gradients(f, given):
    leaves = [t.detach().requires_grad_() for t in given]
    output = f(*leaves)
    return output, *torch.autograd.grad(output.sin().sum(), leaves)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("run", [*of_each_backend(fast), None], ids=str)
def test_compile(run, layout):
    """A named backend, and the choice."""
    torch._dynamo.reset()
    given = tensors_of(TINY, layout)
    f = functools.partial(TINY.call, separable_conv2d, **(run.keywords if run else {}))
    compiled = torch.compile(lambda *t: f(t), fullgraph=True, backend="aot_eager")
    assert_all_close(output_and_gradients(compiled, given), output_and_gradients(reference(TINY), given))
    with torch.no_grad():
        assert_all_close([compiled(*given)], [reference(TINY)(*given)])


@pytest.mark.parametrize(
    "layout, batch", [*((layout, 2) for layout in (*DENSE, "stepped", "channel_slice")), ("contiguous", 0)]
)
@pytest.mark.parametrize("run", of_each_backend(fast), ids=str)
def test_opcheck(run, layout, batch):
    case = TINY.replace(input=(batch, *TINY.input[1:]))
    leaves = [t.detach().requires_grad_() for t in tensors_of(case, layout)]
    torch.library.opcheck(run.operator(OP), case.operands(leaves, run.algorithm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("run", [*of_each_backend(fast), None], ids=str)
def test_autocast(run, dtype):
    given = [t.requires_grad_() for t in tensors_of(TINY, dtype=torch.float32)]
    with torch.autocast(DEVICE, dtype=dtype):
        output = TINY.call(separable_conv2d, given, **(run.keywords if run else {}))
    grads = torch.autograd.grad(output.sum(), given)
    assert output.dtype == dtype and all(g.dtype == torch.float32 for g in grads)
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in given]
    expected = reference(TINY)(*rounded)
    wanted = torch.autograd.grad(expected.sum(), rounded)
    for a, e in zip((output, *grads), (expected, *wanted), strict=True):
        assert_close(a.to(dtype), e, dtype, 200, summed_in=dtype)


@pytest.mark.parametrize("run", fast, ids=str)
def test_flops_are_those_of_the_two_convolutions(run):
    case = TINY.replace(residual=False, bias=False)
    given = tensors_of(case)
    with FlopCounterMode(display=False) as counter:
        output = case.call(separable_conv2d, given, **run.keywords)
    taps, middles = math.prod(case.kernel), case.middles
    places = output.shape[0] * output.shape[2] * output.shape[3]
    assert counter.get_total_flops() == 2 * places * middles * (taps + case.filters)


# The choice, and weights that are kept.


def problem_of_choice(layout="channels_last", channels=64, size=14, **options):
    x = LAYOUTS[layout](functools.partial(torch.randn, **options), (2, channels, size, size))
    dw, pw = torch.randn(channels, 1, 3, 3, **options), torch.randn(channels, channels, 1, 1, **options)
    return x, dw, pw


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
def test_the_choice(monkeypatch):
    """One pass where that is faster and nothing needs a gradient; else two operators, the same bits."""
    calls = []
    for name in ("depthwise_conv2d", "conv2d"):
        operator = getattr(getattr(module, name), name)
        spy = functools.partial(lambda f, *a, **k: (calls.append(f.__name__), f(*a, **k))[1], operator)
        monkeypatch.setattr(getattr(module, name), name, spy)
    tensors = problem_of_choice()
    fused = separable_conv2d(*tensors, padding=1)
    assert calls == []
    weights = [t.requires_grad_() for t in tensors[1:]]
    two = separable_conv2d(tensors[0], *weights, padding=1)
    assert calls == ["depthwise_conv2d", "conv2d"] and two.requires_grad
    torch.testing.assert_close(fused, two)
    with torch.no_grad():
        separable_conv2d(tensors[0], *weights, padding=1)
    assert len(calls) == 2
    with fastconv.use_backend("cpu"):
        separable_conv2d(tensors[0], *weights, padding=1)
    assert len(calls) == 2
    separable_conv2d(*problem_of_choice("contiguous", dtype=torch.bfloat16), padding=1)
    assert len(calls) == 4


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
@pytest.mark.parametrize("algorithm", ["strips", "plain"])
def test_packed_weights(algorithm):
    """Packed once or in each call: the same bits; kept from call to call."""
    case = MIXED[1]
    tensors, *_ = cached_problem(case, torch.float32)
    product = module.PRODUCTS[algorithm]
    packed = torch.ops.fastconv.conv2d_pack_weight(tensors["pointwise_weight"], 1, product)
    operands = list(case.operands([tensors.get(name) for name in case.names], algorithm))

    def convolve(packed):
        operands[6] = packed
        return torch.ops.fastconv.separable_conv2d(*operands)

    assert torch.equal(convolve(packed), convolve(None))
    with pytest.raises(RuntimeError, match="packed must"):
        convolve(packed[:-1])
    fastconv.clear_packed_weights()
    case.call(separable_conv2d, list(tensors.values()), backend="cpu", algorithm=algorithm)
    assert len(_packed_weights._kept) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="of C++ kernels")
def test_several_images_in_a_strip():
    """A strip goes on through the batch; the last is shorter."""
    case = Separable((37, 20, 7, 5), 24, padding=1)
    for run in compiled:
        for layout in DENSE:
            check(run, case, cached_problem(case, torch.float32, layout))


# Bad input: each error names the argument, what it was, and what is allowed.

IMAGE, TAPS, WEIGHT = torch.zeros(1, 2, 4, 5), torch.zeros(2, 1, 3, 3), torch.zeros(3, 2, 1, 1)
BAD = {
    "input of rank 3": ({"input": IMAGE[0]}, ValueError, "input", "4 dimensions"),
    "no channel": ({"input": IMAGE[:, :0]}, ValueError, "input must have at least one channel"),
    "a dense depthwise weight": (
        {"depthwise_weight": torch.zeros(2, 2, 3, 3)},
        ValueError,
        "depthwise_weight must have shape (m * 2, 1, KH, KW)",
        "(2, 2, 3, 3)",
    ),
    "no multiple of the channels": ({"depthwise_weight": torch.zeros(3, 1, 3, 3)}, ValueError, "(m * 2,"),
    "no taps": ({"depthwise_weight": torch.zeros(2, 1, 0, 3)}, ValueError, "at least one tap"),
    "depthwise weight of another type": (
        {"depthwise_weight": TAPS.double()},
        TypeError,
        "depthwise_weight",
        "float64",
    ),
    "pointwise weight of another type": (
        {"pointwise_weight": WEIGHT.double()},
        TypeError,
        "pointwise_weight",
        "float64",
    ),
    "a pointwise weight with taps": (
        {"pointwise_weight": torch.zeros(3, 2, 3, 3)},
        ValueError,
        "pointwise_weight must have shape (M, 2, 1, 1)",
        "(3, 2, 3, 3)",
    ),
    "no filter": ({"pointwise_weight": torch.zeros(0, 2, 1, 1)}, ValueError, "pointwise_weight", "(0, 2,"),
    "a depthwise bias of another size": (
        {"depthwise_bias": torch.zeros(3)},
        ValueError,
        "depthwise_bias must have shape (2,), got (3,)",
    ),
    "a pointwise bias of another size": (
        {"pointwise_bias": torch.zeros(2)},
        ValueError,
        "pointwise_bias must have shape (3,), got (2,)",
    ),
    "a residual of another size": (
        {"residual": torch.zeros(1, 3, 4, 5)},
        ValueError,
        "residual must have the output's shape (1, 3, 2, 3), got (1, 3, 4, 5)",
    ),
    "no stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "padding below 0": ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "a window larger than the image": ({"dilation": 3}, ValueError, "weight spans 7 pixels of height"),
    "an unknown mid_activation": ({"mid_activation": "tanh"}, ValueError, "mid_activation", "'tanh'"),
    "an unknown activation": ({"activation": "tanh"}, ValueError, "activation", "'tanh'"),
    "an unknown backend": ({"backend": "fft"}, ValueError, "backend", "'fft'"),
    "an unknown algorithm": ({"backend": "reference", "algorithm": "fft"}, fastconv.BackendError, "'fft'"),
    "an algorithm that none has": ({"algorithm": "fft"}, fastconv.BackendError, "'fft'"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arguments(case):
    changed, error, *words = case
    arguments = {"input": IMAGE, "depthwise_weight": TAPS, "pointwise_weight": WEIGHT, **changed}
    with pytest.raises(error) as raised:
        separable_conv2d(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    "place, change, words",
    [
        (0, lambda t: t[0], "input must have"),
        (1, lambda t: t.expand(-1, 2, -1, -1), "depthwise_weight must have"),
        (2, lambda t: t[:, :1], "pointwise_weight must have"),
        (2, lambda t: t.double(), "pointwise_weight"),
        (3, lambda t: t[:1], "depthwise_bias must have"),
        (5, lambda t: t[..., :1], "residual must have"),
        (7, lambda _: (1, 0), "stride must be at least 1, got"),
        (8, lambda _: (1, 1), "padding must have 4 values, got"),
        (10, lambda _: "tanh", "activation must be"),
    ],
)
@pytest.mark.parametrize("run", of_each_backend(own), ids=str)
def test_operator_refuses(run, place, change, words):
    """What the public function's checks rule out."""
    operands = list(TINY.operands(tensors_of(TINY, dtype=torch.float32), run.algorithm))
    operands[place] = change(operands[place])
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
        run.operator(OP)(*operands)


def test_gradients_leave_the_input_alone():
    """In place activations must not write what is saved."""
    given = problem(MIXED[0], torch.float32)
    leaves = leaves_of(MIXED[0], given)
    before = [t.detach().clone() for t in leaves]
    output = MIXED[0].call(separable_conv2d, leaves)
    output.backward(given.grad_output)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, leaves))

"""Depthwise convolution, differentiated: gradcheck, torch.func, checkpoint, autocast, FLOPs."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import DEVICE, for_runs, runs
from tolerances import assert_close
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastconv import depthwise_conv2d, depthwise_conv2d_reference
from fastconv.ops._activation import ACTIVATIONS

OP = "depthwise_conv2d"
own = runs(OP, own=True)
# What all overloads share is not repeated on interpreted kernels.
each_fast_run = for_runs([run for run in runs(OP) if not run.slow])
each_fast_own_run = for_runs([run for run in own if not run.slow])

# Everything unequal; the multiplier is 2.
GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
SHAPES = ((2, 3, 5, 6), (6, 1, 3, 2), (6,))


def tensors(dtype=torch.float64, shapes=SHAPES, requires_grad=False):
    given = (torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes)
    return [t.to(dtype).requires_grad_(requires_grad) for t in given]


def function(run, **changes):
    return functools.partial(depthwise_conv2d, **{**GEOMETRY, **run.keywords, **changes})


def reference(**changes):
    return functools.partial(depthwise_conv2d_reference, **{**GEOMETRY, **changes})


def assert_all_close(actual, expected, terms=200):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, torch.float64, terms)


# The kernels' gradients against finite differences.

SMALL = ((1, 2, 3, 4), (4, 1, 3, 2), (4,))


def small(run):
    return ((1, 1, 3, 2), (2, 1, 3, 2), (2,)) if run.slow else SMALL


@for_runs(own, activation=(ACTIVATIONS, [None, "silu"]), bias=([True, False], [True]))
def test_gradcheck(activation, bias, run):
    given = tensors(shapes=small(run)[: 2 + bias], requires_grad=True)
    f = function(run, activation=activation)
    assert torch.autograd.gradcheck(f, given, fast_mode=run.stands_in)


@for_runs(own, activation=(ACTIVATIONS, [None]))
def test_gradgradcheck(activation, run):
    given = tensors(shapes=small(run), requires_grad=True)
    f = function(run, activation=activation)
    assert torch.autograd.gradgradcheck(f, given, fast_mode=run.stands_in or activation is not None)


@for_runs(own, multiplier=([1, 3], []))
def test_gradgradcheck_channels_last(multiplier, run):
    input, weight = tensors(shapes=((1, 2, 4, 3), (2 * multiplier, 1, 2, 3)))
    input = input.contiguous(memory_format=torch.channels_last)
    given = [input.requires_grad_(), weight.requires_grad_()]
    f = functools.partial(depthwise_conv2d, padding=1, **run.keywords)
    assert torch.autograd.gradcheck(f, given, fast_mode=run.stands_in)
    assert torch.autograd.gradgradcheck(f, given, fast_mode=run.stands_in)


@each_fast_own_run
@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_second_gradients_of_some(needed, run):
    """Where only some tensors need a gradient, the double backward meets gradients that do not exist."""
    given = tensors(shapes=SMALL)
    for tensor, need in zip(given, needed):
        tensor.requires_grad_(bool(need))
    leaves = [t for t in given if t.requires_grad]

    def second(f):
        first = torch.autograd.grad(f(*given).pow(3).sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    for actual, expected in zip(
        second(function(run, activation="silu")), second(reference(activation="silu"))
    ):
        assert_all_close(actual, expected)


# torch.func.


@for_runs(runs(OP), activation=([None, "relu6", "gelu"], ["gelu"]))
def test_func_grad(activation, run):
    given = tensors()

    def gradients(f):
        return grad(lambda *t: f(*t).pow(3).sum(), argnums=(0, 1, 2))(*given)

    assert_all_close(
        gradients(function(run, activation=activation)), gradients(reference(activation=activation))
    )


@each_fast_run
@pytest.mark.parametrize("activation", [None, "silu"])
def test_func_grad_of_grad(activation, run):
    given = tensors()

    def second(f):
        def inner(*t):
            return sum(g.pow(2).sum() for g in grad(lambda *t: f(*t).pow(3).sum(), argnums=(0, 1))(*t))

        return grad(inner, argnums=(0, 1, 2))(*given)

    actual, expected = (
        second(f(activation=activation)) for f in (functools.partial(function, run), reference)
    )
    assert_all_close(actual, expected, 2000)


@each_fast_own_run
def test_func_grad_of_the_operator(run):
    """The operator alone, as torch.compile calls it, under torch.func: gradients of each image."""
    input, weight, bias = tensors(shapes=((3, *SHAPES[0]), *SHAPES[1:]))

    def loss(x, w, b):
        geometry = ((2, 1), (1, 1, 2, 2), (1, 2))
        return run.operator(OP)(x, w, b, *geometry, "gelu", run.algorithm).pow(2).sum()

    actual = vmap(grad(loss, argnums=(0, 1)), (0, None, None))(input, weight, bias)
    expected = [
        grad(lambda x, w: reference(activation="gelu")(x, w, bias).pow(2).sum(), argnums=(0, 1))(x, weight)
        for x in input
    ]
    assert_all_close(actual, [torch.stack(g) for g in zip(*expected)])


@each_fast_run
def test_jacrev(run):
    given = tensors(shapes=SMALL)
    for argnum in range(3):
        actual = jacrev(function(run, activation="silu"), argnum)(*given)
        expected = jacrev(reference(activation="silu"), argnum)(*given)
        assert_close(actual, expected, torch.float64, 10)


IN_DIMS = [
    (input, weight, bias)
    for input in (None, 0, 3)
    for weight in (None, 0, 4)
    for bias in (None, 1, "absent")
    if (input, weight) != (None, None) or bias == 1
]


@each_fast_run
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims, run):
    """Each combination of mapped arguments against a loop: output and gradients."""
    count = 3
    shapes = [s if d is None else (*s[:d], count, *s[d:]) for s, d in zip(SHAPES, in_dims) if d != "absent"]
    in_dims = in_dims[: len(shapes)]
    given = tensors(shapes=shapes)
    argnums = tuple(range(len(given)))

    def both(f):
        def each(*t):
            return f(*t), *grad(lambda *t: f(*t).pow(2).sum(), argnums)(*t)

        return each

    mapped = vmap(both(function(run, activation="silu")), in_dims)(*given)
    for i in range(count):
        one = [t if d is None else t.select(d, i) for t, d in zip(given, in_dims)]
        assert_all_close([m[i] for m in mapped], both(reference(activation="silu"))(*one))


@each_fast_own_run
@pytest.mark.parametrize("out_dim", [0, 2, -1])
def test_vmap_puts_the_dimension_where_asked(out_dim, run):
    given = tensors(shapes=((4, *SHAPES[0]), *SHAPES[1:]))
    actual = vmap(function(run), (0, None, None), out_dim)(*given)
    expected = torch.stack([reference()(x, *given[1:]) for x in given[0]])
    assert_close(actual, expected.movedim(0, out_dim), torch.float64, 6)


@each_fast_own_run
def test_vmap_of_vmap(run):
    input, weight, bias = tensors(shapes=((2, *SHAPES[0]), (3, *SHAPES[1]), SHAPES[2]))
    f = function(run)
    actual = vmap(vmap(f, (None, 0, None)), (0, None, None))(input, weight, bias)
    expected = torch.stack([torch.stack([reference()(x, w, bias) for w in weight]) for x in input])
    assert_close(actual, expected, torch.float64, 6)


# Checkpoints, autocast, FLOPs.


@each_fast_run
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, run):
    given = tensors(requires_grad=True)
    f = function(run, activation="gelu_tanh")

    def checkpointed(*t):
        return checkpoint(lambda *t: f(*t).sin(), *t, use_reentrant=use_reentrant)

    checkpointed(*given).sum().backward()
    expected = torch.autograd.grad(reference(activation="gelu_tanh")(*given).sin().sum(), given)
    assert_all_close([t.grad for t in given], expected)


AUTOCAST = [
    (run, dtype)
    for run in runs(OP)
    for dtype in (torch.bfloat16, torch.float16)
    if run.serves(dtype) and not run.slow
]


@pytest.mark.parametrize("run, dtype", AUTOCAST, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize(
    "given",
    [(torch.float32,) * 3, (torch.float32, torch.float16, torch.float32), (torch.float64,) * 3],
    ids=["float32", "mixed", "float64"],
)
def test_autocast(given, backward_inside, run, dtype):
    """Output and gradients have the types that torch.nn.functional.conv2d gives, and the right values."""
    values = [t.to(d) for t, d in zip(tensors(), given)]

    def types_and_values(f):
        leaves = [t.clone().requires_grad_() for t in values]
        with torch.autocast(DEVICE, dtype=dtype):
            output = f(*leaves)
            if backward_inside:
                output.sum().backward()
        if not backward_inside:
            output.sum().backward()
        return [output, *(t.grad for t in leaves)]

    actual = types_and_values(function(run))
    theirs = types_and_values(
        lambda x, w, b: torch.nn.functional.conv2d(x, w, b, **GEOMETRY, groups=x.shape[1])
    )
    assert [t.dtype for t in actual] == [t.dtype for t in theirs]

    rounded = [t.to(dtype).double() if t.dtype != torch.float64 else t for t in values]
    leaves = [t.requires_grad_() for t in rounded]
    output = reference()(*leaves)
    expected = [output, *torch.autograd.grad(output.sum(), leaves)]
    computed_in = actual[0].dtype
    for a, e in zip(actual, expected):
        assert_close(a.to(computed_in), e, computed_in, 30, summed_in=computed_in)


@pytest.mark.parametrize(
    "run, dtype",
    [(run, dtype) for run, dtype in AUTOCAST if run.algorithm],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_autocast_of_the_operator(run, dtype):
    input, weight, bias = tensors(torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        output = run.operator(OP)(input, weight, bias, (1, 1), (1, 1, 1, 1), (1, 1), None, run.algorithm)
    assert output.dtype == dtype


@each_fast_own_run
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("needs_input", [True, False])
def test_flops_are_those_of_pytorchs_convolution(needs_input, stride, run):
    def flops(f):
        input, weight, _ = tensors(torch.float32)
        input.requires_grad_(needs_input)
        weight.requires_grad_(not needs_input)
        with FlopCounterMode(display=False) as forward:
            output = f(input, weight, stride=stride, padding=1)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    groups = SHAPES[0][1]
    forward, backward = flops(functools.partial(torch.nn.functional.conv2d, groups=groups))
    if not needs_input:
        backward //= groups  # PyTorch's count of a grouped weight's gradient forgets the groups
    assert flops(functools.partial(depthwise_conv2d, **run.keywords)) == (forward, backward)
    assert forward == backward > 0

"""conv_bn_act: every backend and algorithm that can run here against the unfused chain in float64."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DEVICE, LAYOUTS, for_runs, runs
from tolerances import assert_close
from torch.nn import functional as F

from fastconv.ops._activation import ACTIVATIONS
from fastconv.ops._arguments import DTYPES
from fastconv.ops.conv_bn_act import backward_operator, batch_norm_act, operator

DENSE = ["contiguous", "channels_last"]
EPS = 1e-3
all_runs, own = runs("conv_bn_act"), runs("conv_bn_act", own=True)
BACKENDS = list(dict.fromkeys(run.backend for run in all_runs))


def activated(x, activation):
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x if activation is None else getattr(F, activation)(x)


def sum_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(shape, dtype, layout="contiguous", residual=True, affine=True, mean=0.5, seed=0):
    """Image, residual, weight and bias of a normalisation, that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def image(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(2).to(DEVICE, dtype)

    channels, exact = shape[1], sum_type(dtype)
    found = [
        LAYOUTS[layout](lambda s: image(s) + mean, shape),
        LAYOUTS[layout](image, shape) if residual else None,
        torch.rand(channels, generator=generator).add_(0.5).to(DEVICE, exact) if affine else None,
        torch.randn(channels, generator=generator).to(DEVICE, exact) if affine else None,
    ]
    return [None if t is None else t.detach().requires_grad_() for t in found]


def expected_of(tensors, grad, activation):
    """Output, running mean and variance after a step of momentum 1, and gradients, in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    image, residual, weight, bias = exact
    running = torch.zeros(2, image.shape[1], dtype=torch.float64, device=image.device)
    normal = F.batch_norm(image, running[0], running[1], weight, bias, True, 1.0, EPS)
    output = activated(normal if residual is None else normal + residual, activation)
    leaves = [t for t in exact if t is not None]
    return output, *running, *torch.autograd.grad(output, leaves, grad.double())


def check_normalized(run, tensors, activation):
    image, residual, weight, bias = tensors
    grad = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, image.dtype)
    running = torch.zeros(2, image.shape[1], dtype=sum_type(image.dtype), device=DEVICE)
    output = batch_norm_act(
        image, running[0], running[1], weight, bias,
        momentum=1.0, eps=EPS, activation=activation, residual=residual, **run.keywords,
    )  # fmt: skip
    leaves = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(output, leaves, grad)
    names = [n for n, t in zip(("input", "residual", "weight", "bias"), tensors) if t is not None]
    names = ["output", "running_mean", "running_var", *(f"grad of {name}" for name in names)]
    count = image.numel() // image.shape[1]
    exact = expected_of(tensors, grad, activation)
    own_type = run in own
    for name, found, wanted in zip(names, (output, *running, *grads), exact):
        # PyTorch's own operators round images between the steps of the chain.
        terms = count if own_type else 16 * count
        summed_in = None if own_type else image.dtype
        scale = max(1.0, wanted.abs().max().item())  # of the terms, which may cancel
        assert_close(found, wanted, found.dtype, terms, scale, summed_in=summed_in, name=name)
    assert output.stride() == torch.empty_like(output).stride()


SHAPES = [
    (2, 3, 5, 7),
    (4, 24, 6, 6),
    (3, 58, 7, 5),
    (2, 16, 9, 9),
    (5, 1, 3, 3),
    (2, 130, 3, 1),
    (7, 33, 1, 1),
    (1, 64, 4, 4),
    (1, 1, 1, 2),
]


@for_runs(
    all_runs,
    dtype=(DTYPES, [torch.float32, torch.float16]),
    layout=(DENSE, DENSE),
    shape=(SHAPES, SHAPES[:3]),
    where=lambda run, dtype, **_: run.serves(dtype),
)
def test_shapes(run, dtype, layout, shape):
    check_normalized(run, operands(shape, dtype, layout), "relu")


@for_runs(
    all_runs,
    activation=(ACTIVATIONS, ACTIVATIONS),
    residual=([True, False], [True, False]),
    dtype=([torch.float64, torch.float32, torch.bfloat16], [torch.float32]),
    where=lambda run, dtype, **_: run.serves(dtype),
)
def test_activations(run, activation, residual, dtype):
    check_normalized(run, operands((2, 20, 3, 5), dtype, "channels_last", residual), activation)
    check_normalized(run, operands((2, 4, 5, 9), dtype, residual=residual, affine=False), activation)


@for_runs(own, layout=(list(LAYOUTS), ["channels_last_channel_slice", "transposed_pixels"]))
def test_layouts(run, layout):
    check_normalized(run, operands((3, 6, 4, 5), torch.float32, layout), "silu")


@for_runs(own, layout=(DENSE, DENSE))
def test_a_far_mean_does_not_cancel_the_variance(run, layout):
    tensors = operands((4, 20, 24, 24), torch.float32, layout, residual=False, mean=1000.0)
    expected = tensors[0].detach().double().var((0, 2, 3), correction=0)
    _, _, variance = operator(run.backend, *tensors, EPS, None, run.algorithm)
    assert ((variance.double() - expected).abs() < 1e-5 * expected).all()


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("channels", [24, 64, 6])
def test_images_beyond_the_caches(layout, channels):
    """They are stored past the caches."""
    run = next(run for run in all_runs if run.backend == ("cpu" if DEVICE == "cpu" else "cuda"))
    side = 304
    tensors = operands((2, channels, side, side), torch.float32, layout, residual=False)
    check_normalized(run, tensors, "relu6")


@pytest.mark.parametrize("run", own, ids=str)
def test_a_residual_alone_needs_a_gradient(run):
    image, residual, weight, bias = operands((2, 5, 4, 4), torch.float64)
    grad = torch.randn_like(image)
    for activation in ("relu", None):
        output = operator(
            run.backend,
            image.detach(),
            residual,
            weight.detach(),
            bias.detach(),
            EPS,
            activation,
            run.algorithm,
        )[0]
        (found,) = torch.autograd.grad(output, residual, grad)
        wanted = grad * (output > 0) if activation else grad
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("run", own, ids=str)
def test_nan_and_infinity_stay_in_their_channel(run):
    image, residual, weight, bias = (t.detach() for t in operands((2, 5, 3, 4), torch.float32))
    image[0, 1, 0, 0], image[1, 3, 2, 2], residual[0, 0, 0, 0] = float("nan"), float("inf"), float("nan")
    output, _, _ = operator(run.backend, image, residual, weight, bias, EPS, "relu", run.algorithm)
    finite = output.isfinite()
    assert not finite[:, [1, 3]].any() and finite[:, [2, 4]].all()
    assert output[0, 0, 0, 0].isnan() and finite[:, 0].sum() == finite[:, 0].numel() - 1


@pytest.mark.parametrize("run", own, ids=str)
def test_empty(run):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3)):
        image = torch.randn(shape, device=DEVICE).requires_grad_()
        numbers = torch.ones(shape[1], device=DEVICE, requires_grad=True)
        running = torch.ones(2, shape[1], device=DEVICE)
        output = batch_norm_act(
            image, *running, numbers, None, momentum=0.5, eps=EPS, activation="relu", residual=None,
            **run.keywords,
        )  # fmt: skip
        assert output.shape == shape and (running == 1).all()
        grads = torch.autograd.grad(output.sum(), (image, numbers))
        assert grads[0].shape == shape and (grads[1] == 0).all()


@for_runs([run for run in own if not run.stands_in], layout=(DENSE, DENSE))
def test_the_result_does_not_depend_on_the_threads(run, layout):
    if run.backend != "cpu":
        pytest.skip("threads are the CPU's")
    tensors = [t.detach() for t in operands((4, 48, 40, 40), torch.float32, layout)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, mean, variance = operator(run.backend, *tensors, EPS, "relu", run.algorithm)
            image, residual, weight, bias = tensors
            grads = backward_operator(
                run.backend, image, *tensors, mean, variance, EPS, "relu", run.algorithm, True
            )
            results.append((output, mean, variance, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@hypothesis.given(
    run=st.sampled_from([run for run in own if not run.slow] or own),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(list(LAYOUTS)),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    affine=st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_random(run, shape, layout, activation, dtype, residual, affine):
    hypothesis.assume(shape[0] * shape[2] * shape[3] > 2 and run.serves(dtype))
    hypothesis.assume(not layout.startswith("expanded"))  # a channel of equal values has no deviation
    check_normalized(run, operands(shape, dtype, layout, residual, affine), activation)


# Derivatives


@for_runs(
    own,
    layout=(DENSE, DENSE[1:]),
    activation=([None, "relu", "silu", "gelu", "gelu_tanh"], ["silu"]),
    residual=([True, False], [True]),
)
def test_gradcheck(run, layout, activation, residual):
    tensors = operands((2, 3, 2, 3), torch.float64, layout, residual)

    def call(*given):
        image, *rest = given
        own_residual = rest.pop(0) if residual else None
        return operator(run.backend, image, own_residual, *rest, EPS, activation, run.algorithm)[0]

    leaves = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=run.slow)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@for_runs(own, layout=([*DENSE, "channel_slice", "empty"], ["channels_last"]))
def test_opcheck(run, layout):
    shape = (0, 4, 3, 3) if layout == "empty" else (2, 4, 3, 3)
    tensors = operands(shape, torch.float32, "contiguous" if layout == "empty" else layout)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = run.operator("conv_bn_act_normalize")
    torch.library.opcheck(forward, (*tensors, EPS, "relu", run.algorithm), test_utils=tests)
    image, residual, weight, bias = (t.detach() for t in tensors)
    _, mean, variance = forward(image, residual, weight, bias, EPS, "relu", run.algorithm)
    arguments = (image, image, residual, weight, bias, mean, variance, EPS, "relu", run.algorithm, True)
    torch.library.opcheck(run.operator("conv_bn_act_normalize_backward"), arguments, test_utils=tests[::2])


def test_the_backward_operator_says_that_it_has_no_gradient():
    image, residual, weight, bias = operands((2, 3, 2, 2), torch.float64)
    _, mean, variance = operator(own[0].backend, image, residual, weight, bias, EPS, "relu", None)
    grads = backward_operator(
        own[0].backend, image, image, residual, weight, bias, mean, variance, EPS, "relu", None, True
    )
    with pytest.raises(NotImplementedError, match="conv_bn_act twice"):
        grads[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_gradient(dtype):
    """The image alone, where PyTorch's chain also keeps what the activation is computed from."""
    image, _, weight, bias = operands((2, 8, 16, 16), dtype, residual=False)

    def kept(call):
        pointers = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: pointers.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            call()
        return sum(pointers.values())

    numbers = 4 * 8 * 4  # weight, bias, mean, variance
    fused = kept(lambda: operator(own[0].backend, image, None, weight, bias, EPS, "silu", None))
    chain = kept(lambda: F.silu(F.batch_norm(image, None, None, weight, bias, True)))
    assert fused == image.nbytes + numbers
    assert chain >= 2 * image.nbytes

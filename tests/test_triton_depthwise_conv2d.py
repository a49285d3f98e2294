"""The launchers of the Triton kernels, one by one: interpreted on CPU tensors, compiled on CUDA tensors.

Interpreted, a program takes about a millisecond, so images are a few pixels large; along each axis some are
still larger than a tile, and some are smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE, LAYOUTS
from tolerances import assert_close

import fastconv
from fastconv.ops._activation import ACTIVATIONS, activate
from fastconv.ops._operator import memory_format_of

pytest.importorskip("triton", reason="triton is not installed")
from fastconv.kernels import depthwise_conv2d as triton_kernels  # noqa: E402

ALGORITHMS = ("tiled", "plain")
FORMATS = ("contiguous", "channels_last")
forward = triton_kernels.depthwise_conv2d_forward_triton
backward = triton_kernels.depthwise_conv2d_backward_triton


class Case(NamedTuple):
    """Every number differs from its neighbours, so that a swap of two shows."""

    shape: tuple[int, int, int, int] = (2, 3, 6, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation


CASES = {
    "3x3": Case(),
    "1x1": Case(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "1x1 stride 3": Case(kernel=(1, 1), padding=(0, 1, 2, 0), stride=(3, 2)),
    "5x2 stride 2x1": Case((1, 2, 9, 6), (5, 2), (2, 1), (2, 1, 0, 1)),
    "3x3 stride 1x2": Case(stride=(1, 2), padding=(0, 1, 1, 0)),
    "3x3 stride 2": Case((1, 2, 9, 8), stride=(2, 2), padding=(1, 0, 0, 1)),
    "3x3 stride 3, dilation 2": Case((1, 2, 11, 10), stride=(3, 3), padding=(3, 2, 1, 4), dilation=(2, 2)),
    "3x2 dilation 2x3": Case(kernel=(3, 2), padding=(2, 1, 0, 3), dilation=(2, 3)),
    "3x3 multiplier 2": Case(multiplier=2, stride=(2, 1), padding=(1, 2, 0, 1)),
    "5x5": Case((1, 2, 7, 6), (5, 5), padding=(2, 1, 3, 2)),
    "7x7": Case((1, 2, 6, 7), (7, 7), padding=(3, 3, 3, 3)),
    "9x8 stride 2x3": Case((1, 2, 9, 10), (9, 8), (2, 3), (3, 2, 3, 1)),
    "9x8 stride 2x1, dilation 2x1": Case((1, 1, 14, 7), (9, 8), (2, 1), (5, 3, 3, 2), (2, 1)),
    "wider than a block": Case((1, 1, 3, 150)),
    "higher than a strip": Case((1, 1, 21, 3), padding=(0, 1, 1, 1)),
    "more channels than a block": Case((1, 34, 2, 2), (1, 2), padding=(0, 0, 1, 0)),
    "one pixel": Case((2, 3, 1, 1)),
}


def tensors(
    case: Case, layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    filters = case.shape[1] * case.multiplier
    return {
        "input": LAYOUTS[layout](lambda shape: torch.randn(shape, device=DEVICE).to(dtype), case.shape),
        "weight": torch.randn(filters, 1, *case.kernel, device=DEVICE).to(dtype),
        "bias": torch.randn(filters, device=DEVICE).to(dtype),
    }


def reference(input, weight, bias, case: Case) -> torch.Tensor:
    top, bottom, left, right = case.padding
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    return fastconv.depthwise_conv2d_reference(padded, weight, bias, case.stride, 0, case.dilation)


def check_forward(
    case: Case, layout: str, algorithm: str | None, activation=None, dtype=torch.float32
) -> None:
    own = tensors(case, layout, dtype)
    exact = activate(reference(*(tensor.double() for tensor in own.values()), case), activation)
    output = forward(*own.values(), *case.geometry, activation, algorithm)
    assert_close(output, exact, dtype, case.kernel[0] * case.kernel[1])
    assert output.is_contiguous(memory_format=memory_format_of(own["input"]))


def check_backward(case: Case, layout: str, algorithm: str | None, dtype=torch.float32) -> None:
    own = tensors(case, layout, dtype)
    wide = [tensor.double().requires_grad_() for tensor in own.values()]
    output = reference(*wide, case)
    grad = torch.randn_like(output).to(dtype)
    grad = grad.contiguous(memory_format=memory_format_of(own["input"]))
    exact = torch.autograd.grad(output, wide, grad.double())
    need = (True, True, True)
    grads = backward(grad, own["input"], own["weight"], *case.geometry, algorithm, *need)
    taps = case.kernel[0] * case.kernel[1] * case.multiplier
    pixels = output.numel() // output.shape[1]
    for name, ours, theirs, terms in zip(own, grads, exact, (taps, pixels, pixels)):
        assert_close(ours, theirs, dtype, terms, name=f"grad_{name}")
    assert grads[0].is_contiguous(memory_format=memory_format_of(own["input"]))
    assert grads[1].is_contiguous()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case: Case, layout: str, algorithm: str) -> None:
    check_forward(case, layout, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backward(case: Case, layout: str, algorithm: str) -> None:
    check_backward(case, layout, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, algorithm: str) -> None:
    case = CASES["3x3 stride 2"]
    check_forward(case, "channels_last", algorithm, "silu", dtype)
    check_backward(case, "channels_last", algorithm, dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16(algorithm: str) -> None:
    case = CASES["3x3 stride 2"]
    check_forward(case, "channels_last", algorithm, "gelu", torch.bfloat16)
    check_backward(case, "channels_last", algorithm, torch.bfloat16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, algorithm: str) -> None:
    check_forward(Case((1, 2, 4, 5)), "contiguous", algorithm, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: str | None) -> None:
    input = torch.full((1, 1, 2, 2), torch.nan, device=DEVICE)
    output = forward(
        input, torch.ones(1, 1, 1, 1, device=DEVICE), None, (1, 1), (0,) * 4, (1, 1), activation, None
    )
    assert output.isnan().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in FORMATS])
def test_strided_inputs(layout: str, algorithm: str) -> None:
    case = Case((2, 3, 4, 5), padding=(1, 0, 0, 1))
    check_forward(case, layout, algorithm)
    check_backward(case, layout, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_strided_weight_bias_and_gradient(algorithm: str) -> None:
    case = Case((1, 2, 4, 5))
    own = tensors(case)
    weight = own["weight"].flip(2).transpose(2, 3)
    bias = torch.stack([own["bias"], own["bias"]], 1)[:, 0]
    output = forward(own["input"], weight, bias, *case.geometry, None, algorithm)
    expected = forward(own["input"], weight.contiguous(), bias.contiguous(), *case.geometry, None, algorithm)
    assert torch.equal(output, expected)
    for grad in (torch.randn((), device=DEVICE).expand(output.shape), torch.randn_like(output.mT).mT):
        arguments = (own["input"], weight, *case.geometry, algorithm, True, True, True)
        for ours, theirs in zip(backward(grad, *arguments), backward(grad.contiguous(), *arguments)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_needs(algorithm: str) -> None:
    """Each gradient alone is the gradient among all, and one not needed is empty."""
    case = Case((1, 2, 4, 5))
    own = tensors(case)
    grad = torch.randn(case.shape, device=DEVICE)
    arguments = (grad, own["input"], own["weight"], *case.geometry, algorithm)
    everything = backward(*arguments, True, True, True)
    for which in range(3):
        need = [index == which for index in range(3)]
        for index, (ours, theirs) in enumerate(zip(backward(*arguments, *need), everything)):
            if index == which:
                torch.testing.assert_close(ours, theirs)
            else:
                assert ours.shape == (0,)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(0, 3, 6, 7), (2, 0, 6, 7)], ids=["batch", "channels"])
def test_nothing(shape: tuple[int, int, int, int], algorithm: str) -> None:
    case = Case(shape)
    own = tensors(case)
    output = forward(*own.values(), *case.geometry, None, algorithm)
    assert output.shape == shape
    grads = backward(output, own["input"], own["weight"], *case.geometry, algorithm, True, True, True)
    for tensor, grad in zip(own.values(), grads):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_slices_are_added_in_a_fixed_order(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits twice, and the same sums however many slices there are."""
    monkeypatch.setattr(triton_kernels, "PLAIN_BLOCK", 16)
    case = Case((3, 1, 9, 5))
    own = tensors(case)
    grad = torch.randn(case.shape, device=DEVICE)
    arguments = (grad, own["input"], own["weight"], *case.geometry, algorithm, False, True, True)
    first, second = backward(*arguments), backward(*arguments)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    monkeypatch.setattr(triton_kernels, "GRAD_WEIGHT_PROGRAMS", 1)
    for few, many in zip(backward(*arguments)[1:], first[1:]):
        torch.testing.assert_close(few, many)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradcheck_through_the_public_function(algorithm: str) -> None:
    def convolve(input, weight, bias):
        return fastconv.depthwise_conv2d(
            input,
            weight,
            bias,
            stride=2,
            padding=1,
            activation="gelu_tanh",
            backend="triton",
            algorithm=algorithm,
        )

    arguments = [(1, 1, 3, 2), (1, 1, 2, 2), (1,)]
    arguments = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in arguments
    ]
    assert torch.autograd.gradcheck(convolve, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with room for more than 2^31 elements")
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FORMATS)
def test_more_than_two_to_the_31_elements(layout: str, algorithm: str) -> None:
    shape = (1, 64, 6000, 6000)
    memory_format = getattr(torch, "channels_last" if layout == "channels_last" else "contiguous_format")
    input = torch.zeros(shape, dtype=torch.float16, device=DEVICE).contiguous(memory_format=memory_format)
    input[0, 63, 5998:, 5998:] = 1
    weight = torch.ones(64, 1, 3, 3, dtype=torch.float16, device=DEVICE)
    output = forward(input, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), None, algorithm)
    assert output[0, 63, 5997:, 5997:].tolist() == [[1, 2, 2], [2, 4, 4], [2, 4, 4]]
    assert output.sum(dtype=torch.float64) == 25

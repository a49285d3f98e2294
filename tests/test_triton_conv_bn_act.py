"""The launchers of conv_bn_act's Triton kernels: interpreted on CPU tensors, compiled on CUDA tensors.

Interpreted, a program takes about a millisecond, so images are a few pixels large. Where several slices are
to be merged, the launcher is told to start fewer programs than it would.
"""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, LAYOUTS, zeros_beyond_32_bits
from tolerances import assert_close

from fastconv.ops._activation import ACTIVATIONS, activate
from fastconv.ops._operator import memory_format_of
from fastconv.ops.conv_bn_act import operator

pytest.importorskip("triton", reason="triton is not installed")
from fastconv.kernels import _moments as triton_moments  # noqa: E402
from fastconv.kernels import conv_bn_act as triton_kernels  # noqa: E402

FORMATS = ("contiguous", "channels_last")
EPS = 1e-3  # large enough that leaving it out shows
NAMES = ("input", "residual", "weight", "bias")
forward = triton_kernels.conv_bn_act_normalize_triton
backward = triton_kernels.conv_bn_act_normalize_backward_triton

SMALL = (2, 3, 6, 7)
SLICED = (2, 3, 23, 25)  # several tiles in either layout
SHAPES = {
    "one channel": (3, 1, 5, 7),
    "more channels than a block": (2, 70, 3, 3),
    "one pixel an image": (5, 7, 1, 1),
    "one pixel and one channel": (9, 1, 1, 1),
    "one image": (1, 3, 4, 4),
    "several tiles": SLICED,
}


def tensors(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    absent: tuple[str, ...] = (),
) -> list[torch.Tensor | None]:
    """Input, residual, weight, bias. Channels differ in mean and spread, so that a swap of two shows."""
    channel = torch.arange(shape[1], device=DEVICE)[:, None, None]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    image, number = {"device": DEVICE}, {"device": DEVICE, "dtype": exact}
    own = {
        "input": (torch.randn(shape, **image) * (1 + channel % 5) + channel % 3 - 0.5).to(dtype),
        "residual": torch.randn(shape, **image).to(dtype),
        "weight": torch.randn(shape[1], **number),
        "bias": torch.randn(shape[1], **number),
    }
    for name in ("input", "residual"):
        own[name] = LAYOUTS[layout](lambda _, name=name: own[name], shape)
    return [None if name in absent else own[name] for name in NAMES]


def check(own, activation: str | None = "relu") -> None:
    """Forward and backward against PyTorch's batch_norm in float64."""
    dtype, memory_format = own[0].dtype, memory_format_of(own[0])
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    count = own[0].numel() // own[0].shape[1]
    output, mean, variance = forward(*own, EPS, activation, None)

    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in own]
    input, residual, weight, bias = wide
    expected = torch.nn.functional.batch_norm(input, None, None, weight, bias, True, eps=EPS)
    expected = activate(expected if residual is None else expected + residual, activation)
    assert_close(output, expected.detach(), dtype, count)
    assert output.is_contiguous(memory_format=memory_format)
    values = input.detach()
    assert_close(mean, values.mean((0, 2, 3)), exact, count, values.abs().max().item(), name="mean")
    assert_close(variance, values.var((0, 2, 3), unbiased=False), exact, count, name="variance")

    grad = torch.randn_like(expected).to(dtype).contiguous(memory_format=memory_format)
    present = [index for index, tensor in enumerate(wide) if tensor is not None]
    gradients = torch.autograd.grad(expected, [wide[index] for index in present], grad.double())
    found = backward(grad, *own, mean, variance, EPS, activation, None, residual is not None)
    for index, gradient in zip(present, gradients):
        type_ = dtype if gradient.dim() == 4 else exact
        assert_close(found[index], gradient, type_, count, name=f"grad_{NAMES[index]}")
    assert found[0].is_contiguous(memory_format=memory_format)
    assert residual is not None or found[1].shape == (0,)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, layout: str) -> None:
    check(tensors(SMALL, layout), activation)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], layout: str) -> None:
    check(tensors(shape, layout))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, layout: str) -> None:
    for activation in ("relu6", "gelu"):
        check(tensors(SMALL, layout, dtype), activation)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("layout", FORMATS)
def test_bfloat16(layout: str) -> None:
    check(tensors(SLICED, layout, torch.bfloat16), "silu")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "absent", [("residual",), ("weight",), ("bias",), ("residual", "weight", "bias")], ids="-".join
)
def test_absent_operands(absent: tuple[str, ...], layout: str) -> None:
    check(tensors(SMALL, layout, absent=absent), "silu")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("programs", [1, 3])
def test_slices(programs: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a slice, the last slice shorter; slices merged by twos; the same bits each time."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(triton_kernels, "MERGED_SLICES", 2)
    monkeypatch.setattr(triton_moments, "MERGED_PARTS", 2)
    own = tensors(SLICED, layout)
    check(own)
    first, second = (forward(*own, EPS, "relu", None) for _ in range(2))
    assert all(map(torch.equal, first, second))
    first, second = (backward(own[1], *own, first[1], first[2], EPS, "relu", None, False) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("layout", FORMATS)
def test_indices_of_64_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "SHORT", 0)
    check(tensors(SLICED, layout))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_mean_far_from_zero(programs: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 1000 costs the variance nothing, and the output what the mean is rounded by."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)
    input, residual, weight, bias = tensors(SLICED, layout)
    input += 1000
    output, mean, variance = forward(input, residual, weight, bias, EPS, None, None)
    exact = [tensor.double() for tensor in (input, residual, weight, bias)]
    count = input.numel() // input.shape[1]
    assert_close(mean, exact[0].mean((0, 2, 3)), torch.float32, name="mean")
    assert_close(variance, exact[0].var((0, 2, 3), unbiased=False), torch.float32, count, name="variance")
    expected = torch.nn.functional.batch_norm(exact[0], None, None, *exact[2:], True, eps=EPS) + exact[1]
    assert_close(output, expected, torch.float32, scale=1000 * weight.abs().max().item())


@pytest.mark.parametrize("layout", FORMATS)
def test_first_tile_unlike_the_rest(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distances are then from a value far from the mean."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    own = tensors((8, 3, 16, 16), layout)
    own[0][0] += 1000
    check(own)


@pytest.mark.parametrize("layout", FORMATS)
def test_constant_channels(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their variance is 0 and not a little below, their output the bias."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    values, bias = torch.rand(40, 1, 1, device=DEVICE), torch.randn(40, device=DEVICE)
    input = LAYOUTS[layout](lambda shape: values.expand(shape).contiguous(), (3, 40, 7, 9))
    output, mean, variance = forward(input, None, None, bias, 1e-5, None, None)
    torch.testing.assert_close(mean, values.flatten(), atol=0, rtol=3e-7)
    assert ((variance >= 0) & (variance < 1e-13)).all()
    torch.testing.assert_close(output, bias[:, None, None].expand(input.shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", FORMATS)
def test_nan_stays_in_its_channel(layout: str) -> None:
    input, residual, weight, bias = tensors(SMALL, layout)
    input[1, 1, 2, 3] = torch.nan
    output, mean, variance = forward(input, residual, weight, bias, EPS, "relu", None)
    for values in (output.movedim(1, 0), mean, variance):
        assert values[1].isnan().all()
        assert not values[::2].isnan().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: str | None) -> None:
    own = tensors(SMALL)
    own[1][0, 1, 2, 3] = torch.nan
    output, _, _ = forward(*own, EPS, activation, None)
    assert torch.equal(output.isnan(), own[1].isnan())


@pytest.mark.parametrize(("activation", "kinks"), [("relu", [0.0, 0.0]), ("relu6", [0.0, 6.0])])
def test_gradient_at_kinks(activation: str, kinks: list[float]) -> None:
    """It is 0 whatever comes from above."""
    input = torch.randn(2, 2, 3, 3, device=DEVICE)
    weight, bias = torch.zeros(2, device=DEVICE), torch.tensor(kinks, device=DEVICE)
    _, mean, variance = forward(input, None, weight, bias, EPS, activation, None)
    grad = torch.full_like(input, torch.nan)
    for gradient in backward(grad, input, None, weight, bias, mean, variance, EPS, activation, None, True):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in FORMATS])
def test_strided_images(layout: str) -> None:
    shape = (2, 3, 4, 5)
    own = tensors(shape)
    for index in (0, 1):
        own[index] = LAYOUTS[layout](lambda shape: torch.randn(shape, device=DEVICE), shape)
    memory_format = memory_format_of(own[0])
    dense = [image.contiguous(memory_format=memory_format) for image in own[:2]] + own[2:]
    ours, theirs = (forward(*operands, EPS, "silu", None) for operands in (own, dense))
    assert all(map(torch.equal, ours, theirs))
    assert ours[0].is_contiguous(memory_format=memory_format)
    grad = LAYOUTS[layout](lambda shape: torch.randn(shape, device=DEVICE), shape)
    ours, theirs = (
        backward(image, *operands, *ours[1:], EPS, "silu", None, True)
        for image, operands in ((grad, own), (grad.contiguous(memory_format=memory_format), dense))
    )
    assert all(map(torch.equal, ours, theirs))


def test_mixed_layouts_and_strided_numbers() -> None:
    input, residual, weight, bias = tensors(SMALL)
    expected = forward(input, residual, weight, bias, EPS, "relu", None)
    weight, bias = torch.stack([weight, bias], 1).unbind(1)
    residual = residual.contiguous(memory_format=torch.channels_last)
    found = forward(input, residual, weight, bias, EPS, "relu", None)
    assert all(map(torch.equal, found, expected))
    mean, variance = torch.stack(found[1:], 1).unbind(1)
    grad = torch.randn(SMALL, device=DEVICE)
    strided = grad.contiguous(memory_format=torch.channels_last)
    found = backward(strided, input, residual, weight, bias, mean, variance, EPS, "relu", None, True)
    dense = [tensor.contiguous() for tensor in (residual, weight, bias, mean, variance)]
    expected = backward(grad, input, *dense, EPS, "relu", None, True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", [(0, 3, 6, 7), (2, 0, 6, 7), (2, 3, 0, 7)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    own = tensors(shape)
    output, mean, variance = forward(*own, EPS, "relu", None)
    assert output.shape == shape
    grads = backward(output, *own, mean, variance, EPS, "relu", None, True)
    for values, like in zip((mean, variance, *grads), (own[2], own[2], *own)):
        assert values.shape == like.shape
        assert not values.any()


@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh"])
@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_through_the_operator(layout: str, activation: str | None) -> None:
    own = [tensor.requires_grad_() for tensor in tensors(SMALL, layout, torch.float64)]
    output, mean, _ = operator("triton", *own, EPS, activation, None)
    assert not mean.requires_grad
    wide = [tensor.detach().clone().requires_grad_() for tensor in own]
    expected = torch.nn.functional.batch_norm(wide[0], None, None, *wide[2:], True, eps=EPS) + wide[1]
    expected = activate(expected, activation)
    grad = torch.randn_like(expected)
    found, theirs = torch.autograd.grad(output, own, grad), torch.autograd.grad(expected, wide, grad)
    count = own[0].numel() // SMALL[1]
    for name, ours, exact in zip(NAMES, found, theirs):
        assert_close(ours, exact, torch.float64, count, name=f"grad_{name}")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with room for more than 2^31 elements")
@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    input = zeros_beyond_32_bits(layout)
    input[0, 5, -1, -1] = 1
    output, mean, variance = forward(input, None, None, None, 1.0, None, None)
    count = input.numel() // 6
    torch.testing.assert_close(mean.tolist(), [0.0] * 5 + [1 / count])
    torch.testing.assert_close(variance.tolist(), [0.0] * 5 + [1 / count], atol=0, rtol=1e-5)
    assert output[0, 5, -1, -1] == 1
    assert output.count_nonzero() == 1
    del output
    grads = backward(input, input, None, None, None, mean, variance, 1.0, None, None, False)
    assert grads[0][0, 5, -1, -1] == 1
    torch.testing.assert_close(grads[3].tolist(), [0.0] * 5 + [1.0])

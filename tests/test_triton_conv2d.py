"""The launchers of the Triton kernels, one by one: interpreted on CPU tensors, compiled on CUDA tensors.

What every backend must do is in test_conv2d.py and test_conv_transpose2d.py; here is what is Triton's own. A
program takes the interpreter milliseconds, so most tests make tiles small instead of tensors large.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE, LAYOUTS
from tolerances import assert_close

import fastconv
from fastconv.backends import BackendError
from fastconv.ops._activation import ACTIVATIONS, activate
from fastconv.ops._operator import memory_format_of

pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from fastconv.kernels import conv2d as convolution  # noqa: E402
from fastconv.kernels import conv2d_launch as launch  # noqa: E402
from fastconv.kernels import conv_transpose2d as transposed  # noqa: E402

FORMATS = ("contiguous", "channels_last")
SIDE = 16  # of the small tiles
forward = convolution.conv2d_forward_triton
backward = convolution.conv2d_backward_triton
transpose = transposed.conv_transpose2d_forward_triton


class Case(NamedTuple):
    """Every number differs from its neighbours, so that a swap of two shows."""

    shape: tuple[int, int, int, int] = (2, 3, 6, 7)
    filters: int = 5
    kernel: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 2, 0, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.filters, self.shape[1] // self.groups, *self.kernel)

    @classmethod
    def pointwise(cls, shape: tuple[int, int, int, int], filters: int, groups: int = 1) -> Case:
        return cls(shape, filters, (1, 1), padding=(0, 0, 0, 0), groups=groups)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "tile_side", lambda size, most: SIDE)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def tensors(case: Case, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Input, weight, bias."""
    input = LAYOUTS[layout](lambda shape: random(shape, dtype), case.shape)
    return [input, random(case.weight, dtype), random((case.filters,), dtype)]


def reference(input, weight, bias, case: Case) -> torch.Tensor:
    top, bottom, left, right = case.padding
    padded = torch.nn.functional.pad(input, (left, right, top, bottom))
    return fastconv.conv2d_reference(padded, weight, bias, case.stride, 0, case.dilation, case.groups)


def check_forward(
    case: Case, layout: str, algorithm: str | None = None, activation=None, dtype=torch.float32, residual=None
) -> None:
    own = tensors(case, layout, dtype)
    exact = reference(*(tensor.double() for tensor in own), case)
    added = None if residual is None else LAYOUTS[residual](lambda s: random(s, dtype), tuple(exact.shape))
    output = forward(*own, added, None, *case.geometry, activation, algorithm)
    exact = activate(exact if added is None else exact + added.double(), activation)
    assert_close(output, exact, dtype, own[1][0].numel() + 2)
    assert output.is_contiguous(memory_format=memory_format_of(own[0]))


def check_backward(case: Case, layout: str, algorithm: str | None = None, dtype=torch.float32) -> None:
    own = tensors(case, layout, dtype)
    wide = [tensor.double().requires_grad_() for tensor in own]
    output = reference(*wide, case)
    grad = random(tuple(output.shape), dtype).contiguous(memory_format=memory_format_of(own[0]))
    exact = torch.autograd.grad(output, wide, grad.double())
    grads = backward(grad, *own[:2], *case.geometry, algorithm, True, True, True)
    pixels = output.numel() // case.filters
    terms = (case.filters // case.groups * case.kernel[0] * case.kernel[1], pixels, pixels)
    for name, ours, theirs, count in zip(("input", "weight", "bias"), grads, exact, terms):
        assert_close(ours, theirs, dtype, count, name=f"grad_{name}")
    assert grads[0].is_contiguous(memory_format=memory_format_of(own[0]))
    assert grads[1].is_contiguous()


def check_transposed(
    shape, filters, kernel, stride, padding, extra, dilation, groups=1, layout="contiguous", algorithm=None
) -> torch.Tensor:
    input = LAYOUTS[layout](random, shape)
    weight, bias = random((shape[1], filters // groups, *kernel)), random((filters,))
    output = transpose(input, weight, bias, None, stride, padding, extra, dilation, groups, algorithm)
    exact = fastconv.conv_transpose2d_reference(
        input.double(), weight.double(), bias.double(), stride, padding, extra, groups, dilation
    )
    assert_close(output, exact, torch.float32, shape[1] // groups * kernel[0] * kernel[1] + 1)
    assert output.is_contiguous(memory_format=memory_format_of(input))
    return output


# Tiles.


def edges(name: str, size: int) -> Case:
    """``size`` of what a tile has SIDE of."""
    return {
        "pixels": Case((1, 3, 1, size), 2, (1, 2), padding=(0, 0, 1, 0)),
        "filters": Case((1, 2, 2, 3), size, (1, 2), padding=(0, 0, 0, 1)),
        "channels": Case((1, size, 2, 3), 2, (2, 1), padding=(1, 0, 0, 0)),
        "taps": Case((1, 1, 4, size), 2, (1, size), padding=(0, 0, 2, 1)),
        "rows": Case((1, 1, size, 2), 2, (3, 1), padding=(0, 1, 0, 0)),
    }[name]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("axis", ["pixels", "filters", "channels", "taps", "rows"])
def test_edges_of_tiles(axis: str, more: int, layout: str, small_tiles: None) -> None:
    case = edges(axis, SIDE + more)
    check_forward(case, layout, residual=layout)
    check_backward(case, layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("axis", ["pixels", "filters", "channels"])
def test_edges_of_pointwise_tiles(axis: str, more: int, layout: str, small_tiles: None) -> None:
    size = SIDE + more
    channels = size if axis == "channels" else 3
    case = Case.pointwise((2, channels, 1, size if axis == "pixels" else 2), size if axis == "filters" else 5)
    check_forward(case, layout, "pointwise", "relu", residual=layout)
    check_backward(case, layout, "pointwise")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_edges_of_the_largest_tiles(more: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 x 128 of half types, as where there is work for a whole GPU."""
    monkeypatch.setattr(launch, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(launch, "tile_side", lambda size, most: most)
    case = Case((1, 32, 1, 128 + more), 128 + more, (1, 1), padding=(0, 0, 0, 0))
    for algorithm in ("implicit_gemm", "pointwise"):
        check_forward(case, layout, algorithm, dtype=torch.float16)
    check_backward(case, layout, dtype=torch.float16)


def test_bands_of_blocks(small_tiles: None) -> None:
    """More blocks of pixels than a band, in the last band fewer, and several blocks of filters."""
    case = Case((1, 2, 2, (launch.BAND + 3) * SIDE // 2), SIDE + 1, (1, 1), padding=(0, 0, 0, 0))
    for algorithm in ("implicit_gemm", "pointwise"):
        check_forward(case, "channels_last", algorithm)


def test_tiles_shrink_until_there_are_enough_programs() -> None:
    large = launch.limits(torch.float16, "ieee", True, 64, 128)
    assert large.tile(10**6, 512, 1, launch.MULTIPROCESSORS) == (128, 128)
    assert large.tile(49, 512, 1, launch.MULTIPROCESSORS) == (32, 32)
    narrow = launch.limits(torch.float16, "ieee", False, 64, 128)
    assert narrow.tile(10**6, 512, 1, launch.MULTIPROCESSORS) == (64, 128)


@pytest.mark.parametrize("size", [1, 3, 16, 17, 24, 48, 64, 96, 97, 128, 160, 1000])
def test_tile_sides_pad_by_at_most_a_third(size: int) -> None:
    side = launch.tile_side(size, 128)
    assert side == launch.LEAST or -size % side <= size // 3


# Groups.

GROUPS = {  # (groups, channels and filters of a group): how many share a tile
    (8, 4, 4): 4,
    (6, 5, 3): 3,
    (7, 2, 2): 7,
    (5, 3, 2): 5,
    (3, 8, 4): 1,
    (16, 1, 1): 16,
    (4, 1, 8): 2,
    (2, 16, 16): 1,
    (2, 17, 1): 1,
}


@pytest.mark.parametrize("groups, layout", zip(GROUPS, itertools.cycle(FORMATS)), ids=str)
def test_groups(groups: tuple[int, int, int], layout: str) -> None:
    count, channels, filters = groups
    assert launch.bundle_size(*groups) == GROUPS[groups]
    case = Case((1, count * channels, 3, 4), count * filters, (2, 2), (2, 1), (0, 1, 1, 0), groups=count)
    check_forward(case, layout)
    check_backward(case, layout)
    case = Case.pointwise((2, count * channels, 2, 3), count * filters, count)
    check_forward(case, layout, "pointwise")
    check_backward(case, layout, "pointwise")
    check_transposed(
        *((1, count * channels, 2, 3), count * filters, (1, 1), (1, 1), (0, 0), (0, 0), (1, 1), count),
        layout=layout,
        algorithm="pointwise",
    )


# Phases of a strided grad_input, and of a transposed convolution.

PHASES = {
    "more taps than stride": Case((1, 2, 9, 8), 3, (5, 3), (2, 2), (2, 1, 0, 1)),
    "fewer taps than stride": Case((1, 2, 9, 8), 3, (2, 1), (3, 4), (1, 0, 0, 2)),
    "stride and dilation share a factor": Case((1, 2, 11, 13), 3, (3, 2), (4, 3), (2, 3, 1, 0), (2, 6)),
    "stride divides dilation": Case((1, 2, 9, 8), 3, (2, 3), (2, 3), (1, 2, 3, 2), (4, 3)),
    "dilation alone": Case((1, 2, 7, 8), 3, (3, 2), (1, 1), (2, 1, 0, 3), (2, 3)),
    "rows without output": Case((1, 2, 10, 9), 3, (2, 2), (3, 3), (0, 1, 1, 0)),
    "stride larger than the image": Case((1, 2, 3, 2), 3, (2, 1), (5, 4), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", PHASES.values(), ids=PHASES)
def test_phases(case: Case, layout: str) -> None:
    check_forward(case, layout)
    check_backward(case, layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [
        ((2, 6, 4, 5), 8, (3, 4), (2, 3), (1, 0), (1, 2), (1, 2), 2),
        ((1, 3, 3, 4), 2, (4, 4), (2, 2), (1, 1), (0, 0), (1, 1)),
        ((1, 3, 3, 4), 2, (1, 2), (3, 2), (0, 0), (2, 1), (1, 1)),
        ((1, 2, 3, 4), 3, (3, 2), (1, 1), (2, 0), (0, 0), (1, 1)),
        ((1, 2, 2, 3), 3, (2, 3), (4, 2), (1, 2), (0, 1), (2, 4)),
    ],
    ids=str,
)
def test_transposed(arguments: tuple, layout: str) -> None:
    check_transposed(*arguments, layout=layout)


def test_pixels_that_no_tap_reaches_are_the_bias() -> None:
    bias = random((3,))
    output = transpose(
        random((1, 2, 3, 3)), random((2, 3, 1, 1)), bias, None, (2, 3), *[(0, 0)] * 2, (1, 1), 1, None
    )
    assert torch.equal(output[:, :, 1::2], bias[:, None, None].expand(1, 3, 2, 7))
    assert torch.equal(output[:, :, :, 2::3], bias[:, None, None].expand(1, 3, 5, 2))


class Counted:
    """Stands in for a kernel, and notes the grids of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


def test_one_launch_serves_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Counted(transposed.conv2d_implicit_gemm_grad_input_kernel)
    for module in (transposed, convolution):
        monkeypatch.setattr(module, "conv2d_implicit_gemm_grad_input_kernel", kernel)
    check_transposed((1, 3, 3, 4), 2, (4, 4), (2, 3), (1, 1), (0, 0), (1, 1))
    assert kernel.grids == [(6,)]
    case = Case((1, 2, 7, 8), 3, (5, 3), (2, 2), (2, 1, 0, 1))
    own = tensors(case)
    backward(torch.ones_like(reference(*own, case)), *own[:2], *case.geometry, None, True, False, False)
    assert kernel.grids[1:] == [(4,)]


# Slices of grad_weight.


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pixels", [15, 16, 17, 31, 33, 95])
def test_edges_of_slices(pixels: int, layout: str) -> None:
    """Sixteen pixels are a slice here; the last one is not full, and images end within slices."""
    kernel = Counted(convolution.conv2d_implicit_gemm_grad_weight_kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "conv2d_implicit_gemm_grad_weight_kernel", kernel)
        width = next(w for w in (5, 3, 2, 1) if pixels % w == 0)
        check_backward(Case((1, 2, pixels // width, width), 3, (1, 3), padding=(0, 0, 1, 1)), layout)
        check_backward(Case((pixels, 2, 1, 1), 3, (1, 3), padding=(0, 0, 1, 1)), layout)
    assert [slices for _, slices in kernel.grids] == [-(-pixels // 16)] * 2


@pytest.mark.parametrize("layout", FORMATS)
def test_slices_of_several_groups_and_steps(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 pixels are two slices, of three steps and of two, for each of two groups too wide for one tile."""
    kernel = Counted(convolution.conv2d_implicit_gemm_grad_weight_kernel)
    monkeypatch.setattr(convolution, "conv2d_implicit_gemm_grad_weight_kernel", kernel)
    case = Case((2, 18, 5, 8), 18, (1, 1), padding=(0, 0, 0, 0), groups=2)
    monkeypatch.setattr(convolution, "GRAD_WEIGHT_PROGRAMS", 4)
    check_backward(case, layout)
    assert kernel.grids == [(2, 2)]


def test_slices_are_added_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits twice, and the same sums however many slices there are."""
    case = Case((3, 2, 9, 5))
    own = tensors(case)
    grad = random(tuple(reference(*own, case).shape))
    arguments = (grad, *own[:2], *case.geometry, None, False, True, True)
    first, second = backward(*arguments), backward(*arguments)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    monkeypatch.setattr(convolution, "GRAD_WEIGHT_PROGRAMS", 1)
    torch.testing.assert_close(backward(*arguments)[1], first[1])


# Conditions, types, layouts.


@pytest.mark.parametrize(
    "case",
    [
        Case(kernel=(1, 2), padding=(0, 0, 0, 0)),
        Case(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(1, 2)),
        Case(kernel=(1, 1), padding=(0, 1, 0, 0)),
    ],
    ids=["taps", "stride", "padding"],
)
def test_pointwise_says_what_it_needs(case: Case) -> None:
    own = tensors(case)
    needs = "needs a 1x1 weight, stride 1 and no padding, got"
    with pytest.raises(ValueError, match=needs):
        forward(*own, None, None, *case.geometry, None, "pointwise")
    grad = reference(*own, case)
    with pytest.raises(ValueError, match=needs):
        backward(grad, *own[:2], *case.geometry, "pointwise", True, True, True)
    with pytest.raises(ValueError, match=needs):
        transpose(
            *(own[0], own[1].transpose(0, 1), own[2], None, case.stride, case.padding[1:3]),
            *((0, 0), case.dilation, 1, "pointwise"),
        )
    if sum(case.padding) == 0:
        with pytest.raises(BackendError, match=needs):
            fastconv.conv2d(*own, case.stride, backend="triton", algorithm="pointwise")


def test_pointwise_has_no_output_padding() -> None:
    arguments = (random((1, 2, 2, 2)), random((2, 3, 1, 1)), None, None, (1, 1), (0, 0))
    with pytest.raises(ValueError, match="no padding"):
        transpose(*arguments, (1, 0), (2, 2), 1, "pointwise")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, layout: str) -> None:
    case = Case((2, 6, 5, 7), 8, stride=(2, 1), groups=2)
    check_forward(case, layout, None, "silu", dtype, residual="contiguous")
    check_backward(case, layout, None, dtype)
    check_forward(Case.pointwise((2, 6, 3, 2), 8), layout, "pointwise", "silu", dtype, "channels_last")


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter computes bfloat16 wrongly")
@pytest.mark.parametrize("layout", FORMATS)
def test_bfloat16(layout: str) -> None:
    case = Case((2, 48, 15, 17), 80, stride=(2, 1), groups=2)
    check_forward(case, layout, None, "gelu", torch.bfloat16, residual="contiguous")
    check_backward(case, layout, None, torch.bfloat16)
    check_forward(Case.pointwise((2, 48, 9, 11), 80), layout, "pointwise", "gelu", torch.bfloat16)


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, algorithm: str) -> None:
    check_forward(
        Case.pointwise((1, 2, 4, 5), 3), "channels_last", algorithm, activation, residual="contiguous"
    )


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in FORMATS])
def test_strided_tensors(layout: str, algorithm: str) -> None:
    case = Case.pointwise((2, 3, 4, 5), 4)
    if algorithm == "implicit_gemm":
        case = case._replace(kernel=(2, 3), padding=(1, 0, 0, 1))
    check_forward(case, layout, algorithm, residual=layout)
    check_backward(case, layout, algorithm)
    own = tensors(case)
    output = reference(*own, case)
    weight = LAYOUTS[layout](lambda shape: random(shape), case.weight)
    grad = LAYOUTS[layout](lambda shape: random(shape), tuple(output.shape))
    bias = torch.stack([own[2]] * 2, 1)[:, 0]
    torch.testing.assert_close(
        forward(own[0], weight, bias, None, None, *case.geometry, None, algorithm),
        reference(own[0], weight, bias, case),
    )
    arguments = (*case.geometry, algorithm, True, True, True)
    dense = backward(grad.contiguous(), own[0], weight.contiguous(), *arguments)
    for ours, theirs in zip(backward(grad, own[0], weight, *arguments), dense):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise"])
def test_needs(algorithm: str) -> None:
    """Each gradient alone is the gradient among all, and one not needed is empty."""
    case = Case.pointwise((1, 2, 4, 5), 3)
    own = tensors(case)
    arguments = (random((1, 3, 4, 5)), *own[:2], *case.geometry, algorithm)
    everything = backward(*arguments, True, True, True)
    for which in range(3):
        need = [index == which for index in range(3)]
        for index, (ours, theirs) in enumerate(zip(backward(*arguments, *need), everything)):
            if index == which:
                assert torch.equal(ours, theirs)
            else:
                assert ours.shape == (0,)


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise"])
def test_nothing(algorithm: str) -> None:
    case = Case.pointwise((0, 3, 6, 7), 5)
    own = tensors(case)
    output = forward(*own, None, None, *case.geometry, None, algorithm)
    assert output.shape == (0, 5, 6, 7)
    grads = backward(output, *own[:2], *case.geometry, algorithm, True, True, True)
    for tensor, grad in zip(own, grads):
        assert grad.shape == tensor.shape
        assert not grad.any()
    empty = transpose(own[0], random((3, 5, 1, 1)), None, None, (1, 1), (0, 0), (0, 0), (1, 1), 1, algorithm)
    assert empty.shape == (0, 5, 6, 7)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.empty((1, 2, 2**15, 2**15), device="meta")
    assert launch.index_type(tensor) == tl.int32
    assert launch.index_type(None, tensor.expand(2, -1, -1, -1)) == tl.int32
    assert launch.index_type(torch.empty((2, 2, 2**15, 2**15), device="meta")) == tl.int64
    for module in (launch, convolution):
        monkeypatch.setattr(module, "index_type", lambda *_: tl.int64)
    case = Case((2, 6, 5, 7), 8, stride=(2, 1), groups=2)
    check_forward(case, "channels_last", residual="contiguous")
    check_backward(case, "contiguous")
    check_backward(Case.pointwise((2, 3, 2, 3), 4), "contiguous", "pointwise")


def test_tf32_is_the_callers_choice() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert launch.arithmetic(torch.float32)["PRECISION"] == "ieee"
        matmul.fp32_precision = "tf32"
        assert launch.arithmetic(torch.float32)["PRECISION"] == "tf32"
        assert launch.arithmetic(torch.float64)["PRECISION"] == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise"])
def test_gradcheck_through_the_public_function(algorithm: str) -> None:
    def convolve(input, weight, bias):
        return fastconv.conv2d(
            input, weight, bias, activation="gelu_tanh", backend="triton", algorithm=algorithm
        )

    arguments = [(1, 1, 2, 1), (2, 1, 1, 1), (2,)]
    arguments = [random(shape, torch.float64).requires_grad_() for shape in arguments]
    assert torch.autograd.gradcheck(convolve, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with room for more than 2^31 elements")
@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    shape = (1, 64, 6000, 6000)
    input = LAYOUTS[layout](lambda s: torch.zeros(s, dtype=torch.float16, device=DEVICE), shape)
    input[0, 63, 5998:, 5998:] = 1
    weight = torch.ones(64, 64, 3, 3, dtype=torch.float16, device=DEVICE)
    geometry = (1, 1), (1, 1, 1, 1), (1, 1), 1
    output = forward(input, weight, None, None, None, *geometry, None, None)
    assert output[0, 63, 5997:, 5997:].tolist() == [[1, 2, 2], [2, 4, 4], [2, 4, 4]]
    assert output.sum(dtype=torch.float64) == 64 * 25
    grads = backward(input, output, weight, *geometry, None, True, True, False)
    assert grads[0][0, 0, 5997:, 5997:].tolist() == [[1, 2, 2], [2, 4, 4], [2, 4, 4]]
    assert grads[1][63, 0].tolist() == [[9, 12, 6], [12, 16, 8], [6, 8, 4]]

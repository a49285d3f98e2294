"""The CUDA kernels of conv_bn_act's normalisation, run by the emulator, against PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE
from tolerances import assert_close

from fastconv import emulator

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the emulator")

EPS = 1e-3
VARIANTS = ("sliced", "plain")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
SHAPES = {
    "odd channels": (2, 19, 5, 7),
    "one channel": (3, 1, 9, 5),
    "two values": (1, 5, 1, 2),
    "images of one pixel": (17, 12, 1, 1),
    "odd images of one pixel": (5, 3, 1, 1),
    "tiles of channels": (2, 300, 3, 4),
    "the last tile is smaller": (2, 264, 2, 2),
    "slices": (3, 2, 96, 90),
    "slices across odd images": (9, 3, 45, 67),
    "more slices than rows merge": (2, 64, 64, 48),
}
# Values that a thread of the sliced kernels adds one after the other, at most; the rest is merged pairwise.
IN_A_ROW = 64

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def exact_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem:
    """Operands of one call, what the kernels make of them, and what they should."""

    def __init__(self, shape, layout, dtype, activation="relu", *, residual=True, numbers=True, center=1.0):
        def image(center=0.0):
            values = torch.randn(shape, dtype=torch.float64) + center
            return values.to(dtype).contiguous(memory_format=LAYOUTS[layout])

        self.dtype, self.activation, self.count = dtype, activation, shape[0] * shape[2] * shape[3]
        self.center = max(abs(center), 1.0)
        self.input, self.grad = image(center), image()
        self.residual = image() if residual else None
        exact = exact_type(dtype)
        self.weight = torch.rand(shape[1], dtype=exact) + 0.5 if numbers else None
        self.bias = torch.randn(shape[1], dtype=exact) if numbers else None
        self.variance, self.mean = torch.var_mean(self.input.double(), (0, 2, 3), correction=0)

    def operands(self):
        return self.input, self.residual, self.weight, self.bias

    def forward(self, variant):
        return torch.ops.fastconv.conv_bn_act_normalize.emulator(
            *self.operands(), EPS, self.activation, variant
        )

    def backward(self, variant, *, need_residual=True):
        exact = exact_type(self.dtype)
        return torch.ops.fastconv.conv_bn_act_normalize_backward.emulator(
            self.grad,
            *self.operands(),
            self.mean.to(exact),
            self.variance.to(exact),
            EPS,
            self.activation,
            variant,
            need_residual,
        )

    def expected(self):
        """The output, the gradient of the sum before the activation, and those of input, weight and bias."""
        input, residual, weight, bias = (t if t is None else t.double() for t in self.operands())
        channels = input.shape[1]
        weight = torch.ones(channels, dtype=torch.float64) if weight is None else weight
        bias = torch.zeros(channels, dtype=torch.float64) if bias is None else bias
        operands = [t.requires_grad_() for t in (input, weight, bias)]
        total = torch.nn.functional.batch_norm(input, None, None, weight, bias, True, eps=EPS)
        total = total if residual is None else total + residual
        output = ACTIVATIONS[self.activation](total)
        grads = torch.autograd.grad(output, [total, *operands], self.grad.double())
        return output.detach(), *grads

    def check(self, variant, *, need_residual=True):
        exact = exact_type(self.dtype)
        output, mean, variance = self.forward(variant)
        grad_input, grad_residual, grad_weight, grad_bias = self.backward(
            variant, need_residual=need_residual
        )
        expected, grad_sum, *grads = self.expected()

        def close(actual, expected, dtype, name, **options):
            terms = IN_A_ROW if variant == "sliced" else self.count
            assert_close(actual, expected, dtype, terms, name=name, **options)

        spread = self.center * expected.abs().max().item()  # a mean far off costs digits of each value
        close(output, expected, self.dtype, "output", scale=spread)
        close(mean, self.mean, exact, "mean", scale=self.center)
        close(variance, self.variance, exact, "variance")
        # Each of these sums may come out near zero, but its terms do not.
        inverse = torch.rsqrt(self.variance + EPS)[:, None, None]
        normal = (self.input.double() - self.mean[:, None, None]) * inverse
        factors = inverse if self.weight is None else inverse * self.weight[:, None, None]
        terms = self.center * (grad_sum * factors).abs().max().item()
        close(grad_input, grads[0], self.dtype, "grad_input", scale=terms)
        walk = math.sqrt(self.count)
        close(grad_bias, grads[2], exact, "grad_bias", scale=walk * grad_sum.abs().max().item())
        terms = self.center * (grad_sum * normal).abs().max().item()
        close(grad_weight, grads[1], exact, "grad_weight", scale=walk * terms)
        if need_residual:
            close(grad_residual, grad_sum, self.dtype, "grad_residual")
        else:
            assert grad_residual.numel() == 0
        for image in (output, grad_input, grad_residual) if need_residual else (output, grad_input):
            assert image.stride() == self.input.stride()


@each_variant
@each_layout
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, layout, variant):
    Problem((2, 24, 6, 8), layout, dtype, activation).check(variant)


@each_variant
@each_layout
@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, layout, variant):
    Problem(shape, layout, dtype).check(variant)


@each_variant
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_what_may_be_left_out(residual, activation, dtype, layout, variant):
    problem = Problem((2, 16, 5, 8), layout, dtype, activation, residual=residual, numbers=False)
    problem.check(variant, need_residual=False)


@each_variant
@each_layout
def test_a_mean_far_off(layout, variant):
    """No difference of large sums: a million values about 1000 keep their variance."""
    shape = (4, 1, 500, 500)
    problem = Problem(shape, layout, torch.float32, center=1000.0)
    _, mean, variance = problem.forward(variant)
    assert abs(mean.double() - problem.mean).item() < 1e-4
    assert abs(variance.double() / problem.variance - 1).item() < 1e-5
    Problem((3, 6, 40, 60), layout, torch.float32, center=1000.0).check(variant)


@each_variant
@each_layout
def test_nan_stays_in_its_channel(layout, variant):
    problem = Problem((2, 8, 5, 4), layout, torch.float32, residual=False)
    problem.input[1, 3, 2, 1] = math.nan
    others = [c for c in range(8) if c != 3]
    for result in problem.forward(variant):
        by_channel = result.movedim(1, 0) if result.dim() == 4 else result
        assert by_channel[3].isnan().all()
        assert by_channel[others].isfinite().all()


@each_layout
@each_dtype
def test_the_same_bits_every_time(dtype, layout):
    problem = Problem((3, 6, 96, 90), layout, dtype)
    first = (*problem.forward("sliced"), *problem.backward("sliced"))
    again = (*problem.forward("sliced"), *problem.backward("sliced"))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (2, 8, 5, 5)], ids=["contiguous", "channels_last"])
def test_an_address_off_the_vectors_boundary(shape):
    """Values one by one, where a load of 16 bytes would not lie on its boundary."""
    layout = "contiguous" if shape == (2, 6, 8, 8) else "channels_last"
    problem = Problem(shape, layout, torch.float32)
    values = torch.empty(problem.input.numel() + 1)[1:].as_strided(shape, problem.input.stride(), 1)
    problem.input = values.copy_(problem.input)
    with emulator.count() as counters:
        problem.check("sliced")
    flag = "true" if layout == "channels_last" else "false"
    assert f"conv_bn_act_sliced_normalize_kernel<float, 1, {flag}>" in counters


# What the kernels ask of memory.


def kernel(counters, name):
    (found,) = [values for key, values in counters.items() if key.startswith(f"conv_bn_act_sliced_{name}")]
    return found


@pytest.mark.parametrize(
    "layout, shape, blocks",
    [
        ("contiguous", (3, 2, 96, 90), 2 * 3),
        ("contiguous", (2, 64, 16, 16), 64),
        ("channels_last", (3, 2, 96, 90), 6),
        ("channels_last", (2, 64, 64, 48), 48),
        ("channels_last", (2, 300, 3, 4), 3),
    ],
)
def test_blocks_are_channels_by_slices(layout, shape, blocks):
    problem = Problem(shape, layout, torch.float32)
    with emulator.count() as counters:
        problem.forward("sliced")
        problem.backward("sliced")
    for name in ("moments", "normalize", "grad_sums", "grad_input"):
        assert kernel(counters, name)["blocks"] == blocks, name


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("need_residual", [True, False], ids=["grad_residual", "no grad_residual"])
def test_images_take_the_fewest_sectors(need_residual, dtype, layout):
    """Reads and writes of whole sectors, in whole requests of 512 bytes."""
    problem = Problem((2, 64, 16, 16), layout, dtype)
    with emulator.count() as counters:
        problem.forward("sliced")
        problem.backward("sliced", need_residual=need_residual)
    sectors = problem.input.nbytes // emulator.SECTOR_BYTES
    requests = problem.input.nbytes // 512
    images = {  # read, written
        "moments": (1, 0),
        "normalize": (2, 1),
        "grad_sums": (3, 1 if need_residual else 0),
        "grad_input": (2 if need_residual else 3, 1),
    }
    for name, (read, written) in images.items():
        values = kernel(counters, name)
        # beside the images: four numbers of each of a block's channels
        numbers = {"moments": 0}.get(name, 4 * values["blocks"] * (1 if layout == "contiguous" else 64 // 8))
        assert read * sectors <= values["global_load_sectors"] <= read * sectors + numbers, name
        if name in ("normalize", "grad_input"):
            assert values["global_store_sectors"] == written * sectors, name
            assert values["global_store_requests"] == written * requests, name
        else:
            sums = values["global_store_bytes"] - written * problem.input.nbytes
            channels = 1 if layout == "contiguous" else 64
            assert sums == values["blocks"] * channels * 2 * 4, name

"""Cases of dense convolution and of its transpose: tensors, what the reference makes of them, a check."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from cases import DEVICE, LAYOUTS, Run, for_runs
from tolerances import assert_close

import fastconv
from fastconv.backends import CHOICES
from fastconv.ops._activation import FROM_OUTPUT
from fastconv.ops._arguments import output_size, padding_sides, pair


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A call, without the tensors' values."""

    input: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True
    residual: bool = False
    activation: str | None = None

    op = "conv2d"
    names = ("input", "weight", "bias", "residual")

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return " ".join(f"{k}={v}".replace(" ", "") for k, v in changed.items())

    def replace(self, **changes: Any) -> Convolution:
        return dataclasses.replace(self, **changes)

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.filters, self.input[1] // self.groups, *self.kernel)

    @property
    def geometry(self) -> tuple:
        """Stride, padding, dilation, groups as the operators take them."""
        stride, dilation = pair("stride", self.stride), pair("dilation", self.dilation)
        return stride, padding_sides(self.padding, self.kernel, stride, dilation), dilation, self.groups

    @property
    def output(self) -> tuple[int, ...]:
        stride, (top, bottom, left, right), dilation, _ = self.geometry
        sizes = map(output_size, self.input[2:], self.kernel, stride, (top + bottom, left + right), dilation)
        return self.input[0], self.filters, *sizes

    @functools.cached_property
    def terms(self) -> dict[str, int]:
        """In each sum of the output and of the gradients."""
        taps, places = math.prod(self.kernel), math.prod(self.output) // self.filters
        sums = {"output": self.weight[1] * taps + 2, "input": self.filters // self.groups * taps}
        sums.update({"weight": places, "bias": places, "residual": 1})
        if self.activation:  # its gradient is as far off as the sum that it starts from
            sums = {name: terms + (name != "output") * sums["output"] for name, terms in sums.items()}
        return sums

    def is_exact(self, dtype: torch.dtype) -> bool:
        """Whether sums of whole numbers and halves are not rounded."""
        return self.activation in FROM_OUTPUT

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"input": self.input, "weight": self.weight}
        if self.bias:
            shapes["bias"] = (self.filters,)
        if self.residual:
            shapes["residual"] = self.output
        return shapes

    def call(self, function: Callable, tensors: Sequence[torch.Tensor | None], **keywords: Any):
        """A function with the signature of conv2d, or of its reference."""
        input, weight, bias, residual = (*tensors, None, None)[:4]
        arguments = (self.stride, self.padding, self.dilation, self.groups)
        return function(
            input, weight, bias, *arguments, activation=self.activation, residual=residual, **keywords
        )

    def operands(self, tensors: Sequence[torch.Tensor | None], algorithm: str | None) -> tuple:
        """Of ``torch.ops.fastconv.<op>``; weights are not packed."""
        input, weight, bias, residual = (*tensors, None, None)[:4]
        return input, weight, bias, residual, None, *self.geometry, self.activation, algorithm

    @property
    def function(self) -> Callable:
        return getattr(fastconv, self.op)

    @property
    def reference(self) -> Callable:
        return getattr(fastconv, f"{self.op}_reference")

    def serves(self, run: Run, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> bool:
        """Whether a backend's algorithm has no condition that this call fails."""
        input = LAYOUTS[layout](functools.partial(self.empty, dtype=dtype), self.input)
        weight = self.empty(self.weight, dtype)
        return run.serves(dtype) and (
            CHOICES[self.op].why_not(run.backend, run.algorithm, input, weight, *self.geometry) is None
        )

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Transposed(Convolution):
    output_padding: int | tuple[int, int] = 0

    op = "conv_transpose2d"
    names = ("input", "weight", "bias")

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.input[1], self.filters // self.groups, *self.kernel)

    @property
    def geometry(self) -> tuple:
        padding, extra = pair("padding", self.padding, 0), pair("output_padding", self.output_padding, 0)
        return pair("stride", self.stride), padding, extra, pair("dilation", self.dilation), self.groups

    @property
    def output(self) -> tuple[int, ...]:
        sizes = (
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, k, s, p, extra, d in zip(self.input[2:], self.kernel, *self.geometry[:4])
        )
        return self.input[0], self.filters, *sizes

    @functools.cached_property
    def terms(self) -> dict[str, int]:
        taps, places = math.prod(self.kernel), self.input[0] * math.prod(self.input[2:])
        sums = {"output": self.weight[0] // self.groups * taps + 1, "input": self.weight[1] * taps}
        return {**sums, "weight": places, "bias": math.prod(self.output) // self.filters}

    def call(self, function: Callable, tensors: Sequence[torch.Tensor | None], **keywords: Any):
        input, weight, bias = (*tensors, None)[:3]
        arguments = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return function(input, weight, bias, *arguments, **keywords)

    def operands(self, tensors: Sequence[torch.Tensor | None], algorithm: str | None) -> tuple:
        return *(*tensors, None)[:3], None, *self.geometry, algorithm


@dataclasses.dataclass(frozen=True)
class Shuffled(Convolution):
    op = "group_conv2d_shuffle"
    names = ("input", "weight", "bias")

    def call(self, function: Callable, tensors: Sequence[torch.Tensor | None], **keywords: Any):
        input, weight, bias = (*tensors, None)[:3]
        arguments = (self.stride, self.padding, self.dilation, self.groups)
        return function(input, weight, bias, *arguments, activation=self.activation, **keywords)

    def operands(self, tensors: Sequence[torch.Tensor | None], algorithm: str | None) -> tuple:
        return *(*tensors, None)[:3], None, *self.geometry, self.activation, algorithm


@dataclasses.dataclass(frozen=True)
class Shifted(Convolution):
    kernel: tuple[int, int] = (1, 1)
    offsets: str = "window"  # or "scattered": anywhere; or "far": some beyond the image

    op = "shift_conv2d"
    names = ("input", "weight", "bias")

    @property
    def output(self) -> tuple[int, ...]:
        return (
            self.input[0],
            self.filters,
            *((size - 1) // s + 1 for size, s in zip(self.input[2:], pair("stride", self.stride))),
        )

    @property
    def shift(self) -> torch.Tensor:
        """(C, 2), rows (dh, dw)."""
        channel = torch.arange(self.input[1])
        if self.offsets == "window":  # in runs, as ShiftNet has them
            place = channel * 9 // max(self.input[1], 1)
            return torch.stack([place // 3 - 1, place % 3 - 1], 1)
        scattered = torch.stack([channel * 5 % 7 - 3, channel * 3 % 5 - 2], 1)
        return scattered if self.offsets == "scattered" else scattered * (1 + channel[:, None] % 3 * 2**40)

    def call(self, function: Callable, tensors: Sequence[torch.Tensor | None], **keywords: Any):
        input, weight, bias = (*tensors, None)[:3]
        keywords["activation"] = self.activation
        return function(input, self.shift, weight, bias, self.stride, **keywords)

    def operands(self, tensors: Sequence[torch.Tensor | None], algorithm: str | None) -> tuple:
        input, weight, bias = (*tensors, None)[:3]
        return input, self.shift, weight, bias, None, self.geometry[0], self.activation, algorithm


@dataclasses.dataclass(frozen=True)
class Separable(Convolution):
    multiplier: int = 1
    residual: bool = True
    mid_activation: str | None = "relu"

    op = "separable_conv2d"
    names = (
        *("input", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "residual"),
    )

    def is_exact(self, dtype: torch.dtype) -> bool:
        """The half types round the gradient of the middle."""
        exact = self.mid_activation is None or self.mid_activation in FROM_OUTPUT
        return super().is_exact(dtype) and exact and dtype.itemsize > 2

    @property
    def middles(self) -> int:
        return self.input[1] * self.multiplier

    @functools.cached_property
    def terms(self) -> dict[str, int]:
        taps, places = math.prod(self.kernel), math.prod(self.output) // self.filters
        given = taps + self.middles + 4  # of all that is computed again for the gradients
        sums = {"input": self.filters * taps, "residual": 1, "depthwise_bias": places * self.filters}
        sums.update({"depthwise_weight": places * self.filters, "pointwise_weight": places})
        sums["pointwise_bias"] = places
        return {"output": given, **{name: terms + given for name, terms in sums.items()}}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {
            "input": self.input,
            "depthwise_weight": (self.middles, 1, *self.kernel),
            "pointwise_weight": (self.filters, self.middles, 1, 1),
            "depthwise_bias": (self.middles,),
            "pointwise_bias": (self.filters,),
            "residual": self.output,
        }
        left_out = [("bias", self.bias), ("residual", self.residual)]
        return {
            name: shape
            for name, shape in shapes.items()
            if all(has or not name.endswith(end) for end, has in left_out)
        }

    def call(self, function: Callable, tensors: Sequence[torch.Tensor | None], **keywords: Any):
        *operands, residual = (*tensors, *[None] * (6 - len(tensors)))
        keywords.update(mid_activation=self.mid_activation, activation=self.activation, residual=residual)
        return function(*operands, self.stride, self.padding, self.dilation, **keywords)

    def operands(self, tensors: Sequence[torch.Tensor | None], algorithm: str | None) -> tuple:
        tensors = (*tensors, *[None] * (6 - len(tensors)))
        return *tensors, None, *self.geometry[:3], self.mid_activation, self.activation, algorithm


def dtype_for(run: Run, wanted: torch.dtype = torch.float32) -> torch.dtype:
    """The wanted type, or float16 for the kernels that multiply half types alone."""
    halves = run.algorithm == "implicit_gemm" and run.backend in ("cuda", "emulator")
    return torch.float16 if halves else wanted


def serves(
    run: Run, case: Convolution, layout: str = "contiguous", dtype: torch.dtype | None = None, **_: Any
) -> bool:
    """Which points of a test's grid there are: ``where=`` of ``for_runs``."""
    return case.serves(run, dtype or dtype_for(run), layout)


each = functools.partial(for_runs, where=serves)


class Problem(NamedTuple):
    tensors: dict[str, torch.Tensor]
    grad_output: torch.Tensor
    expected: dict[str, torch.Tensor]  # in float64: the output, and the gradient of each tensor


def problem(case: Convolution, dtype: torch.dtype, input: str = "contiguous", **layouts: str) -> Problem:
    """Random tensors of a case, laid out as named, and what the reference makes of them in float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    # Whole numbers and a half: no sum is near an activation's corner, where rounding decides the gradient.
    whole = case.activation in FROM_OUTPUT
    layouts["input"] = input

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        def make(shape):
            if whole:
                values = torch.randint(-2, 3, shape, generator=generator) + 0.5 * name.endswith("bias")
            else:
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(device=DEVICE, dtype=dtype)

        return LAYOUTS[layouts[name]](make, shape) if name in layouts else make(shape)

    assert case.bias or not whole
    tensors = {name: tensor(name, shape) for name, shape in case.shapes().items()}
    exact = {name: value.double().requires_grad_() for name, value in tensors.items()}
    output = case.call(case.reference, [exact.get(name) for name in case.names])
    grad_output = tensor("grad_output", tuple(output.shape))
    grads = torch.autograd.grad(output, list(exact.values()), grad_output.double())
    return Problem(tensors, grad_output, {"output": output.detach(), **dict(zip(exact, grads))})


cached_problem = functools.lru_cache(maxsize=None)(problem)


def leaves_of(case: Convolution, given: Problem) -> list[torch.Tensor | None]:
    return [t if t is None else t.detach().requires_grad_() for t in map(given.tensors.get, case.names)]


def check(run: Run, case: Convolution, given: Problem) -> None:
    """Output and all gradients of one run."""
    leaves = leaves_of(case, given)
    output = case.call(case.function, leaves, **run.keywords)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], given.grad_output)
    compare(run, case, given, (output, *grads))


def compare(run: Run, case: Convolution, given: Problem, actual: Sequence[torch.Tensor]) -> None:
    dtype = given.grad_output.dtype
    # The reference, and the products of unfolded windows, add in the tensors' own type.
    summed_in = dtype if run.backend in ("reference", "aten") else None
    # Whole numbers and halves, as problem() takes for these activations, add up without rounding. Winograd's
    # points are other fractions.
    winograd = (run.algorithm or "").startswith("winograd")
    exact = case.is_exact(dtype) and summed_in is None and not winograd
    for (name, expected), value in zip(given.expected.items(), actual, strict=True):
        if exact:
            assert value.dtype == dtype
            assert torch.equal(value, expected.to(dtype)), f"{name} is exact, but not what it should be"
            continue
        # Sums of products of order one are of this size; the few that there are may all cancel.
        scale = max(math.sqrt(case.terms[name]), expected.abs().max().item() if expected.numel() else 0.0)
        assert_close(
            value,
            expected,
            dtype,
            case.terms[name],
            scale,
            summed_in=summed_in,
            algorithm=run.algorithm,
            name=name if name == "output" else f"grad_{name}",
        )


def check_not_finite(run: Run, case: Convolution, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """What is not finite must be so where the reference's is, and at no other place but what is said here.

    A tile of Winograd's is one sum: it is lost as a whole. Triton's tile of several narrow groups multiplies
    the others' values by zeros: their outputs at the same pixels are lost too.
    """
    touched = ~expected.isfinite()
    assert touched.any() and not touched.all()
    algorithm = run.algorithm or ""
    if algorithm.startswith("winograd"):
        lost = torch.nn.functional.max_pool2d(touched.double(), 15, 1, 7) > 0
    elif run.backend == "triton":
        lost = touched.any(1, keepdim=True).expand_as(touched)
    else:
        lost = torch.zeros_like(touched)
    assert not actual[touched & lost].isfinite().any()
    kept = ~lost
    dtype, terms = actual.dtype, case.terms["output"]
    assert_close(actual[kept], expected[kept], dtype, terms, algorithm=run.algorithm)

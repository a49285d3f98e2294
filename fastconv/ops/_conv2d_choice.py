"""Which kernel runs a convolution: the conditions of each, and the one that is taken where none is named.

Arguments are those of ``torch.ops.fastconv.conv2d``, in their normal forms: pairs, and four sides of padding.
"""

from __future__ import annotations

from ..backends import Choice
from ..precision import get_precision
from . import _convolution


def why_not(backend, algorithm, input, weight, stride, padding, dilation, groups) -> str | None:
    return _convolution.why_not(algorithm, input, weight, stride, padding, dilation)


def prefer(input, weight, stride, padding, dilation, groups) -> tuple[str, ...]:
    """The backends for ``backend=None``, the best first."""
    return ("aten", "cuda", "triton") if input.device.type == "cuda" else ("aten", "cpu")


choose = Choice(
    "conv2d",
    algorithms={
        "cpu": ("direct", "im2col", "plain"),
        "triton": ("implicit_gemm", "pointwise"),
        "aten": ("convolution", "unfold"),
        "reference": (),
    },
    prefer=prefer,
    why_not=why_not,
)


def default_algorithm(input, weight, stride, padding, dilation, groups) -> str:
    """The C++ kernel where a call names none."""
    for algorithm in choose.algorithms["cpu"]:
        if algorithm.startswith("winograd") and get_precision() == "exact":
            continue
        if why_not("cpu", algorithm, input, weight, stride, padding, dilation, groups) is None:
            return algorithm
    raise AssertionError("the plain kernel serves every call")


def pass_algorithms(
    backend, algorithm, input, weight, stride, padding, dilation, groups
) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """(backend, algorithm) of grad_input and of grad_weight, after a forward pass that ran on these."""
    return (backend, algorithm), (backend, algorithm)

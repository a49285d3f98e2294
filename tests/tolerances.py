"""How far from the float64 reference a kernel may be: one table for every operator.

A sum of R terms, rounded after each addition, is off by about ``eps * sqrt(R)`` of its magnitude, for
rounding errors of random sign add up like a random walk; storing it rounds once more, to the tensor's type:

    bound = c * scale * (eps(dtype) + a * sqrt(R) * eps(type of the sum))

with a = 1 but for the algorithms that round more, below.

For float32 and float64 that is ``c * eps * sqrt(R) * scale`` and a little. For the half types it is tighter,
which is the point: a kernel that added in bfloat16 would fail.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    c: float
    summed_in: torch.dtype


TOLERANCES = {
    # Kernels add in blocks, and round fewer times than R: a c of 1 holds; 2 leaves room for an activation.
    # Here the reference is rounded as much as the kernel, and each evaluation of an activation's gradient
    # costs units of its own: up to 7 of the largest value for gelu_tanh, against extended precision.
    torch.float64: Tolerance(6.0, torch.float64),
    # exp and erf in float32 are good to a few units in the last place, on top of the sum's own error.
    torch.float32: Tolerance(3.0, torch.float32),
    # eps is twice the error of one rounding. The worst chain rounds four times: the sum that an activation's
    # gradient starts from, the activation, its gradient, and what is stored.
    torch.float16: Tolerance(2.0, torch.float32),
    torch.bfloat16: Tolerance(2.0, torch.float32),
}

# How many times the error of a plain sum an algorithm's may be. Winograd's F(m x m, 3 x 3) interpolates
# polynomials at m + 1 points: its sums are of products larger than the result, which cancel, and the more so
# the further out the points lie.
ALGORITHMS = {"winograd_f2": 4.0, "winograd_f4": 8.0, "winograd_f6": 32.0}


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    reduction: int = 1,
    scale: float | None = None,
    *,
    summed_in: torch.dtype | None = None,
    algorithm: str | None = None,
    name: str = "output",
) -> None:
    """Raises unless ``actual`` is ``expected`` to rounding.

    Args:
        actual: what the kernel gave, in ``dtype``.
        expected: the same in float64, computed from the same (rounded) inputs.
        dtype: the kernel's type; ``actual`` must have it.
        reduction: terms in each sum.
        scale: magnitude of the sums; None takes the largest finite expected value.
        summed_in: the type of the sum where it is not the table's (PyTorch's own operators make no promise).
        algorithm: the kernel's, for those whose sums are rounded more (``ALGORITHMS``).
        name: what is compared, for the message.

    NaN must meet NaN, and an infinity the same infinity.
    """
    assert actual.dtype == dtype, f"{name} is {actual.dtype}, not {dtype}"
    assert expected.dtype == torch.float64, f"expected must be float64, got {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} has shape {actual.shape}, not {expected.shape}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().cpu()
    finite = expected.isfinite()
    if scale is None:
        scale = expected[finite].abs().max().item() if finite.any() else 1.0
    tolerance = TOLERANCES[dtype]
    sum_eps = torch.finfo(summed_in or tolerance.summed_in).eps * ALGORITHMS.get(algorithm, 1.0)
    bound = tolerance.c * scale * (torch.finfo(dtype).eps + math.sqrt(max(reduction, 1)) * sum_eps)

    good = torch.where(
        finite,
        (actual - expected).abs() <= bound,  # false for NaN
        (actual == expected) | (actual.isnan() & expected.isnan()),
    )
    if good.all():
        return
    error = torch.where(good, -1.0, (actual - expected).abs().nan_to_num(math.inf, math.inf))
    worst = torch.unravel_index(error.argmax(), error.shape)
    raise AssertionError(
        f"{name} ({dtype}): {(~good).sum().item()} of {good.numel()} values are wrong; at "
        f"{tuple(int(i) for i in worst)} it is {actual[worst].item()}, not {expected[worst].item()} "
        f"(allowed error {bound:.3g} for sums of {reduction} terms)"
    )
